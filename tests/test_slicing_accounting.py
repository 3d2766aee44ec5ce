"""Parameters and FLOPs of dense, shallower and sliced models: published counts, and those of the models themselves."""

import pytest
import torch
from architectures import build
from model_helpers import CUT, sliced
from torch import nn
from transformers import LlamaConfig, MistralConfig, OPTConfig, PhiConfig

from prunelib import models
from prunelib.models import parameter_count
from prunelib.slicing import SlicePlan, constant, count_parameters, plan_of_size
from prunelib.slicing.modeling import SlicedLayer


def test_parameter_counts_of_slicegpt():
    """The counts that SliceGPT's own tests state for slices of 20 %, rounded down to multiples of 8."""
    opt = count_parameters(OPTConfig(), SlicePlan(768, (608,) * 12, "constant"), shortcuts="full")
    assert opt.parameters == 147_250_880
    phi_2 = PhiConfig(vocab_size=51200, hidden_size=2560, intermediate_size=10240, num_hidden_layers=32, num_attention_heads=32)
    phi = count_parameters(phi_2, SlicePlan(2560, (2048,) * 32, "constant"), shortcuts="full")
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
            width = int((1 - share) * config.hidden_size) // 8 * 8
            plan = SlicePlan(config.hidden_size, (width,) * config.num_hidden_layers, "constant")
            assert 100 * count_parameters(config, plan, shortcuts=shortcuts).removed == pytest.approx(removed, abs=0.06)


@pytest.mark.parametrize("name", ["llama_tied", "gpt_neox", "qwen2"])
def test_counts_are_those_of_the_models(name):
    model, tokens = build(name), torch.randint(0, 97, (5, 24))
    for shortcuts in ("folded", "full", "shared_basis"):
        narrow = sliced(model, CUT, tokens, shortcuts=shortcuts)
        found = count_parameters(model.config, CUT, shortcuts=shortcuts, context=10)
        assert (found.parameters, found.dense_parameters) == (parameter_count(narrow), parameter_count(model))
        assert found.shortcut_parameters == sum(
            parameter_count(module.shortcuts) for module in narrow.modules() if isinstance(module, SlicedLayer)
        )
        assert found.removed == pytest.approx(models.removed_fraction(model, narrow))
        assert found.flops - count_parameters(model.config, CUT, shortcuts=shortcuts).flops == 4 * 10 * 32 * 6
    maps = [module for module in model.modules() if isinstance(module, nn.Linear)]
    dense = count_parameters(model.config)
    assert dense.flops == dense.dense_flops == sum(2 * module.weight.numel() for module in maps)
    assert (dense.parameters, dense.removed) == (parameter_count(model), 0.0)


def test_a_plan_of_a_given_size():
    config = LlamaConfig(hidden_size=256, intermediate_size=512, num_hidden_layers=4, num_attention_heads=4, vocab_size=500)
    plan = plan_of_size(config, 0.2, lambda share: constant(4, 256, share))
    assert count_parameters(config, plan).removed == pytest.approx(0.201, abs=1.1e-3)
    with pytest.raises(ValueError, match=r"removed=0\.95: this schedule removes 0 to 0\.\d+ of the parameters"):
        plan_of_size(config, 0.95, lambda share: constant(4, 256, share))
