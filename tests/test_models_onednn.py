"""Linear layers through oneDNN: the same numbers to float32 rounding, forwards and backwards; nothing else changes."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional

from prunelib import models
from prunelib.models import onednn

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this build of PyTorch has no oneDNN")


def pair(bias: bool = True) -> tuple[nn.Linear, nn.Linear]:
    plain = nn.Linear(24, 40, bias=bias)
    return plain, onednn.use_onednn(nn.Sequential(copy.deepcopy(plain)))[0]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(3, 32, 24), (64, 24), (onednn.ROWS, 24)])
def test_product_equals_float64(bias, shape):
    plain, fast = pair(bias)
    rows = torch.randn(shape)
    exact = functional.linear(rows.double(), plain.weight.double(), plain.bias.double() if bias else None)
    torch.testing.assert_close(fast(rows).double(), exact, rtol=1e-5, atol=1e-5)
    assert fast(rows).shape == plain(rows).shape


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("bias", [True, False])
def test_gradients_are_those_of_the_plain_layer(frozen, bias):
    plain, fast = pair(bias)
    if frozen:  # as below an adapter
        plain.requires_grad_(False)
        fast.requires_grad_(False)
    found = []
    for layer in (plain, fast):
        rows = torch.linspace(-1, 1, 2 * 32 * 24).reshape(2, 32, 24).requires_grad_()
        layer(rows).square().sum().backward()
        found.append([rows.grad, *(parameter.grad for parameter in layer.parameters())])
    for expected, gradient in zip(*found, strict=True):
        if frozen and expected is None:
            assert gradient is None
        else:
            torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-4)


def test_few_rows_other_types_and_autocast_take_the_plain_way():
    plain, fast = pair()
    few = torch.randn(onednn.ROWS - 1, 24)
    assert torch.equal(fast(few), plain(few))
    many = torch.randn(64, 24)
    assert fast.double()(many.double()).dtype == torch.float64
    fast.float()
    with torch.autocast("cpu", torch.bfloat16):
        assert fast(many).dtype == torch.bfloat16


def test_subclasses_and_other_modules_are_left_alone():
    class Other(nn.Linear):
        """A linear layer of its own kind, such as those of quantized models."""

    model = onednn.use_onednn(nn.Sequential(Other(4, 4), nn.LayerNorm(4), nn.Linear(4, 4)))
    assert [type(module) for module in model] == [Other, nn.LayerNorm, onednn.OneDnnLinear]
    assert isinstance(model[2], nn.Linear)
    assert type(onednn.use_onednn_like(nn.Linear(2, 2), nn.Sequential(nn.Linear(4, 4)))[0]) is nn.Linear


def test_a_loaded_model_uses_it_is_pruned_and_saved_as_an_ordinary_one(tiny_llama, tmp_path):
    models.save(tiny_llama, None, tmp_path / "dense")
    loaded = models.load(tmp_path / "dense")
    assert any(type(module) is onednn.OneDnnLinear for module in loaded.modules())
    ids = torch.arange(64).reshape(2, 32)
    with torch.inference_mode():
        torch.testing.assert_close(loaded(ids).logits, tiny_llama(ids).logits, rtol=1e-4, atol=1e-5)
    pruned = models.remove_layers(loaded, [2])
    models.save(pruned, None, tmp_path / "pruned")
    again = models.load(tmp_path / "pruned")
    with torch.inference_mode():
        assert torch.equal(again(ids).logits, pruned(ids).logits)
