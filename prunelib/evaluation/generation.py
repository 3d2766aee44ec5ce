"""What a model writes: greedy continuations, how much they repeat, and what the dense model says to them.

Multiple choice hides what generation shows (arXiv 2602.01997). LAMBADA's accuracy in `evaluation.tasks` is a greedy one
already: whether every token of the last word is the model's first choice.
"""

from collections.abc import Iterable

import torch
from jaxtyping import Int64
from torch import Tensor
from torch.nn import functional
from tqdm.auto import tqdm
from transformers import GenerationConfig, PreTrainedModel

from prunelib.evaluation.perplexity import NotFinite, check_length, check_windows
from prunelib.models import memory

NGRAMS = (1, 2, 4)


@memory.says_what_fits("batch_size", "shorter continuations or a smaller dtype")
@torch.no_grad()
def continuations(
    model: PreTrainedModel,
    prompts: Int64[Tensor, "prompt position"],
    tokens: int,
    *,
    seed: int | None = None,
    batch_size: int = 8,
    progress: bool = False,
) -> Int64[Tensor, "prompt token"]:
    """Exactly `tokens` more tokens for every prompt: always the most likely one, or with a seed drawn from the whole
    distribution at temperature 1. The end-of-text token does not end a text: more tokens follow it, as in a packed text.

    What the model's own generation settings say is left out. torch's generators of random numbers stay as they were. Raises
    ValueError as `check_windows`, for fewer than 1 token, and where the model was made for fewer than prompt and continuation.
    """
    check_windows(model, prompts, batch_size=batch_size)
    if tokens < 1:
        raise ValueError(f"tokens={tokens}: continue by at least 1 token")
    check_length(model, prompts.shape[1] + tokens)
    config = GenerationConfig(max_new_tokens=tokens, do_sample=seed is not None, top_k=0, pad_token_id=0)
    own, found = model.generation_config, []
    model.generation_config = GenerationConfig()  # its end-of-text token, penalties and sampling would be taken
    try:
        with torch.random.fork_rng([model.device] if model.device.type == "cuda" else []):
            if seed is not None:
                torch.manual_seed(seed)
            for ids in tqdm(prompts.split(batch_size), desc="continue texts", unit="batch", disable=not progress):
                ids = ids.to(model.device)
                written = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)
                found.append(written[:, ids.shape[1] :].cpu())
    finally:
        model.generation_config = own
    return torch.cat(found)


@memory.says_what_fits("batch_size", "shorter continuations or a smaller dtype")
def generated(
    model: PreTrainedModel,
    dense: PreTrainedModel,
    prompts: Int64[Tensor, "prompt position"],
    reference: Int64[Tensor, "prompt token"],
    *,
    batch_size: int = 8,
) -> dict[str, float]:
    """How `model` continues prompts, beside `reference`, the dense model's own greedy `continuations` of them.

    distinct_1, distinct_2, distinct_4: different n-grams over all n-grams of all continuations (distinct-n, arXiv 1510.03055).
    repeated_4: share of a continuation's 4-grams that were in it before, the mean over them (seq-rep-4, arXiv 1908.04319).
    dense_nll: nats per token of the dense model on them; low also for text that repeats itself, so it needs the others beside.
    agreement: share of the positions of `reference` where, after the same tokens, the model's first choice is that token.

    Raises ValueError for a reference of fewer than 4 tokens, and as `continuations`.
    """
    tokens = reference.shape[1]
    if tokens < max(NGRAMS):
        raise ValueError(f"a reference of {tokens} tokens has no {max(NGRAMS)}-grams: continue the prompts by more")
    written = continuations(model, prompts, tokens, batch_size=batch_size)
    found = {f"distinct_{n}": _distinct(written.unfold(1, n, 1).flatten(0, 1)) for n in NGRAMS}
    own = [1 - _distinct(grams) for grams in written.unfold(1, max(NGRAMS), 1)]
    nll, _ = _scored(dense, prompts, written, batch_size)
    _, agreement = _scored(model, prompts, reference, batch_size)
    return found | {f"repeated_{max(NGRAMS)}": sum(own) / len(own), "dense_nll": nll, "agreement": agreement}


def _distinct(grams: Iterable[Tensor]) -> float:
    listed = [tuple(gram.tolist()) for gram in grams]
    return len(set(listed)) / len(listed)


@torch.inference_mode()
def _scored(model: PreTrainedModel, prompts: Tensor, texts: Tensor, batch_size: int) -> tuple[float, float]:
    """Nats per token of continuations, and the share of their tokens that are the first choice."""
    nll, first = 0.0, 0
    for prompt, text in zip(prompts.split(batch_size), texts.split(batch_size), strict=True):
        ids, wanted = torch.cat([prompt, text], dim=1).to(model.device), text.to(model.device)
        logits = model(input_ids=ids, use_cache=False).logits[:, prompt.shape[1] - 1 : -1]
        first += int((logits.argmax(-1) == wanted).sum())
        losses = functional.cross_entropy(logits.transpose(1, 2).float(), wanted, reduction="none")
        nll += float(losses.double().sum())
    if not nll < float("inf"):
        raise NotFinite("the likelihood of a continuation is not finite; check the weights, or use a dtype of wider range")
    return nll / texts.numel(), first / texts.numel()
