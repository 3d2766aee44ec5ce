"""Weights of decoder layers in fewer bits, rounded without calibration, multiplied in the precision of the activations."""

from collections.abc import Callable

import torch
from jaxtyping import Float, Int8
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from prunelib.models.architectures import UnsupportedModel
from prunelib.models.layers import decoder_layers

BLOCK = 64  # weights of NF4 with one scale


class Int8Linear(nn.Module):
    """A frozen linear map with 8-bit weights, integers up to ±127 times one scale for each output, as in LLM.int8."""

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


class NF4Linear(nn.Linear):
    """A frozen linear map with 4-bit normal-float weights in blocks of 64 (QLoRA), dequantized whenever it is applied.

    Quantized by bitsandbytes, whose own layer cannot be differentiated on some CPUs once it has been evaluated.
    """

    def __init__(self, linear: nn.Linear):
        from bitsandbytes.functional import quantize_4bit

        nn.Module.__init__(self)  # the weights are those of `linear`, not new ones
        self.in_features, self.out_features = linear.in_features, linear.out_features
        packed, state = quantize_4bit(linear.weight.detach().flatten(), blocksize=BLOCK, quant_type="nf4")
        self.weight = nn.Parameter(packed, requires_grad=False)
        self.register_buffer("absmax", state.absmax)
        self.register_parameter("bias", linear.bias)

    def dequantized(self, dtype: torch.dtype) -> Float[Tensor, "out in"]:
        """The weights as they are applied."""
        from bitsandbytes.functional import QuantState, dequantize_4bit

        # As one long row: where a row is no whole number of blocks, bitsandbytes 0.50 takes the wrong scales on a CPU.
        shape = torch.Size((self.out_features * self.in_features,))
        state = QuantState(self.absmax, shape=shape, blocksize=BLOCK, quant_type="nf4", dtype=dtype)
        return dequantize_4bit(self.weight, state).view(self.out_features, self.in_features)

    def forward(self, states: Float[Tensor, "... in"]) -> Float[Tensor, "... out"]:
        output = _Dequantized.apply(states, self)
        return output if self.bias is None else output + self.bias.to(output.dtype)


class _Dequantized(torch.autograd.Function):
    """states @ weights.T; the weights are dequantized once more for the derivative instead of being kept."""

    @staticmethod
    def forward(ctx, states: Tensor, linear: NF4Linear) -> Tensor:
        ctx.linear, ctx.dtype = linear, states.dtype
        return functional.linear(states, linear.dequantized(states.dtype))

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        return (gradient @ ctx.linear.dequantized(gradient.dtype)).to(ctx.dtype), None


FORMATS: dict[str, Callable[[nn.Linear], nn.Module]] = {
    "bf16": lambda linear: linear.to(torch.bfloat16),
    "int8": Int8Linear,
    "nf4": NF4Linear,
}
"""What becomes of each linear map of the decoder layers; in "bf16" everything else, activations too, is bfloat16 as well."""


def to_format(model: PreTrainedModel, name: str) -> None:
    """Bring the weights of `model` into one of the `FORMATS`, in place; UnsupportedModel where a layer holds no linear map."""
    if name not in FORMATS:
        raise ValueError(f"unknown format {name!r}; there are: {', '.join(FORMATS)}")
    for index, layer in enumerate(decoder_layers(model)):
        linears = [(path, module) for path, module in layer.named_modules() if isinstance(module, nn.Linear)]
        if not linears:
            raise UnsupportedModel(f"model type {model.config.model_type!r}: layer {index} has no linear map to quantize")
        for path, linear in linears:
            layer.set_submodule(path, FORMATS[name](linear))
    if name == "bf16":
        model.to(torch.bfloat16)


def weight_bytes(model: nn.Module) -> int:
    """Bytes of all parameters and buffers, scales included; tied ones once."""
    tensors = {tensor.data_ptr(): tensor for tensor in (*model.parameters(), *model.buffers())}
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
