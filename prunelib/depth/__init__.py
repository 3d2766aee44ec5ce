"""Which layers go?

One shot by importance (`lowest`, `lowest_block`), SimDiff's alpha (`alpha_path`, `exact_alpha`, `ternary_alpha`), or a search
that minimizes a `LayerSetLoss` (`greedy`, `beam`, `evolutionary`, `swap_descent`, `exhaustive`, `second_order`).
"""

from prunelib.depth.objective import LayerSetLoss
from prunelib.depth.search import beam, evolutionary, exhaustive, greedy, swap_descent
from prunelib.depth.select import AlphaInterval, alpha_path, exact_alpha, lowest, lowest_block, ternary_alpha
from prunelib.depth.surrogate import second_order
from prunelib.models.layerwise import LayerSet

__all__ = [
    "AlphaInterval",
    "LayerSet",
    "LayerSetLoss",
    "alpha_path",
    "beam",
    "evolutionary",
    "exact_alpha",
    "exhaustive",
    "greedy",
    "lowest",
    "lowest_block",
    "second_order",
    "swap_descent",
    "ternary_alpha",
]
