"""SimDiff (arXiv 2604.19520): MSSD, MASD, and importance that weighs them against similarity with alpha.

alpha I_diff + (1 - alpha) I_sim (Eq. 7): I_sim is half of block influence (Eq. 6), I_diff the sigmoid (Eq. 5) of how far a
layer moves the hidden states, squared (MSSD, Eq. 3) or absolute (MASD, Eq. 4). `prunelib.depth.select` searches alpha.
"""

import numpy as np
from jaxtyping import Float64

from prunelib.criteria.registry import criterion
from prunelib.criteria.similarity import block_influence, known_option, token_subset
from prunelib.criteria.statistics import LayerStats


@criterion(title="SimDiff (MSSD)", source="SimDiff, arXiv 2604.19520, Eq. 3 and 5-7")
def simdiff_mssd(
    stats: LayerStats, alpha: float | int = 0.5, reduce: str = "mean", tokens: str = "all"
) -> Float64[np.ndarray, "layer"]:
    """alpha I_diff + (1 - alpha) I_sim with the squared difference; `reduce` as in `layer_difference`; in [0, 1]."""
    return _mixed(stats, alpha, "mssd", reduce, tokens)


@criterion(title="SimDiff (MASD)", source="SimDiff, arXiv 2604.19520, Eq. 4-7")
def simdiff_masd(stats: LayerStats, alpha: float | int = 0.5, tokens: str = "all") -> Float64[np.ndarray, "layer"]:
    """alpha I_diff + (1 - alpha) I_sim with the mean absolute difference; in [0, 1]."""
    return _mixed(stats, alpha, "masd", "mean", tokens)


def _mixed(stats: LayerStats, alpha: float | int, kind: str, reduce: str, tokens: str) -> np.ndarray:
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha must lie between 0 and 1, got {alpha}")
    return alpha * difference_term(stats, kind, reduce, tokens) + (1 - alpha) * similarity_term(stats, tokens)


def similarity_term(stats: LayerStats, tokens: str = "all") -> Float64[np.ndarray, "layer"]:
    """SimDiff's I_sim, half of block influence (Eq. 6); in [0, 1]."""
    return block_influence(stats, tokens=tokens) / 2


def layer_difference(
    stats: LayerStats, kind: str = "mssd", reduce: str = "mean", tokens: str = "all"
) -> Float64[np.ndarray, "layer"]:
    """SimDiff's L_diff: squared (`mssd`, Eq. 3) or absolute (`masd`, Eq. 4) difference of output and input, mean over tokens.

    reduce="mean" also divides by the width, reduce="sum" does not. Eq. 3 prints the sum and Eq. 4 the mean, but a sum over
    thousands of dimensions saturates the sigmoid of Eq. 5, and the paper's Fig. 4 shows MSSD acting more weakly than MASD,
    not more strongly: hence the default.
    """
    sums = known_option("kind", kind, {"mssd": stats.squared_difference, "masd": stats.absolute_difference})
    width = known_option("reduce", reduce, {"mean": stats.hidden_size, "sum": 1})
    subset, count = token_subset(stats, tokens)
    return sums[subset] / (count * width)


def difference_term(
    stats: LayerStats, kind: str = "mssd", reduce: str = "mean", tokens: str = "all"
) -> Float64[np.ndarray, "layer"]:
    """SimDiff's I_diff, the sigmoid of `layer_difference` (Eq. 5); in [0.5, 1]."""
    # The same function as 1 / (1 + exp(-x)), without overflow on either side.
    return 0.5 + 0.5 * np.tanh(layer_difference(stats, kind, reduce, tokens) / 2)
