"""What a healing minimizes: next-token loss, or the distance to the dense model (distillation)."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from prunelib.healing.recipes import Recipe
from prunelib.models import decoder_layers
from prunelib.text.sequences import IGNORED

LOGITS_IN_A_CHUNK = 2**24  # at most so many at once are compared with the dense model's


@dataclass(frozen=True)
class Teacher:
    """The dense model in distillation.

    pairs: (index in the pruned model's hidden states, index in the dense one's) that are matched; both lists hold the input of
    every layer, and the output of the final norm. bf16: its forward pass is under autocast.
    """

    model: PreTrainedModel
    pairs: tuple[tuple[int, int], ...]
    bf16: bool


def next_token(model: nn.Module, inputs: Mapping[str, Tensor], recipe: Recipe, teacher: Teacher | None) -> Tensor:
    """Sum of the cross-entropies of a batch, in nats."""
    logits = model(input_ids=inputs["input_ids"], attention_mask=inputs.get("attention_mask"), use_cache=False).logits
    targets = _following(inputs["labels"]).flatten()
    return functional.cross_entropy(logits.flatten(0, 1).float(), targets, ignore_index=IGNORED, reduction="sum")


def distillation(model: nn.Module, inputs: Mapping[str, Tensor], recipe: Recipe, teacher: Teacher | None) -> Tensor:
    """Sum over a batch of temperature² KL(dense ‖ pruned), plus the weighted distance of hidden states."""
    arguments = {
        "input_ids": inputs["input_ids"],
        "attention_mask": inputs.get("attention_mask"),
        "use_cache": False,
        "output_hidden_states": bool(teacher.pairs),
    }
    with torch.no_grad(), torch.autocast(inputs["input_ids"].device.type, torch.bfloat16, enabled=teacher.bf16):
        dense = teacher.model(**arguments)
    output = model(**arguments)
    counts = _following(inputs["labels"]) != IGNORED
    loss = kl_divergence(output.logits, dense.logits, counts, recipe.temperature)
    if teacher.pairs:
        both = [(output.hidden_states[mine], dense.hidden_states[theirs]) for mine, theirs in teacher.pairs]
        loss = loss + recipe.hidden_weight * torch.stack([_relative_distance(*pair, counts) for pair in both]).mean()
    return loss


OBJECTIVES: dict[str, Callable[[nn.Module, Mapping[str, Tensor], Recipe, Teacher | None], Tensor]] = {
    "next_token": next_token,
    "distillation": distillation,
}
"""Each gives the sum over the trained positions of a batch, to be divided by their number."""


def _following(labels: Int64[Tensor, "row position"]) -> Int64[Tensor, "row position"]:
    return functional.pad(labels[:, 1:], (0, 1), value=IGNORED)


def kl_divergence(
    logits: Float[Tensor, "row position vocabulary"],
    dense: Float[Tensor, "row position vocabulary"],
    counts: Bool[Tensor, "row position"],
    temperature: float | int = 1.0,
) -> Float[Tensor, ""]:
    """temperature² × sum over the positions that count of KL(dense ‖ model) in nats, both softened by the temperature.

    Some positions at a time: of the logits in float32 and their softmax, no more than `LOGITS_IN_A_CHUNK` are in memory.
    """

    def part(mine: Tensor, theirs: Tensor, weight: Tensor) -> Tensor:
        mine, theirs = (torch.log_softmax(x.float() / temperature, dim=-1) for x in (mine, theirs))
        return (functional.kl_div(mine, theirs, reduction="none", log_target=True).sum(dim=-1) * weight).sum()

    size = max(1, LOGITS_IN_A_CHUNK // logits.shape[-1])
    pieces = (logits.flatten(0, 1).split(size), dense.flatten(0, 1).split(size), counts.flatten().float().split(size))
    total = sum(checkpoint(part, *piece, use_reentrant=False, preserve_rng_state=False) for piece in zip(*pieces, strict=True))
    return total * temperature**2


def _relative_distance(
    states: Float[Tensor, "row position hidden"],
    dense: Float[Tensor, "row position hidden"],
    counts: Bool[Tensor, "row position"],
) -> Float[Tensor, ""]:
    """Sum over the positions that count of |states − dense|² / |dense|²."""
    mine, theirs = states.float(), dense.float()
    error = (mine - theirs).square().sum(dim=-1) / theirs.square().sum(dim=-1).clamp_min(1e-12)
    return (error * counts).sum()


def matched_states(pruned: PreTrainedModel, dense: PreTrainedModel, removed: Sequence[int]) -> tuple[tuple[int, int], ...]:
    """`Teacher.pairs` after the first removed layer: pruned layer j, once layer `kept[j]`, reads what that one read.

    Raises ValueError when removing the layers `removed` from `dense` does not give a model like `pruned`.
    """
    n_dense, n_pruned = len(decoder_layers(dense)), len(decoder_layers(pruned))
    kept = [index for index in range(n_dense) if index not in set(removed)]
    if len(kept) != n_pruned or not removed or not all(0 <= index < n_dense for index in removed):
        raise ValueError(
            f"removed={tuple(removed)} does not lead from {n_dense} to {n_pruned} layers; to match hidden states, give the "
            "indices of the layers that were removed"
        )
    if pruned.config.hidden_size != dense.config.hidden_size or pruned.config.model_type != dense.config.model_type:
        raise ValueError("hidden states of a sliced model lie in other bases than the dense model's: take hidden_weight=0")
    return (*((new, old) for new, old in enumerate(kept) if old > min(removed)), (n_pruned, n_dense))
