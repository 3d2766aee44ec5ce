"""What is larger than memory, or runs in more than one process?"""

from prunelib.scale.distributed import collect
from prunelib.scale.offload import DoesNotFit, OffloadedModel

__all__ = ["DoesNotFit", "OffloadedModel", "collect"]
