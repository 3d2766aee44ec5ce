"""Slicing: uncut, the model computes the same; cut, it agrees with an independent float64 reference and with published code."""

import copy
import math
from pathlib import Path

import pytest
import torch
from architectures import ARCHITECTURES, build
from model_helpers import CUT, FULL, SLICED_FAMILIES, UNCUT_LAYERS, difference, sliced
from torch import nn
from torch.nn import functional

from prunelib import models
from prunelib.evaluation.perplexity import perplexity
from prunelib.models import UnsupportedModel, parameter_count
from prunelib.models.architectures import ARCHITECTURES as SLICEABLE
from prunelib.slicing import SlicePlan, constant, principal_axes, random_axes, rotate, slice_model
from prunelib.text import corpora
from prunelib.text.windows import consecutive_windows, sample_windows

ROOT = Path(__file__).parents[1]


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randint(0, 97, (5, 24))


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


def test_every_family_is_tested():
    assert {ARCHITECTURES[name][0] for name in SLICED_FAMILIES} == set(SLICEABLE)


@pytest.mark.parametrize("name", SLICED_FAMILIES)
def test_without_cuts_the_model_is_the_dense_model(name, tokens):
    model = build(name)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    for shortcuts in ("folded", "full"):
        assert difference(sliced(model, FULL, tokens, shortcuts=shortcuts), model, tokens) < 1e-4
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    model = exact(model)
    for shortcuts in ("folded", "full"):
        assert difference(exact(sliced(model, FULL, tokens, shortcuts=shortcuts)), model, tokens) < 1e-9


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("gpt_neox", {"use_parallel_residual": False}),
        ("gpt_neox", {"attention_bias": False}),  # the norms have biases, the maps behind them have none
        ("opt", {"layer_norm_elementwise_affine": False}),
        ("llama", {"rms_norm_eps": 0.3}),
    ],
)
def test_architectures_that_the_configuration_chooses(name, change, tokens):
    model = build(name, **change)
    assert difference(sliced(model, FULL, tokens, shortcuts="full"), model, tokens) < 1e-5
    assert difference(sliced(model, FULL, tokens), build(name), tokens) > 1e-2
    assert difference(sliced(model, CUT, tokens), sliced(model, CUT, tokens, shortcuts="full"), tokens) < 1e-4


@pytest.mark.parametrize("name", SLICED_FAMILIES)
def test_folded_shortcuts_compute_the_same_and_one_basis_needs_none(name, tokens):
    model = build(name).double()
    for plan in (CUT, UNCUT_LAYERS):
        small, large = sliced(model, plan, tokens), sliced(model, plan, tokens, shortcuts="full")
        assert difference(small, large, tokens) < 1e-6  # some norms of the families round to float32
        assert difference(small, model, tokens) > 1e-2
        assert parameter_count(small) < parameter_count(large)
    shared = sliced(model, UNCUT_LAYERS, tokens, shortcuts="shared_basis")
    assert set(shared.config.slicing["shortcuts"]) == {"identity"}
    assert difference(sliced(model, FULL, tokens, shortcuts="shared_basis"), model, tokens) < 1e-6
    random = sliced(model, UNCUT_LAYERS, tokens, shortcuts="shared_basis", axes=random_axes(0))
    assert 1e-2 < difference(shared, model, tokens) < difference(random, model, tokens)


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


def test_moments_in_blocks_and_projections_both_ways_agree(tokens, monkeypatch):
    model = build("llama").double()
    whole = sliced(model, CUT, tokens)
    monkeypatch.setattr(rotate, "_BLOCK", 10)  # no divisor of the width
    assert difference(sliced(model, CUT, tokens), whole, tokens) < 1e-4
    kept = sliced(model, CUT, tokens, axes=lambda moments, width: principal_axes(moments, width))  # tells nothing of the rest
    assert difference(kept, whole, tokens) < 1e-4


def test_batches_change_nothing(tokens):
    model = build("qwen3").double()
    assert difference(slice_model(model, CUT, tokens, batch_size=5, progress=False), sliced(model, CUT, tokens), tokens) < 1e-6


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", ["llama", "gpt_neox", "qwen2_sliding"])
def test_streamed_through_a_device_agrees(name, tokens):
    model = build(name).double()
    expected = sliced(model, CUT, tokens)
    streamed = sliced(model, CUT, tokens, device="cuda")
    assert streamed.device.type == "cpu"
    assert difference(streamed, expected, tokens) < 1e-6
    assert difference(sliced(model.cuda(), CUT, tokens).cpu(), expected, tokens) < 1e-6


def test_a_model_in_half_precision(tokens):
    model = build("llama")
    expected = sliced(model, constant(6, 32, 0.2), tokens)
    half = sliced(copy.deepcopy(model).bfloat16(), constant(6, 32, 0.2), tokens)
    assert {weight.dtype for weight in half.state_dict().values()} == {torch.bfloat16}
    assert perplexity(half, tokens).ppl == pytest.approx(perplexity(expected, tokens).ppl, rel=0.05)


@pytest.mark.parametrize("name", ["llama", "opt"])
def test_random_axes_are_a_control(name, tokens):
    model = build(name).double()
    drawn = [sliced(model, CUT, tokens, axes=random_axes(seed)) for seed in (0, 0, 1)]
    assert difference(drawn[0], drawn[1], tokens) == 0
    assert difference(drawn[0], drawn[2], tokens) > 1e-2
    assert difference(sliced(model, CUT, tokens), model, tokens) < min(difference(one, model, tokens) for one in drawn)
    assert difference(sliced(model, SlicePlan(32, (31,) * 6, "test"), tokens, axes=random_axes(0)), model, tokens) < (
        1e-9 if name == "opt" else 10  # the one direction that nothing needs is the one that is never drawn
    )


def test_models_that_no_plan_fits(tokens):
    with pytest.raises(UnsupportedModel, match="model type 'mixtral' cannot be sliced; the families"):
        slice_model(build("mixtral"), FULL, tokens)
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
    with pytest.raises(UnsupportedModel, match="LlamaModel is not the causal language model of type 'llama'"):
        slice_model(build("llama").model, FULL, tokens)
    damaged = build("llama")
    damaged.model.layers[2].mlp.down_proj.weight.data[0, 0] = float("nan")
    with pytest.raises(RuntimeError, match="NaN or infinity in the hidden states after mlp of layer 2; check the weights"):
        sliced(damaged, CUT, tokens)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"plan": SlicePlan(64, (32,) * 6, "test")}, "the plan is for 6 layers of width 64, this model has 6 of width 32"),
        ({"windows": torch.ones(1, 20, dtype=torch.int64)}, "20 calibration tokens cannot say which 30 of 32 directions"),
        ({"windows": torch.full((5, 24), 97)}, "another model's tokenizer"),
        ({"shortcuts": "short"}, "unknown shortcuts 'short'; there are: folded, full, shared_basis"),
        ({"batch_size": 0}, "batch_size=0"),
    ],
)
def test_bad_arguments_are_refused_before_any_work(tiny_llama, tokens, change, message):
    tiny_llama.model.embed_tokens.register_forward_hook(lambda *_: pytest.fail("work was done before the refusal"))
    with pytest.raises(ValueError, match=message):
        slice_model(tiny_llama, **{"plan": CUT, "windows": tokens} | change)


# Numbers of TransformerCompression (commit 6b12cde) on the same weights and tokens: `benchmarks/slicing_vs_reference.py`.
@pytest.mark.slow
@pytest.mark.parametrize(("width", "published"), [(128, 21.80511342258781), (112, 45.650792126735745)])
def test_agrees_with_transformer_compression(width, published):
    folder = ROOT / "data" / "reference" / "ref-llama-32l"
    model, tokenizer = models.load(folder), models.load_tokenizer(folder)
    windows = sample_windows(corpora.load("pydocs", "calibration"), tokenizer, 16, 256, 0, progress=False)
    held_out = consecutive_windows(corpora.load("pydocs", "evaluation"), tokenizer, 256, 20, progress=False)
    model.config.rms_norm_eps = 1e-5  # it takes this epsilon for every model, and the mean off the embeddings
    for module in model.modules():
        if hasattr(module, "variance_epsilon"):
            module.variance_epsilon = 1e-5
    plan = SlicePlan(160, (width,) * 32, "constant")
    for shortcuts in ("folded", "full"):
        narrow = slice_model(model, plan, windows, shortcuts=shortcuts, subtract_mean=True, progress=False)
        assert perplexity(narrow, held_out, batch_size=8).ppl == pytest.approx(published, rel=1e-6)
    random = slice_model(model, plan, windows, axes=random_axes(0), subtract_mean=True, progress=False)
    assert perplexity(random, held_out, batch_size=8).ppl > 5 * published
