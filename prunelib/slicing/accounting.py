"""Parameters and FLOPs of dense, shallower and sliced models, counted on models without weights: nothing is loaded."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from prunelib.models import parameter_count
from prunelib.slicing.modeling import Diagonal, SlicedLayer, empty_model, sliced_configuration
from prunelib.slicing.schedules import SlicePlan

HIGHEST = 0.85  # slice percentage that `plan_of_size` tries


@dataclass(frozen=True)
class ParameterCount:
    """Parameters and FLOPs of a model beside those of its dense one, with shortcuts and the untied head.

    FLOPs are per token (a multiply-add is two): those of the linear maps and of attention over `context` earlier tokens.
    """

    dense_parameters: int
    parameters: int
    shortcut_parameters: int
    dense_flops: int
    flops: int
    context: int

    @property
    def removed(self) -> float:
        """Fraction of the parameters that is really gone; negative where shortcuts (or the untied head) outweigh the cuts."""
        return 1 - self.parameters / self.dense_parameters

    @property
    def flops_removed(self) -> float:
        """Fraction of the FLOPs that is really gone."""
        return 1 - self.flops / self.dense_flops


def count_parameters(
    config: PreTrainedConfig, plan: SlicePlan | None = None, *, shortcuts: str = "folded", context: int = 0
) -> ParameterCount:
    """Parameters and FLOPs per token of a dense model, and of the same as `plan` would slice it.

    Raises ValueError when the plan does not fit, and UnsupportedModel for a plan of a family that cannot be sliced.
    """
    dense = counted = empty_model(config)
    if plan is not None:
        counted = empty_model(sliced_configuration(config, plan, shortcuts=shortcuts))
    added = [layer.shortcuts for layer in counted.modules() if isinstance(layer, SlicedLayer)]
    return ParameterCount(
        dense_parameters=parameter_count(dense),
        parameters=parameter_count(counted),
        shortcut_parameters=sum(map(parameter_count, added)),
        dense_flops=_flops(dense, context),
        flops=_flops(counted, context),
        context=context,
    )


def plan_of_size(config: PreTrainedConfig, removed: float | int, schedule: Callable[[float], SlicePlan]) -> SlicePlan:
    """The plan of a schedule that removes this fraction of a dense model's parameters, folded shortcuts included, to 0.1 %.

    `schedule` makes a plan of a slice percentage: ``lambda s: constant(32, 4096, s)``. The smallest one that removes enough is
    found by bisection up to `HIGHEST`. Raises ValueError when even that does not remove so much.
    """
    low, high, plan = 0.0, HIGHEST, schedule(HIGHEST)
    found = count_parameters(config, plan).removed
    if not 0 <= removed <= found:
        raise ValueError(f"removed={removed}: this schedule removes 0 to {found:.3f} of the parameters, at slices up to {high}")
    while found - removed > 1e-3 and high - low > 1e-4:
        middle = (low + high) / 2
        candidate = schedule(middle)
        share = count_parameters(config, candidate).removed
        if share >= removed:
            high, plan, found = middle, candidate, share
        else:
            low = middle
    return plan


def _flops(model: PreTrainedModel, context: int) -> int:
    config = model.config
    heads = config.num_attention_heads
    head_size = getattr(config, "head_dim", None) or config.hidden_size // heads
    linear = sum(2 * module.weight.numel() for module in model.modules() if isinstance(module, nn.Linear))
    diagonal = sum(module.weight.numel() for module in model.modules() if isinstance(module, Diagonal))
    return linear + diagonal + 4 * context * heads * head_size * config.num_hidden_layers
