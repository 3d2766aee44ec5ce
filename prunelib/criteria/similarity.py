"""From `LayerStats` to the importance of every layer or block of layers: higher = keep. Numpy only, no model."""

from typing import Any

import numpy as np
from jaxtyping import Float64

from prunelib.criteria.registry import block_criterion, criterion
from prunelib.criteria.statistics import SUBSETS, LayerStats


@criterion(title="Block influence", source="ShortGPT, arXiv 2403.03853; SimDiff Eq. 2")
def block_influence(stats: LayerStats, tokens: str = "all") -> Float64[np.ndarray, "layer"]:
    """1 - mean over tokens of cos(layer input, layer output); in [0, 2]."""
    subset, count = token_subset(stats, tokens)
    return 1 - np.diagonal(stats.cosine[subset], offset=1) / count


@criterion(title="Relative magnitude", source="ablation in ShortGPT, arXiv 2403.03853")
def relative_magnitude(stats: LayerStats, tokens: str = "all") -> Float64[np.ndarray, "layer"]:
    """Mean over tokens of |f(x)| / |x + f(x)|, where f is what the layer adds to the residual stream; >= 0."""
    subset, count = token_subset(stats, tokens)
    return stats.relative_magnitude[subset] / count


@criterion(title="Random layers", source="control")
def random(stats: LayerStats, seed: int = 0) -> Float64[np.ndarray, "layer"]:
    """Ranks of one seeded permutation: for one seed, the layers removed at K are among those removed at K + 1."""
    return np.random.default_rng(seed).permutation(stats.n_layers).astype(np.float64)


@criterion(title="Deepest layers", source="simple rule of Gromov et al., arXiv 2403.17887", protect_last=1)
def deepest(stats: LayerStats) -> Float64[np.ndarray, "layer"]:
    """The deeper, the less important. With the last layer protected, as published, the removed block ends just before it."""
    return np.arange(stats.n_layers, dtype=np.float64)[::-1].copy()


# The formula of Gromov et al. lets a block end at the last layer, which ruins any model that is not healed; their text keeps
# it in the simple rule. protect_last=0 in `prunelib.depth.lowest_block` is the formula as printed.
@block_criterion(title="Angular distance", source="Gromov et al., arXiv 2403.17887", protect_last=1)
def angular(stats: LayerStats, n: int, tokens: str = "last") -> Float64[np.ndarray, "start"]:
    """Angular distance between input and output of every block of n layers: element l is for layers l .. l+n-1.

    The mean over tokens of arccos(cos) / pi, in [0, 1]; L + 1 - n elements. Raises ValueError unless 1 <= n <= L.
    """
    subset, count = _block(stats, n, tokens)
    return np.diagonal(stats.angle[subset], offset=n) / count


@block_criterion(title="Block cosine", source="LLM-Streamline, arXiv 2403.19135", protect_last=1)
def block_cosine(stats: LayerStats, n: int, tokens: str = "all") -> Float64[np.ndarray, "start"]:
    """(1 - mean over tokens of cos(block input, block output)) / 2 of every block of n layers; L + 1 - n elements in [0, 1].

    SimDiff's I_sim of a block. (The released code of LLM-Streamline takes the state after the final norm for blocks that end
    at the last layer.) Raises ValueError unless 1 <= n <= L.
    """
    subset, count = _block(stats, n, tokens)
    return (1 - np.diagonal(stats.cosine[subset], offset=n) / count) / 2


def _block(stats: LayerStats, n: int, tokens: str) -> tuple[int, float]:
    if not 1 <= n <= stats.n_layers:
        raise ValueError(f"a block of {n} layers does not exist in {stats.n_layers} layers; n must be 1 to {stats.n_layers}")
    return token_subset(stats, tokens)


def known_option(option: str, value: str, choices: dict[str, Any]) -> Any:
    if value not in choices:
        raise ValueError(f"unknown {option} {value!r}; there are: {', '.join(choices)}")
    return choices[value]


def token_subset(stats: LayerStats, tokens: str) -> tuple[int, float]:
    """Index of a token subset on axis 0 of the statistics, and its number of tokens."""
    subset = known_option("tokens", tokens, {name: index for index, name in enumerate(SUBSETS)})
    count = float(stats.count[subset])
    if not count > 0:
        raise ValueError(f"the statistics hold no tokens in subset {tokens!r}; collect them on longer or more windows")
    return subset, count
