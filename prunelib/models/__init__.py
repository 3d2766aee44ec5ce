"""How is a layer removed, and the model run and saved?"""

from prunelib.models.architectures import UnsupportedModel
from prunelib.models.layers import (
    IdentityLayer,
    decoder_layers,
    evaluating,
    final_norm,
    is_spread,
    keep_layers,
    layers_path,
    parameter_count,
    parameter_fraction,
    probe_tokens,
    remove_layers,
    removed_fraction,
    with_layers,
)
from prunelib.models.loading import (
    DTYPES,
    CheckpointError,
    check_finite,
    check_vocabulary,
    checked_device,
    checked_dtype,
    checkpoint_folder,
    load,
    load_tokenizer,
)
from prunelib.models.saving import save, scratch_beside

__all__ = [
    "DTYPES",
    "CheckpointError",
    "IdentityLayer",
    "UnsupportedModel",
    "check_finite",
    "check_vocabulary",
    "checked_device",
    "checked_dtype",
    "checkpoint_folder",
    "decoder_layers",
    "evaluating",
    "final_norm",
    "is_spread",
    "keep_layers",
    "layers_path",
    "load",
    "load_tokenizer",
    "parameter_count",
    "parameter_fraction",
    "probe_tokens",
    "remove_layers",
    "removed_fraction",
    "save",
    "scratch_beside",
    "with_layers",
]
