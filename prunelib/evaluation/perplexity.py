"""Perplexity under a stated protocol, for one model or for many removals of layers at once.

Protocols move a perplexity more than many a method does (Llama-2-7B on WikiText-2: 5.47 with windows of 2048 tokens, 5.12
with 4096, 12.19 with 128), so `PerplexityProtocol` holds every part and `PerplexityProtocol.describe` goes into the results.
"""

import math
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field

import numpy as np
import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor, nn
from torch.nn import functional
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from prunelib.models import check_vocabulary, memory
from prunelib.models.layerwise import LayerSet, SharedPrefixEvaluator
from prunelib.models.layerwise import (
    shared_layer_forwards as shared_layer_forwards,  # what the dictionaries below cost, beforehand
)
from prunelib.text.corpora import Corpus
from prunelib.text.windows import consecutive_windows

BEYOND_CHANCE = 1.0
"""Nats per token beyond those of guessing: a model with random weights stays below, another vocabulary gives several."""


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
        limit: at most so many windows, evenly spaced over the whole text, None for all.
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
        """The windows of a corpus; the tail that fills no window is dropped. Raises as `windows.consecutive_windows`."""
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


class LayerSetPerplexity(dict[LayerSet, Perplexity]):
    """Removed layers → `Perplexity`, and what it cost.

    ``layer_forwards`` counts the calls of decoder layers, over all batches; ``layer_forwards_alone`` is what evaluating every
    set by itself would have taken.
    """

    layer_forwards: int = 0
    layer_forwards_alone: int = 0


@dataclass(frozen=True)
class Divergence:
    """Summed KL divergence from the dense model, in nats, over the scored tokens; ``window_kl`` holds it by window."""

    kl: float
    tokens: int
    window_kl: tuple[float, ...] = field(repr=False)

    @property
    def nats(self) -> float:
        """Nats per token."""
        return self.kl / self.tokens


class LayerSetDivergence(dict[LayerSet, Divergence]):
    """Removed layers → `Divergence`, and what it cost (the dense model included), as in `LayerSetPerplexity`."""

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


@memory.says_what_fits("batch_size", "shorter windows or a smaller dtype")
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
    check_windows(model, windows, stride=stride, batch_size=batch_size)
    tally = Tally(windows, stride)
    for start in _batches(len(windows), batch_size, progress, "perplexity"):
        ids = windows[start : start + batch_size].to(model.device)
        tally.add(start, ids, _logits(model, ids))
    return tally.result()


def check_windows(
    model: PreTrainedModel, windows: Int64[Tensor, "window position"], *, stride: int | None = None, batch_size: int = 1
) -> None:
    """Raise ValueError, before any work, when a loss of this model on these windows would make no sense."""
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
    check_vocabulary(model, windows)


def _batches(count: int, batch_size: int, progress: bool, what: str) -> Iterable[int]:
    return tqdm(range(0, count, batch_size), desc=what, unit="batch", disable=not progress)


def _logits(model: nn.Module, ids: Int64[Tensor, "batch position"]) -> Float[Tensor, "batch position vocabulary"]:
    return model(input_ids=ids, use_cache=False).logits


def _warn_of_chance(found: Perplexity, model: nn.Module) -> None:
    """Warn where a whole model predicts clearly worse than by guessing: its tokens are then those of another tokenizer."""
    chance = math.log(model.get_input_embeddings().num_embeddings)
    if found.nats > chance + BEYOND_CHANCE:
        warnings.warn(
            f"the whole model predicts worse than chance: {found.nats:.2f} nats per token where guessing gives {chance:.2f}: "
            "another model's tokenizer, or damaged weights?",
            stacklevel=3,
        )


class Tally:
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


@memory.says_what_fits("batch_size", "shorter windows or a smaller dtype")
@torch.inference_mode()
def layer_set_perplexity(
    model: PreTrainedModel,
    windows: Int64[Tensor, "window position"],
    layer_sets: Iterable[LayerSet],
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
        layer_sets: the removed layers, each ascending, or sublayers such as ``((3, "attn"), (5, "mlp"))``; ``()`` is the dense
            model. Repeated sets are evaluated once. A set of sublayers equals the perplexity of
            ``remove_sublayers(model, SublayerPlan.from_units(n_layers, removed, ...))``.

    Raises:
        ValueError: a set that is not ascending, out of range, or everything; and as `perplexity`.
        NotFinite: a likelihood that is not finite; names what was removed and the window.
        UnsupportedModel: as `layerwise.SharedPrefixEvaluator`.
    """
    check_windows(model, windows, stride=stride, batch_size=batch_size)
    runs = SharedPrefixEvaluator(model, layer_sets)
    tallies = {removed: Tally(windows, stride) for removed in runs.sets}
    for start, ids, removed, logits in runs.logits(windows, batch_size=batch_size, progress=progress):
        try:
            tallies[removed].add(start, ids, logits)
        except NotFinite as error:
            raise NotFinite(f"without layers {removed}: {error}") from None
        del logits  # before the next ones are made
    results = LayerSetPerplexity((removed, tally.result()) for removed, tally in tallies.items())
    if () in results:
        _warn_of_chance(results[()], model)
    results.layer_forwards, results.layer_forwards_alone = runs.layer_forwards, runs.layer_forwards_alone
    return results


@memory.says_what_fits("batch_size", "shorter windows or a smaller dtype")
@torch.inference_mode()
def layer_set_divergence(
    model: PreTrainedModel,
    windows: Int64[Tensor, "window position"],
    layer_sets: Iterable[LayerSet],
    *,
    batch_size: int = 8,
    progress: bool = True,
    dense: Float[Tensor, "window position vocabulary"] | None = None,
) -> LayerSetDivergence:
    """How far the model without each of the given sets of layers predicts from the dense model: KL(dense || pruned).

    In nats per token, at the positions that `perplexity` scores (all but the last of a window, which predicts nothing in it):
    the fitness of EvoPress (arXiv 2410.14649). Shared beginnings run once, as in `layer_set_perplexity`; the dense model
    runs along with the sets, so that one batch of its logits is all that is held. What rounding takes below 0 in a window
    counts as 0. With the logits `dense` of the dense model it need not run.

    Raises:
        ValueError, NotFinite, UnsupportedModel: as `layer_set_perplexity`.
    """
    check_windows(model, windows, batch_size=batch_size)
    asked = list(dict.fromkeys(tuple(removed) for removed in layer_sets))
    # The dense model, given first, comes out first of each batch: its logits are there before they are needed.
    sets = [(), *asked] if asked and dense is None else asked
    runs = SharedPrefixEvaluator(model, sets)
    sums = {removed: np.zeros(len(windows)) for removed in runs.sets}
    reference = torch.empty(0)
    for start, ids, removed, logits in runs.logits(windows, batch_size=batch_size, progress=progress):
        if dense is not None:
            reference = dense[start : start + len(ids)].to(logits.device)
        elif removed == ():
            reference = logits
        values = torch.stack([_divergence(*pair) for pair in zip(reference, logits, strict=True)]).cpu().numpy()
        finite = np.isfinite(values)
        if not finite.all():
            raise NotFinite(
                f"without layers {removed}: the divergence of window {start + int(np.argmin(finite))} is not finite: NaN "
                "or infinite logits (damaged weights, or an overflow in float16: load it in bfloat16 or float32)"
            )
        sums[removed][start : start + len(ids)] = values.clip(min=0)
        del logits
    tokens = len(windows) * (windows.shape[1] - 1)
    results = LayerSetDivergence(
        (removed, Divergence(math.fsum(sums[removed]), tokens, tuple(sums[removed].tolist()))) for removed in asked
    )
    results.layer_forwards, results.layer_forwards_alone = runs.layer_forwards, runs.layer_forwards_alone
    return results


def _divergence(
    dense: Float[Tensor, "position vocabulary"], pruned: Float[Tensor, "position vocabulary"]
) -> Float64[Tensor, ""]:
    """KL(dense || pruned) summed over the scored positions of one window."""
    expected, found = dense[:-1].float().log_softmax(-1), pruned[:-1].float().log_softmax(-1)
    return functional.kl_div(found, expected, reduction="none", log_target=True).double().sum()


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
