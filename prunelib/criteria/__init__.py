"""What is a layer worth?

Layer statistics (`collect`, `LayerStats`) and the rules that make an importance of them, by name in `CRITERIA` and
`BLOCK_CRITERIA`; rules that need the model itself, in `ABLATIONS`.
"""

from prunelib.criteria import loss_based, simdiff, similarity
from prunelib.criteria.registry import ABLATIONS, BLOCK_CRITERIA, CRITERIA, ablation, block_criterion, criterion
from prunelib.criteria.simdiff import difference_term, layer_difference, similarity_term
from prunelib.criteria.statistics import LayerStats, collect

__all__ = [
    "ABLATIONS",
    "BLOCK_CRITERIA",
    "CRITERIA",
    "LayerStats",
    "ablation",
    "block_criterion",
    "collect",
    "criterion",
    "difference_term",
    "layer_difference",
    "loss_based",
    "simdiff",
    "similarity",
    "similarity_term",
]
