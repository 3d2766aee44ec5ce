"""LaCo (arXiv 2402.11187): layers collapse into an earlier one, as long as the final hidden states stay close.

Two rules of merging, because the paper and its released code differ (`RULES`): "published" adds to the matrices of layer l
what the following m layers have beyond it, theta_l + sum_k (theta_{l+k} - theta_l); "released" subtracts the matrices
already updated instead of theta_l, so that each merge copies the last of the layers, theta_{l+m} (LaCo issue 4). For m = 1
both are theta_{l+1}. Attention and MLP are merged; norms stay those of layer l, as in the released code.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.nn import functional
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from prunelib.models import UnsupportedModel, decoder_layers, keep_layers


def _published(base: Float[Tensor, "..."], following: Sequence[Float[Tensor, "..."]]) -> Float[Tensor, "..."]:
    # The formula, sorted so that m = 1 gives the one following layer without rounding.
    total = following[0].float()
    for tensor in following[1:]:
        total = total + (tensor.float() - base.float())
    return total.to(base.dtype)


def _released(base: Float[Tensor, "..."], following: Sequence[Float[Tensor, "..."]]) -> Float[Tensor, "..."]:
    return following[-1].clone()


RULES: dict[str, Callable[[Tensor, Sequence[Tensor]], Tensor]] = {"published": _published, "released": _released}
"""How a weight of the base layer and the same weight of the following layers become one."""


@dataclass(frozen=True)
class MergeStep:
    """One attempt: `following` layers after layer `base` (indices at that time) merged into it.

    cosine: mean similarity of the final hidden states to the dense model.
    """

    base: int
    following: int
    cosine: float
    accepted: bool


@dataclass(frozen=True)
class Collapse:
    """A merged model; for each of its layers the layers of the dense model it is made of; and every attempt in order."""

    model: PreTrainedModel
    origins: tuple[tuple[int, ...], ...]
    steps: tuple[MergeStep, ...]


def merge(model: PreTrainedModel, base: int, following: int, rule: str = "published") -> PreTrainedModel:
    """A model in which layer `base` has taken in the next `following` layers, which are gone.

    It shares every other weight with `model`, which stays as it was. Sums are float32.

    Raises ValueError for layers that do not exist or an unknown rule, and UnsupportedModel where layers that are to be merged
    are not built alike (a dense one and a mixture of experts), or as `models.keep_layers`.
    """
    if rule not in RULES:
        raise ValueError(f"unknown rule {rule!r}; there are: {', '.join(RULES)}")
    layers = decoder_layers(model)
    if following < 1 or not 0 <= base < base + following < len(layers):
        raise ValueError(f"cannot merge {following} layers into layer {base} of {len(layers)}: at least 1, and all must exist")
    merged = keep_layers(model, [index for index in range(len(layers)) if not base < index <= base + following])
    target = decoder_layers(merged)[base]
    others = [dict(layers[base + offset].named_parameters()) for offset in range(1, following + 1)]
    shapes = {name: parameter.shape for name, parameter in target.named_parameters()}
    for offset, other in enumerate(others, start=1):
        if {name: parameter.shape for name, parameter in other.items()} != shapes:
            raise UnsupportedModel(f"cannot merge layer {base + offset} into layer {base}: they are not built alike")
    for name, parameter in list(target.named_parameters()):
        owner, _, leaf = name.rpartition(".")
        if _is_norm(target, owner):
            continue
        weight = RULES[rule](parameter.detach(), [other[name].detach() for other in others])
        setattr(target.get_submodule(owner), leaf, nn.Parameter(weight, requires_grad=parameter.requires_grad))
    return merged


def _is_norm(layer: nn.Module, path: str) -> bool:
    """Whether the module at `path` is a norm, or part of one."""
    above = [module for name, module in layer.named_modules() if name and f"{path}.".startswith(f"{name}.")]
    return any("norm" in type(module).__name__.lower() for module in above)


def collapse(
    model: PreTrainedModel,
    samples: Int64[Tensor, "sample position"] | Sequence[Int64[Tensor, " _"]],
    *,
    layers_per_merge: int = 7,
    threshold: float = 0.45,
    rule: str = "published",
    layers_removed: int | None = None,
    progress: bool = True,
) -> Collapse:
    """LaCo's search: from the top down, merge, and keep a merge when the final hidden states stay similar enough.

    At layer l, starting `layers_per_merge` (C) below the last, the next C - 1 layers, or as many as there are, are merged into
    l. If the mean cosine to the dense model exceeds `threshold`, the merge stays; then l goes down by 1, to 0. The cosine is
    taken as the released code does: of the states after the final norm, all tokens of a sample as one vector. Settings are
    those of the released notebook for Llama-2-13B, which calibrates on five short Wikipedia snippets.

    Args:
        samples: windows, or token sequences of different length.
        layers_removed: stop when so many layers are gone, merging fewer in the last step if need be. The published search
            has no such aim; the threshold decides alone. It may end with fewer layers removed: see `Collapse.origins`.

    Raises:
        ValueError: settings out of range, no samples, an unknown rule.
        UnsupportedModel: as `merge`.
        RuntimeError: hidden states that are not finite.
    """
    n_layers = len(decoder_layers(model))
    if not 2 <= layers_per_merge < n_layers or not -1 <= threshold <= 1:
        raise ValueError(
            f"layers_per_merge={layers_per_merge} (2 to {n_layers - 1}) or threshold={threshold} (-1 to 1) is out of range"
        )
    if rule not in RULES:
        raise ValueError(f"unknown rule {rule!r}; there are: {', '.join(RULES)}")
    if layers_removed is not None and not 0 <= layers_removed < n_layers:
        raise ValueError(f"cannot remove {layers_removed} of {n_layers} layers: at least one must stay")
    if len(samples) == 0 or min(len(ids) for ids in samples) == 0:
        raise ValueError("no tokens to compare the hidden states on: give at least one sample, none of them empty")
    dense = [_final_states(model, ids) for ids in samples]
    origins: list[tuple[int, ...]] = [(index,) for index in range(n_layers)]
    steps: list[MergeStep] = []
    to_go = n_layers - 1 if layers_removed is None else layers_removed
    # A merge at l leaves at least l + 1 layers: the next base always has one above it.
    for base in tqdm(range(n_layers - 1 - layers_per_merge, -1, -1), desc="merge", unit="layer", disable=not progress):
        following = min(layers_per_merge - 1, len(origins) - base - 1, to_go)
        if following == 0:
            break
        candidate = merge(model, base, following, rule)
        cosines = [
            functional.cosine_similarity(_final_states(candidate, ids), states, dim=0).item()
            for ids, states in zip(samples, dense, strict=True)
        ]
        cosine = sum(cosines) / len(cosines)
        steps.append(MergeStep(base, following, cosine, cosine > threshold))
        if cosine > threshold:
            model = candidate
            taken = origins[base : base + following + 1]
            origins[base : base + following + 1] = [tuple(index for group in taken for index in group)]
            to_go -= following
    return Collapse(model, tuple(origins), tuple(steps))


@torch.inference_mode()
def _final_states(model: PreTrainedModel, ids: Int64[Tensor, " position"]) -> Float[Tensor, " all"]:
    """The states after the final norm, all tokens in one float32 vector."""
    states = model.base_model(input_ids=ids[None].to(model.device), use_cache=False).last_hidden_state.float().flatten()
    if not bool(torch.isfinite(states).all()):
        raise RuntimeError("the final hidden states are NaN or infinite; check the weights, or use a dtype of wider range")
    return states
