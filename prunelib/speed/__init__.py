"""How fast is a model, beside the limit?"""

from prunelib.speed.roofline import OpCount, Roofline, measured_roofline, prefill_ops, step_ops
from prunelib.speed.shapes import SHAPES, random_model, random_sliced, shape_configuration
from prunelib.speed.speculative import acceptance, best_drafted, decode, expected_speedup
from prunelib.speed.timing import Decoder, Quartiles, Setting

__all__ = [
    "SHAPES",
    "Decoder",
    "OpCount",
    "Quartiles",
    "Roofline",
    "Setting",
    "acceptance",
    "best_drafted",
    "decode",
    "expected_speedup",
    "measured_roofline",
    "prefill_ops",
    "random_model",
    "random_sliced",
    "shape_configuration",
    "step_ops",
]
