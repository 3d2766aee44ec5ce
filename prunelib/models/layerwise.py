"""Many removals of layers from one model, each shared beginning of the kept layers run once.

Two removals that keep the same first layers have the same hidden states behind them. The sets are walked as a trie of their
kept layers: the layers above a branch run once, and hidden states are held only where branches are still to come. Perplexity
and divergence of layer sets, and with them the greedy, beam, evolutionary and exhaustive searches, all stand on this walk.
Where a call of a layer costs more than its arithmetic, several branches can go through a layer at once.

What is removed are units (`UNITS`): layers, or sublayers. With sublayers, unit 2 l is the attention of layer l and unit 2 l + 1
its MLP. A layer that misses one of them runs while that one gives zeros, and is another step of the walk than the whole layer;
a layer that misses both is left out.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from prunelib.models.architectures import SLICED_MODEL_TYPE
from prunelib.models.layers import IdentityLayer, UnsupportedModel, decoder_layers, with_layers
from prunelib.models.sublayers import check_additive, silent, sublayers_of

LayerSet = tuple[int, ...]
"""Layers, ascending; or other units that can go, such as the sublayers of `UNITS`, in the place of layers."""

# What sets can be made of, and how many of it a layer holds.
UNITS = {"layer": 1, "sublayer": 2}

# A layer that runs, and which of its sublayers (0 attention, 1 MLP) are silent meanwhile.
_Step = tuple[int, tuple[int, ...]]


@dataclass
class _Node:
    """One step that runs after those on the path to it; ``ends`` is the removal whose last step this is."""

    step: _Step
    children: dict[_Step, "_Node"] = field(default_factory=dict)
    ends: LayerSet | None = None


def _trie(n_layers: int, layer_sets: Iterable[LayerSet], unit: str) -> tuple[_Node, int]:
    """The steps of every removal as paths from a root, and the number of nodes below the root."""
    root, nodes = _Node((-1, ())), 0
    for removed in layer_sets:
        node = root
        for step in _steps(n_layers, removed, unit):
            if step not in node.children:
                node.children[step] = _Node(step)
                nodes += 1
            node = node.children[step]
        node.ends = removed
    return root, nodes


def _steps(n_layers: int, removed: LayerSet, unit: str) -> list[_Step]:
    """What still runs without the units `removed`, in order."""
    check_layer_set(n_layers, removed, unit)
    per_layer, gone = UNITS[unit], set(removed)
    missing = [tuple(part for part in range(per_layer) if per_layer * layer + part in gone) for layer in range(n_layers)]
    return [(layer, parts) for layer, parts in enumerate(missing) if len(parts) < per_layer]


def check_layer_set(n_layers: int, removed: LayerSet, unit: str = "layer") -> None:
    """Raise ValueError unless `removed` is ascending, unique, within a model of `n_layers`, and leaves something.

    `unit` says what is counted (`UNITS`); every layer may lose one sublayer, but not all of them both.
    """
    if unit not in UNITS:
        raise ValueError(f"unknown unit {unit!r}; there are: {', '.join(UNITS)}")
    n_units = UNITS[unit] * n_layers
    if list(removed) != sorted(set(removed)) or (removed and not 0 <= removed[0] <= removed[-1] < n_units):
        raise ValueError(f"removed {unit}s {removed}: give distinct {unit}s in ascending order, from 0 to {n_units - 1}")
    if len(removed) == n_units:
        raise ValueError(f"cannot remove {len(removed)} of {n_units} {unit}s: at least one must stay")


def shared_layer_forwards(n_layers: int, layer_sets: Iterable[LayerSet], unit: str = "layer") -> int:
    """Layer calls per batch that `SharedPrefixEvaluator` makes: the distinct beginnings of the sequences of kept layers.

    A layer that runs with a silent sublayer counts as one call, and is not shared with the whole layer.

    Raises:
        ValueError: an unknown unit, or a set that is not ascending, out of range, or everything.
    """
    return _trie(n_layers, layer_sets, unit)[1]


def layer_forwards_alone(n_layers: int, layer_sets: Iterable[LayerSet], unit: str = "layer") -> int:
    """Layer calls per batch when every set is evaluated by itself. Raises as `shared_layer_forwards`."""
    return sum(len(_steps(n_layers, removed, unit)) for removed in layer_sets)


class SharedPrefixEvaluator:
    """The logits of one model without each of several sets of layers, batch by batch of the windows.

    ``layer_forwards`` counts the layers that ran so far, over all batches (one for each branch, however many go through in a
    call); ``layer_forwards_alone`` is what every set by itself takes over all batches. Only models whose layers do something
    else after renumbering (GPT-2 with ``scale_attn_by_inverse_layer_idx``) differ from `models.remove_layers`, and those it
    refuses.

    Args:
        layer_sets: the removed units, each ascending; ``()`` is the dense model. Repeated sets run once.
        unit: "layer", or "sublayer": then sets are made of 0 .. 2 L - 1.
        together: branches that go through a layer in one call. 1 walks depth first and holds few hidden states. More walks
            layer by layer and holds a hidden state for every branch: faster on a GPU whose batches are small, and equal up to
            rounding, since the matrices that are multiplied have another shape.
        shell: one of this model from before, so that its layers are not looked at again.

    Raises:
        ValueError: an unknown unit, a set that is not ascending, out of range, or everything, or `together` below 1.
        UnsupportedModel: no decoder layers are found in a model of this type, they cannot be skipped, or their sublayers
            cannot be told apart or do not simply add to the input of the layer (found when the runs begin, before any work);
            or the model is sliced, and something is to be removed.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        windows: Int64[Tensor, "window position"],
        layer_sets: Iterable[LayerSet],
        *,
        batch_size: int,
        progress: bool,
        unit: str = "layer",
        together: int = 1,
        shell: "Shell | None" = None,
    ):
        if together < 1:
            raise ValueError(f"together={together}: at least 1 branch goes through a layer")
        layers = decoder_layers(model)
        self.sets: list[LayerSet] = list(dict.fromkeys(tuple(removed) for removed in layer_sets))
        if model.config.model_type == SLICED_MODEL_TYPE and any(self.sets):
            raise UnsupportedModel("this model is sliced, and its layers differ in width: remove layers first, then slice")
        self._root, self._nodes = _trie(len(layers), self.sets, unit)
        self._cut = sorted({layer for removed in self.sets for layer, parts in _steps(len(layers), removed, unit) if parts})
        self._model, self._layers, self._windows = model, layers, windows
        self._starts = range(0, len(windows), batch_size) if self.sets else range(0)
        self._batch_size, self._progress = batch_size, progress
        self._together, self._shell = together, shell
        self.layer_forwards = 0
        self.layer_forwards_alone = len(self._starts) * layer_forwards_alone(len(layers), self.sets, unit)

    @torch.inference_mode()
    def __iter__(
        self,
    ) -> Iterator[tuple[int, Int64[Tensor, "batch position"], LayerSet, Float[Tensor, "batch position vocabulary"]]]:
        """Yield (first window of the batch, its ids, removed units, logits); the dense model first, if it was given first."""
        shell = self._shell or Shell(self._model, self._layers, self._windows[:1, :2].to(self._model.device), self._cut)
        description = f"{len(self.sets)} layer sets"
        with tqdm(total=len(self._starts) * self._nodes, desc=description, unit="layer", disable=not self._progress) as bar:
            for start in self._starts:
                ids = self._windows[start : start + self._batch_size].to(self._model.device)
                walk = self._walk(shell, shell.enter(ids), bar) if self._together == 1 else self._sweep(shell, ids, bar)
                for removed, hidden in walk:
                    yield start, ids, removed, shell.leave(ids, hidden)

    def _walk(
        self, shell: "Shell", entered: Float[Tensor, "batch position hidden"], bar: tqdm
    ) -> Iterator[tuple[LayerSet, Float[Tensor, "batch position hidden"]]]:
        """Depth first. A hidden state lives as long as a branch that starts from it, or an end, waits on the stack."""
        stack: list[tuple[_Node | LayerSet, Tensor]] = [(child, entered) for child in reversed(self._root.children.values())]
        while stack:
            node, hidden = stack.pop()
            if isinstance(node, tuple):
                yield node, hidden
                continue
            layer, without = node.step
            hidden = shell.run(layer, hidden, without)
            self.layer_forwards += 1
            bar.update()
            # Ends wait until the branches are done: so the dense model, if given first, is also the first to come out.
            if node.ends is not None:
                stack.append((node.ends, hidden))
            stack += [(child, hidden) for child in reversed(node.children.values())]

    def _sweep(
        self, shell: "Shell", ids: Int64[Tensor, "batch position"], bar: tqdm
    ) -> Iterator[tuple[LayerSet, Float[Tensor, "batch position hidden"]]]:
        """Layer by layer, several branches in one call. The ends come in the order of the sets."""
        entered, calls = shell.enter(ids), {1: shell.calls}
        waiting = [(child, entered) for child in self._root.children.values()]
        ends: dict[LayerSet, Tensor] = {}
        for layer in range(len(self._layers)):
            due = [(node, hidden) for node, hidden in waiting if node.step[0] == layer]
            waiting = [(node, hidden) for node, hidden in waiting if node.step[0] != layer]
            for without in dict.fromkeys(node.step[1] for node, _ in due):
                alike = [(node, hidden) for node, hidden in due if node.step[1] == without]
                for part in (alike[start : start + self._together] for start in range(0, len(alike), self._together)):
                    if len(part) not in calls:
                        # The model itself says what its layers are called with for so many rows.
                        shell.enter(ids.repeat(len(part), 1))
                        calls[len(part)] = shell.calls
                    shell.calls = calls[len(part)]
                    rows = torch.cat([hidden.to(part[0][1].device) for _, hidden in part])
                    for (node, _), hidden in zip(part, shell.run(layer, rows, without).split(len(ids)), strict=True):
                        waiting += [(child, hidden) for child in node.children.values()]
                        if node.ends is not None:
                            ends[node.ends] = hidden
                    self.layer_forwards += len(part)
                    bar.update(len(part))
        for removed in self.sets:
            yield removed, ends.pop(removed)


class Shell:
    """A model without its layers: what stands before, between and behind them, whatever the architecture.

    A view of the model in which every layer is skipped tells, by hooks on its slots, what the embeddings hand to the first
    layer and with which other arguments (mask, position embeddings, …) each layer is called. The same view turns a hidden
    state into logits: it is put in the place of the first slot's input. Call it under `torch.inference_mode` or `no_grad`.

    In the layers `cut` single sublayers can be silenced. That these can be told apart and add to the input of the layer is
    checked at once, on `probe`. Raises UnsupportedModel when not, and when a layer cannot be skipped. `slots` are skipped
    layers that know already what a layer returns: where layers cannot run on the probe.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        layers: nn.ModuleList,
        probe: Int64[Tensor, "batch position"],
        cut: Iterable[int] = (),
        slots: Sequence[IdentityLayer] = (),
    ):
        self.layers = layers
        self.sublayers = {index: sublayers_of(model, index) for index in cut}
        self.calls: list[tuple[tuple, dict]] = [((), {})] * len(layers)
        self.replacement: Tensor | None = None
        slots = list(slots) or [IdentityLayer(layer) for layer in layers]
        self.view = with_layers(model, slots)
        for index, slot in enumerate(slots):
            slot.register_forward_pre_hook(self._hook(index), with_kwargs=True)
        # An IdentityLayer runs its layer once to see what it returns; two tokens are enough for that.
        hidden = self.enter(probe)
        for index in self.sublayers:
            check_additive(model, index, hidden, partial(self.run, index, hidden))

    def _hook(self, index: int):
        def hook(slot: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
            if self.replacement is None:
                self.calls[index] = (args, kwargs)
                return None
            return _with_hidden(args, kwargs, self.replacement) if index == 0 else None

        return hook

    def enter(self, ids: Int64[Tensor, "batch position"], **inputs: Any) -> Float[Tensor, "batch position hidden"]:
        """The input of the first layer; keeps the arguments of every layer for this batch. `inputs` go with the ids."""
        self.calls = [((), {})] * len(self.layers)
        body = self.view.base_model
        (self.view if body is self.view else body)(input_ids=ids, use_cache=False, **inputs)
        args, kwargs = self.calls[0]
        return args[0] if args else kwargs["hidden_states"]

    def run(
        self, index: int, hidden: Float[Tensor, "batch position hidden"], without: tuple[int, ...] = ()
    ) -> Float[Tensor, "batch position out"]:
        """The output of one layer of the batch that entered last, its sublayers `without` (0 attention, 1 MLP) silent.

        Of a model spread over devices it lies on that of the layer; the next layer takes it from there.
        """
        args, kwargs = _with_hidden(*self.calls[index], hidden)
        with silent(*(self.sublayers[index][part] for part in without)):
            output = self.layers[index](*args, **kwargs)
        return output[0] if isinstance(output, tuple) else output

    def leave(
        self,
        ids: Int64[Tensor, "batch position"],
        hidden: Float[Tensor, "batch position hidden"],
        device: torch.device | None = None,
    ) -> Float[Tensor, "batch position vocabulary"]:
        """Final norm, head and whatever else follows the layers; on the device of `ids` unless another is given."""
        self.replacement = hidden
        try:
            return self.view(input_ids=ids, use_cache=False).logits.to(device or ids.device)
        finally:
            self.replacement = None


def _with_hidden(args: tuple, kwargs: dict, hidden: Tensor) -> tuple[tuple, dict]:
    return ((hidden, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": hidden})
