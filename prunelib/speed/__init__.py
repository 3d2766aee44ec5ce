"""How fast is a model, beside the limit?"""

from prunelib.speed.roofline import Roofline
from prunelib.speed.shapes import SHAPES
from prunelib.speed.speculative import acceptance, best_drafted, decode, expected_speedup
from prunelib.speed.timing import Decoder, Setting

__all__ = ["SHAPES", "Decoder", "Roofline", "Setting", "acceptance", "best_drafted", "decode", "expected_speedup"]
