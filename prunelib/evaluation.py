"""Perplexity under a stated protocol, for one model or for many removals of layers at once.

Protocols move a perplexity more than many a method does (Llama-2-7B on WikiText-2: 5.47 with windows of 2048 tokens, 5.12
with 4096, 12.19 with 128), so `PerplexityProtocol` holds every part and `PerplexityProtocol.describe` goes into the results.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field

import numpy as np
import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor, nn
from torch.nn import functional
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from prunelib.corpora import Corpus, consecutive_windows
from prunelib.models import Skip, decoder_layers, layers_as


@dataclass(frozen=True)
class PerplexityProtocol:
    """What a perplexity means.

    Attributes:
        window: tokens per window, bos included.
        stride: text tokens from one window to the next, None for windows that do not overlap. With overlap only the tokens
            that are new in a window are scored, each with at least ``window - stride`` tokens before it.
        bos: the beginning-of-text token stands at position 0 of every window. It is never scored.
        dtype: of the weights and activations; the log-likelihood is float32, its sums are float64 in any case.
        join: text between two documents, None for the tokenizer's end-of-text token (a blank line where it has none).
        limit: at most so many windows from the beginning of the text, None for all.
    """

    window: int = 2048
    stride: int | None = None
    bos: bool = False
    dtype: str = "float32"
    join: str | None = None
    limit: int | None = None

    def __post_init__(self) -> None:
        if self.window < 2:
            raise ValueError(f"window={self.window}: a window needs at least 2 tokens, the first is not scored")
        if self.stride is not None and not 1 <= self.stride <= self.window - int(self.bos):
            raise ValueError(f"stride={self.stride}: between 1 and the {self.window - int(self.bos)} text tokens of a window")
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"limit={self.limit}: keep at least 1 window, or None for all")
        if not isinstance(getattr(torch, self.dtype, None), torch.dtype):
            raise ValueError(f"dtype={self.dtype!r}: name a torch type, such as float32, bfloat16 or float16")

    def windows(self, corpus: Corpus, tokenizer, *, progress: bool = True) -> Int64[Tensor, "window position"]:
        """The windows of a corpus; the tail that fills no window is dropped. Raises as `corpora.consecutive_windows`."""
        return consecutive_windows(
            corpus, tokenizer, self.window, self.limit, self.bos, stride=self.stride, join=self.join, progress=progress
        )

    def measure(
        self, model: PreTrainedModel, windows: Int64[Tensor, "window position"], *, batch_size: int = 8, progress: bool = False
    ) -> "Perplexity":
        """`perplexity` of windows that this protocol cut, after a check that model and windows are what it states.

        Raises:
            ValueError: another dtype or another window length; and as `perplexity`.
        """
        if model.dtype != getattr(torch, self.dtype):
            raise ValueError(
                f"the protocol states dtype={self.dtype}, the model is in {model.dtype}: load it in the stated one"
            )
        if windows.shape[1] != self.window:
            raise ValueError(f"the protocol states windows of {self.window} tokens, these have {windows.shape[1]}")
        if self.bos and not bool((windows[:, 0] == windows[0, 0]).all()):
            raise ValueError("the protocol states bos=True, but the windows do not begin with the same token")
        return perplexity(model, windows, stride=self.stride, batch_size=batch_size, progress=progress)

    def describe(self) -> dict:
        """Every part of the protocol in words and numbers that JSON can hold."""
        return asdict(self) | {
            "stride": self.stride or self.window - int(self.bos),
            "join": self.join if self.join is not None else "end-of-text token, else a blank line",
            "first_token_scored": False,
            "tail": "dropped",
            "likelihood": "float32, summed in float64",
        }


@dataclass(frozen=True)
class Perplexity:
    """Summed negative log-likelihood, in nats, of the scored tokens.

    ``window_nll`` and ``window_tokens`` hold the same by window, for paired tests; ``correct`` counts the scored tokens
    that were the model's first choice.
    """

    nll: float
    tokens: int
    correct: int
    window_nll: tuple[float, ...] = field(repr=False)
    window_tokens: tuple[int, ...] = field(repr=False)

    @property
    def nats(self) -> float:
        """Nats per token."""
        return self.nll / self.tokens

    @property
    def ppl(self) -> float:
        """exp(nats); infinite where that overflows."""
        return math.exp(self.nats) if self.nats < 709 else math.inf

    @property
    def accuracy(self) -> float:
        """Fraction of the scored tokens that were the model's first choice."""
        return self.correct / self.tokens


class LayerSetPerplexity(dict[tuple[int, ...], Perplexity]):
    """Removed layers → `Perplexity`, and what it cost.

    ``layer_forwards`` counts the calls of decoder layers, over all batches; ``layer_forwards_alone`` is what evaluating every
    set by itself would have taken.
    """

    layer_forwards: int = 0
    layer_forwards_alone: int = 0


class NotFinite(RuntimeError):
    """A likelihood is NaN or infinite."""


@dataclass(frozen=True)
class PairedDifference:
    """``difference`` in nats per token (positive: a is worse than b) with its bootstrap interval."""

    difference: float
    low: float
    high: float
    level: float


# --- one model -----------------------------------------------------------------------------------------------------------


@torch.inference_mode()
def perplexity(
    model: PreTrainedModel,
    windows: Int64[Tensor, "window position"],
    *,
    stride: int | None = None,
    batch_size: int = 8,
    progress: bool = False,
) -> Perplexity:
    """Token perplexity over windows.

    The first position of a window has no context and is not scored. With ``stride`` (the windows overlap: they were cut with
    the same stride), every window but the first scores its last ``stride`` positions only, so that each token counts once.
    No more than one batch of logits exists at a time.

    Raises:
        ValueError: no window, windows longer than the model's positions, ids outside its vocabulary, a model in training mode,
            ``batch_size`` or ``stride`` out of range.
        NotFinite: the likelihood is not finite; names the window.
    """
    _check(model, windows, stride, batch_size)
    tally = _Tally(windows, stride)
    for start in _batches(len(windows), batch_size, progress, "perplexity"):
        ids = windows[start : start + batch_size].to(model.device)
        tally.add(start, ids, _logits(model, ids))
    return tally.result()


def _check(model: PreTrainedModel, windows: Int64[Tensor, "window position"], stride: int | None, batch_size: int) -> None:
    count, length = windows.shape
    if count < 1 or length < 2:
        raise ValueError(f"windows of shape {tuple(windows.shape)}: at least 1 window of at least 2 tokens is needed")
    if stride is not None and not 1 <= stride <= length:
        raise ValueError(f"stride={stride}: between 1 and the window's {length} tokens")
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size}: at least 1")
    if model.training:
        raise ValueError("the model is in training mode (dropout would blur the result): call model.eval() first")
    positions = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    if positions is not None and length > positions:
        raise ValueError(f"windows of {length} tokens exceed the {positions} positions of this model: take shorter windows")
    vocabulary = model.get_input_embeddings().num_embeddings
    low, high = int(windows.min()), int(windows.max())
    if low < 0 or high >= vocabulary:
        raise ValueError(f"token ids {low} to {high}, but the model knows 0 to {vocabulary - 1}: another model's tokenizer?")


def _batches(count: int, batch_size: int, progress: bool, what: str) -> Iterable[int]:
    return tqdm(range(0, count, batch_size), desc=what, unit="batch", disable=not progress)


def _logits(model: nn.Module, ids: Int64[Tensor, "batch position"]) -> Float[Tensor, "batch position vocabulary"]:
    return model(input_ids=ids, use_cache=False).logits


class _Tally:
    """Sums per window, from one batch of logits after another."""

    def __init__(self, windows: Int64[Tensor, "window position"], stride: int | None):
        self.count, self.length = windows.shape
        self.stride = stride
        self.nll = np.zeros(self.count, dtype=np.float64)
        self.correct = np.zeros(self.count, dtype=np.int64)

    def scored(self, window: int) -> int:
        """How many positions at the end of a window are scored."""
        everything = self.length - 1
        return everything if window == 0 or self.stride is None else min(self.stride, everything)

    def add(self, start: int, ids: Int64[Tensor, "batch position"], logits: Float[Tensor, "batch position vocabulary"]) -> None:
        """Add the windows ``start``, ``start + 1``, …"""
        sums = []
        # Window by window: a float32 copy of a whole batch of bfloat16 logits would treble the memory.
        for row in range(len(ids)):
            scored = self.scored(start + row)
            targets = ids[row, -scored:]
            predictions = logits[row, -scored - 1 : -1].float()
            nll = functional.cross_entropy(predictions, targets, reduction="none").double().sum()
            sums.append(torch.stack([nll, (predictions.argmax(-1) == targets).sum().double()]))
        values = torch.stack(sums).cpu().numpy()
        finite = np.isfinite(values[:, 0])
        if not finite.all():
            raise NotFinite(
                f"the likelihood of window {start + int(np.argmin(finite))} is not finite: NaN or infinite logits "
                "(damaged weights, or an overflow in float16: load it in bfloat16 or float32)"
            )
        self.nll[start : start + len(ids)] = values[:, 0]
        self.correct[start : start + len(ids)] = values[:, 1].astype(np.int64)

    def result(self) -> Perplexity:
        tokens = tuple(self.scored(window) for window in range(self.count))
        return Perplexity(
            nll=math.fsum(self.nll),
            tokens=sum(tokens),
            correct=int(self.correct.sum()),
            window_nll=tuple(self.nll.tolist()),
            window_tokens=tokens,
        )


# --- many removals -------------------------------------------------------------------------------------------------------


@dataclass
class _Node:
    """One layer that runs after the layers on the path to it; ``ends`` is the removal whose last kept layer this is."""

    layer: int
    children: dict[int, "_Node"] = field(default_factory=dict)
    ends: tuple[int, ...] | None = None


def _trie(n_layers: int, layer_sets: Iterable[tuple[int, ...]]) -> tuple[_Node, int]:
    """The kept layers of every removal as paths from a root, and the number of nodes below the root."""
    root, nodes = _Node(layer=-1), 0
    for removed in layer_sets:
        if list(removed) != sorted(set(removed)) or (removed and not 0 <= removed[0] <= removed[-1] < n_layers):
            raise ValueError(f"removed layers {removed}: give distinct layers in ascending order, from 0 to {n_layers - 1}")
        if len(removed) == n_layers:
            raise ValueError(f"cannot remove {len(removed)} of {n_layers} layers: at least one must stay")
        node = root
        for layer in sorted(set(range(n_layers)) - set(removed)):
            if layer not in node.children:
                node.children[layer] = _Node(layer)
                nodes += 1
            node = node.children[layer]
        node.ends = removed
    return root, nodes


def shared_layer_forwards(n_layers: int, layer_sets: Iterable[tuple[int, ...]]) -> int:
    """Layer calls per batch that `layer_set_perplexity` makes: the distinct beginnings of the sequences of kept layers.

    Raises:
        ValueError: as `layer_set_perplexity`, for a set that is not ascending, out of range, or all layers.
    """
    return _trie(n_layers, layer_sets)[1]


@torch.inference_mode()
def layer_set_perplexity(
    model: PreTrainedModel,
    windows: Int64[Tensor, "window position"],
    layer_sets: Iterable[tuple[int, ...]],
    *,
    stride: int | None = None,
    batch_size: int = 8,
    progress: bool = True,
) -> LayerSetPerplexity:
    """`perplexity` of the model without each of the given sets of layers, on the same windows.

    Two removals that keep the same first layers have the same hidden states behind them, so those layers run once per
    batch: the sets are walked as a trie, and hidden states are held only where branches are still to come. Equal, to float
    tolerance, to ``perplexity(remove_layers(model, removed), windows)``; only models whose layers do something else after
    renumbering (GPT-2 with ``scale_attn_by_inverse_layer_idx``) differ, and those `remove_layers` refuses.

    Args:
        layer_sets: the removed layers, each ascending; ``()`` is the dense model. Repeated sets are evaluated once.

    Raises:
        ValueError: a set that is not ascending, out of range, or all layers; and as `perplexity`.
        NotFinite: a likelihood that is not finite; names the removed layers and the window.
    """
    _check(model, windows, stride, batch_size)
    layers = decoder_layers(model)
    sets = list(dict.fromkeys(tuple(removed) for removed in layer_sets))
    root, nodes = _trie(len(layers), sets)
    tallies = {removed: _Tally(windows, stride) for removed in sets}
    shell = _Shell(model, layers, windows[:1, :2].to(model.device))
    results = LayerSetPerplexity()
    starts = range(0, len(windows), batch_size) if sets else ()
    with tqdm(total=len(starts) * nodes, desc=f"{len(sets)} layer sets", unit="layer", disable=not progress) as bar:
        for start in starts:
            ids = windows[start : start + batch_size].to(model.device)
            # Depth first. A hidden state lives as long as a branch that starts from it waits on the stack.
            stack = [(child, shell.enter(ids)) for child in reversed(root.children.values())]
            while stack:
                node, hidden = stack.pop()
                hidden = shell.run(node.layer, hidden)
                results.layer_forwards += 1
                bar.update()
                if node.ends is not None:
                    try:
                        tallies[node.ends].add(start, ids, shell.leave(ids, hidden))
                    except NotFinite as error:
                        raise NotFinite(f"without the layers {node.ends}: {error}") from None
                stack += [(child, hidden) for child in reversed(node.children.values())]
    results.layer_forwards_alone = len(starts) * sum(len(layers) - len(removed) for removed in sets)
    results.update((removed, tally.result()) for removed, tally in tallies.items())
    return results


class _Shell:
    """A model without its layers: what stands before, between and behind them, whatever the architecture.

    A view of the model in which every layer is skipped tells, by hooks on its slots, what the embeddings hand to the first
    layer and with which other arguments (mask, position embeddings, …) each layer is called. The same view turns a hidden
    state into logits: it is put in the place of the first slot's input.
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
        args, kwargs = _with_hidden(*self.calls[index], hidden)
        output = self.layers[index](*args, **kwargs)
        return output[0] if isinstance(output, tuple) else output

    def leave(
        self, ids: Int64[Tensor, "batch position"], hidden: Float[Tensor, "batch position hidden"]
    ) -> Float[Tensor, "batch position vocabulary"]:
        """Final norm, head and whatever else follows the layers."""
        self.replacement = hidden
        try:
            return _logits(self.view, ids)
        finally:
            self.replacement = None


def _with_hidden(args: tuple, kwargs: dict, hidden: Tensor) -> tuple[tuple, dict]:
    return ((hidden, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": hidden})


# --- comparing two models ------------------------------------------------------------------------------------------------


def paired_bootstrap(
    window_nll_a: Sequence[float],
    window_nll_b: Sequence[float],
    seed: int,
    n: int = 1000,
    *,
    window_tokens: Sequence[int],
    level: float = 0.95,
) -> PairedDifference:
    """Bootstrap interval of a − b in nats per token, two models on the same windows.

    Windows are drawn with replacement, the same ones for both models, ``n`` times; the interval holds the middle ``level`` of
    the differences. Take the arguments from `Perplexity.window_nll` and `Perplexity.window_tokens`.

    Raises:
        ValueError: lengths that differ, fewer than two windows, or ``n``, ``level``, ``seed`` out of range.
    """
    if not len(window_nll_a) == len(window_nll_b) == len(window_tokens):
        raise ValueError(
            f"{len(window_nll_a)} and {len(window_nll_b)} windows, {len(window_tokens)} token counts: "
            "a paired test needs the same windows"
        )
    if len(window_tokens) < 2:
        raise ValueError(f"{len(window_tokens)} window: a bootstrap needs at least 2")
    if n < 1 or not 0 < level < 1 or seed < 0:
        raise ValueError(f"n={n}, level={level}, seed={seed}: n from 1, level between 0 and 1, seed from 0")
    difference = np.asarray(window_nll_a, dtype=np.float64) - np.asarray(window_nll_b, dtype=np.float64)
    tokens = np.asarray(window_tokens, dtype=np.float64)
    generator = np.random.default_rng(seed)
    drawn = np.array([_resampled(difference, tokens, generator) for _ in range(n)])
    low, high = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2])
    return PairedDifference(float(difference.sum() / tokens.sum()), float(low), float(high), level)


def _resampled(
    difference: Float64[np.ndarray, " window"], tokens: Float64[np.ndarray, " window"], generator: np.random.Generator
) -> float:
    picked = generator.integers(0, len(tokens), size=len(tokens))
    return float(difference[picked].sum() / tokens[picked].sum())
