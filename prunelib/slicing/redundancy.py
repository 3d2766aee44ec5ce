"""Layer redundancy (LR), from which Dynamic LLM Slicing (arXiv 2411.03513) makes the width of every layer. Numpy only."""

from collections.abc import Callable

import numpy as np
from jaxtyping import Float64
from scipy.stats import rankdata

from prunelib.criteria.similarity import block_influence
from prunelib.criteria.statistics import LayerStats

QUANTILE = 0.1  # what "clipped" leaves out at either end


def layer_redundancy(
    stats: LayerStats, normalize: str = "minmax", last: float | int | None = None
) -> Float64[np.ndarray, "layer"]:
    """LR in [0, 1], 1 = most redundant: 1 - block influence, brought to that range.

    normalize: "minmax" as published; "rank" spaces the layers evenly (ties share their mean rank); "clipped" is min-max after
        values beyond the quantiles `QUANTILE` and 1 - `QUANTILE` were set to these, so that one outlying layer does not decide.
        Where all layers are equally important, all are 1.
    last: replaces the block influence of the last layer. With `criteria.statistics.influence_through_final_norm` the score is
        that of the released code, which compares the last layer's input with its output after the final norm.

    Raises ValueError for an unknown normalization, and RuntimeError as `block_influence`.
    """
    if normalize not in NORMALIZATIONS:
        raise ValueError(f"unknown normalize {normalize!r}; there are: {', '.join(NORMALIZATIONS)}")
    importance = block_influence(stats)
    if last is not None:
        importance[-1] = last
    return 1 - NORMALIZATIONS[normalize](importance)


def _minmax(importance: np.ndarray) -> np.ndarray:
    span = importance.max() - importance.min()
    return (importance - importance.min()) / span if span > 0 else np.zeros(len(importance))


NORMALIZATIONS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "minmax": _minmax,
    "rank": lambda importance: _minmax(rankdata(importance)),
    "clipped": lambda importance: _minmax(np.clip(importance, *np.quantile(importance, [QUANTILE, 1 - QUANTILE]))),
}
