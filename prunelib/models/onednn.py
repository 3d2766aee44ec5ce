"""Linear layers of float32 models on a CPU, multiplied by oneDNN instead of MKL: half of the time on AMD's processors.

See `benchmarks/linear_cost.py`. Results agree to float32 rounding.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

ROWS = 16  # with fewer, as in generation token by token, the call costs more than the faster product saves


def use_onednn(model: nn.Module) -> nn.Module:
    """`model`, in which every plain linear layer becomes an `OneDnnLinear`; weights, names and subclasses stay as they are."""
    if torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        for module in model.modules():
            if type(module) is nn.Linear:
                module.__class__ = OneDnnLinear
    return model


def use_onednn_like(example: nn.Module, model: nn.Module) -> nn.Module:
    """`model`, multiplying as `example` does: two builds of one model then compare without a difference of rounding."""
    return use_onednn(model) if any(isinstance(module, OneDnnLinear) for module in example.modules()) else model


class OneDnnLinear(nn.Linear):
    """`nn.Linear` through oneDNN for at least `ROWS` rows of float32 on a CPU outside autocast, else PyTorch's own product."""

    def forward(self, input: Float[Tensor, "... features"]) -> Float[Tensor, "... outputs"]:
        possible = (
            input.dtype == self.weight.dtype == torch.float32
            and input.device.type == self.weight.device.type == "cpu"
            and input.shape[-1] == self.weight.shape[1]  # the error of a wrong width is PyTorch's
            and input.numel() >= ROWS * input.shape[-1]
            and not torch.is_autocast_enabled("cpu")
        )
        if not possible:
            return functional.linear(input, self.weight, self.bias)
        if torch.is_grad_enabled():
            return _Product.apply(input, self.weight, self.bias)
        return _product(input, self.weight, self.bias)


def _product(rows: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(rows, weight, bias, "none", [], "")


class _Product(torch.autograd.Function):
    # The older form, with a context: for the newer one PyTorch inspects signatures in every call, half the cost of a product.
    @staticmethod
    def forward(ctx, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        # A frozen weight has no gradient, and then the input need not be kept: most of a LoRA step's memory.
        ctx.save_for_backward(input if ctx.needs_input_grad[1] else None, weight)
        return _product(input, weight, bias)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        input, weight = ctx.saved_tensors
        of_input, of_weight, of_bias = ctx.needs_input_grad
        rows = gradient.reshape(-1, gradient.shape[-1])
        for_weight = _product(rows.t(), input.reshape(-1, input.shape[-1]).t()) if of_weight else None
        return _product(gradient, weight.t()) if of_input else None, for_weight, rows.sum(0) if of_bias else None
