"""Weights in fewer bits, multiplied in the precision of the activations: the formats that pruning is combined with.

Weights only, rounded to the nearest value, no calibration: what happens to a layer then does not depend on the others, and a
pruned model that is quantized equals a quantized model that is pruned. Only the linear maps of the decoder layers change;
embeddings, norms and head stay as they are, as in bitsandbytes.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float, Int8
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from prunelib.models import UnsupportedModel, decoder_layers, nf4


class Int8Linear(nn.Module):
    """A frozen linear map with 8-bit weights, integers up to ±127 times one scale for each output ("absmax").

    LLM.int8 (arXiv 2208.07339) scales weights alike, but rounds the activations as well, except for outlying columns.
    """

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        weight, scale = absmax_int8(linear.weight.detach())
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale)
        self.register_parameter("bias", linear.bias)

    def forward(self, states: Float[Tensor, "... in"]) -> Float[Tensor, "... out"]:
        # Integers up to 127 are exact in every floating type, so the scales can wait until after the product.
        output = functional.linear(states, self.weight.to(states.dtype)) * self.scale.to(states.dtype)
        return output if self.bias is None else output + self.bias.to(output.dtype)


def absmax_int8(weight: Float[Tensor, "out in"]) -> tuple[Int8[Tensor, "out in"], Float[Tensor, "out"]]:
    """Integers from -127 to 127 and float32 scales, whose product is nearest to `weight`; rows of zeros have scale 1."""
    largest = weight.float().abs().amax(dim=1)
    scale = torch.where(largest > 0, largest / 127, torch.ones_like(largest))
    return (weight.float() / scale[:, None]).round().to(torch.int8), scale


def _int8(model: PreTrainedModel) -> None:
    for layer in decoder_layers(model):
        for name, module in list(layer.named_modules()):
            if isinstance(module, nn.Linear):
                layer.set_submodule(name, Int8Linear(module))


def _bf16(model: PreTrainedModel) -> None:
    model.to(torch.bfloat16)


FORMATS: dict[str, Callable[[PreTrainedModel], None]] = {"bf16": _bf16, "int8": _int8, "nf4": nf4.quantize}
"""Each changes a model in place: weights and activations in bfloat16; weights in 8 bits; weights in 4 bits (bitsandbytes)."""


def to_format(model: PreTrainedModel, name: str) -> None:
    """Bring the weights of `model` into one of the `FORMATS`, in place.

    Raises ValueError for an unknown format, and UnsupportedModel where a layer holds no linear map (GPT-2 has its own kind).
    """
    if name not in FORMATS:
        raise ValueError(f"unknown format {name!r}; there are: {', '.join(FORMATS)}")
    for index, layer in enumerate(decoder_layers(model)):
        if not any(isinstance(module, nn.Linear) for module in layer.modules()):
            raise UnsupportedModel(f"model type {model.config.model_type!r}: layer {index} has no linear map to quantize")
    FORMATS[name](model)


def weight_bytes(model: nn.Module) -> int:
    """Bytes of all parameters and buffers, scales included; tied ones once."""
    tensors = {tensor.data_ptr(): tensor for tensor in (*model.parameters(), *model.buffers())}
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
