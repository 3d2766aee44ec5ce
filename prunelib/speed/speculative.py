"""Speculative decoding with a pruned model as the draft of the dense one: how often it is accepted, and what that is worth.

A draft proposes some tokens, the dense model checks them all in one run and keeps the beginning it agrees with (Leviathan et
al. 2023, arXiv 2211.17192; Chen et al. 2023, arXiv 2302.01318). The text is the dense model's own, whatever the draft. A pruned
model is a draft that needs no training and, in memory, no weights of its own.
"""

import time
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from prunelib.evaluation.perplexity import check_length, check_windows


@torch.inference_mode()
def acceptance(
    dense: PreTrainedModel,
    drafts: Mapping[str, PreTrainedModel],
    windows: Int64[Tensor, "window position"],
    *,
    batch_size: int = 4,
) -> dict[str, dict[str, Float64[np.ndarray, " window"]]]:
    """Acceptance rates of every draft at all positions of given text (teacher-forced), by window.

    "greedy" is the share of positions at which both models have the same first choice; "sampled" the mean of
    sum_token min(p_dense, p_draft), the chance that a token drawn from the draft at temperature 1 is accepted. The text decides
    what is measured: on a model's own greedy text drafts agree more often than on text of others.

    Raises ValueError as `evaluation.check_windows`, and when a draft has another vocabulary.
    """
    for name, model in {"dense": dense, **drafts}.items():
        check_windows(model, windows, batch_size=batch_size)
        _check_vocabulary(dense, model, name)
    rates: dict[str, dict[str, list[Tensor]]] = {name: {"greedy": [], "sampled": []} for name in drafts}
    for ids in windows.split(batch_size):
        expected = _probabilities(dense, ids)
        for name, draft in drafts.items():
            found = _probabilities(draft, ids).to(expected.device)
            rates[name]["greedy"].append((found.argmax(-1) == expected.argmax(-1)).double().mean(-1))
            rates[name]["sampled"].append(torch.minimum(found, expected).sum(-1).double().mean(-1))
    return {name: {kind: torch.cat(one).cpu().numpy() for kind, one in kinds.items()} for name, kinds in rates.items()}


def _check_vocabulary(dense: PreTrainedModel, draft: PreTrainedModel, name: str) -> None:
    size, other = (model.config.get_text_config(decoder=True).vocab_size for model in (dense, draft))
    if other != size:
        raise ValueError(f"draft {name!r} has {other} tokens, the dense model {size}: take a draft of the same tokenizer")


def _probabilities(model: PreTrainedModel, ids: Int64[Tensor, "batch position"]) -> Float[Tensor, "batch predicted vocabulary"]:
    return model(input_ids=ids.to(model.device), use_cache=False).logits[:, :-1].float().softmax(-1)


def expected_speedup(acceptance_rate: float, drafted: int, cost: float) -> float:
    """Expected speed-up over the dense model alone, (1 - a^(g + 1)) / (1 - a) / (g c + 1) (arXiv 2211.17192, Theorem 3.8).

    For g `drafted` proposals, each accepted with the same chance a, whatever came before, and a draft whose step takes c =
    `cost` runs of the dense model. A run over g + 1 tokens is taken to last as long as one over a single token, as it does
    where reading the weights takes most of the time. Raises ValueError for a rate outside [0, 1] or negative numbers.
    """
    if not 0 <= acceptance_rate <= 1 or drafted < 0 or cost < 0:
        raise ValueError(f"acceptance_rate={acceptance_rate}, drafted={drafted}, cost={cost}: a rate to 1, and all from 0")
    return sum(acceptance_rate**count for count in range(drafted + 1)) / (drafted * cost + 1)


def best_drafted(acceptance_rate: float, cost: float) -> int:
    """The number of proposals, up to 32, of highest expected speed-up, the lowest among equals.

    0 (no draft) where the acceptance rate does not exceed the cost: then nothing is gained (arXiv 2211.17192, Corollary 3.9).
    """
    return max(range(33), key=lambda drafted: (expected_speedup(acceptance_rate, drafted, cost), -drafted))


class Decoded(NamedTuple):
    """Greedy text: its new tokens, the proposals in every run of the dense model and how many were kept, and wall time."""

    tokens: list[int]
    accepted: list[int]
    proposed: list[int]
    seconds: float


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
    if min(len(prompt), new_tokens, drafted) < 1:
        raise ValueError(f"{len(prompt)} tokens of prompt, new_tokens={new_tokens}, drafted={drafted}: all from 1")
    _check_vocabulary(dense, draft or dense, "draft")
    check_length(dense, len(prompt) + new_tokens)
    ids, accepted, proposed = prompt.tolist(), [], []
    caches = DynamicCache(), DynamicCache()

    def run(model: PreTrainedModel, cache: DynamicCache, last: int, more: list[int]) -> list[int]:
        """First choices at the last positions, after what the cache does not hold yet of the text and `more`."""
        unread = (ids + more)[cache.get_seq_length() :]
        feed = torch.tensor([unread], device=model.device)
        logits = model(input_ids=feed, past_key_values=cache, use_cache=True).logits
        return logits[0, -last:].argmax(-1).tolist()

    started, end = time.perf_counter(), len(prompt) + new_tokens
    while len(ids) < end:
        proposals: list[int] = []
        for _ in range(min(drafted, end - len(ids) - 1) if draft is not None else 0):
            proposals += run(draft, caches[1], 1, proposals)
        choices = run(dense, caches[0], len(proposals) + 1, proposals)
        kept = next((at for at, token in enumerate(proposals) if token != choices[at]), len(proposals))
        ids += choices[: kept + 1]
        accepted.append(kept)
        proposed.append(len(proposals))
        for cache in caches:
            surplus = cache.get_seq_length() - (len(ids) - 1)
            if surplus > 0:
                cache.crop(-surplus)
    return Decoded(ids[len(prompt) :], accepted, proposed, time.perf_counter() - started)
