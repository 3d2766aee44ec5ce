"""Shapes of published models, to be filled with random weights: how fast a model is does not depend on its weights."""

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from prunelib.models import decoder_layers, remove_layers
from prunelib.models.loading import checked_dtype
from prunelib.models.onednn import use_onednn
from prunelib.slicing.modeling import sliced_configuration
from prunelib.slicing.schedules import SlicePlan

_LLAMA2 = {"model_type": "llama", "vocab_size": 32000, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5}
_LLAMA3 = {"model_type": "llama", "vocab_size": 128256, "rms_norm_eps": 1e-5, "num_key_value_heads": 8}
_LLAMA3 |= {"max_position_embeddings": 131072, "rope_parameters": {"rope_theta": 500000.0, "rope_type": "default"}}
_MISTRAL = {"model_type": "mistral", "vocab_size": 32768, "num_key_value_heads": 8, "sliding_window": None}
_QWEN = {"model_type": "qwen2", "vocab_size": 151936, "tie_word_embeddings": True, "max_position_embeddings": 32768}
_REFERENCE = {"model_type": "llama", "vocab_size": 4096, "max_position_embeddings": 2048}

_FIELDS = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads")
_TABLE = {
    "ref-llama-32l": (_REFERENCE, (32, 160, 432, 5)),
    "tinyllama-1.1b": (_LLAMA2 | {"num_key_value_heads": 4, "max_position_embeddings": 2048}, (22, 2048, 5632, 32)),
    "llama-2-7b": (_LLAMA2, (32, 4096, 11008, 32)),
    "llama-2-13b": (_LLAMA2, (40, 5120, 13824, 40)),
    "llama-3.1-8b": (_LLAMA3, (32, 4096, 14336, 32)),
    "mistral-7b-v0.3": (_MISTRAL, (32, 4096, 14336, 32)),
    "qwen2.5-0.5b": (_QWEN | {"num_key_value_heads": 2}, (24, 896, 4864, 14)),
    "qwen2.5-1.5b": (_QWEN | {"num_key_value_heads": 2}, (28, 1536, 8960, 12)),
    "qwen2.5-3b": (_QWEN | {"num_key_value_heads": 2}, (36, 2048, 11008, 16)),
}

SHAPES = {name: kind | dict(zip(_FIELDS, sizes, strict=True)) for name, (kind, sizes) in _TABLE.items()}
"""Fields of the configuration of published models, by name. The main reference model has its head tied; here it is not."""


def shape_configuration(name: str, **changes: Any) -> PreTrainedConfig:
    """Configuration of one of `SHAPES`, some fields changed. Raises ValueError listing them for another name."""
    if name not in SHAPES:
        raise ValueError(f"there is no shape {name!r}; there are: {', '.join(SHAPES)}")
    return AutoConfig.for_model(**SHAPES[name] | changes)


def random_model(config: PreTrainedConfig, *, dtype: str = "float32", device: str | torch.device = "cpu") -> PreTrainedModel:
    """A model of random weights, made on the device itself, in evaluation mode: matrices N(0, 0.02), vectors as initialized.

    Its outputs mean nothing. Raises ValueError for an unknown dtype.
    """
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=checked_dtype(dtype)).eval().requires_grad_(False)
    generator = torch.Generator(device=device).manual_seed(0)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.normal_(0, 0.02, generator=generator)
    return use_onednn(model)


def random_sliced(config: PreTrainedConfig, plan: SlicePlan, **settings: Any) -> PreTrainedModel:
    """`random_model` in the shape that `slice_model` would give a dense one of this configuration."""
    return random_model(sliced_configuration(config, plan), **settings)


def without_layers(model: PreTrainedModel, count: int) -> PreTrainedModel:
    """The model without `count` layers, the deepest but the last: which ones does not matter to speed. Weights are shared."""
    n_layers = len(decoder_layers(model))
    if not 0 <= count < n_layers:
        raise ValueError(f"cannot remove {count} of {n_layers} layers: at least one must stay")
    return remove_layers(model, range(n_layers - 1 - count, n_layers - 1))
