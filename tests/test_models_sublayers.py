"""Attention or MLP alone: against layers silenced by hooks of the tests' own, reloads, brute force, and what is counted."""

import pytest
import torch
from architectures import build

from prunelib.models import UnsupportedModel, decoder_layers, parameter_count
from prunelib.models.layerwise import SharedPrefixEvaluator
from prunelib.models.plans import SublayerPlan
from prunelib.models.sublayers import idle_fraction, remove_sublayers

# What adds to the residual stream of each family, attention first, as its modelling code reads: behind the norms, if any.
ADDENDS = {
    "llama": ("self_attn.o_proj", "mlp"),
    "mistral": ("self_attn", "mlp.down_proj"),
    "qwen2": ("self_attn", "mlp"),
    "qwen3": ("self_attn", "mlp"),
    "phi": ("self_attn.dense", "mlp.fc2"),
    "phi3": ("self_attn.o_proj", "mlp.down_proj"),
    "gpt_neox": ("attention.dense", "mlp"),
    "opt": ("self_attn.out_proj", "fc2"),
    "gpt2": ("attn.resid_dropout", "mlp.dropout"),
    "gemma": ("self_attn", "mlp"),
    "gemma2": ("post_attention_layernorm", "post_feedforward_layernorm"),
    "gemma3_text": ("post_attention_layernorm", "post_feedforward_layernorm"),
    "olmo2": ("post_attention_layernorm", "post_feedforward_layernorm"),
    "mixtral": ("self_attn", "mlp"),
    "gpt_oss": ("self_attn.o_proj", "mlp"),
    "deepseek_v3": ("self_attn.o_proj", "mlp"),
    "falcon": ("self_attention.dense", "mlp"),
}
SEQUENTIAL = {"gpt_neox_sequential": ("gpt_neox", {"use_parallel_residual": False})}
FAMILIES = [*ADDENDS, *SEQUENTIAL]
# Layer 0 loses its attention, 2 both, 4 its MLP, 5 its attention.
PLAN = SublayerPlan(6, (0, 2, 5), (2, 4), "test")


def model_of(name: str):
    family, changes = SEQUENTIAL.get(name, (name, {}))
    return build(family, **changes), ADDENDS[family]


def random_windows(count: int = 4, length: int = 12) -> torch.Tensor:
    return torch.randint(3, 128, (count, length), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def silenced_logits(model, addends, plan, ids) -> torch.Tensor:
    """Logits of the dense model while hooks put zeros in the place of what each removed sublayer adds."""
    handles = []
    for lost, name in zip((plan.attention, plan.mlp), addends, strict=True):
        for index in lost:
            module = decoder_layers(model)[index].get_submodule(name)
            handles.append(
                module.register_forward_hook(
                    lambda _, args, output: (0 * output[0], *output[1:]) if isinstance(output, tuple) else 0 * output
                )
            )
    logits = model(ids, use_cache=False).logits
    for handle in handles:
        handle.remove()
    return logits


# --- an ordinary checkpoint


@pytest.mark.parametrize("name", FAMILIES)
def test_logits_equal_those_of_silenced_sublayers(name):
    model, addends = model_of(name)
    ids = random_windows()
    pruned = remove_sublayers(model, PLAN)
    with torch.no_grad():
        found = pruned(ids, use_cache=False).logits
        prompt = pruned(ids[:, :7], use_cache=True)
        rest = pruned(ids[:, 7:], past_key_values=prompt.past_key_values, use_cache=True).logits
        dense = model(ids, use_cache=False).logits
    assert len(decoder_layers(pruned)) == pruned.config.num_hidden_layers == 5
    assert torch.equal(found, silenced_logits(model, addends, PLAN, ids))
    torch.testing.assert_close(torch.cat([prompt.logits, rest], dim=1), found, atol=1e-4, rtol=1e-4)
    assert (found - dense).abs().max() > 0.01
    # Each of the cuts matters by itself, so that none of them can have been forgotten above.
    for unit in PLAN.removed:
        alone = SublayerPlan.from_units(6, [unit], "test")
        assert not torch.equal(silenced_logits(model, addends, alone, ids), dense)


def test_the_model_is_left_as_it_was_and_the_rest_is_shared(tiny_llama):
    before = {name: tensor.clone() for name, tensor in tiny_llama.state_dict().items()}
    tiny_llama.train()
    tiny_llama.model.layers[3].eval()
    pruned = remove_sublayers(tiny_llama, SublayerPlan(6, (1,), (3,), "test"))
    assert [layer.training for layer in tiny_llama.model.layers] == [True, True, True, False, True, True]
    assert [layer.training for layer in pruned.model.layers] == [True, True, True, False, True, True]
    assert all(torch.equal(tensor, before[name]) for name, tensor in tiny_llama.state_dict().items())
    own = {name for name, parameter in pruned.named_parameters() if parameter is not tiny_llama.get_parameter(name)}
    assert own == {"model.layers.1.self_attn.o_proj.weight", "model.layers.3.mlp.down_proj.weight"}
    assert not any(module._forward_hooks for model in (tiny_llama, pruned) for module in model.modules())
    nothing = remove_sublayers(tiny_llama, SublayerPlan(6, (), (), "test"))
    assert all(parameter is tiny_llama.get_parameter(name) for name, parameter in nothing.named_parameters())


@pytest.mark.parametrize("family", ["bloom", "mpt"])
def test_layers_that_do_more_than_add_are_refused(family):
    model = build(family)
    with pytest.raises(UnsupportedModel, match=rf"'{family}', layer 1, a \w+, does not add its attention and its MLP"):
        remove_sublayers(model, SublayerPlan(6, (1,), (), "test"))
    assert len(decoder_layers(remove_sublayers(model, SublayerPlan(6, (1,), (1,), "test")))) == 5


def test_other_refusals_name_the_model_and_the_reason():
    with pytest.raises(ValueError, match="the plan is for 5 layers, this llama model has 6"):
        remove_sublayers(build("llama"), SublayerPlan(5, (1,), (), "test"))
    with pytest.raises(UnsupportedModel, match=r"'lfm2', layer 2, a Lfm2DecoderLayer: no sublayer self_attn or"):
        remove_sublayers(build("lfm2"), SublayerPlan(6, (), (2,), "test"))


def test_zeros_that_do_not_silence_are_refused(monkeypatch):
    # As if another family had its output projection under a name that means something else here.
    monkeypatch.setattr("prunelib.models.sublayers.OUTPUT_NAMES", ("c_fc",))
    with pytest.raises(UnsupportedModel, match=r"zeros for mlp\.c_fc\.weight, mlp\.c_fc\.bias do not silence its sublayer"):
        remove_sublayers(build("gpt2"), SublayerPlan(6, (), (3,), "test"))
    monkeypatch.setattr("prunelib.models.sublayers.OUTPUT_NAMES", ("out",))
    with pytest.raises(UnsupportedModel, match=r"'gpt2', layer 3, a GPT2Block: no output projection out in mlp"):
        remove_sublayers(build("gpt2"), SublayerPlan(6, (), (3,), "test"))


# --- what is idle


def test_idle_parameters_by_hand():
    llama, phi = build("llama"), build("phi")
    norm, attention = 32, 32 * (32 + 16 + 16 + 32)
    found = idle_fraction(llama, SublayerPlan(6, (3,), (), "test"))
    assert found * parameter_count(llama) == pytest.approx(norm + attention)
    # One norm feeds both sublayers of Phi: it stays at work.
    found = idle_fraction(phi, SublayerPlan(6, (), (3,), "test"))
    assert found * parameter_count(phi) == pytest.approx(sum(p.numel() for p in phi.model.layers[3].mlp.parameters()))


# --- without a checkpoint


@pytest.mark.parametrize("name", ["llama", "gpt_neox", "gemma2", "opt", "mixtral", "gpt_neox_sequential"])
@torch.inference_mode()
def test_logits_of_sets_of_sublayers_are_those_of_the_checkpoints(name):
    model, ids = model_of(name)[0], random_windows()
    sets = [(), ((0, "attn"),), ((1, "mlp"),), ((1, "attn"), (1, "mlp")), PLAN.removed, tuple((i, "attn") for i in range(6))]
    for _, _, removed, logits in SharedPrefixEvaluator(model, sets).logits(ids, batch_size=4):
        expected = remove_sublayers(model, SublayerPlan.from_units(6, removed, "test"))(ids, use_cache=False).logits
        torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)
    assert not any(module._forward_hooks for module in model.modules())
