"""Many removals of layers from one model, each shared beginning of the kept layers run once.

Two removals that keep the same first layers have the same hidden states behind them. The sets are walked as a trie of their
kept layers: the layers above a branch run once, and hidden states are held only where branches are still to come. Perplexity
and divergence of layer sets, and with them the greedy, beam, evolutionary and exhaustive searches, all stand on this walk.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from prunelib.models import Skip, decoder_layers, layers_as
from prunelib.search import LayerSet


@dataclass
class _Node:
    """One layer that runs after the layers on the path to it; ``ends`` is the removal whose last kept layer this is."""

    layer: int
    children: dict[int, "_Node"] = field(default_factory=dict)
    ends: LayerSet | None = None


def _trie(n_layers: int, layer_sets: Iterable[LayerSet]) -> tuple[_Node, int]:
    """The kept layers of every removal as paths from a root, and the number of nodes below the root."""
    root, nodes = _Node(layer=-1), 0
    for removed in layer_sets:
        check_layer_set(n_layers, removed)
        node = root
        for layer in sorted(set(range(n_layers)) - set(removed)):
            if layer not in node.children:
                node.children[layer] = _Node(layer)
                nodes += 1
            node = node.children[layer]
        node.ends = removed
    return root, nodes


def check_layer_set(n_layers: int, removed: LayerSet) -> None:
    """Raise ValueError unless `removed` is ascending, unique, within a model of `n_layers`, and leaves a layer."""
    if list(removed) != sorted(set(removed)) or (removed and not 0 <= removed[0] <= removed[-1] < n_layers):
        raise ValueError(f"removed layers {removed}: give distinct layers in ascending order, from 0 to {n_layers - 1}")
    if len(removed) == n_layers:
        raise ValueError(f"cannot remove {len(removed)} of {n_layers} layers: at least one must stay")


def shared_layer_forwards(n_layers: int, layer_sets: Iterable[LayerSet]) -> int:
    """Layer calls per batch that `SharedRuns` makes: the distinct beginnings of the sequences of kept layers.

    Raises:
        ValueError: for a set that is not ascending, out of range, or all layers.
    """
    return _trie(n_layers, layer_sets)[1]


class SharedRuns:
    """The logits of one model without each of several sets of layers, batch by batch of the windows.

    ``layer_forwards`` counts the calls of decoder layers so far, over all batches; ``layer_forwards_alone`` is what every set
    by itself takes over all batches. Only models whose layers do something else after renumbering (GPT-2 with
    ``scale_attn_by_inverse_layer_idx``) differ from `models.remove_layers`, and those it refuses.

    Args:
        layer_sets: the removed layers, each ascending; ``()`` is the dense model. Repeated sets run once.

    Raises:
        ValueError: a set that is not ascending, out of range, or all layers.
        UnsupportedModel: no decoder layers are found in a model of this type, or they cannot be skipped.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        windows: Int64[Tensor, "window position"],
        layer_sets: Iterable[LayerSet],
        *,
        batch_size: int,
        progress: bool,
    ):
        layers = decoder_layers(model)
        self.sets: list[LayerSet] = list(dict.fromkeys(tuple(removed) for removed in layer_sets))
        self._root, self._nodes = _trie(len(layers), self.sets)
        self._model, self._layers, self._windows = model, layers, windows
        self._starts = range(0, len(windows), batch_size) if self.sets else range(0)
        self._batch_size, self._progress = batch_size, progress
        self.layer_forwards = 0
        self.layer_forwards_alone = len(self._starts) * sum(len(layers) - len(removed) for removed in self.sets)

    @torch.inference_mode()
    def __iter__(
        self,
    ) -> Iterator[tuple[int, Int64[Tensor, "batch position"], LayerSet, Float[Tensor, "batch position vocabulary"]]]:
        """Yield (first window of the batch, its ids, removed layers, logits); the dense model first, if it was given first."""
        shell = Shell(self._model, self._layers, self._windows[:1, :2].to(self._model.device))
        description = f"{len(self.sets)} layer sets"
        with tqdm(total=len(self._starts) * self._nodes, desc=description, unit="layer", disable=not self._progress) as bar:
            for start in self._starts:
                ids = self._windows[start : start + self._batch_size].to(self._model.device)
                for removed, hidden in self._walk(shell, shell.enter(ids), bar):
                    yield start, ids, removed, shell.leave(ids, hidden)

    def _walk(
        self, shell: "Shell", entered: Float[Tensor, "batch position hidden"], bar: tqdm
    ) -> Iterator[tuple[LayerSet, Float[Tensor, "batch position hidden"]]]:
        """Depth first. A hidden state lives as long as a branch that starts from it, or an end, waits on the stack."""
        stack: list[tuple[_Node | LayerSet, Tensor]] = [(child, entered) for child in reversed(self._root.children.values())]
        while stack:
            step, hidden = stack.pop()
            if isinstance(step, tuple):
                yield step, hidden
                continue
            hidden = shell.run(step.layer, hidden)
            self.layer_forwards += 1
            bar.update()
            # Ends wait until the branches are done: so the dense model, if given first, is also the first to come out.
            if step.ends is not None:
                stack.append((step.ends, hidden))
            stack += [(child, hidden) for child in reversed(step.children.values())]


class Shell:
    """A model without its layers: what stands before, between and behind them, whatever the architecture.

    A view of the model in which every layer is skipped tells, by hooks on its slots, what the embeddings hand to the first
    layer and with which other arguments (mask, position embeddings, …) each layer is called. The same view turns a hidden
    state into logits: it is put in the place of the first slot's input. Call it under `torch.inference_mode` or `no_grad`.
    """

    def __init__(self, model: PreTrainedModel, layers: nn.ModuleList, probe: Int64[Tensor, "batch position"]):
        self.layers = layers
        self.calls: list[tuple[tuple, dict]] = [((), {})] * len(layers)
        self.replacement: Tensor | None = None
        slots = [Skip(layer) for layer in layers]
        self.view = layers_as(model, slots)
        for index, slot in enumerate(slots):
            slot.register_forward_pre_hook(self._hook(index), with_kwargs=True)
        # A Skip runs its layer once to see what it returns; two tokens are enough for that.
        self.enter(probe)

    def _hook(self, index: int):
        def hook(slot: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
            if self.replacement is None:
                self.calls[index] = (args, kwargs)
                return None
            return _with_hidden(args, kwargs, self.replacement) if index == 0 else None

        return hook

    def enter(self, ids: Int64[Tensor, "batch position"]) -> Float[Tensor, "batch position hidden"]:
        """The input of the first layer; keeps the arguments of every layer for this batch."""
        body = self.view.base_model
        (self.view if body is self.view else body)(input_ids=ids, use_cache=False)
        args, kwargs = self.calls[0]
        return args[0] if args else kwargs["hidden_states"]

    def run(self, index: int, hidden: Float[Tensor, "batch position hidden"]) -> Float[Tensor, "batch position hidden"]:
        """The output of one layer of the batch that entered last."""
        args, kwargs = _with_hidden(*self.calls[index], hidden)
        output = self.layers[index](*args, **kwargs)
        return output[0] if isinstance(output, tuple) else output

    def leave(
        self, ids: Int64[Tensor, "batch position"], hidden: Float[Tensor, "batch position hidden"]
    ) -> Float[Tensor, "batch position vocabulary"]:
        """Final norm, head and whatever else follows the layers."""
        self.replacement = hidden
        try:
            return self.view(input_ids=ids, use_cache=False).logits
        finally:
            self.replacement = None


def _with_hidden(args: tuple, kwargs: dict, hidden: Tensor) -> tuple[tuple, dict]:
    return ((hidden, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": hidden})
