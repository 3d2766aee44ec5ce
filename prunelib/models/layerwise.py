"""Run a model layer by layer, and many removals of layers with the layers they have in common run once.

`LayerwiseModel` takes a model apart at its decoder layers. With it `SharedPrefixEvaluator` runs a model without each of many
layer sets: two removals that keep the same first layers have the same hidden states behind them, so the sets are walked as a
trie of the layers they keep, depth first.
"""

import inspect
import operator
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from prunelib.models.architectures import SLICED_MODEL_TYPE, SUBLAYERS, UnsupportedModel
from prunelib.models.layers import decoder_layers, describe_layer, layers_path, sublayers_of

LayerSet = tuple[int | tuple[int, str], ...]
"""What is removed, ascending: layers ``(3, 7)``, or sublayers ``((3, "attn"), (7, "mlp"))``. ``()`` is the dense model."""


# --- one model, layer by layer -------------------------------------------------------------------------------------------


class LayerwiseModel:
    """A causal language model taken apart at its decoder layers, whatever its family.

    These lines equal ``model(ids).logits``, bit for bit::

        engine = LayerwiseModel(model)
        with torch.inference_mode():
            hidden = engine.embed(ids)  # the input of layer 0: [batch, position, width]
            for index in range(engine.n_layers):
                hidden = engine.run_layer(index, hidden)
            logits = engine.head(hidden)  # final norm and output head

    `embed` and `head` run the model with its layers skipped. `embed` notes in `calls` what the model hands to each layer for
    these ids (masks by kind of layer, rotary embeddings, ...), and `run_layer` uses these arguments until the next `embed`.

    Hidden states may come from anywhere: after `embed`, ``run_layer(5, states)`` continues from stored inputs of layer 5, and a
    layer that is not run is left out. `head` needs no `embed`. With several batches in turn, keep `calls` of each (one
    ``(args, kwargs)`` per layer, without the hidden states) and set it again before `run_layer`. ready: for layers without
    weights in memory, gives a context in which a layer has them; only the constructor uses it. Gradients: the caller's choice.

    Raises UnsupportedModel when no decoder layers are found or a layer hands more than hidden states to the next one.
    """

    def __init__(self, model: PreTrainedModel, *, ready: Callable[[int], AbstractContextManager] = nullcontext):
        self.model, self.layers = model, decoder_layers(model)
        self.n_layers = len(self.layers)
        self.calls: list[tuple[tuple, dict]] = []
        self._sublayers: dict[int, dict[str, nn.Module]] = {}
        self._skipped = _Skipped(ready)
        self._slots = nn.ModuleList(_Slot(layer, index, self._skipped) for index, layer in enumerate(self.layers))
        body = model.base_model
        self._body = body if any(module is self.layers for module in body.modules()) else model
        with torch.no_grad():  # a skipped layer runs its layer once, to see what it returns: two tokens are enough
            self.embed(torch.zeros(1, 2, dtype=torch.int64))

    @property
    def device(self) -> torch.device:
        """Where token ids go."""
        return self.model.get_input_embeddings().weight.device

    def embed(
        self, ids: Int64[Tensor, "batch position"], mask: Bool[Tensor, "batch position"] | None = None, **inputs: Any
    ) -> Float[Tensor, "batch position width"]:
        """The input of the first layer.

        mask: true on real tokens, false on padding, which does not shift the positions of the real ones. inputs: what else the
        model is called with, such as a mask and positions of its own form (attention_mask, position_ids).
        """
        ids, skipped = ids.to(self.device), self._skipped
        if mask is not None and not bool(mask.all()):
            inputs["attention_mask"] = mask.to(ids.device, torch.int64)
            if "position_ids" in inspect.signature(self._body.forward).parameters:
                inputs["position_ids"] = (inputs["attention_mask"].cumsum(dim=1) - 1).clamp(min=0)
        skipped.calls = self.calls = [((), {})] * self.n_layers
        try:
            with self._layers_skipped():
                self._body(input_ids=ids, use_cache=False, **inputs)
            return skipped.embedded
        finally:
            skipped.embedded = None

    def run_layer(
        self, index: int, hidden: Float[Tensor, "batch position width"], without: Collection[str] = ()
    ) -> Float[Tensor, "batch position out"]:
        """The output of a layer, the sublayers `without` ("attn", "mlp") silent; on the device of that layer.

        Raises UnsupportedModel where sublayers cannot be told apart or do not simply add to the input of the layer; this is
        checked when the layer first runs without one.
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
        """Final norm, output head and whatever else follows the layers; on `device`, that of the token ids unless given."""
        ids = torch.zeros(hidden.shape[:2], dtype=torch.int64, device=self.device)  # nothing behind the layers reads them
        self._skipped.given = hidden
        try:
            with self._layers_skipped():
                return self.model(input_ids=ids, use_cache=False).logits.to(device or self.device)
        finally:
            self._skipped.given = None

    @contextmanager
    def _layers_skipped(self) -> Iterator[None]:
        """While this lasts the model has slots in the place of its layers."""
        parent, _, name = layers_path(self.model).rpartition(".")
        owner = self.model.get_submodule(parent)
        setattr(owner, name, self._slots)
        try:
            yield
        finally:
            setattr(owner, name, self.layers)


class _Skipped:
    """What the slots of a model have in common."""

    def __init__(self, ready: Callable[[int], AbstractContextManager]):
        self.ready = ready
        self.forms: dict[type, tuple[type, int]] = {}  # by class of layer: tensor, tuple or list, and its length
        self.calls: list[tuple[tuple, dict]] = []
        self.embedded: Tensor | None = None  # what the first slot was given
        self.given: Tensor | None = None  # what the slots return instead


class _Slot(nn.Module):
    """A skipped layer: notes its arguments and returns the hidden states in the form in which the layer returns its output.

    Layers do not declare their form: the first one of each class runs once to show it, but for sliced layers (`returns`), which
    cannot run on hidden states of another width. Attributes are those of the layer (models read its `attention_type`, say).
    """

    def __init__(self, layer: nn.Module, index: int, skipped: _Skipped):
        super().__init__()
        self.__dict__ |= {"layer": layer, "index": index, "skipped": skipped}

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["layer"], name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        hidden, skipped = args[0] if args else kwargs["hidden_states"], self.skipped
        if skipped.given is not None:
            hidden = skipped.given
        else:
            if self.index == 0:
                skipped.embedded = hidden
            skipped.calls[self.index] = (args[1:], kwargs) if args else ((), {**kwargs, "hidden_states": None})
        if type(self.layer) not in skipped.forms:
            skipped.forms[type(self.layer)] = self._form(*args, **kwargs)
        kind, length = skipped.forms[type(self.layer)]
        return hidden if kind is Tensor else kind([hidden, *[None] * (length - 1)])

    @torch.no_grad()
    def _form(self, *args: Any, **kwargs: Any) -> tuple[type, int]:
        if hasattr(self.layer, "returns"):
            return self.layer.returns, 1
        with self.skipped.ready(self.index):
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


# --- many removals -------------------------------------------------------------------------------------------------------


def check_layer_set(n_layers: int, removed: LayerSet) -> tuple[tuple[int, str], ...]:
    """All sublayers that go with `removed`: both of every layer in it.

    Raises ValueError unless `removed` is ascending, unique, within a model of `n_layers`, and leaves something. Every layer
    may lose one sublayer, but not all of them both.
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


# A layer that runs, and which of its sublayers are silent meanwhile.
_Step = tuple[int, tuple[str, ...]]


def _steps(n_layers: int, removed: LayerSet) -> list[_Step]:
    """What still runs without `removed`, in order."""
    gone = set(check_layer_set(n_layers, removed))
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
    """Layer calls per batch that `SharedPrefixEvaluator` makes: the distinct beginnings of the sequences of kept layers.

    A layer that runs with a silent sublayer counts as one call, and is not shared with the whole layer. Raises ValueError as
    `check_layer_set`.
    """
    return _trie(n_layers, layer_sets)[1]


def layer_forwards_alone(n_layers: int, layer_sets: Iterable[LayerSet]) -> int:
    """Layer calls per batch when every set is evaluated by itself. Raises ValueError as `check_layer_set`."""
    return sum(len(_steps(n_layers, removed)) for removed in layer_sets)


class SharedPrefixEvaluator:
    """One model without each of several layer sets; layers that several sets have in common run once per batch.

    Only models whose layers do something else after renumbering (GPT-2 with ``scale_attn_by_inverse_layer_idx``) differ from
    `remove_layers`, and those it refuses.

    sets: the distinct layer sets, in the order given. engine: the `LayerwiseModel` that runs. layers_per_batch: layer calls for
    one batch. layer_forwards: layer calls so far. layer_forwards_alone: what every set by itself would have taken.

    Raises ValueError as `check_layer_set`, and UnsupportedModel as `LayerwiseModel`, as its `run_layer` where sublayers are
    removed, or where the model is sliced and something is to be removed.
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
        """Yield (first window of the batch, its ids, removed, logits) for all sets of each batch of windows.

        The dense model comes first in each batch if it is the first of the sets.
        """
        starts = range(0, len(windows), batch_size) if self.sets else range(0)
        with tqdm(total=len(starts) * self.layers_per_batch, desc="layer sets", unit="layer", disable=not progress) as bar:
            for start in starts:
                ids = windows[start : start + batch_size].to(self.engine.device)
                for removed, hidden in self.walk(self.engine.embed(ids), bar):
                    yield start, ids, removed, self.engine.head(hidden)

    def walk(
        self, embedded: Float[Tensor, "batch position width"], bar: tqdm | None = None
    ) -> Iterator[tuple[LayerSet, Float[Tensor, "batch position width"]]]:
        """Yield (removed, output of the last layer) of each set for the batch that `engine.embed` saw last.

        Depth first: hidden states live as long as a branch that starts from them waits. `bar` counts layers.
        """
        self.layer_forwards_alone += self._alone

        def waiting(node: dict, hidden: Tensor) -> list[tuple[_Step | None, Any, Tensor]]:
            # Ends wait until the branches are done: so the dense model, if given first, is also the first to come out.
            in_turn = sorted(node.items(), key=lambda item: item[0] is None)
            return [(step, behind, hidden) for step, behind in reversed(in_turn)]

        stack = waiting(self._root, embedded)
        while stack:
            step, behind, hidden = stack.pop()
            if step is None:
                yield behind, hidden
                continue
            hidden = self.engine.run_layer(step[0], hidden, step[1])
            self.layer_forwards += 1
            if bar is not None:
                bar.update()
            stack += waiting(behind, hidden)
