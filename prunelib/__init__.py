"""A laboratory for making language models shallower and thinner without retraining them."""

from prunelib.slicing.registration import register_model_type

register_model_type()
