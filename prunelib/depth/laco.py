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

from prunelib.evaluation.perplexity import check_windows
from prunelib.models import UnsupportedModel, decoder_layers, remove_layers


def _published(base: Float[Tensor, "..."], following: Sequence[Float[Tensor, "..."]]) -> Float[Tensor, "..."]:
    # The formula, sorted so that m = 1 gives the one following layer without rounding.
    return sum((tensor.float() - base.float() for tensor in following[1:]), following[0].float()).to(base.dtype)


RULES: dict[str, Callable[[Tensor, Sequence[Tensor]], Tensor]] = {
    "published": _published,
    "released": lambda base, following: following[-1].clone(),
}
"""How a weight of the base layer and the same weight of the following layers become one."""


@dataclass(frozen=True)
class MergeStep:
    """One attempt: `following` layers after layer `base` (indices at that time) merged; cosine to the dense final states."""

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
    """A model in which layer `base` has taken in the next `following` layers, by one of `RULES`, and these are gone.

    It shares every other weight with `model`, which stays as it was. Sums are float32. Raises ValueError for layers that do not
    exist, and UnsupportedModel where layers that are to be merged are not built alike (a dense one and a mixture of experts).
    """
    layers = decoder_layers(model)
    if following < 1 or not 0 <= base < base + following < len(layers):
        raise ValueError(f"cannot merge {following} layers into layer {base} of {len(layers)}: at least 1, and all must exist")
    gone = range(base + 1, base + 1 + following)
    merged = remove_layers(model, gone)
    target = decoder_layers(merged)[base]
    weights = dict(target.named_parameters())
    others = {index: dict(layers[index].named_parameters()) for index in gone}
    for index, other in others.items():
        if {name: weight.shape for name, weight in other.items()} != {name: weight.shape for name, weight in weights.items()}:
            raise UnsupportedModel(f"cannot merge layer {index} into layer {base}: they are not built alike")
    for name, weight in weights.items():
        owner, _, leaf = name.rpartition(".")
        if not _is_norm(target, owner):
            value = RULES[rule](weight.detach(), [other[name].detach() for other in others.values()])
            setattr(target.get_submodule(owner), leaf, nn.Parameter(value, requires_grad=weight.requires_grad))
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
    taken as in the released code: of the states after the final norm, all tokens of a sample as one vector. The defaults are
    those of the released notebook for Llama-2-13B. samples: windows, or token sequences of different length. layers_removed:
    stop when so many layers are gone (the published search has no such aim); it may end with fewer.

    Raises ValueError for settings out of range, no samples, an unknown rule and as `check_windows`, UnsupportedModel as
    `merge`, and RuntimeError for hidden states that are not finite.
    """
    n_layers = len(decoder_layers(model))
    to_go = n_layers - 1 if layers_removed is None else layers_removed
    if not 2 <= layers_per_merge < n_layers or not -1 <= threshold <= 1 or not 0 <= to_go < n_layers:
        raise ValueError(
            f"layers_per_merge={layers_per_merge} (2 to {n_layers - 1}), threshold={threshold} (-1 to 1) or "
            f"layers_removed={to_go} (0 to {n_layers - 1}) is out of range"
        )
    if rule not in RULES:
        raise ValueError(f"unknown rule {rule!r}; there are: {', '.join(RULES)}")
    if len(samples) == 0 or min(len(ids) for ids in samples) == 0:
        raise ValueError("no tokens to compare the hidden states on: give at least one sample, none of them empty")
    for ids in samples:
        check_windows(model, ids[None])
    dense = [_final_states(model, ids) for ids in samples]
    origins = [(index,) for index in range(n_layers)]
    steps = []
    # A merge at l leaves at least l + 1 layers: the next base always has one above it.
    for base in tqdm(range(n_layers - 1 - layers_per_merge, -1, -1), desc="merge", unit="layer", disable=not progress):
        following = min(layers_per_merge - 1, len(origins) - base - 1, to_go)
        if following == 0:
            break
        candidate = merge(model, base, following, rule)
        states = map(_final_states, [candidate] * len(dense), samples)
        cosine = sum(functional.cosine_similarity(*pair, dim=0).item() for pair in zip(states, dense, strict=True)) / len(dense)
        steps.append(MergeStep(base, following, cosine, cosine > threshold))
        if cosine > threshold:
            model = candidate
            origins[base : base + following + 1] = [sum(origins[base : base + following + 1], ())]
            to_go -= following
    return Collapse(model, tuple(origins), tuple(steps))


@torch.inference_mode()
def _final_states(model: PreTrainedModel, ids: Int64[Tensor, " position"]) -> Float[Tensor, " all"]:
    """The states after the final norm, all tokens in one float32 vector."""
    states = model.base_model(input_ids=ids[None].to(model.device), use_cache=False).last_hidden_state.float().flatten()
    if not bool(torch.isfinite(states).all()):
        raise RuntimeError("the final hidden states are NaN or infinite; check the weights, or use a dtype of wider range")
    return states
