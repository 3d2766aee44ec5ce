"""Run a model layer by layer, and many removals of layers with the layers they have in common run once.

`LayerwiseModel` takes a model apart at its decoder layers: `embed`, `run_layer` for each layer, `head`. `SharedPrefixEvaluator`
uses it to run a model without each of many layer sets. Two removals that keep the same first layers have the same hidden
states behind them, so the sets are walked as a trie of the layers they keep, depth first. Perplexity, divergence and
likelihoods of layer sets, and with them the searches, are built on this walk.

A layer set holds layers, such as ``(3, 7)``, or single sublayers, such as ``((3, "attn"), (7, "mlp"))``.
"""

import inspect
import operator
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from prunelib.models.architectures import SLICED_MODEL_TYPE, SUBLAYERS, UnsupportedModel
from prunelib.models.layers import IdentityLayer, decoder_layers, describe_layer, sublayers_of, with_layers

LayerSet = tuple[int | tuple[int, str], ...]
"""What is removed, ascending: layers, or sublayers (layer, "attn" | "mlp"). ``()`` is the dense model."""


# --- one model, layer by layer -------------------------------------------------------------------------------------------


@dataclass
class _State:
    """What the skipped layers of a view saw, and the hidden states that the first of them is to hand on instead."""

    calls: list[tuple[tuple, dict]] = field(default_factory=list)
    hidden: Tensor | None = None
    replacement: Tensor | None = None


class LayerwiseModel:
    """A causal language model taken apart at its decoder layers, whatever its family.

    These lines equal ``model(ids).logits``, bit for bit::

        engine = LayerwiseModel(model)
        with torch.inference_mode():
            hidden = engine.embed(ids)  # the input of layer 0: [batch, position, width]
            for index in range(engine.n_layers):
                hidden = engine.run_layer(index, hidden)
            logits = engine.head(hidden)  # final norm and output head

    `embed` notes what the model itself hands to each layer for these ids (masks by kind of layer, rotary embeddings, ...):
    it runs a view of the model in which every layer is skipped. `run_layer` uses these arguments until the next `embed`.

    - Hidden states may come from anywhere: after `embed`, ``run_layer(5, states)`` continues from stored inputs of layer 5.
      Leave a layer out by not running it. `head` needs no `embed` and takes any number of positions.
    - With several batches in turn, keep ``engine.calls`` of each batch (a list with one ``(args, kwargs)`` per layer, without
      the hidden states) and set it again before `run_layer`. ``engine.calls[index][1]`` are the keyword arguments of a layer.
    - Layers without weights in memory: pass `ready`; it is called with an index and gives a context in which that layer has its
      weights. The engine needs it only here, for the first layer of each class. Enter it yourself around `run_layer`.
    - Gradients are the caller's choice: nothing here disables them after the constructor.

    Raises UnsupportedModel when no decoder layers are found or a layer hands more than hidden states to the next one.
    """

    def __init__(self, model: PreTrainedModel, *, ready: Callable[[int], AbstractContextManager] | None = None):
        self.model = model
        self.layers = decoder_layers(model)
        self._state = _State()
        returns: dict[type, tuple[type, int]] = {}
        slots = [_Slot(layer, index, self._state, returns, ready or nullcontext) for index, layer in enumerate(self.layers)]
        self._view = with_layers(model, slots)
        container, body = decoder_layers(self._view), self._view.base_model
        self._body = body if any(module is container for module in body.modules()) else self._view
        self._sublayers: dict[int, dict[str, nn.Module]] = {}
        with torch.no_grad():  # a skipped layer runs its layer once, to see what it returns: two tokens are enough
            self.embed(torch.zeros(1, 2, dtype=torch.int64))

    @property
    def n_layers(self) -> int:
        """Number of decoder layers."""
        return len(self.layers)

    @property
    def calls(self) -> list[tuple[tuple, dict]]:
        """The arguments of each layer beside the hidden states, of the batch that was embedded last; may be set."""
        return self._state.calls

    @calls.setter
    def calls(self, calls: list[tuple[tuple, dict]]) -> None:
        self._state.calls = calls

    @property
    def device(self) -> torch.device:
        """Where token ids go."""
        return self.model.get_input_embeddings().weight.device

    @property
    def forward(self) -> Callable:
        """The forward function that `embed` calls: its signature tells which inputs the model takes."""
        return self._body.forward

    def embed(
        self, ids: Int64[Tensor, "batch position"], mask: Bool[Tensor, "batch position"] | None = None, **inputs: Any
    ) -> Float[Tensor, "batch position width"]:
        """The input of the first layer.

        mask: true on real tokens, false on padding, which does not shift the positions of the real ones. inputs: what else the
        model is called with, such as a mask and positions of its own form (attention_mask, position_ids).
        """
        ids = ids.to(self.device)
        if mask is not None and not bool(mask.all()):
            inputs["attention_mask"] = mask.to(ids.device, torch.int64)
            if "position_ids" in inspect.signature(self.forward).parameters:
                inputs["position_ids"] = (inputs["attention_mask"].cumsum(dim=1) - 1).clamp(min=0)
        self._state.calls = [((), {})] * len(self.layers)
        try:
            self._body(input_ids=ids, use_cache=False, **inputs)
            return self._state.hidden
        finally:
            self._state.hidden = None

    def run_layer(
        self, index: int, hidden: Float[Tensor, "batch position width"], without: Collection[str] = ()
    ) -> Float[Tensor, "batch position out"]:
        """The output of a layer, the sublayers `without` ("attn", "mlp") silent; on the device of that layer.

        Raises UnsupportedModel where sublayers cannot be told apart or do not simply add to the input of the layer; this is
        checked when the layer first runs without one.
        """
        if without and index not in self._sublayers:
            sublayers = sublayers_of(self.model, index)
            with silent(*sublayers):
                output = self._run(index, hidden)
            # Whatever norms and factors stand in between then give zero for zero: silence means absence.
            if not torch.equal(output.to(hidden.device), hidden):
                where = describe_layer(self.model, index)
                raise UnsupportedModel(f"{where}, does not add its attention and its MLP to its input; look at whole layers")
            self._sublayers[index] = dict(zip(SUBLAYERS, sublayers, strict=True))
        with silent(*(self._sublayers[index][part] for part in without)):
            return self._run(index, hidden)

    def _run(self, index: int, hidden: Tensor) -> Tensor:
        args, kwargs = self._state.calls[index]
        if "hidden_states" in kwargs:
            output = self.layers[index](*args, **{**kwargs, "hidden_states": hidden})
        else:
            output = self.layers[index](hidden, *args, **kwargs)
        return output[0] if isinstance(output, (tuple, list)) else output

    def head(
        self, hidden: Float[Tensor, "batch position width"], device: torch.device | None = None
    ) -> Float[Tensor, "batch position vocabulary"]:
        """Final norm, output head and whatever else follows the layers; on `device`, that of the token ids unless given."""
        self._state.replacement = hidden
        ids = torch.zeros(hidden.shape[:2], dtype=torch.int64, device=self.device)  # nothing behind the layers reads them
        try:
            return self._view(input_ids=ids, use_cache=False).logits.to(device or self.device)
        finally:
            self._state.replacement = None


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


class _Slot(IdentityLayer):
    """A skipped layer that notes its arguments or, as the first one, hands on other hidden states for the head.

    Layers of one class return their output in one form, so only the first of each class runs once to show it.
    """

    def __init__(
        self,
        layer: nn.Module,
        index: int,
        state: _State,
        returns: dict[type, tuple[type, int]],
        ready: Callable[[int], AbstractContextManager],
    ):
        super().__init__(layer)
        self.index, self.known, self.ready = index, returns, ready
        self.__dict__["state"] = state

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        state = self.state
        if state.replacement is None:
            if self.index == 0:
                state.hidden = args[0] if args else kwargs["hidden_states"]
            state.calls[self.index] = (args[1:], kwargs) if args else ((), {**kwargs, "hidden_states": None})
        elif self.index == 0:
            args, kwargs = (
                ((state.replacement, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": state.replacement})
            )
        return super().forward(*args, **kwargs)

    def output_form(self, *args: Any, **kwargs: Any) -> tuple[type, int]:
        kind = type(self.stands_for)
        if kind not in self.known:
            with self.ready(self.index):
                self.known[kind] = super().output_form(*args, **kwargs)
        return self.known[kind]


# --- many removals -------------------------------------------------------------------------------------------------------

# A layer that runs, and which of its sublayers are silent meanwhile.
_Step = tuple[int, tuple[str, ...]]


@dataclass
class _Node:
    """One step that runs after those on the path to it; ``ends`` is the removal whose last step this is."""

    step: _Step
    children: dict[_Step, "_Node"] = field(default_factory=dict)
    ends: LayerSet | None = None


def _trie(n_layers: int, layer_sets: Iterable[LayerSet]) -> tuple[_Node, int]:
    """The steps of every removal as paths from a root, and the number of nodes below the root."""
    root, nodes = _Node((-1, ())), 0
    for removed in layer_sets:
        node = root
        for step in _steps(n_layers, removed):
            if step not in node.children:
                node.children[step] = _Node(step)
                nodes += 1
            node = node.children[step]
        node.ends = removed
    return root, nodes


def _steps(n_layers: int, removed: LayerSet) -> list[_Step]:
    """What still runs without `removed`, in order."""
    gone = set(check_layer_set(n_layers, removed))
    missing = [tuple(part for part in SUBLAYERS if (layer, part) in gone) for layer in range(n_layers)]
    return [(layer, parts) for layer, parts in enumerate(missing) if len(parts) < len(SUBLAYERS)]


def check_layer_set(n_layers: int, removed: LayerSet) -> tuple[tuple[int, str], ...]:
    """All sublayers that go with `removed`: both of every layer in it.

    Raises ValueError unless `removed` is ascending, unique, within a model of `n_layers`, and leaves something. Every layer
    may lose one sublayer, but not all of them both.
    """
    gone = []
    for unit in removed:
        if isinstance(unit, tuple):
            gone.append(unit)
        else:
            gone += [(operator.index(unit), part) for part in SUBLAYERS]
    known = all(0 <= layer < n_layers and part in SUBLAYERS for layer, part in gone)
    if not known or gone != sorted(set(gone)):
        raise ValueError(
            f"removed {removed}: give distinct layers from 0 to {n_layers - 1} in ascending order, or sublayers of them, such "
            'as (0, "attn") and (0, "mlp")'
        )
    if len(gone) == len(SUBLAYERS) * n_layers:
        raise ValueError(f"cannot remove {n_layers} of {n_layers} layers: at least one must stay")
    return tuple(gone)


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

    Attributes:
        sets: the distinct layer sets, in the order given.
        engine: the `LayerwiseModel` that runs.
        layers_per_batch: layer calls for one batch.
        layer_forwards: layer calls so far. layer_forwards_alone: what every set by itself would have taken.

    Raises:
        ValueError: as `check_layer_set`.
        UnsupportedModel: as `LayerwiseModel`, and as its `run_layer` where sublayers are removed; or the model is sliced, and
            something is to be removed.
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
        description = f"{len(self.sets)} layer sets"
        with tqdm(total=len(starts) * self.layers_per_batch, desc=description, unit="layer", disable=not progress) as bar:
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
        stack: list[tuple[_Node | LayerSet, Tensor]] = [(child, embedded) for child in reversed(self._root.children.values())]
        while stack:
            node, hidden = stack.pop()
            if isinstance(node, tuple):
                yield node, hidden
                continue
            layer, without = node.step
            hidden = self.engine.run_layer(layer, hidden, without)
            self.layer_forwards += 1
            if bar is not None:
                bar.update()
            # Ends wait until the branches are done: so the dense model, if given first, is also the first to come out.
            if node.ends is not None:
                stack.append((node.ends, hidden))
            stack += [(child, hidden) for child in reversed(node.children.values())]
