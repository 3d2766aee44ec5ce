"""Run a model layer by layer, and many removals of layers with the layers they have in common run once.

Two removals that keep the same first layers have the same hidden states behind them, so `SharedPrefixEvaluator` walks the sets
as a trie of the layers they keep, depth first.
"""

import operator
import weakref
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from prunelib.models.architectures import SLICED_MODEL_TYPE, SUBLAYERS, UnsupportedModel
from prunelib.models.layers import decoder_layers, describe_layer, layers_path, sublayers_of

LayerSet = tuple[int | tuple[int, str], ...]
"""What is removed, ascending: layers ``(3, 7)``, or sublayers ``((3, "attn"), (7, "mlp"))``. ``()`` is the dense model."""


class LayerwiseModel:
    """A causal language model taken apart at its decoder layers, whatever its family.

    These lines equal ``model(ids).logits``, bit for bit::

        engine = LayerwiseModel(model)
        with torch.inference_mode():
            hidden = engine.embed(ids)  # the input of layer 0: [batch, position, width]
            for index in range(engine.n_layers):
                hidden = engine.run_layer(index, hidden)
            logits = engine.head(hidden)  # final norm and output head

    `embed` notes in `calls` what the model hands to each layer for these ids (masks, rotary embeddings, ...): one
    ``(args, kwargs)`` per layer, without the hidden states. `run_layer` uses these until the next `embed`; with several batches
    in turn, keep `calls` of each and set it again. Hidden states may come from anywhere. ready: for layers without weights in
    memory, gives a context in which a layer has them, for the constructor.

    Raises UnsupportedModel when no decoder layers are found or a layer hands more than hidden states to the next one.
    """

    def __init__(self, model: PreTrainedModel, *, ready: Callable[[int], AbstractContextManager] = nullcontext):
        self.model, self.layers = model, decoder_layers(model)
        self.n_layers = len(self.layers)
        self.calls: list[tuple[tuple, dict]] = []
        self._sublayers: dict[int, dict[str, nn.Module]] = {}
        self.ready, self.forms = ready, {}  # forms: by class of layer: tensor, tuple or list, and its length
        self._slots = nn.ModuleList(_Slot(layer, index, weakref.proxy(self)) for index, layer in enumerate(self.layers))
        body = model.base_model
        self._body = body if any(module is self.layers for module in body.modules()) else model
        with torch.no_grad():  # a skipped layer runs its layer once, to see what it returns: two tokens are enough
            self.embed(torch.zeros(1, 2, dtype=torch.int64))

    @property
    def device(self) -> torch.device:
        """Where token ids go."""
        return self.model.get_input_embeddings().weight.device

    def embed(self, ids: Int64[Tensor, "batch position"]) -> Float[Tensor, "batch position width"]:
        """The input of the first layer."""
        self.calls = [((), {})] * self.n_layers
        with self._layers_skipped():
            self._body(input_ids=ids.to(self.device), use_cache=False)
            return self.embedded

    def run_layer(
        self, index: int, hidden: Float[Tensor, "batch position width"], without: Collection[str] = ()
    ) -> Float[Tensor, "batch position out"]:
        """The output of a layer, the sublayers `without` ("attn", "mlp") silent; on the device of that layer.

        Raises UnsupportedModel where sublayers cannot be told apart or do not simply add to the input of the layer.
        """
        if without and index not in self._sublayers:
            sublayers = sublayers_of(self.model, index)
            with silent(*sublayers.values()):
                output = self._run(index, hidden)
            # Whatever norms and factors stand in between then give zero for zero: silence means absence.
            if not torch.equal(output.to(hidden.device), hidden):
                where = describe_layer(self.model, index)
                raise UnsupportedModel(f"{where}, does not add its attention and its MLP to its input; look at whole layers")
            self._sublayers[index] = sublayers
        with silent(*(self._sublayers[index][part] for part in without)):
            return self._run(index, hidden)

    def _run(self, index: int, hidden: Tensor) -> Tensor:
        args, kwargs = self.calls[index]
        if "hidden_states" in kwargs:
            output = self.layers[index](*args, **{**kwargs, "hidden_states": hidden})
        else:
            output = self.layers[index](hidden, *args, **kwargs)
        return output[0] if isinstance(output, (tuple, list)) else output

    def head(
        self, hidden: Float[Tensor, "batch position width"], device: torch.device | None = None
    ) -> Float[Tensor, "batch position vocabulary"]:
        """Logits: final norm, output head and whatever else follows the layers; on `device`, else that of the token ids."""
        ids = torch.zeros(hidden.shape[:2], dtype=torch.int64, device=self.device)  # nothing behind the layers reads them
        with self._layers_skipped(given=hidden):
            return self.model(input_ids=ids, use_cache=False).logits.to(device or self.device)

    @contextmanager
    def _layers_skipped(self, given: Tensor | None = None) -> Iterator[None]:
        """The model with slots in the place of its layers; they return `given`, or what they get, the first in `embedded`."""
        parent, _, name = layers_path(self.model).rpartition(".")
        owner = self.model.get_submodule(parent)
        setattr(owner, name, self._slots)
        self.given = given
        try:
            yield
        finally:
            setattr(owner, name, self.layers)
            self.given = self.embedded = None


class _Slot(nn.Module):
    """A skipped layer: notes its arguments and returns the hidden states in the form in which the layer returns its output.

    The first layer of each class runs once to show its form, but for sliced layers (`returns`), which cannot run on hidden
    states of another width. Attributes are those of the layer (models read its `attention_type`, say).
    """

    def __init__(self, layer: nn.Module, index: int, engine: LayerwiseModel):
        super().__init__()
        self.__dict__ |= {"layer": layer, "index": index, "engine": engine}

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["layer"], name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        hidden, engine = args[0] if args else kwargs["hidden_states"], self.engine
        if engine.given is not None:
            hidden = engine.given
        else:
            if self.index == 0:
                engine.embedded = hidden
            engine.calls[self.index] = (args[1:], kwargs) if args else ((), {**kwargs, "hidden_states": None})
        if type(self.layer) not in engine.forms:
            engine.forms[type(self.layer)] = self._form(*args, **kwargs)
        kind, length = engine.forms[type(self.layer)]
        return hidden if kind is Tensor else kind([hidden, *[None] * (length - 1)])

    @torch.no_grad()
    def _form(self, *args: Any, **kwargs: Any) -> tuple[type, int]:
        if hasattr(self.layer, "returns"):
            return self.layer.returns, 1
        with self.engine.ready(self.index):
            output = self.layer.forward(*args, **kwargs)
        if not isinstance(output, (tuple, list)):
            return Tensor, 1
        # Attention weights [sample, head, query, key] may be dropped. Anything else is read by the next layer (Zaya).
        if any(isinstance(item, Tensor) and item.ndim != 4 for item in output[1:]):
            raise UnsupportedModel(f"cannot skip a {type(self.layer).__name__}: it passes on more than hidden states")
        return (tuple if isinstance(output, tuple) else list), len(output)


@contextmanager
def silent(*modules: nn.Module) -> Iterator[None]:
    """While this lasts, the modules return zeros, in the form of their output."""

    def zeroed(module: nn.Module, args: tuple, output: Any) -> Any:
        if isinstance(output, Tensor):
            return torch.zeros_like(output)
        return type(output)([torch.zeros_like(output[0]), *output[1:]])

    with ExitStack() as hooks:
        for module in modules:
            hooks.callback(module.register_forward_hook(zeroed).remove)
        yield


def check_layer_set(n_layers: int, removed: LayerSet) -> tuple[tuple[int, str], ...]:
    """All sublayers that go with `removed`: both of every layer in it.

    Raises ValueError unless `removed` is ascending, unique, within a model of `n_layers`, and leaves something.
    """
    gone = []
    for unit in removed:
        gone += [unit] if isinstance(unit, tuple) else [(operator.index(unit), part) for part in SUBLAYERS]
    known = all(0 <= layer < n_layers and part in SUBLAYERS for layer, part in gone)
    if not known or gone != sorted(set(gone)):
        raise ValueError(
            f"removed {removed}: give distinct layers from 0 to {n_layers - 1} in ascending order, or sublayers of them, such "
            'as (0, "attn") and (0, "mlp")'
        )
    if len(gone) == len(SUBLAYERS) * n_layers:
        raise ValueError(f"cannot remove {n_layers} of {n_layers} layers: at least one must stay")
    return tuple(gone)


_Step = tuple[int, tuple[str, ...]]  # a layer that runs, and which of its sublayers are silent meanwhile


def _steps(n_layers: int, removed: LayerSet) -> list[_Step]:
    """What still runs without `removed`, in order."""
    gone = check_layer_set(n_layers, removed)
    missing = [tuple(part for part in SUBLAYERS if (layer, part) in gone) for layer in range(n_layers)]
    return [(layer, parts) for layer, parts in enumerate(missing) if len(parts) < len(SUBLAYERS)]


def _trie(n_layers: int, layer_sets: Iterable[LayerSet]) -> tuple[dict, int]:
    """What runs after each step, by step, from a root; under None, the set whose last step this is. And the number of steps."""
    root, steps = {}, 0
    for removed in layer_sets:
        node = root
        for step in _steps(n_layers, removed):
            steps += step not in node
            node = node.setdefault(step, {})
        node[None] = removed
    return root, steps


def shared_layer_forwards(n_layers: int, layer_sets: Iterable[LayerSet]) -> int:
    """Layer calls per batch of `SharedPrefixEvaluator`; a layer with a silent sublayer is not shared with the whole layer."""
    return _trie(n_layers, layer_sets)[1]


def layer_forwards_alone(n_layers: int, layer_sets: Iterable[LayerSet]) -> int:
    """Layer calls per batch when every set is evaluated by itself."""
    return sum(len(_steps(n_layers, removed)) for removed in layer_sets)


class SharedPrefixEvaluator:
    """One model without each of several layer sets; layers that several sets have in common run once per batch.

    sets: the distinct ones, in the order given. layer_forwards: layer calls so far. layer_forwards_alone: what every set by
    itself would have taken. Results equal those of `remove_layers`, where that does not refuse the model.

    Raises ValueError as `check_layer_set`, and UnsupportedModel, before any work, for a sliced model and as `LayerwiseModel`.
    """

    def __init__(self, model: PreTrainedModel, layer_sets: Iterable[LayerSet]):
        self.sets: list[LayerSet] = list(dict.fromkeys(tuple(removed) for removed in layer_sets))
        if model.config.model_type == SLICED_MODEL_TYPE and any(self.sets):
            raise UnsupportedModel("this model is sliced, and its layers differ in width: remove layers first, then slice")
        n_layers = len(decoder_layers(model))
        self._root, self.layers_per_batch = _trie(n_layers, self.sets)
        self._alone = layer_forwards_alone(n_layers, self.sets)
        self.layer_forwards = self.layer_forwards_alone = 0
        self.engine = LayerwiseModel(model)
        cut = {layer: parts for removed in self.sets for layer, parts in _steps(n_layers, removed) if parts}
        with torch.no_grad():
            hidden = self.engine.embed(torch.zeros(1, 2, dtype=torch.int64))
            for layer in sorted(cut):  # what cannot be run is refused here, before any work
                self.engine.run_layer(layer, hidden, cut[layer])

    @torch.inference_mode()
    def logits(
        self, windows: Int64[Tensor, "window position"], *, batch_size: int, progress: bool = False
    ) -> Iterator[tuple[int, Int64[Tensor, "batch position"], LayerSet, Float[Tensor, "batch position vocabulary"]]]:
        """Yield (first window of a batch, its ids, removed, logits) for all sets of each batch; dense first if given first."""
        starts = range(0, len(windows), batch_size) if self.sets else range(0)
        with tqdm(total=len(starts) * self.layers_per_batch, desc="layer sets", unit="layer", disable=not progress) as bar:
            for start in starts:
                ids = windows[start : start + batch_size].to(self.engine.device)
                for removed, hidden in self.walk(self.engine.embed(ids), bar):
                    yield start, ids, removed, self.engine.head(hidden)

    def walk(
        self, embedded: Float[Tensor, "batch position width"], bar: tqdm | None = None
    ) -> Iterator[tuple[LayerSet, Float[Tensor, "batch position width"]]]:
        """Yield (removed, output of the last layer) of each set for the batch that `engine.embed` saw last, depth first."""
        self.layer_forwards_alone += self._alone
        stack = _waiting(self._root, embedded)
        while stack:
            step, behind, hidden = stack.pop()  # kept no longer than a branch that starts from it waits
            if step is None:
                yield behind, hidden
                continue
            hidden = self.engine.run_layer(step[0], hidden, step[1])
            self.layer_forwards += 1
            if bar is not None:
                bar.update()
            stack += _waiting(behind, hidden)


def _waiting(node: dict, hidden: Tensor) -> list[tuple[_Step | None, Any, Tensor]]:
    """What to do from `hidden`, the last first: ends come after branches, so that the dense model, given first, is first."""
    in_turn = sorted(node.items(), key=lambda item: item[0] is None)
    return [(step, behind, hidden) for step, behind in reversed(in_turn)]
