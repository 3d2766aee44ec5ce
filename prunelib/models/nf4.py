"""Frozen 4-bit weights for QLoRA on any processor, by bitsandbytes' quantization and arithmetic of our own.

The weights are always dequantized before they are multiplied. The library's own layer changes its weights to a layout without
derivatives when it is evaluated on some processors, so that measuring in the middle would spoil training.
"""

from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from prunelib.models import decoder_layers


class NF4Linear(nn.Linear):
    """A frozen linear map with 4-bit normal-float weights in blocks of 64 (QLoRA), dequantized whenever it is applied."""

    BLOCK: ClassVar[int] = 64

    def __init__(self, linear: nn.Linear):
        from bitsandbytes.functional import quantize_4bit

        nn.Module.__init__(self)  # the weights are those of `linear`, not new ones
        self.in_features, self.out_features = linear.in_features, linear.out_features
        packed, state = quantize_4bit(linear.weight.detach().flatten(), blocksize=self.BLOCK, quant_type="nf4")
        self.weight = nn.Parameter(packed, requires_grad=False)
        self.register_buffer("absmax", state.absmax)
        self.register_parameter("bias", linear.bias)

    def dequantized(self, dtype: torch.dtype) -> Float[Tensor, "out in"]:
        """The weights as they are applied."""
        from bitsandbytes.functional import QuantState, dequantize_4bit

        # As one long row: for a matrix whose rows are no whole number of blocks, bitsandbytes 0.50 takes the wrong scales on a
        # CPU, without a word.
        shape = torch.Size((self.out_features * self.in_features,))
        state = QuantState(self.absmax, shape=shape, blocksize=self.BLOCK, quant_type="nf4", dtype=dtype)
        return dequantize_4bit(self.weight, state).view(self.out_features, self.in_features)

    def forward(self, states: Float[Tensor, "... in"]) -> Float[Tensor, "... out"]:
        output = _Dequantized.apply(states, self)
        return output if self.bias is None else output + self.bias.to(output.dtype)


class _Dequantized(torch.autograd.Function):
    """states @ weightsᵀ; the weights are dequantized once more for the derivative instead of being kept."""

    @staticmethod
    def forward(ctx, states: Tensor, linear: NF4Linear) -> Tensor:
        ctx.linear, ctx.dtype = linear, states.dtype
        return functional.linear(states, linear.dequantized(states.dtype))

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        return (gradient @ ctx.linear.dequantized(gradient.dtype)).to(ctx.dtype), None


def quantize(model: PreTrainedModel) -> None:
    """Put 4-bit weights in the place of every linear map of the decoder layers."""
    for layer in decoder_layers(model):
        for name, module in list(layer.named_modules()):
            if isinstance(module, nn.Linear):
                layer.set_submodule(name, NF4Linear(module))
