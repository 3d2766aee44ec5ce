"""Slicing: what is not cut computes the same, what is cut agrees with an independent float64 reference, and a sliced model is a
model like any other: saved, loaded, generated with, trained."""

import copy
import math
import os
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
from architectures import ARCHITECTURES, build
from torch import nn
from torch.nn import functional
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    OPTConfig,
    PhiConfig,
)

from prunelib import models
from prunelib.evaluation import perplexity
from prunelib.models import UnsupportedModel, parameter_count
from prunelib.models.architectures import ARCHITECTURES as WIRED
from prunelib.slicing import rotate as slicing
from prunelib.slicing.modeling import SHORTCUTS, Diagonal, Identity, SlicedLayer, positions, shortcut_kinds
from prunelib.slicing.rotate import (
    _on,
    _singular_vectors,
    account,
    dense_configuration,
    plan_of_size,
    principal_axes,
    random_axes,
    slice_model,
)
from prunelib.slicing.schedules import SlicePlan, constant
from prunelib.text import corpora
from prunelib.text.windows import consecutive_windows, sample_windows

ROOT = Path(__file__).parents[1]
FAMILIES = [
    "llama",
    "llama_tied",
    "mistral",
    "ministral",
    "qwen2",
    "qwen2_sliding",
    "qwen3",
    "smollm3",
    "gemma",
    "phi3",
    "phi",
    "gpt_neox",
    "opt",
]
FULL = SlicePlan(32, (32,) * 6, "test")
CUT = SlicePlan(32, (28, 20, 24, 16, 16, 30), "test")
UNCUT_LAYERS = SlicePlan(32, (32, 20, 32, 32, 16, 32), "test")


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randint(0, 97, (5, 24))


def sliced(model, plan, tokens, **options):
    return slice_model(model, plan, tokens, batch_size=2, progress=False, **options)


def logits(model, tokens):
    with torch.no_grad():
        return model(input_ids=tokens, use_cache=False).logits


def difference(a, b, tokens) -> float:
    return float((logits(a, tokens) - logits(b, tokens)).abs().max())


class ExactNorm(nn.Module):
    """RMSNorm in float64: those of the families fall back to float32, which is noise beside 1e-9."""

    def __init__(self, norm: nn.Module):
        super().__init__()
        self.weight = norm.weight
        self.offset = 1.0 if "Gemma" in type(norm).__name__ else 0.0
        self.eps = getattr(norm, "variance_epsilon", None) or norm.eps

    def forward(self, x):
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps) * (self.weight + self.offset)


def exact(model):
    """`model` in float64, its RMSNorms too."""
    model = model.double()
    for name, module in list(model.named_modules()):
        if "RMSNorm" in type(module).__name__:
            model.set_submodule(name, ExactNorm(module))
    return model


# ----------------------------------------------------------------------------------------------------------- invariance


def test_every_family_is_tested():
    assert {ARCHITECTURES[name][0] for name in FAMILIES} == set(WIRED)


@pytest.mark.parametrize("name", FAMILIES)
def test_without_cuts_the_model_is_the_dense_model(name, tokens):
    model = build(name)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    for shortcuts in ("absorbed", "dense"):
        assert difference(sliced(model, FULL, tokens, shortcuts=shortcuts), model, tokens) < 1e-4
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    model = exact(model)
    for shortcuts in ("absorbed", "dense"):
        assert difference(exact(sliced(model, FULL, tokens, shortcuts=shortcuts)), model, tokens) < 1e-9


@pytest.mark.parametrize("name", ["gpt_neox", "opt"])
def test_wirings_that_the_configuration_chooses(name, tokens):
    changes = {"gpt_neox": {"use_parallel_residual": False}, "opt": {"layer_norm_elementwise_affine": False}}
    model = build(name, **changes[name])
    assert difference(sliced(model, FULL, tokens, shortcuts="dense"), model, tokens) < 1e-5
    assert difference(sliced(model, CUT, tokens), sliced(model, CUT, tokens, shortcuts="dense"), tokens) < 1e-4


def test_biases_that_a_norm_leaves_behind_are_kept(tokens):
    model = build("gpt_neox", attention_bias=False)  # the norms have biases, the maps behind them have none
    assert difference(sliced(model, FULL, tokens, shortcuts="dense"), model, tokens) < 1e-5


def test_a_layer_norm_model_loses_nothing_by_one_dimension(tokens):
    model = build("opt").double()
    one_less = SlicePlan(32, (31,) * 6, "test")
    assert difference(sliced(model, one_less, tokens), model, tokens) < 1e-9  # the stream has no component along its mean


def test_full_rotation_leaves_perplexity_unchanged(tiny_llama, tokens):
    rotated = sliced(tiny_llama, FULL, tokens, shortcuts="dense")
    assert perplexity(rotated, tokens).ppl == pytest.approx(perplexity(tiny_llama, tokens).ppl, rel=1e-6)
    turned = [layer.shortcuts[0].weight.detach() for layer in models.decoder_layers(rotated)]
    assert all(float((weight.abs() - torch.eye(32)).abs().max()) > 0.1 for weight in turned)  # it is not the identity
    for weight in turned:
        assert torch.allclose(weight @ weight.T, torch.eye(32), atol=1e-5)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("plan", [CUT, UNCUT_LAYERS], ids=["cut", "uncut_layers"])
def test_absorbed_shortcuts_compute_the_same(name, plan, tokens):
    model = build(name).double()
    small, large = sliced(model, plan, tokens), sliced(model, plan, tokens, shortcuts="dense")
    assert difference(small, large, tokens) < 1e-6  # some norms of the families round to float32
    assert difference(small, model, tokens) > 1e-2
    assert parameter_count(small) < parameter_count(large)


# ------------------------------------------------------------------------------------------------ an independent reference


def reference_perplexity(model, widths, calibration, evaluation) -> float:
    """Perplexity of a Llama sliced as SliceGPT does it, in float64, from the weights alone: every matrix written out."""
    weights = {name: tensor.double() for name, tensor in model.state_dict().items()}
    config = model.config
    size, heads, groups, eps = config.hidden_size, config.num_attention_heads, config.num_key_value_heads, config.rms_norm_eps
    width = size // heads

    def rotate(x):  # [sample, head, token, width]
        frequencies = 10000.0 ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
        angles = torch.cat([torch.arange(x.shape[2], dtype=torch.float64)[:, None] * frequencies] * 2, dim=1)
        turned = torch.cat([-x[..., width // 2 :], x[..., : width // 2]], dim=-1)
        return x * angles.cos() + turned * angles.sin()

    def normed(x):
        return x / (x.square().sum(-1, keepdim=True) / size + eps).sqrt()

    def attention(x, q, k, v):
        samples, length, _ = x.shape
        q, k, v = (rotate_or_not(x @ w.T) for w, rotate_or_not in ((q, split_turned), (k, split_turned), (v, split)))
        k, v = (y.repeat_interleave(heads // groups, dim=1) for y in (k, v))
        scores = q @ k.transpose(2, 3) / math.sqrt(width)
        scores = scores.masked_fill(torch.ones(length, length).triu(1).bool(), -math.inf)
        return (scores.softmax(-1) @ v).transpose(1, 2).reshape(samples, length, heads * width)

    def split(x):
        return x.unflatten(-1, (-1, width)).transpose(1, 2)

    def split_turned(x):
        return rotate(split(x))

    def principal(x, kept):
        flat = x.flatten(0, 1)
        return torch.linalg.eigh(flat.T @ flat).eigenvectors.flip(1)[:, :kept]

    sets = [weights["model.embed_tokens.weight"][ids] for ids in (calibration, evaluation)]
    kept = [*widths, size]
    q_in = principal(sets[0], kept[0])
    sets = [x @ q_in for x in sets]
    for index in range(config.num_hidden_layers):
        layer = {
            name.removeprefix(f"model.layers.{index}."): weight
            for name, weight in weights.items()
            if name.startswith(f"model.layers.{index}.")
        }
        scale = layer["input_layernorm.weight"]
        q, k, v = ((layer[f"self_attn.{name}_proj.weight"] * scale) @ q_in for name in "qkv")
        mixed = [attention(normed(x), q, k, v) for x in sets]
        whole = sets[0] @ q_in.T + mixed[0] @ layer["self_attn.o_proj.weight"].T
        q_mid = principal(whole, kept[index])
        o = q_mid.T @ layer["self_attn.o_proj.weight"]
        sets = [x @ (q_in.T @ q_mid) + y @ o.T for x, y in zip(sets, mixed, strict=True)]
        scale = layer["post_attention_layernorm.weight"]
        gate, up = ((layer[f"mlp.{name}_proj.weight"] * scale) @ q_mid for name in ("gate", "up"))
        hidden = [functional.silu(normed(x) @ gate.T) * (normed(x) @ up.T) for x in sets]
        whole = sets[0] @ q_mid.T + hidden[0] @ layer["mlp.down_proj.weight"].T
        q_out = principal(whole, kept[index + 1])
        down = q_out.T @ layer["mlp.down_proj.weight"]
        sets = [x @ (q_mid.T @ q_out) + y @ down.T for x, y in zip(sets, hidden, strict=True)]
        q_in = q_out
    head = (weights["lm_head.weight"] * weights["model.norm.weight"]) @ q_in
    scores = normed(sets[1]) @ head.T
    return float(functional.cross_entropy(scores[:, :-1].flatten(0, 1), evaluation[:, 1:].flatten()).exp())


@pytest.mark.parametrize("widths", [CUT.widths, (24,) * 6, UNCUT_LAYERS.widths], ids=["varied", "constant", "uncut_layers"])
def test_agrees_with_the_reference(widths, tokens):
    model = build("llama").double()
    calibration = torch.randint(0, 97, (12, 24))
    expected = reference_perplexity(model, widths, calibration, tokens)
    found = perplexity(sliced(model, SlicePlan(32, widths, "test"), calibration), tokens).ppl
    assert found == pytest.approx(expected, rel=1e-5)
    assert found != pytest.approx(perplexity(model, tokens).ppl, rel=1e-2)
    single = perplexity(sliced(build("llama"), SlicePlan(32, widths, "test"), calibration), tokens).ppl
    assert single == pytest.approx(expected, rel=1e-4)


# ------------------------------------------------------------------------------------------------- bases and shortcuts


@pytest.mark.parametrize("name", ["llama", "gpt_neox", "opt"])
def test_bases_are_orthonormal_and_widths_chain(name, tokens):
    seen = []

    def axes(moments, width):
        assert torch.allclose(moments, moments.T)
        seen.append(principal_axes(moments, width))
        return seen[-1]

    model = sliced(build(name).double(), CUT, tokens, axes=axes)
    steps = 1 if name == "gpt_neox" else 2
    assert [basis.shape[1] for basis in seen] == positions(CUT.widths, steps, 32)[:-1]
    for basis in seen:
        assert torch.allclose(basis.T @ basis, torch.eye(basis.shape[1], dtype=torch.float64), atol=1e-12)
        if WIRED[name].centered:
            assert float(basis.sum(dim=0).abs().max()) < 1e-10
    layers = models.decoder_layers(model)
    places = [module for layer in layers for module in layer.shortcuts]
    for index, (module, kind) in enumerate(zip(places, model.config.slicing["shortcuts"], strict=True)):
        before, after = positions(CUT.widths, steps, 32)[index : index + 2]
        assert module(torch.randn(2, 3, before, dtype=torch.float64)).shape == (2, 3, after)
        if kind == "dense":
            assert torch.linalg.matrix_norm(module.weight, ord=2) <= 1 + 1e-9
        if kind == "diagonal":
            assert module.weight.shape == (min(before, after),)
            assert module.weight.min() >= 0
            assert module.weight.max() <= 1 + 1e-9
    path = WIRED[name].layers
    for index, layer in enumerate(layers):
        last = (*CUT.widths, 32)[index + 1]
        read = layer.get_submodule(WIRED[name].attn.inputs[0]).in_features
        assert (read, layer.get_submodule(WIRED[name].mlp.output).out_features) == (CUT.widths[index], last)
    assert model.get_submodule(path) is layers


def test_shortcuts_vanish_where_they_can():
    size = 8
    places = positions((6, 5, 4), 2, size)
    assert places == [6, 6, 5, 5, 4, 4, 8]
    assert shortcut_kinds(places, size) == ["diagonal", "dense", "diagonal", "dense", "diagonal", "identity"]
    assert shortcut_kinds(places, size, shortcuts="dense") == ["dense"] * 6
    assert shortcut_kinds([8, 8, 8], size) == ["identity"] * 2
    # Layer 0 spared: its places take over the basis of layer 1, from which layer 1 keeps the first directions.
    assert shortcut_kinds([8, 8, 5, 5, 5, 5, 8], size) == ["identity"] * 2 + ["diagonal", "dense", "diagonal", "identity"]
    # Spared in the middle: into it for nothing, out of it at the price of one matrix.
    assert shortcut_kinds([5, 5, 8, 8, 5, 5, 8], size) == ["diagonal", *["identity"] * 2, "dense", "diagonal", "identity"]
    assert shortcut_kinds([5, 8, 5, 8], size) == ["identity", "dense", "identity"]


@pytest.mark.parametrize("shape", [(9, 6), (6, 9), (7, 7)])
def test_singular_vectors(shape):
    left = torch.linalg.qr(torch.randn(12, shape[0], dtype=torch.float64)).Q
    right = torch.linalg.qr(torch.randn(12, shape[1], dtype=torch.float64)).Q
    matrix = left.T @ right
    matrix[:, 0] = 0  # a singular value of 0
    u, v = _singular_vectors(matrix)
    for basis in (u, v):
        assert torch.allclose(basis.T @ basis, torch.eye(len(basis), dtype=torch.float64), atol=1e-12)
    between = u.T @ matrix @ v
    singular = between.diagonal().clone()
    between.diagonal().zero_()
    assert float(between.abs().max()) < 1e-8
    assert torch.allclose(singular, torch.linalg.svdvals(matrix), atol=1e-8)


@pytest.mark.parametrize("name", FAMILIES)
def test_one_basis_needs_no_shortcuts(name, tokens):
    model = build(name).double()
    shared = sliced(model, UNCUT_LAYERS, tokens, shortcuts="none")
    assert set(shared.config.slicing["shortcuts"]) == {"identity"}
    assert account(shared.config).shortcut_parameters == 0
    assert difference(sliced(model, FULL, tokens, shortcuts="none"), model, tokens) < 1e-6
    assert 1e-2 < difference(shared, model, tokens) < 10


def test_one_basis_is_that_of_the_dense_stream(tokens):
    model = build("llama").double()
    moments = []

    def axes(total, width):
        moments.append(total.clone())
        return principal_axes(total, width)

    shared = sliced(model, CUT, tokens, shortcuts="none", axes=axes, damping=0.0)
    states = []
    for layer in models.decoder_layers(model):
        layer.register_forward_pre_hook(lambda _, args: states.append(args[0]))
        layer.post_attention_layernorm.register_forward_pre_hook(lambda _, args: states.append(args[0]))
    model.model.norm.register_forward_pre_hook(lambda _, args: states.append(args[0]))
    logits(model, tokens)
    flat = [state.flatten(0, 1) for state in states]
    expected = sum(x.T @ x / x.square().sum() for x in flat)
    assert len(moments) == 1
    assert torch.allclose(moments[0], expected, atol=1e-6)
    basis = principal_axes(expected, 32)[:, : CUT.widths[0]]
    table, expected = shared.model.embed_tokens.weight, model.model.embed_tokens.weight @ basis
    assert torch.allclose(table @ table.T, expected @ expected.T, atol=1e-4)


def test_a_plan_of_a_given_size(tokens):
    config = LlamaConfig(hidden_size=256, intermediate_size=512, num_hidden_layers=4, num_attention_heads=4, vocab_size=500)
    for shortcuts in SHORTCUTS:
        plan = plan_of_size(config, 0.2, lambda share: constant(4, 256, share), shortcuts=shortcuts, tolerance=2e-3)
        assert account(config, plan, shortcuts=shortcuts).removed == pytest.approx(0.201, abs=1.1e-3)
    plan = plan_of_size(config, 0.2, lambda share: constant(4, 256, share, keep_full=(0,)), highest=0.6)
    assert plan.widths[0] == 256
    with pytest.raises(ValueError, match=r"removed=0\.95: this schedule removes 0 to 0\.\d+ of the parameters"):
        plan_of_size(config, 0.95, lambda share: constant(4, 256, share))


def test_shortcut_modules(tokens):
    model = sliced(build("llama"), UNCUT_LAYERS, tokens)
    kinds = {"identity": Identity, "diagonal": Diagonal, "dense": nn.Linear}
    modules = [module for layer in models.decoder_layers(model) for module in layer.shortcuts]
    assert [type(module) for module in modules] == [kinds[kind] for kind in model.config.slicing["shortcuts"]]
    assert {type(module) for module in modules} == set(kinds.values())


# ---------------------------------------------------------------------------------------------------------------- options


def test_moments_are_filled_in_by_blocks(tokens, monkeypatch):
    model = build("llama")
    whole = sliced(model, CUT, tokens)
    monkeypatch.setattr(slicing, "_BLOCK", 10)  # no divisor of the width
    assert difference(sliced(model, CUT, tokens), whole, tokens) < 1e-4
    stream = torch.randn(2, 7, 32)
    flat, moments = stream.flatten(0, 1).double(), torch.zeros(32, 32, dtype=torch.float64)
    slicing._add_moments(moments, stream)
    assert torch.allclose(slicing._mirrored(moments), flat.T @ flat, atol=1e-12)


def test_what_is_cut_may_be_taken_off_or_what_is_kept_be_kept(tokens):
    model = build("llama").double()
    kept = sliced(model, CUT, tokens, axes=lambda moments, width: principal_axes(moments, width))  # tells nothing of the rest
    assert difference(sliced(model, CUT, tokens), kept, tokens) < 1e-9


def test_every_sublayer_runs_once(tokens):
    model = build("llama")
    calls = []
    for index, layer in enumerate(models.decoder_layers(model)):
        layer.self_attn.register_forward_hook(lambda *_, index=index: calls.append(f"{index} attn"))
        layer.mlp.register_forward_hook(lambda *_, index=index: calls.append(f"{index} mlp"))
    sliced(model, CUT, tokens)
    order = [f"{index} {part}" for index in range(6) for part in ("attn", "mlp") for _ in range(3)]
    assert calls == order[:-3]  # nothing is cut behind the last MLP
    calls.clear()
    sliced(model, SlicePlan(32, (20, 20, 32, 32, 32, 32), "test"), tokens)
    assert calls == order[:9]


def test_batches_and_where_activations_are_kept_change_nothing(tokens):
    model = build("qwen3").double()
    one = slice_model(model, CUT, tokens, batch_size=5, progress=False)
    for options in ({}, {"activation_device": "cpu", "device": "cpu"}, {"activation_dtype": torch.float64}):
        assert difference(one, sliced(model, CUT, tokens, **options), tokens) < 1e-6


def test_a_layer_on_another_device_is_copied_there(tokens):
    # No accelerator is needed to see that work happens on copies and that the dense model keeps its weights.
    layer = models.decoder_layers(build("llama"))[0]
    assert _on(layer, torch.device("cpu")) is layer
    elsewhere = _on(layer, torch.device("meta"))
    assert next(elsewhere.parameters()).is_meta and not next(layer.parameters()).is_meta


def test_one_layer_at_a_time_is_on_the_device(tiny_llama, tokens, monkeypatch):
    alive: list[weakref.ref] = []
    most = []

    def copied(layer, device):
        most.append(sum(reference() is not None for reference in alive))
        on_device = copy.deepcopy(layer)
        alive.append(weakref.ref(on_device))
        return on_device

    monkeypatch.setattr("prunelib.slicing.rotate._on", copied)
    sliced(tiny_llama, CUT, tokens)
    assert len(most) == 6
    assert max(most) == 0  # when a layer comes, none of those before is there


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", ["llama", "gpt_neox", "qwen2_sliding"])
def test_streamed_through_a_device_agrees(name, tokens):
    model = build(name).double()
    expected = sliced(model, CUT, tokens)
    for options in ({}, {"activation_device": "cpu"}):
        streamed = sliced(model, CUT, tokens, device="cuda", **options)
        assert streamed.device.type == "cpu"
        assert difference(streamed, expected, tokens) < 1e-6
    assert difference(sliced(model.cuda(), CUT, tokens).cpu(), expected, tokens) < 1e-6


def test_half_precision_activations_are_close(tiny_llama, tokens):
    plan = constant(6, 32, 0.2)
    exactly, roughly = (sliced(tiny_llama, plan, tokens, activation_dtype=dtype) for dtype in (None, torch.bfloat16))
    dense = tiny_llama
    assert 0 < difference(exactly, roughly, tokens) < 0.2 * difference(exactly, dense, tokens)
    assert exactly.dtype == roughly.dtype == torch.float32


def test_a_model_in_half_precision(tokens):
    model = build("llama")
    expected = sliced(model, constant(6, 32, 0.2), tokens)
    half = sliced(copy.deepcopy(model).bfloat16(), constant(6, 32, 0.2), tokens)
    assert {weight.dtype for weight in half.state_dict().values()} == {torch.bfloat16}
    assert perplexity(half, tokens).ppl == pytest.approx(perplexity(expected, tokens).ppl, rel=0.05)


def test_mean_subtraction_changes_rms_norm_models_only(tokens):
    llama, neox = build("llama"), build("gpt_neox")
    with torch.no_grad():
        llama.model.embed_tokens.weight += 0.05
    centered = copy.deepcopy(llama)
    with torch.no_grad():
        table = centered.model.embed_tokens.weight
        table -= table.mean(dim=1, keepdim=True)
    with_mean = sliced(llama, FULL, tokens, subtract_mean=True)
    assert difference(with_mean, llama, tokens) > 1e-2
    assert difference(with_mean, centered, tokens) < 1e-5
    assert difference(sliced(llama, CUT, tokens, subtract_mean=True), sliced(centered, CUT, tokens), tokens) < 1e-4
    assert difference(sliced(neox, CUT, tokens, subtract_mean=True), sliced(neox, CUT, tokens), tokens) < 1e-5


@pytest.mark.parametrize("name", ["llama", "opt"])
def test_random_axes_are_a_control(name, tokens):
    model = build(name).double()
    drawn = [sliced(model, CUT, tokens, axes=random_axes(seed)) for seed in (0, 0, 1)]
    assert difference(drawn[0], drawn[1], tokens) == 0
    assert difference(drawn[0], drawn[2], tokens) > 1e-2
    assert difference(sliced(model, SlicePlan(32, (31,) * 6, "test"), tokens, axes=random_axes(0)), model, tokens) < (
        1e-9 if name == "opt" else 10  # the one direction that nothing needs is the one that is never drawn
    )


def test_the_epsilon_is_the_models_own(tokens):
    model = build("llama", rms_norm_eps=0.3)
    assert difference(sliced(model, FULL, tokens), model, tokens) < 1e-5
    assert difference(sliced(model, FULL, tokens), build("llama"), tokens) > 1e-2


def test_a_shallower_model_can_be_sliced(tiny_llama, tokens):
    shallow = models.keep_layers(tiny_llama, [0, 2, 3, 5])
    narrow = sliced(shallow, SlicePlan(32, (24, 20, 20, 28), "test"), tokens)
    assert len(models.decoder_layers(narrow)) == 4
    assert difference(sliced(shallow, SlicePlan(32, (32,) * 4, "test"), tokens), shallow, tokens) < 1e-5


# --------------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe_step_2", "gpt_oss", "deepseek_v3", "gemma2", "olmo2", "gpt2", "bloom"])
def test_other_families_are_refused_by_name(name, tokens):
    model = build(name)
    with pytest.raises(UnsupportedModel, match=rf"model type '{model.config.model_type}' cannot be sliced; the families"):
        slice_model(model, FULL, tokens)
    with pytest.raises(UnsupportedModel, match=model.config.model_type):
        account(model.config, FULL)


def test_models_that_no_plan_fits(tokens):
    before = build("opt", do_layer_norm_before=False)
    with pytest.raises(UnsupportedModel, match=r"opt model cannot be sliced: it has no model\.decoder\.final_layer_norm"):
        slice_model(before, FULL, tokens)
    once = sliced(build("llama"), CUT, tokens)
    with pytest.raises(UnsupportedModel, match="sliced already"):
        slice_model(once, CUT, tokens)
    with pytest.raises(UnsupportedModel, match="cannot remove these layers of a prunelib_sliced model"):
        models.keep_layers(once, [0, 1, 2, 3])
    spread = build("llama")
    spread.model.layers[0]._hf_hook = object()
    with pytest.raises(UnsupportedModel, match="spread over several devices"):
        slice_model(spread, FULL, tokens)
    backbone = build("llama").model
    with pytest.raises(UnsupportedModel, match="LlamaModel is not the causal language model of type 'llama'"):
        slice_model(backbone, FULL, tokens)


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (SlicePlan(64, (32,) * 6, "test"), "the plan is for a hidden size of 64, this model has 32"),
        (SlicePlan(32, (32,) * 5, "test"), "the plan has the widths of 5 layers, this model has 6"),
    ],
)
def test_plans_of_another_model(tiny_llama, tokens, plan, message):
    tiny_llama.model.embed_tokens.register_forward_hook(lambda *_: pytest.fail("work was done before the refusal"))
    with pytest.raises(ValueError, match=message):
        slice_model(tiny_llama, plan, tokens)


def test_windows_that_cannot_calibrate(tiny_llama, tokens):
    with pytest.raises(ValueError, match="20 calibration tokens cannot say which 30 of 32 directions to keep"):
        slice_model(tiny_llama, CUT, tokens[:1, :20])
    with pytest.raises(ValueError, match="unknown shortcuts 'short'; there are: absorbed, dense, none"):
        slice_model(tiny_llama, CUT, tokens, shortcuts="short")
    with pytest.raises(ValueError, match="batch_size=0"):
        slice_model(tiny_llama, CUT, tokens, batch_size=0)
    with pytest.raises(ValueError, match="another model's tokenizer"):
        slice_model(tiny_llama, CUT, tokens + 97)


def test_the_first_nan_is_named(tiny_llama, tokens):
    with torch.no_grad():
        tiny_llama.model.layers[2].mlp.down_proj.weight[0, 0] = float("nan")
    with pytest.raises(RuntimeError, match="NaN or infinity in the hidden states after mlp of layer 2; check the weights"):
        sliced(tiny_llama, CUT, tokens)


# --------------------------------------------------------------------------------------------------------------- accounts


def test_parameter_counts_of_slicegpt():
    """The counts that SliceGPT's own tests state for slices of 20 %."""
    opt = account(OPTConfig(), constant(12, 768, 0.20, multiple=8, rounding="down"), shortcuts="dense")
    assert opt.parameters == 147_250_880
    phi_2 = PhiConfig(vocab_size=51200, hidden_size=2560, intermediate_size=10240, num_hidden_layers=32, num_attention_heads=32)
    phi = account(phi_2, constant(32, 2560, 0.20, multiple=8, rounding="down"), shortcuts="dense")
    assert phi.parameters == 2_391_772_160


LLAMA_70B = {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64}


@pytest.mark.parametrize(
    ("config", "with_matrices", "absorbed"),
    [
        (LlamaConfig(), {0.1: -3.0, 0.2: 9.4, 0.3: 21.5, 0.5: 44.6}, {0.1: 3.7, 0.3: 25.5}),
        (LlamaConfig(**LLAMA_70B, num_key_value_heads=8), {0.3: 22.2}, {0.3: 26.1}),
        (MistralConfig(), {0.1: -2.1, 0.3: 22.0}, {0.1: 4.1, 0.3: 25.8}),
    ],
    ids=["llama-2-7b", "llama-2-70b", "mistral-7b"],
)
def test_slicing_is_not_parameter_removal(config, with_matrices, absorbed):
    for shortcuts, expected in (("dense", with_matrices), ("absorbed", absorbed)):
        for share, removed in expected.items():
            plan = constant(config.num_hidden_layers, config.hidden_size, share, multiple=8, rounding="down")
            assert 100 * account(config, plan, shortcuts=shortcuts).removed == pytest.approx(removed, abs=0.06)


@pytest.mark.parametrize("name", ["llama_tied", "gpt_neox", "qwen2"])
def test_accounts_are_those_of_the_models(name, tokens):
    model = build(name)
    for shortcuts in ("absorbed", "dense"):
        narrow = sliced(model, CUT, tokens, shortcuts=shortcuts)
        found = account(model.config, CUT, shortcuts=shortcuts, context=10)
        assert (found.parameters, found.dense_parameters) == (parameter_count(narrow), parameter_count(model))
        assert found == account(narrow.config, context=10)
        assert found.shortcut_parameters == sum(
            parameter_count(module.shortcuts) for module in narrow.modules() if isinstance(module, SlicedLayer)
        )
        assert found.removed == pytest.approx(models.removed_fraction(model, narrow))
        assert found.flops - account(narrow.config).flops == 4 * 10 * 32 * 6
    maps = [module for module in model.modules() if isinstance(module, nn.Linear)]
    assert account(model.config, CUT).dense_flops == sum(2 * module.weight.numel() for module in maps)
    assert dense_configuration(narrow.config).to_dict() == model.config.to_dict()
    with pytest.raises(ValueError, match="a plan is needed"):
        account(model.config)
    with pytest.raises(ValueError, match="has its plan"):
        account(narrow.config, CUT)
    with pytest.raises(ValueError, match="for 5 layers of width 32, this model has 6 of width 32"):
        account(model.config, SlicePlan(32, (32,) * 5, "test"))


# ------------------------------------------------------------------------------------------------- a model like any other


@pytest.mark.parametrize("name", FAMILIES)
def test_saved_and_loaded(name, tokens, tmp_path):
    model = sliced(build(name), CUT, tokens)
    models.save(model, None, tmp_path / "sliced")  # proves the reload: keys, weights, logits
    again, info = AutoModelForCausalLM.from_pretrained(tmp_path / "sliced", output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert type(again) is type(model)
    assert torch.equal(logits(again, tokens), logits(model, tokens))
    assert again.config.slicing["widths"] == list(CUT.widths)
    assert (tmp_path / "sliced" / "model.safetensors").is_file()
    models.load(tmp_path / "sliced", dtype="bfloat16")


@pytest.mark.parametrize("name", FAMILIES)
def test_generation_with_cache_equals_without(name, tokens):
    model = sliced(build(name), CUT, tokens)
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    mask = torch.ones_like(tokens[:2])
    mask[1, :5] = 0  # padded on the left
    with_cache, without = (
        model.generate(tokens[:2], attention_mask=mask, use_cache=use_cache, **options) for use_cache in (True, False)
    )
    assert with_cache.shape == (2, 32)
    assert torch.equal(with_cache, without)


@pytest.mark.parametrize("device_map", ["cpu", "auto", "split"])
def test_loaded_onto_devices(device_map, tiny_llama, tokens, tmp_path):
    model = sliced(tiny_llama, CUT, tokens)
    model.save_pretrained(tmp_path / "model")
    if device_map == "split":  # some layers wait on the disk until they are needed
        places = ["model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"]
        device_map = dict.fromkeys(places, "cpu")
        device_map |= {f"model.layers.{index}": "disk" if index % 2 else "cpu" for index in range(6)}
    options = {"device_map": device_map, "offload_folder": tmp_path / "disk"}
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "model", **options)
    assert ("disk" in getattr(again, "hf_device_map", {}).values()) == (device_map not in ("cpu", "auto"))
    assert torch.allclose(logits(again, tokens.to(again.device)).cpu(), logits(model, tokens), atol=1e-5)


def test_layers_are_kept_in_one_piece(tiny_llama, tokens):
    accelerate = pytest.importorskip("accelerate")
    model = sliced(tiny_llama, CUT, tokens)
    whole = {type(layer).__name__ for layer in models.decoder_layers(model)}
    assert whole == {"SlicedLlamaDecoderLayer"} <= set(model._no_split_modules)
    device_map = accelerate.infer_auto_device_map(
        model, max_memory={0: 60_000, "cpu": 10**9}, no_split_module_classes=list(model._no_split_modules)
    )
    assert len(set(device_map.values())) == 2
    assert all(name.count(".") <= 2 for name in device_map)


def test_ten_steps_of_lora_improve_it(tiny_llama, tokens):
    peft = pytest.importorskip("peft")
    model = sliced(tiny_llama, CUT, tokens)
    before = perplexity(model, tokens).nats
    settings = peft.LoraConfig(
        r=4, target_modules=["q_proj", "v_proj", "o_proj", "up_proj", "down_proj"], task_type="CAUSAL_LM"
    )
    healed = peft.get_peft_model(model, settings)
    healed.train()
    optimizer = torch.optim.AdamW((weight for weight in healed.parameters() if weight.requires_grad), lr=1e-2)
    for _ in range(10):
        healed(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    merged = healed.merge_and_unload().eval()
    assert perplexity(merged, tokens).nats < before - 0.1
    everything = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(r=2, target_modules="all-linear"))
    assert sum(weight.requires_grad for weight in everything.parameters()) > 0


@pytest.mark.parametrize("shortcuts", ["absorbed", "dense"])
def test_quantized_to_four_bits(shortcuts, tmp_path):
    """NF4 on a CPU, whose fast kernels take widths that are multiples of 64."""
    bitsandbytes = pytest.importorskip("bitsandbytes")
    peft = pytest.importorskip("peft")
    config = LlamaConfig(
        vocab_size=97,
        hidden_size=256,
        intermediate_size=192,
        num_hidden_layers=3,
        num_attention_heads=4,
        initializer_range=0.08,
    )
    tokens = torch.randint(0, 97, (16, 24))
    model = sliced(LlamaForCausalLM(config).eval(), SlicePlan(256, (192, 128, 64), "test"), tokens, shortcuts=shortcuts)
    model.save_pretrained(tmp_path)
    quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)

    def loaded():
        return AutoModelForCausalLM.from_pretrained(
            tmp_path, quantization_config=quantization, device_map="cpu", dtype=torch.float32
        )

    def distance(a, b):
        return float((logits(a, tokens) - logits(b, tokens)).norm() / logits(b, tokens).norm())

    small, wide = loaded(), loaded().dequantize()
    maps = {path for path, module in small.named_modules() if isinstance(module, bitsandbytes.nn.Linear4bit)}
    assert {path for path, module in model.named_modules() if isinstance(module, nn.Linear)} - maps == {"lm_head"}
    assert any("shortcuts" in path for path in maps)
    assert not any(isinstance(module, bitsandbytes.nn.Linear4bit) for module in wide.modules())
    assert distance(small, wide) < 0.03  # the kernels compute in bfloat16
    assert 0.05 < distance(wide, model) < 0.5  # what NF4 costs random weights
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    with_cache, without = (small.generate(tokens[:2], use_cache=use_cache, **options) for use_cache in (True, False))
    assert torch.equal(with_cache, without)
    tuned = peft.get_peft_model(loaded(), peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM"))
    tuned.train()
    tuned(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
    trained = [weight for weight in tuned.parameters() if weight.requires_grad]
    assert trained
    assert all(weight.grad is not None for weight in trained)


def test_activations_can_be_computed_again_in_training(tiny_llama, tokens):
    model = sliced(tiny_llama, CUT, tokens).train()
    gradients = []
    for again in (False, True):
        for layer in models.decoder_layers(model):
            layer.gradient_checkpointing = again
            layer._gradient_checkpointing_func = torch.utils.checkpoint.checkpoint
        model(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
        gradients.append(model.model.layers[0].mlp.up_proj.weight.grad.clone())
        model.zero_grad()
    assert torch.allclose(*gradients, atol=1e-7)
    assert float(gradients[0].abs().max()) > 0


def test_hidden_states_can_be_asked_for(tiny_llama, tokens):
    model = sliced(tiny_llama, CUT, tokens)
    with torch.no_grad():
        states = model(input_ids=tokens, output_hidden_states=True).hidden_states
    assert [state.shape[-1] for state in states] == [*CUT.widths, 32]


def run_python(code: str, **options) -> subprocess.CompletedProcess:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, "-c", code], env=environment, cwd=ROOT, capture_output=True, text=True, **options)


def test_importing_the_package_imports_nothing_heavy():
    heavy = ("torch", "transformers", "safetensors", "prunelib.slicing.modeling")
    done = run_python(f"import sys, prunelib, prunelib.figures.style; print([name for name in {heavy} if name in sys.modules])")
    assert done.stdout.strip() == "[]", done.stderr


@pytest.mark.parametrize(
    "first_lines",
    [
        "import prunelib\nfrom transformers import AutoModelForCausalLM",
        "from transformers import AutoModelForCausalLM\nimport prunelib",
        "import prunelib\nimport transformers.models.llama.modeling_llama\nfrom transformers import AutoModelForCausalLM",
    ],
    ids=["before", "after", "before_the_family"],
)
def test_one_import_is_enough_to_load(first_lines, tiny_llama, tokens, tmp_path):
    model = sliced(tiny_llama, CUT, tokens)
    model.save_pretrained(tmp_path)
    code = (
        f"{first_lines}\nimport sys, torch\n"
        f"model = AutoModelForCausalLM.from_pretrained({str(tmp_path)!r})\n"
        "print(type(model).__name__, sum(p.numel() for p in model.parameters()))\n"
        "assert not any('registration' in type(finder).__module__ for finder in sys.meta_path)\n"
    )
    done = run_python(code)
    assert done.stdout.split() == ["SlicedLlamaForCausalLM", str(parameter_count(model))], done.stderr


def test_damaged_configurations_are_named(tiny_llama, tokens, tmp_path):
    sliced(tiny_llama, CUT, tokens).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    text = path.read_text()
    path.write_text(text.replace('"family": "llama"', '"family": "gpt17"'))
    with pytest.raises(UnsupportedModel, match="names no family that can be sliced, but 'gpt17'"):
        AutoModelForCausalLM.from_pretrained(tmp_path)
    path.write_text(text.replace('"num_hidden_layers": 6', '"num_hidden_layers": 5'))
    with pytest.raises(ValueError, match="slicing of this configuration is that of 6 layers and 12 shortcuts, the model has 5"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


# ------------------------------------------------------------------------------------------------------------ real weights


@pytest.fixture(scope="module")
def reference():
    """The main reference model, its tokenizer, calibration and evaluation windows of its own corpus."""
    folder = ROOT / "data" / "reference" / "ref-llama-32l"
    model, tokenizer = models.load(folder), models.load_tokenizer(folder)
    windows = sample_windows(corpora.load("pydocs", "calibration"), tokenizer, 8, 128, 0, progress=False)
    held_out = consecutive_windows(corpora.load("pydocs", "evaluation"), tokenizer, 128, 4, progress=False)
    return model, tokenizer, windows, held_out


def test_principal_directions_are_the_ones_to_keep(reference, tmp_path):
    model, tokenizer, windows, held_out = reference
    plan = constant(32, 160, 0.1, multiple=8)
    dense = perplexity(model, held_out).nats
    principal = slice_model(model, plan, windows, progress=False)
    cost = perplexity(principal, held_out).nats - dense
    random = perplexity(slice_model(model, plan, windows, axes=random_axes(0), progress=False), held_out).nats - dense
    assert 0.05 < cost < 1.0
    assert random > 5 * cost
    models.save(principal, tokenizer, tmp_path / "sliced")
    again = models.load(tmp_path / "sliced")
    assert perplexity(again, held_out).nats == pytest.approx(dense + cost, abs=1e-6)
    assert models.load_tokenizer(tmp_path / "sliced")("x = 1")["input_ids"] == tokenizer("x = 1")["input_ids"]


def test_a_sliced_model_takes_tasks(reference):
    pytest.importorskip("lm_eval")
    from prunelib.evaluation.tasks import evaluate_layer_sets, evaluate_tasks

    model, tokenizer, windows, _ = reference
    narrow = slice_model(model, constant(32, 160, 0.3, multiple=8), windows[:4], progress=False)
    asked = {"bos": False, "limit": 12, "progress": False}
    here, dense = (
        evaluate_tasks(which, tokenizer, ["pydocs_next_line"], **asked).tasks["pydocs_next_line"] for which in (narrow, model)
    )
    assert here.items_sha256 == dense.items_sha256
    assert here.n == 12
    assert here.predicted != dense.predicted
    shared = evaluate_layer_sets(narrow, tokenizer, ["pydocs_next_line"], [()], **asked)
    assert shared.tokens < shared.tokens_alone  # layers of several widths are no obstacle to sharing beginnings
    assert shared[()].tasks["pydocs_next_line"].predicted == here.predicted
    assert shared[()].tasks["pydocs_next_line"].scores == here.scores
    with pytest.raises(UnsupportedModel, match=r"this model is sliced, .* remove layers first, then slice"):
        evaluate_layer_sets(narrow, tokenizer, ["pydocs_next_line"], [(), (3,)], **asked)
