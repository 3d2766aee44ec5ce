"""How is a layer removed, and the model run and saved?"""

from prunelib.models.architectures import UnsupportedModel
from prunelib.models.layers import (
    decoder_layers,
    evaluating,
    final_norm,
    is_spread,
    keep_layers,
    parameter_count,
    parameter_fraction,
    remove_layers,
    removed_fraction,
)
from prunelib.models.loading import DTYPES, CheckpointError, check_vocabulary, load, load_tokenizer
from prunelib.models.saving import save

__all__ = [
    "DTYPES",
    "CheckpointError",
    "UnsupportedModel",
    "check_vocabulary",
    "decoder_layers",
    "evaluating",
    "final_norm",
    "is_spread",
    "keep_layers",
    "load",
    "load_tokenizer",
    "parameter_count",
    "parameter_fraction",
    "remove_layers",
    "removed_fraction",
    "save",
]
