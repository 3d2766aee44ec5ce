"""Distillation: the distance of a pruned model's next-token distribution to the dense model's."""

from collections.abc import Mapping

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from prunelib.models import evaluating
from prunelib.text.sequences import IGNORED

LOGITS_IN_A_CHUNK = 2**24  # at most so many at once are compared with the dense model's


def distillation_loss(model: nn.Module, dense: PreTrainedModel, inputs: Mapping[str, Tensor], bf16: bool) -> Float[Tensor, ""]:
    """Sum over the trained positions of a batch of KL(dense ‖ pruned) in nats; with bf16 the dense model is under autocast."""
    arguments = {name: tensor for name, tensor in inputs.items() if name != "labels"}
    autocast = torch.autocast(inputs["input_ids"].device.type, torch.bfloat16, enabled=bf16)
    with torch.no_grad(), evaluating(dense), autocast:
        wanted = dense(**arguments, use_cache=False).logits
    return kl_divergence(model(**arguments).logits, wanted, functional.pad(inputs["labels"][:, 1:] != IGNORED, (0, 1)))


def kl_divergence(
    logits: Float[Tensor, "row position vocabulary"],
    dense: Float[Tensor, "row position vocabulary"],
    counts: Bool[Tensor, "row position"],
) -> Float[Tensor, ""]:
    """Sum over the positions that count of KL(dense ‖ model) in nats.

    Some positions at a time: of the logits in float32 and their softmax, no more than `LOGITS_IN_A_CHUNK` are in memory.
    """

    def part(mine: Tensor, theirs: Tensor, weight: Tensor) -> Tensor:
        mine, theirs = (torch.log_softmax(x.float(), dim=-1) for x in (mine, theirs))
        return (functional.kl_div(mine, theirs, reduction="none", log_target=True).sum(dim=-1) * weight).sum()

    size = max(1, LOGITS_IN_A_CHUNK // logits.shape[-1])
    pieces = (logits.flatten(0, 1).split(size), dense.flatten(0, 1).split(size), counts.flatten().float().split(size))
    return sum(checkpoint(part, *piece, use_reentrant=False, preserve_rng_state=False) for piece in zip(*pieces, strict=True))
