"""Formats of fewer bits: what rounding does to weights, and that pruning and quantizing can be done in either order."""

import copy

import pytest
import torch
from architectures import build
from model_helpers import random_windows
from torch import nn

from prunelib.evaluation.layer_sets import layer_set_perplexity
from prunelib.evaluation.perplexity import perplexity
from prunelib.models import UnsupportedModel, decoder_layers, remove_layers
from prunelib.models.quantization import FORMATS, NF4Linear, absmax_int8, to_format, weight_bytes


def test_a_worked_example_of_absmax():
    weight = torch.tensor([[1.27, -0.64, 0.004, 0.006], [0.0, 0.0, 0.0, 0.0], [-254.0, 2.9, 3.1, 127.0]])
    integers, scale = absmax_int8(weight)
    assert integers.tolist() == [[127, -64, 0, 1], [0, 0, 0, 0], [-127, 1, 2, 64]]
    torch.testing.assert_close(scale, torch.tensor([0.01, 1.0, 2.0]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rounding_is_at_most_half_a_step(dtype):
    weight = torch.randn(40, 30, generator=torch.Generator().manual_seed(1)).to(dtype)
    integers, scale = absmax_int8(weight)
    assert integers.dtype == torch.int8 and (integers.abs().amax(dim=1) == 127).all()
    assert ((integers.float() * scale[:, None] - weight.float()).abs() <= scale[:, None] / 2 * (1 + 1e-5)).all()
    assert torch.equal(absmax_int8(integers.float() * scale[:, None])[0], integers)


def modules(model):
    return [module for layer in decoder_layers(model) for module in layer.modules()]


@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
@pytest.mark.parametrize("name", FORMATS)
def test_pruning_and_quantizing_commute(family, name):
    windows, removed = random_windows(), (1, 4)
    quantized = build(family)
    head = quantized.get_output_embeddings().weight.clone()
    to_format(quantized, name)
    walked = layer_set_perplexity(quantized, windows, [(), removed], progress=False)
    pruned = remove_layers(build(family), removed)
    to_format(pruned, name)
    tolerance = 2e-2 if name == "bf16" else 1e-5
    assert walked[removed].nll == pytest.approx(perplexity(pruned, windows).nll, abs=tolerance)
    # Something changed, and little; the head did not, but for bfloat16.
    assert 0 < abs(walked[()].nll - perplexity(build(family), windows).nll) < 0.1
    if name != "bf16":
        assert torch.equal(head, quantized.get_output_embeddings().weight)
        assert not any(isinstance(module, nn.Linear) and module.weight.is_floating_point() for module in modules(quantized))


def test_bytes_of_the_formats():
    dense = build("llama", hidden_size=64, intermediate_size=128, head_dim=16)
    linear = [module for module in modules(dense) if isinstance(module, nn.Linear)]
    whole = weight_bytes(dense)
    parameters = sum(parameter.numel() for parameter in dense.parameters())
    assert 4 * parameters <= whole <= 4 * parameters + 1000  # and the frequencies of the position embeddings
    to_format(dense, "int8")
    saved = sum(3 * module.weight.numel() - 4 * module.out_features for module in linear)
    assert whole - weight_bytes(dense) == saved
    assert weight_bytes(build("llama_tied")) < weight_bytes(build("llama"))


def test_what_cannot_be_quantized_is_refused():
    with pytest.raises(ValueError, match="unknown format 'int4'; there are: bf16, int8, nf4"):
        to_format(build("llama"), "int4")
    with pytest.raises(UnsupportedModel, match="'gpt2': layer 0 has no linear map to quantize"):
        to_format(build("gpt2"), "int8")


# --- 4 bits

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
    torch.testing.assert_close(NF4Linear(linear).dequantized(torch.bfloat16), found.bfloat16())


@pytest.mark.parametrize("family", ["llama", "phi"])
def test_a_quantized_model_computes_and_differentiates_as_with_the_dequantized_weights(family):
    plain = build(family)
    quantized = copy.deepcopy(plain)
    to_format(quantized, "nf4")
    assert all(isinstance(module, NF4Linear) for module in modules(quantized) if isinstance(module, nn.Linear))
    for name, module in quantized.named_modules():
        if isinstance(module, NF4Linear):
            plain.get_submodule(name).weight = nn.Parameter(module.dequantized(torch.float32))
    embedded = torch.randn(2, 7, plain.config.hidden_size)
    found = []
    for model in (quantized, plain):
        with torch.no_grad():
            model(inputs_embeds=embedded)  # an evaluation in between must not spoil what follows
        states = embedded.clone().requires_grad_()
        logits = model(inputs_embeds=states, use_cache=False).logits
        logits.square().sum().backward()
        found.append((logits.detach(), states.grad))
    for mine, theirs in zip(*found, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)
