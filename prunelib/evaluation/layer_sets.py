"""Many sets of removed layers of one model, evaluated in one walk: layers that several sets begin with run once per batch.

Equal, to float tolerance, to evaluating ``remove_layers(model, removed)`` for each set. What cannot be removed
raises the errors of `models.layerwise.SharedPrefixEvaluator`.
"""

import itertools
import math
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.nn import functional
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from prunelib.evaluation.perplexity import NllAccumulator, NotFinite, check_length, check_windows, require_finite
from prunelib.models import check_vocabulary, memory
from prunelib.models.layerwise import LayerSet, SharedPrefixEvaluator

BEYOND_CHANCE = 1.0
"""Nats per token beyond those of guessing: a model with random weights stays below, another vocabulary gives several."""

Answer = tuple[float, bool]  # log-likelihood in nats; whether every token is the most likely one


class LayerSetResults(dict):
    """Removed layers → result, and the cost: layer calls over all batches, and what every set by itself would have taken."""

    def __init__(self, results: dict, layer_forwards: int = 0, layer_forwards_alone: int = 0):
        super().__init__(results)
        self.layer_forwards, self.layer_forwards_alone = layer_forwards, layer_forwards_alone


@dataclass(frozen=True)
class Divergence:
    """KL divergence from the dense model, in nats: ``kl_sum`` over the scored tokens, which ``window_kl`` holds by window."""

    kl_sum: float
    tokens: int
    window_kl: tuple[float, ...] = field(repr=False)

    @property
    def kl(self) -> float:
        """Nats per token."""
        return self.kl_sum / self.tokens


@memory.says_what_fits("batch_size", "shorter windows or a smaller dtype")
def layer_set_perplexity(
    model: PreTrainedModel,
    windows: Int64[Tensor, "window position"],
    layer_sets: Iterable[LayerSet],
    *,
    batch_size: int = 8,
    progress: bool = True,
) -> LayerSetResults:
    """`perplexity` of the model without each of the given sets of layers, on the same windows: set → `Perplexity`.

    Raises the same errors as `perplexity` and `SharedPrefixEvaluator`; NotFinite names what was removed and the window.
    """
    results = _accumulated(model, windows, layer_sets, lambda: NllAccumulator(windows), batch_size, progress)
    chance = math.log(model.get_input_embeddings().num_embeddings)
    if () in results and results[()].nll > chance + BEYOND_CHANCE:
        warnings.warn(
            f"the whole model predicts worse than chance: {results[()].nll:.2f} nats per token where guessing gives "
            f"{chance:.2f}: another model's tokenizer, or damaged weights?",
            stacklevel=2,
        )
    return results


@memory.says_what_fits("batch_size", "shorter windows or a smaller dtype")
def layer_set_divergence(
    model: PreTrainedModel,
    windows: Int64[Tensor, "window position"],
    layer_sets: Iterable[LayerSet],
    *,
    batch_size: int = 8,
    progress: bool = True,
) -> LayerSetResults:
    """KL(dense || pruned) for each of the given sets of layers, the fitness of EvoPress (arXiv 2410.14649): set → `Divergence`.

    In nats per token, at the positions that `perplexity` scores. The dense model runs along with the sets, so that one batch of
    its logits is all that is held. Raises the same errors as `layer_set_perplexity`.
    """
    asked = list(map(tuple, layer_sets))
    dense: dict[int, Tensor] = {}
    sets = [(), *asked] if asked else []  # the dense model, given first, comes out first of each batch
    results = _accumulated(model, windows, sets, lambda: _Kl(windows, dense), batch_size, progress)
    if () not in asked:
        results.pop((), None)
    return results


class _Kl:
    """KL from the logits that came first of each batch, those of the dense model, which all accumulators share."""

    def __init__(self, windows: Int64[Tensor, "window position"], dense: dict[int, Tensor]):
        self.tokens, self.dense = len(windows) * (windows.shape[1] - 1), dense
        self.sums = np.zeros(len(windows))

    def add(self, start: int, ids: Int64[Tensor, "batch position"], logits: Float[Tensor, "batch position vocabulary"]) -> None:
        if start not in self.dense:
            self.dense.clear()
            self.dense[start] = logits
        sums = []
        for expected, found in zip(self.dense[start], logits, strict=True):
            expected, found = expected[:-1].float().log_softmax(-1), found[:-1].float().log_softmax(-1)
            sums.append(functional.kl_div(found, expected, reduction="none", log_target=True).double().sum())
        values = torch.stack(sums).cpu().numpy()
        require_finite(values, start, "the divergence")
        self.sums[start : start + len(ids)] = values.clip(min=0)  # what rounding takes below 0

    def result(self) -> Divergence:
        return Divergence(math.fsum(self.sums), self.tokens, tuple(self.sums.tolist()))


@torch.inference_mode()
def _accumulated(
    model: PreTrainedModel,
    windows: Int64[Tensor, "window position"],
    layer_sets: Iterable[LayerSet],
    accumulator: Callable[[], NllAccumulator | _Kl],
    batch_size: int,
    progress: bool,
) -> LayerSetResults:
    check_windows(model, windows, batch_size=batch_size)
    runs = SharedPrefixEvaluator(model, layer_sets)
    sums = {removed: accumulator() for removed in runs.sets}
    for start, ids, removed, logits in runs.logits(windows, batch_size=batch_size, progress=progress):
        try:
            sums[removed].add(start, ids, logits)
        except NotFinite as error:
            raise NotFinite(f"without layers {removed}: {error}") from None
        del logits  # before the next ones are made
    results = {removed: found.result() for removed, found in sums.items()}
    return LayerSetResults(results, runs.layer_forwards, runs.layer_forwards_alone)


@dataclass(frozen=True)
class Continuation:
    """Tokens to score, and what the model reads: the context and the continuation without its last token."""

    read: tuple[int, ...]
    scored: tuple[int, ...]


@memory.says_what_fits("batch_size", "a smaller dtype")
@torch.inference_mode()
def layer_set_likelihoods(
    model: PreTrainedModel,
    continuations: Sequence[Continuation],
    layer_sets: Iterable[LayerSet],
    *,
    batch_size: int = 16,
    progress: bool = True,
) -> LayerSetResults:
    """Log-likelihood of every continuation under the model without each of the given sets: set → one `Answer` each.

    A text that several continuations read runs once, and the head runs at the scored positions only. Batches of `batch_size`
    texts, longest first, are padded on the right.

    Raises ValueError for a continuation that is empty or longer than what is read, a text that is longer than the model's
    positions, a token that it does not know, ``batch_size`` below 1, a model in training mode, and the same errors as
    `SharedPrefixEvaluator`.
    """
    if batch_size < 1 or model.training:
        raise ValueError(f"batch_size={batch_size}, training={model.training}: batch_size from 1, and call model.eval() first")
    texts: dict[tuple[int, ...], list[int]] = {}
    for number, one in enumerate(continuations):
        if not 1 <= len(one.scored) <= len(one.read):
            raise ValueError(f"continuation {number}: {len(one.scored)} tokens to score on {len(one.read)} that are read")
        texts.setdefault(one.read, []).append(number)
    for text in {max(texts, key=len), max(texts, key=max), min(texts, key=min)} if texts else ():
        check_length(model, len(text))
        check_vocabulary(model, torch.tensor(text))
    runs = SharedPrefixEvaluator(model, layer_sets)
    found: dict[LayerSet, list[Answer]] = {removed: [(0.0, False)] * len(continuations) for removed in runs.sets}
    batches = _batches(texts, batch_size, _depends_on_longest(model)) if runs.sets else []
    with tqdm(total=len(batches) * runs.layers_per_batch, desc="likelihoods", unit="layer", disable=not progress) as bar:
        for batch in batches:
            ids = torch.zeros(len(batch), len(batch[0]), dtype=torch.int64)
            places: list[tuple[int, int]] = []  # (row, position) of every scored token, continuation after continuation
            for row, text in enumerate(batch):
                ids[row, : len(text)] = torch.tensor(text)
                for number in texts[text]:
                    places += [(row, position) for position in range(len(text) - len(continuations[number].scored), len(text))]
            numbers = [number for text in batch for number in texts[text]]
            distinct, where = torch.tensor(places).unique(dim=0, return_inverse=True)
            scored = [continuations[number].scored for number in numbers]
            for removed, hidden in runs.walk(runs.engine.embed(ids), bar):
                rows, positions = distinct.T.to(hidden.device)
                # Of 16 bits in float32: else every logarithm is rounded to 8 bits.
                likelihoods = runs.engine.head(hidden[rows, positions][:, None])[:, 0].float().log_softmax(-1)
                for number, answer in zip(numbers, _answers(likelihoods, where, scored), strict=True):
                    found[removed][number] = answer
                del likelihoods  # before the next ones are made
    return LayerSetResults(found, runs.layer_forwards, runs.layer_forwards_alone)


def _depends_on_longest(model: PreTrainedModel) -> bool:
    """Whether rotary frequencies change with the longest text of a batch: texts of other lengths then get other numbers."""
    kinds = (getattr(module, "rope_type", None) for module in model.modules())
    named = {kind for one in kinds if one for kind in (one.values() if isinstance(one, dict) else [one])}
    return any("dynamic" in kind or kind == "longrope" for kind in named)


def _batches(texts: Iterable[tuple[int, ...]], size: int, one_length: bool) -> list[list[tuple[int, ...]]]:
    """At most `size` texts each, longest first; with `one_length`, only texts of one length share a batch."""
    order = sorted(texts, key=lambda text: (-len(text), text))
    groups = [list(group) for _, group in itertools.groupby(order, len)] if one_length else [order]
    return [group[start : start + size] for group in groups for start in range(0, len(group), size)]


def _answers(
    likelihoods: Float[Tensor, "place vocabulary"], where: Int64[Tensor, " token"], scored: Sequence[tuple[int, ...]]
) -> list[Answer]:
    """One per continuation; ``where`` says at which place each of their tokens is predicted."""
    tokens = torch.tensor([token for one in scored for token in one], device=likelihoods.device)
    where = where.to(likelihoods.device)
    values = likelihoods[where, tokens].double().cpu()
    likeliest = (likelihoods.argmax(-1)[where] == tokens).cpu()
    lengths = [len(one) for one in scored]
    return [
        (float(one.sum()), bool(hits.all())) for one, hits in zip(values.split(lengths), likeliest.split(lengths), strict=True)
    ]
