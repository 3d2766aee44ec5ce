"""4-bit weights: their values, and derivatives through them."""

import copy

import pytest
import torch
from architectures import build
from torch import nn

from prunelib.models import decoder_layers
from prunelib.models.nf4 import NF4Linear, quantize

# QLoRA (arXiv 2305.14314), appendix E.
LEVELS = torch.tensor(
    [
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334),
        *(-0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
        *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
    ]
)


@pytest.mark.parametrize("shape", [(160, 96), (128, 64), (48, 40)])
def test_four_bit_weights_are_the_nearest_levels_of_their_block(shape):
    linear = nn.Linear(*shape)
    weight = linear.weight.detach().flatten()
    blocks = weight.split(64)  # also where a row is no whole number of blocks, as in the reference models
    nearest = [LEVELS[((b / b.abs().max())[:, None] - LEVELS).abs().argmin(1)] * b.abs().max() for b in blocks]
    found = NF4Linear(linear).dequantized(torch.float32)
    torch.testing.assert_close(found, torch.cat(nearest).view_as(linear.weight), rtol=1e-6, atol=0)
    assert found.dtype == torch.float32
    torch.testing.assert_close(NF4Linear(linear).dequantized(torch.bfloat16), found.bfloat16())


@pytest.mark.parametrize("family", ["llama", "phi"])
def test_a_quantized_model_computes_and_differentiates_as_with_the_dequantized_weights(family):
    plain = build(family)
    quantized = copy.deepcopy(plain)
    quantize(quantized)
    inside = [module for layer in decoder_layers(quantized) for module in layer.modules()]
    assert all(isinstance(module, NF4Linear) for module in inside if isinstance(module, nn.Linear))
    assert not isinstance(quantized.get_output_embeddings(), NF4Linear)
    for name, module in quantized.named_modules():
        if isinstance(module, NF4Linear):
            plain.get_submodule(name).weight = nn.Parameter(module.dequantized(torch.float32))
    embedded = torch.randn(2, 7, plain.config.hidden_size)
    found = []
    for model in (quantized, plain):
        states = embedded.clone().requires_grad_()
        logits = model(inputs_embeds=states, use_cache=False).logits
        logits.square().sum().backward()
        found.append((logits.detach(), states.grad))
    for mine, theirs in zip(*found, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)
