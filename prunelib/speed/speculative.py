"""Speculative decoding with a pruned model as the draft of the dense one: how often it is believed, and what that is worth.

A draft proposes some tokens, the dense model checks them all in one run and keeps the beginning it agrees with (Leviathan et
al. 2023, arXiv 2211.17192; Chen et al. 2023, arXiv 2302.01318). The text is the dense model's own, whatever the draft. A pruned
model is a draft that needs no training and, in memory, no weights of its own.
"""

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from prunelib.evaluation.perplexity import check_windows


@dataclass(frozen=True)
class Acceptance:
    """How often the dense model accepts a draft's token on given text, by window.

    Attributes:
        agreed: positions of each window at which both models have the same first choice (greedy decoding).
        overlap: sum over the positions of each window of sum_token min(p_dense, p_draft): the chance that a token drawn from
            the draft is accepted (sampling at temperature 1), which is 1 - total variation distance.
        positions: of every window.
    """

    agreed: tuple[int, ...] = field(repr=False)
    overlap: tuple[float, ...] = field(repr=False)
    positions: int

    @property
    def greedy(self) -> float:
        """Acceptance rate of greedy decoding."""
        return sum(self.agreed) / (self.positions * len(self.agreed))

    @property
    def sampled(self) -> float:
        """Acceptance rate of sampling at temperature 1."""
        return math.fsum(self.overlap) / (self.positions * len(self.overlap))

    def stderr(self, kind: str) -> float:
        """Standard error over windows of the rate "greedy" or "sampled"; NaN for a single window."""
        rates = torch.tensor({"greedy": self.agreed, "sampled": self.overlap}[kind], dtype=torch.float64) / self.positions
        return float(rates.std() / math.sqrt(len(rates)))


@torch.inference_mode()
def acceptance(
    dense: PreTrainedModel,
    drafts: Mapping[str, PreTrainedModel],
    windows: Int64[Tensor, "window position"],
    *,
    batch_size: int = 4,
) -> dict[str, Acceptance]:
    """`Acceptance` of every draft at all positions of given text (teacher-forced); the last position predicts nothing in it.

    The text decides what is measured: on a model's own greedy text drafts agree more often than on text of others.
    Raises ValueError as `evaluation.check_windows`, and when a draft has another vocabulary.
    """
    for model in (dense, *drafts.values()):
        check_windows(model, windows, batch_size=batch_size)
    _check_vocabularies(dense, drafts)
    agreed: dict[str, list[int]] = {name: [] for name in drafts}
    overlap: dict[str, list[float]] = {name: [] for name in drafts}
    for ids in windows.split(batch_size):
        expected = _probabilities(dense, ids)
        for name, draft in drafts.items():
            found = _probabilities(draft, ids).to(expected.device)
            agreed[name] += (found.argmax(-1) == expected.argmax(-1)).sum(-1).tolist()
            overlap[name] += torch.minimum(found, expected).sum(-1).double().sum(-1).tolist()
    positions = windows.shape[1] - 1
    return {name: Acceptance(tuple(agreed[name]), tuple(overlap[name]), positions) for name in drafts}


def _check_vocabularies(dense: PreTrainedModel, drafts: Mapping[str, PreTrainedModel]) -> None:
    size = dense.config.get_text_config(decoder=True).vocab_size
    for name, draft in drafts.items():
        other = draft.config.get_text_config(decoder=True).vocab_size
        if other != size:
            raise ValueError(f"draft {name!r} has {other} tokens, the dense model {size}: take a draft of the same tokenizer")


def _probabilities(model: PreTrainedModel, ids: Int64[Tensor, "batch position"]) -> Float[Tensor, "batch predicted vocabulary"]:
    return model(input_ids=ids.to(model.device), use_cache=False).logits[:, :-1].float().softmax(-1)


# --- what an acceptance rate is worth ------------------------------------------------------------------------------------


def expected_tokens(acceptance_rate: float, drafted: int) -> float:
    """Tokens that one run of the dense model yields: (1 - a^(g + 1)) / (1 - a) (arXiv 2211.17192, Eq. 1).

    For `drafted` proposals g, each accepted with the same chance a, whatever came before. Raises ValueError for a rate outside
    [0, 1] or a negative number of proposals.
    """
    if not 0 <= acceptance_rate <= 1 or drafted < 0:
        raise ValueError(f"acceptance_rate={acceptance_rate}, drafted={drafted}: a rate from 0 to 1, and a number from 0")
    return sum(acceptance_rate**count for count in range(drafted + 1))


def expected_speedup(acceptance_rate: float, drafted: int, cost: float) -> float:
    """Expected speed-up over the dense model alone: expected_tokens / (g c + 1) (arXiv 2211.17192, Theorem 3.8).

    `cost` is the time c of one step of the draft in units of one run of the dense model. A run over g + 1 tokens is taken to
    last as long as one over a single token, as it does where reading the weights takes most of the time. Raises ValueError as
    `expected_tokens`, and for a negative cost.
    """
    if cost < 0:
        raise ValueError(f"cost={cost}: from 0")
    return expected_tokens(acceptance_rate, drafted) / (drafted * cost + 1)


def best_drafted(acceptance_rate: float, cost: float, limit: int = 32) -> int:
    """The number of proposals of highest expected speed-up, the lowest among equals, up to `limit`.

    0 (no draft) where the acceptance rate does not exceed the cost: then nothing is gained (arXiv 2211.17192, Corollary 3.9).
    """
    return max(range(limit + 1), key=lambda drafted: (expected_speedup(acceptance_rate, drafted, cost), -drafted))


# --- decoding ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Decoded:
    """Greedy text and its cost.

    ``tokens`` holds the new ones; ``accepted`` the proposals that were kept in every run of the dense model and ``proposed``
    how many there were; ``seconds`` is wall time.
    """

    tokens: tuple[int, ...]
    accepted: tuple[int, ...]
    proposed: tuple[int, ...]
    seconds: float

    @property
    def tokens_per_run(self) -> float:
        """New tokens for every run of the dense model."""
        return len(self.tokens) / len(self.accepted)


@torch.inference_mode()
def decode(
    dense: PreTrainedModel,
    prompt: Int64[Tensor, " position"],
    new_tokens: int,
    *,
    draft: PreTrainedModel | None = None,
    drafted: int = 4,
) -> Decoded:
    """`new_tokens` tokens of greedy decoding, proposed by `draft` where there is one: one loop for both, so that times compare.

    The end-of-text token is a token like others. Up to rounding (a run over several tokens multiplies matrices of other
    shapes, which can decide between two equally likely tokens) the text is that of the dense model alone, and of transformers'
    ``generate(assistant_model=...)``, which does the same with more work on the host.

    Raises ValueError for an empty prompt, fewer than 1 new token or proposal, or a draft of another vocabulary.
    """
    if len(prompt) < 1 or new_tokens < 1 or (draft is not None and drafted < 1):
        raise ValueError(f"{len(prompt)} tokens of prompt, new_tokens={new_tokens}, drafted={drafted}: all from 1")
    if draft is not None:
        _check_vocabularies(dense, {"draft": draft})
    ids = prompt.tolist()
    caches = {"dense": DynamicCache(), "draft": DynamicCache()}
    accepted, proposed = [], []

    def run(name: str, model: PreTrainedModel, last: int, more: list[int]) -> list[int]:
        """First choices at the last positions, after what the cache does not hold yet of the text and `more`."""
        unread = (ids + more)[caches[name].get_seq_length() :]
        feed = torch.tensor([unread], device=model.device)
        logits = model(input_ids=feed, past_key_values=caches[name], use_cache=True).logits
        return logits[0, -last:].argmax(-1).tolist()

    started = time.perf_counter()
    while len(ids) < len(prompt) + new_tokens:
        proposals: list[int] = []
        for _ in range(min(drafted, len(prompt) + new_tokens - len(ids) - 1) if draft is not None else 0):
            proposals += run("draft", draft, 1, proposals)
        choices = run("dense", dense, len(proposals) + 1, proposals)
        kept = next((at for at, token in enumerate(proposals) if token != choices[at]), len(proposals))
        ids += choices[: kept + 1]
        accepted.append(kept)
        proposed.append(len(proposals))
        for cache in caches.values():
            surplus = cache.get_seq_length() - (len(ids) - 1)
            if surplus > 0:
                cache.crop(-surplus)
    seconds = time.perf_counter() - started
    return Decoded(tuple(ids[len(prompt) :]), tuple(accepted), tuple(proposed), seconds)
