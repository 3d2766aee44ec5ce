"""Linear layers through oneDNN: the same numbers to float32 rounding, forwards and backwards; nothing else changes."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional

from prunelib.models import onednn

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this build of PyTorch has no oneDNN")


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(3, 32, 24), (64, 24), (onednn.ROWS, 24)])
def test_product_equals_float64_and_gradients_are_those_of_the_plain_layer(shape, bias, frozen):
    plain = nn.Linear(24, 40, bias=bias).requires_grad_(not frozen)  # frozen as below an adapter
    fast = onednn.use_onednn(nn.Sequential(copy.deepcopy(plain)))[0]
    rows = torch.randn(shape)
    exact = functional.linear(rows.double(), plain.weight.double(), plain.bias.double() if bias else None)
    torch.testing.assert_close(fast(rows).double(), exact, rtol=1e-5, atol=1e-5)
    found = []
    for layer in (plain, fast):
        states = rows.clone().requires_grad_()
        layer(states).square().sum().backward()
        found.append([states.grad, *(parameter.grad for parameter in layer.parameters())])
    for expected, gradient in zip(*found, strict=True):
        assert (expected is None) == (gradient is None)
        if expected is not None:
            torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-4)


def test_few_rows_other_types_autocast_and_other_modules_are_left_alone():
    class Other(nn.Linear):
        """A linear layer of its own kind, such as those of quantized models."""

    model = onednn.use_onednn(nn.Sequential(Other(4, 4), nn.LayerNorm(4), nn.Linear(24, 40)))
    assert [type(module) for module in model] == [Other, nn.LayerNorm, onednn.OneDnnLinear]
    assert type(onednn.use_onednn_like(nn.Linear(2, 2), nn.Sequential(nn.Linear(4, 4)))[0]) is nn.Linear
    fast, few, many = model[2], torch.randn(onednn.ROWS - 1, 24), torch.randn(64, 24)
    assert torch.equal(fast(few), functional.linear(few, fast.weight, fast.bias))
    with torch.autocast("cpu", torch.bfloat16):
        assert fast(many).dtype == torch.bfloat16
    assert fast.double()(many.double()).dtype == torch.float64
