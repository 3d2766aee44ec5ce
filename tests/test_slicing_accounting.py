"""Parameters and FLOPs of dense, shallower and sliced models: published counts, and those of the models themselves."""

import pytest
import torch
from architectures import build
from slicing_models import CUT, FULL, UNCUT_LAYERS, sliced
from torch import nn
from transformers import LlamaConfig, MistralConfig, OPTConfig, PhiConfig

from prunelib import models
from prunelib.models import UnsupportedModel, parameter_count
from prunelib.slicing import SlicePlan, constant, count_parameters, plan_of_size
from prunelib.slicing.modeling import SHORTCUTS, SlicedLayer, dense_configuration


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randint(0, 97, (5, 24))


def test_parameter_counts_of_slicegpt():
    """The counts that SliceGPT's own tests state for slices of 20 %."""
    opt = count_parameters(OPTConfig(), constant(12, 768, 0.20, multiple=8, rounding="down"), shortcuts="full")
    assert opt.parameters == 147_250_880
    phi_2 = PhiConfig(vocab_size=51200, hidden_size=2560, intermediate_size=10240, num_hidden_layers=32, num_attention_heads=32)
    phi = count_parameters(phi_2, constant(32, 2560, 0.20, multiple=8, rounding="down"), shortcuts="full")
    assert phi.parameters == 2_391_772_160


LLAMA_70B = {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64}


@pytest.mark.parametrize(
    ("config", "with_matrices", "folded"),
    [
        (LlamaConfig(), {0.1: -3.0, 0.2: 9.4, 0.3: 21.5, 0.5: 44.6}, {0.1: 3.7, 0.3: 25.5}),
        (LlamaConfig(**LLAMA_70B, num_key_value_heads=8), {0.3: 22.2}, {0.3: 26.1}),
        (MistralConfig(), {0.1: -2.1, 0.3: 22.0}, {0.1: 4.1, 0.3: 25.8}),
    ],
    ids=["llama-2-7b", "llama-2-70b", "mistral-7b"],
)
def test_slicing_is_not_parameter_removal(config, with_matrices, folded):
    for shortcuts, expected in (("full", with_matrices), ("folded", folded)):
        for share, removed in expected.items():
            plan = constant(config.num_hidden_layers, config.hidden_size, share, multiple=8, rounding="down")
            assert 100 * count_parameters(config, plan, shortcuts=shortcuts).removed == pytest.approx(removed, abs=0.06)


@pytest.mark.parametrize("name", ["llama_tied", "gpt_neox", "qwen2"])
def test_accounts_are_those_of_the_models(name, tokens):
    model = build(name)
    for shortcuts in ("folded", "full"):
        narrow = sliced(model, CUT, tokens, shortcuts=shortcuts)
        found = count_parameters(model.config, CUT, shortcuts=shortcuts, context=10)
        assert (found.parameters, found.dense_parameters) == (parameter_count(narrow), parameter_count(model))
        assert found == count_parameters(narrow.config, context=10)
        assert found.shortcut_parameters == sum(
            parameter_count(module.shortcuts) for module in narrow.modules() if isinstance(module, SlicedLayer)
        )
        assert found.removed == pytest.approx(models.removed_fraction(model, narrow))
        assert found.flops - count_parameters(narrow.config).flops == 4 * 10 * 32 * 6
    maps = [module for module in model.modules() if isinstance(module, nn.Linear)]
    assert count_parameters(model.config, CUT).dense_flops == sum(2 * module.weight.numel() for module in maps)
    assert dense_configuration(narrow.config).to_dict() == model.config.to_dict()
    dense = count_parameters(model.config)
    assert (dense.parameters, dense.flops, dense.removed) == (parameter_count(model), found.dense_flops - 4 * 10 * 32 * 6, 0.0)
    with pytest.raises(ValueError, match="has its plan"):
        count_parameters(narrow.config, CUT)
    with pytest.raises(ValueError, match="for 5 layers of width 32, this model has 6 of width 32"):
        count_parameters(model.config, SlicePlan(32, (32,) * 5, "test"))


def test_a_plan_of_a_given_size(tokens):
    config = LlamaConfig(hidden_size=256, intermediate_size=512, num_hidden_layers=4, num_attention_heads=4, vocab_size=500)
    for shortcuts in SHORTCUTS:
        plan = plan_of_size(config, 0.2, lambda share: constant(4, 256, share), shortcuts=shortcuts, tolerance=2e-3)
        assert count_parameters(config, plan, shortcuts=shortcuts).removed == pytest.approx(0.201, abs=1.1e-3)
    plan = plan_of_size(config, 0.2, lambda share: constant(4, 256, share, keep_full=(0,)), highest=0.6)
    assert plan.widths[0] == 256
    with pytest.raises(ValueError, match=r"removed=0\.95: this schedule removes 0 to 0\.\d+ of the parameters"):
        plan_of_size(config, 0.95, lambda share: constant(4, 256, share))


def test_other_families_are_refused_by_name():
    with pytest.raises(UnsupportedModel, match="model type 'gpt2' cannot be sliced; the families"):
        count_parameters(build("gpt2").config, FULL)


def test_one_basis_has_no_shortcuts(tokens):
    shared = sliced(build("llama"), UNCUT_LAYERS, tokens, shortcuts="shared_basis")
    assert count_parameters(shared.config).shortcut_parameters == 0
