"""Many sets of removed layers of one model, evaluated in one walk: layers that several sets begin with run once per batch.

Perplexity, divergence from the dense model, and the log-likelihoods of given continuations. Equal, to float tolerance, to
evaluating ``remove_layers(model, removed)`` for each set; only models whose layers do something else after renumbering (GPT-2
with ``scale_attn_by_inverse_layer_idx``) differ, and those `remove_layers` refuses.

A set holds the removed layers, ascending, or sublayers such as ``((3, "attn"), (5, "mlp"))``; ``()`` is the dense model.
Repeated sets are evaluated once. What cannot be removed raises the errors of `models.layerwise.SharedPrefixEvaluator`.
"""

import math
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor
from torch.nn import functional
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from prunelib.evaluation.perplexity import NllAccumulator, NotFinite, Perplexity, check_windows, require_finite
from prunelib.models import memory
from prunelib.models.layerwise import LayerSet, SharedPrefixEvaluator

BEYOND_CHANCE = 1.0
"""Nats per token beyond those of guessing: a model with random weights stays below, another vocabulary gives several."""

Answer = tuple[float, bool]  # log-likelihood in nats; whether every token is the most likely one


class LayerSetResults(dict):
    """Removed layers → result, and what it cost.

    ``layer_forwards`` counts the calls of decoder layers, over all batches; ``layer_forwards_alone`` is what evaluating every
    set by itself would have taken.
    """

    layer_forwards: int = 0
    layer_forwards_alone: int = 0

    @classmethod
    def of(cls, results: dict, runs: SharedPrefixEvaluator) -> "LayerSetResults":
        found = cls(results)
        found.layer_forwards, found.layer_forwards_alone = runs.layer_forwards, runs.layer_forwards_alone
        return found


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
@torch.inference_mode()
def layer_set_perplexity(
    model: PreTrainedModel,
    windows: Int64[Tensor, "window position"],
    layer_sets: Iterable[LayerSet],
    *,
    batch_size: int = 8,
    progress: bool = True,
) -> LayerSetResults:
    """`perplexity` of the model without each of the given sets of layers, on the same windows: set → `Perplexity`.

    Raises:
        ValueError: a set that is not ascending, out of range, or everything; and as `perplexity`.
        NotFinite: a likelihood that is not finite; names what was removed and the window.
        UnsupportedModel: as `layerwise.SharedPrefixEvaluator`.
    """
    check_windows(model, windows, batch_size=batch_size)
    runs = SharedPrefixEvaluator(model, layer_sets)
    sums = {removed: NllAccumulator(windows) for removed in runs.sets}
    for start, ids, removed, logits in runs.logits(windows, batch_size=batch_size, progress=progress):
        try:
            sums[removed].add(start, ids, logits)
        except NotFinite as error:
            raise NotFinite(f"without layers {removed}: {error}") from None
        del logits  # before the next ones are made
    results = LayerSetResults.of({removed: found.result() for removed, found in sums.items()}, runs)
    if () in results:
        _warn_of_chance(results[()], model)
    return results


def _warn_of_chance(found: Perplexity, model: PreTrainedModel) -> None:
    """Warn where a whole model predicts clearly worse than by guessing: its tokens are then those of another tokenizer."""
    chance = math.log(model.get_input_embeddings().num_embeddings)
    if found.nll > chance + BEYOND_CHANCE:
        warnings.warn(
            f"the whole model predicts worse than chance: {found.nll:.2f} nats per token where guessing gives {chance:.2f}: "
            "another model's tokenizer, or damaged weights?",
            stacklevel=3,
        )


@memory.says_what_fits("batch_size", "shorter windows or a smaller dtype")
@torch.inference_mode()
def layer_set_divergence(
    model: PreTrainedModel,
    windows: Int64[Tensor, "window position"],
    layer_sets: Iterable[LayerSet],
    *,
    batch_size: int = 8,
    progress: bool = True,
) -> LayerSetResults:
    """KL(dense || pruned) for each of the given sets of layers: set → `Divergence`.

    In nats per token, at the positions that `perplexity` scores: the fitness of EvoPress (arXiv 2410.14649). The dense model
    runs along with the sets, so that one batch of its logits is all that is held. What rounding takes below 0 in a window
    counts as 0.

    Raises:
        ValueError, NotFinite, UnsupportedModel: as `layer_set_perplexity`.
    """
    check_windows(model, windows, batch_size=batch_size)
    asked = list(dict.fromkeys(tuple(removed) for removed in layer_sets))
    # The dense model, given first, comes out first of each batch: its logits are there before they are needed.
    runs = SharedPrefixEvaluator(model, [(), *asked] if asked else [])
    sums = {removed: np.zeros(len(windows)) for removed in runs.sets}
    dense = torch.empty(0)
    for start, ids, removed, logits in runs.logits(windows, batch_size=batch_size, progress=progress):
        if removed == ():
            dense = logits
        values = torch.stack([_divergence(*pair) for pair in zip(dense, logits, strict=True)]).cpu().numpy()
        require_finite(values, start, f"without layers {removed}: the divergence")
        sums[removed][start : start + len(ids)] = values.clip(min=0)
        del logits
    tokens = len(windows) * (windows.shape[1] - 1)
    results = {removed: Divergence(math.fsum(sums[removed]), tokens, tuple(sums[removed].tolist())) for removed in asked}
    return LayerSetResults.of(results, runs)


def _divergence(
    dense: Float[Tensor, "position vocabulary"], pruned: Float[Tensor, "position vocabulary"]
) -> Float64[Tensor, ""]:
    """KL(dense || pruned) summed over the scored positions of one window."""
    expected, found = dense[:-1].float().log_softmax(-1), pruned[:-1].float().log_softmax(-1)
    return functional.kl_div(found, expected, reduction="none", log_target=True).double().sum()


# --- likelihoods of continuations ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Continuation:
    """Tokens to score: ``scored`` are predicted at the last ``len(scored)`` positions of ``read``, what the model reads (the
    context and the continuation without its last token).
    """

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
    softmax_dtype: torch.dtype | None = None,
    progress: bool = True,
) -> LayerSetResults:
    """Log-likelihood of every continuation under the model without each of the given sets: set → one `Answer` each.

    A text that several continuations read runs once, and the head runs at the scored positions only.

    Args:
        batch_size: texts in one batch; longest first, padded on the right, where nothing that is scored can see it.
        softmax_dtype: in which log-probabilities are computed, None for that of the logits.

    Raises:
        ValueError: a continuation that is empty or longer than what is read, ``batch_size`` below 1, a model in training mode,
            or a set that is not ascending, out of range, or everything.
        UnsupportedModel: as `layerwise.SharedPrefixEvaluator`.
    """
    if batch_size < 1 or model.training:
        raise ValueError(f"batch_size={batch_size}, training={model.training}: batch_size from 1, and call model.eval() first")
    texts: dict[tuple[int, ...], list[int]] = {}
    for number, one in enumerate(continuations):
        if not 1 <= len(one.scored) <= len(one.read):
            raise ValueError(f"continuation {number}: {len(one.scored)} tokens to score on {len(one.read)} that are read")
        texts.setdefault(one.read, []).append(number)
    runs = SharedPrefixEvaluator(model, layer_sets)
    found: dict[LayerSet, list[Answer]] = {removed: [(0.0, False)] * len(continuations) for removed in runs.sets}
    order = sorted(texts, key=lambda text: (-len(text), text))
    starts = range(0, len(order), batch_size) if runs.sets else range(0)
    with tqdm(total=len(starts) * runs.layers_per_batch, desc="likelihoods", unit="layer", disable=not progress) as bar:
        for start in starts:
            batch = order[start : start + batch_size]
            ids = torch.zeros(len(batch), len(batch[0]), dtype=torch.int64)
            places: list[tuple[int, int]] = []  # (row, position) of every scored token, continuation after continuation
            for row, text in enumerate(batch):
                ids[row, : len(text)] = torch.tensor(text)
                for number in texts[text]:
                    places += [(row, position) for position in range(len(text) - len(continuations[number].scored), len(text))]
            numbers = [number for text in batch for number in texts[text]]
            distinct, where = torch.tensor(places).unique(dim=0, return_inverse=True)
            for removed, hidden in runs.walk(runs.engine.embed(ids), bar):
                rows, positions = distinct.T.to(hidden.device)
                scored = runs.engine.head(hidden[rows, positions][:, None])[:, 0].log_softmax(-1, dtype=softmax_dtype)
                for number, answer in zip(
                    numbers, _answers(scored, where, [continuations[n].scored for n in numbers]), strict=True
                ):
                    found[removed][number] = answer
                del scored  # before the next ones are made
    return LayerSetResults.of(found, runs)


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
