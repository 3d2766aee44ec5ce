"""How wide each layer is, as data: slice plans, and the schedules that make them. Numpy only, no model.

A slice is the fraction of the residual stream's width D that a layer loses. `slice_percentage` (S_P) is the mean slice over the
L layers, `slice_base` (S_B) the slice of the least redundant layer, both fractions of 1.
"""

from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import numpy as np
from jaxtyping import Float64, Int64

from prunelib.models.plans import JsonPlan

CAP = 0.9  # no layer loses more than this unless a schedule is told otherwise


@dataclass(frozen=True)
class SlicePlan(JsonPlan):
    """Width of the residual stream at every decoder layer.

    hidden_size: width D of the dense model. widths: of each layer, 1 to D: of the input of its attention and of its MLP; the
    embeddings are as wide as layer 0, the input of the head D. method, settings: what chose them, as plain JSON values.

    Raises ValueError when a width is out of range, there is none, or `settings` cannot be written as JSON.
    """

    _name: ClassVar[str] = "slice plan"

    hidden_size: int
    widths: tuple[int, ...]
    method: str
    settings: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        if not self.widths:
            raise ValueError("a slice plan needs the width of at least one layer")
        wrong = [(layer, width) for layer, width in enumerate(self.widths) if not 1 <= width <= self.hidden_size]
        if wrong:
            raise ValueError(f"widths must lie between 1 and {self.hidden_size}; (layer, width) that do not: {wrong}")
        super().__post_init__()

    @property
    def n_layers(self) -> int:
        """Number of decoder layers L."""
        return len(self.widths)

    @property
    def slices(self) -> tuple[float, ...]:
        """Fraction of the width that each layer really loses."""
        return tuple(1 - width / self.hidden_size for width in self.widths)

    @property
    def mean_slice(self) -> float:
        """Mean of `slices`: the slice percentage really reached. It is not the fraction of parameters removed."""
        return 1 - sum(self.widths) / (self.hidden_size * self.n_layers)


def constant(n_layers: int, hidden_size: int, slice_percentage: float | int, *, multiple: int = 1) -> SlicePlan:
    """Every layer loses the same (SliceGPT, arXiv 2401.15024). Raises ValueError as `from_slices`."""
    _check_percentage(slice_percentage)
    plan = from_slices(np.full(n_layers, float(slice_percentage)), hidden_size, multiple=multiple)
    return replace(plan, method="constant", settings=plan.settings | {"slice_percentage": slice_percentage})


def dynamic(
    redundancy: Float64[np.ndarray, "layer"],
    hidden_size: int,
    slice_percentage: float | int,
    slice_base: float | int,
    *,
    cap: float | int = CAP,
    multiple: int = 1,
) -> SlicePlan:
    """Redundant layers lose more: `final_slices` of a layer redundancy (arXiv 2411.03513), as widths.

    Raises ValueError as `final_slices` and `from_slices`.
    """
    slices = final_slices(redundancy, slice_percentage, slice_base, cap=cap)
    settings = {"slice_percentage": slice_percentage, "slice_base": slice_base, "cap": cap, "redundancy": redundancy.tolist()}
    plan = from_slices(slices, hidden_size, multiple=multiple)
    return replace(plan, method="layer_redundancy", settings=plan.settings | settings)


def from_slices(slices: Float64[np.ndarray, "layer"], hidden_size: int, *, multiple: int = 1) -> SlicePlan:
    """Any slices as widths, each a multiple of `multiple`; units left over go to the largest remainders, first layers first.

    Raises ValueError unless all slices lie in [0, 1), `multiple` divides `hidden_size`, and every width is at least `multiple`.
    """
    if not len(slices) or not bool(((slices >= 0) & (slices < 1)).all()):
        raise ValueError(f"slices must be fractions of the width, at least 0 and below 1; got {slices.tolist()}")
    if multiple < 1 or hidden_size < 1 or hidden_size % multiple:
        raise ValueError(f"a width of {hidden_size} cannot be cut in steps of {multiple}: give a divisor of it")
    widths = multiple * _largest_remainder((1 - slices) * hidden_size / multiple)
    if widths.min() < 1:
        layers = np.flatnonzero(widths < 1).tolist()
        raise ValueError(f"layers {layers} would keep no width at slices {slices[layers].tolist()}: slice less")
    return SlicePlan(hidden_size, tuple(widths.tolist()), "given", {"multiple": multiple})


def _largest_remainder(units: Float64[np.ndarray, "layer"]) -> Int64[np.ndarray, "layer"]:
    # Rounded first: 0.7 * 4096 / 8 * 32 must not lose a unit to the last bit of a float. The sum is rounded on its own: one of
    # n + 1/2, as bisection meets it, would otherwise depend on the order in which a processor adds.
    exact = np.round(units, 9)
    whole = np.floor(exact).astype(np.int64)
    missing = round(round(float(exact.sum()), 6)) - int(whole.sum())
    whole[np.argsort(whole - exact, kind="stable")[:missing]] += 1
    return whole


def redundancy_slices(
    redundancy: Float64[np.ndarray, "layer"], slice_percentage: float | int, slice_base: float | int
) -> Float64[np.ndarray, "layer"]:
    """SLR_l = v_l (S_P - S_B) / mean(v), v the min-max of the redundancy: what a layer loses beyond the slice base.

    Where all redundancies are equal, every layer's is S_P - S_B, which makes a constant schedule. Raises ValueError unless
    0 <= S_B <= S_P < 1 and all redundancies lie in [0, 1], 1 = most redundant.
    """
    _check_percentage(slice_percentage)
    if not len(redundancy) or not bool(((redundancy >= 0) & (redundancy <= 1)).all()):
        what = "layer redundancies lie between 0 and 1, 1 = most redundant; raw importances are not redundancies"
        raise ValueError(f"{what} (prunelib.slicing.layer_redundancy makes them); got {redundancy.tolist()}")
    if not 0 <= slice_base <= slice_percentage:
        raise ValueError(f"slice_base={slice_base}: it lies between 0 and slice_percentage={slice_percentage}")
    low, high = float(redundancy.min()), float(redundancy.max())
    if low == high:
        return np.full(len(redundancy), float(slice_percentage - slice_base))
    scaled = (redundancy - low) / (high - low)
    return scaled * (slice_percentage - slice_base) / scaled.mean()


def final_slices(
    redundancy: Float64[np.ndarray, "layer"], slice_percentage: float | int, slice_base: float | int, *, cap: float | int = CAP
) -> Float64[np.ndarray, "layer"]:
    """FS_l = SLR_l + S_B, the slice of every layer; their mean is S_P.

    Where FS exceeds `cap` (the published formula can exceed 1), the layer gets `cap`, and all others the same addition, such
    that the mean stays S_P. Raises ValueError as `redundancy_slices`, and when S_P > cap or cap is not below 1.
    """
    slices = redundancy_slices(redundancy, slice_percentage, slice_base) + slice_base
    if not slice_percentage <= cap < 1:
        raise ValueError(f"cap={cap}: it must be below 1 and at least slice_percentage={slice_percentage}")
    return slices if slices.max() <= cap else _filled(slices, cap, slice_percentage)


def _filled(slices: Float64[np.ndarray, "layer"], cap: float, mean: float) -> Float64[np.ndarray, "layer"]:
    """min(slices + t, cap) with the t >= 0 that gives the mean, found exactly: a capped layer stays capped as t grows."""
    capped = slices > cap
    while True:
        if capped.all():
            return np.full(len(slices), cap)
        level = (mean * len(slices) - cap * capped.sum() - slices[~capped].sum()) / (~capped).sum()
        beyond = ~capped & (slices + level > cap)
        if not beyond.any():
            return np.where(capped, cap, slices + level)
        capped |= beyond


def _check_percentage(slice_percentage: float | int) -> None:
    if not 0 <= slice_percentage < 1:
        raise ValueError(f"slice_percentage={slice_percentage}: a fraction, at least 0 and below 1")
