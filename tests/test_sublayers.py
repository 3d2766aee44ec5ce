"""Attention or MLP alone: against layers silenced by hooks of the tests' own, reloads, brute force, and what is counted."""

import itertools
import math

import numpy as np
import pytest
import torch
from architectures import build
from transformers import AutoModelForCausalLM

from prunelib.depth import LayerSetLoss, evolutionary, greedy
from prunelib.evaluation.layer_sets import layer_set_divergence, layer_set_perplexity
from prunelib.evaluation.perplexity import NotFinite, perplexity
from prunelib.models import UnsupportedModel, decoder_layers, parameter_count, remove_layers, removed_fraction, save
from prunelib.models.layerwise import layer_forwards_alone, shared_layer_forwards
from prunelib.models.plans import SublayerPlan
from prunelib.models.sublayers import Account, account, remove_sublayers

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


@pytest.mark.parametrize("name", ["llama", "qwen2", "phi3", "gpt_neox", "opt", "gpt2", "gemma2", "mixtral"])
def test_it_saves_and_reloads(name, tmp_path):
    model, _ = model_of(name)
    pruned = remove_sublayers(model, PLAN)
    save(pruned, None, tmp_path / name)
    again, info = AutoModelForCausalLM.from_pretrained(tmp_path / name, dtype=torch.float32, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    with torch.no_grad():
        assert torch.equal(again.eval()(random_windows()).logits, pruned(random_windows()).logits)


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


def test_biases_of_output_projections_go_too():
    pruned = remove_sublayers(build("opt"), SublayerPlan(6, (1,), (3,), "test"))
    layers = decoder_layers(pruned)
    assert not layers[1].self_attn.out_proj.bias.any()
    assert not layers[3].fc2.bias.any()
    assert layers[1].fc2.bias.any()
    assert layers[3].self_attn.out_proj.bias.any()


def test_removing_both_is_removing_the_layer():
    model = build("qwen3")
    plan = SublayerPlan(6, (1, 4), (1, 4), "test")
    pruned, expected = remove_sublayers(model, plan), remove_layers(model, [1, 4])
    assert plan.layers == (1, 4)
    weights = expected.state_dict()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in pruned.state_dict().items())
    assert account(model, plan) == Account(removed_fraction(model, expected), 0.0, 0)


@pytest.mark.parametrize("family", ["bloom", "mpt"])
def test_layers_that_do_more_than_add_are_refused(family):
    model = build(family)
    with pytest.raises(UnsupportedModel, match=rf"'{family}', layer 1, a \w+, does not add its attention and its MLP"):
        remove_sublayers(model, SublayerPlan(6, (1,), (), "test"))
    assert len(decoder_layers(remove_sublayers(model, SublayerPlan(6, (1,), (1,), "test")))) == 5
    with pytest.raises(UnsupportedModel, match="does not add its attention and its MLP"):
        layer_set_perplexity(model, random_windows(), [(2,)], progress=False, unit="sublayer")


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


# --- the account


@pytest.mark.parametrize("name", ["llama", "gpt_neox", "opt", "gemma2", "gpt2", "mixtral"])
def test_half_a_layer_and_the_other_half_are_idle_and_a_whole_one_is_gone(name):
    model, _ = model_of(name)
    layer = sum(parameter.numel() for parameter in decoder_layers(model)[0].parameters()) / parameter_count(model)
    found = account(model, PLAN)
    assert found.removed == pytest.approx(layer)
    halves = [account(model, SublayerPlan.from_units(6, [unit], "test")) for unit in (4, 5)]
    assert [half.removed for half in halves] == [0, 0]
    assert sum(half.idle for half in halves) == pytest.approx(layer)
    assert found.idle == pytest.approx(2 * halves[0].idle + halves[1].idle)
    assert found.idle_caches == 2


def test_idle_parameters_by_hand():
    llama, phi = build("llama"), build("phi")
    norm, attention = 32, 32 * (32 + 16 + 16 + 32)
    found = account(llama, SublayerPlan(6, (3,), (), "test"))
    assert found.idle * parameter_count(llama) == pytest.approx(norm + attention)
    # One norm feeds both sublayers of Phi: it stays at work.
    found = account(phi, SublayerPlan(6, (), (3,), "test"))
    assert found.idle * parameter_count(phi) == pytest.approx(sum(p.numel() for p in phi.model.layers[3].mlp.parameters()))


# --- sets of units


@pytest.mark.parametrize("name", ["llama", "gpt_neox", "gemma2", "opt", "mixtral", "gpt_neox_sequential"])
def test_losses_of_units_are_those_of_the_checkpoints(name):
    model, _ = model_of(name)
    windows = random_windows()
    sets = [(), (0,), (3,), (2, 3), PLAN.removed, (0, 2, 4, 6, 8, 10), (1, 3, 5, 7, 9, 10, 11)]
    nll = LayerSetLoss(model, windows, batch_size=3, unit="sublayer")(sets)
    pruned = [remove_sublayers(model, SublayerPlan.from_units(6, removed, "test")) for removed in sets]
    np.testing.assert_allclose(nll, [perplexity(one, windows).nll for one in pruned], atol=1e-5)
    kl = LayerSetLoss(model, windows, "kl", batch_size=3, unit="sublayer")(sets)
    with torch.no_grad():
        dense, *others = [one(windows, use_cache=False).logits[:, :-1].double().log_softmax(-1) for one in pruned]
    expected = [(dense.exp() * (dense - other)).sum(-1).mean().item() for other in (dense, *others)]
    np.testing.assert_allclose(kl, expected, atol=1e-5)
    assert kl[0] == 0
    assert len(set(np.round(nll, 5))) == len(sets)
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("metric", ["nll", "kl"])
def test_whole_layers_as_units_are_layers(metric):
    model, windows = build("llama"), random_windows()
    layers, units = LayerSetLoss(model, windows, metric), LayerSetLoss(model, windows, metric, unit="sublayer")
    sets = [(), (1,), (1, 4), (5,)]
    assert units([tuple(itertools.chain(*((2 * i, 2 * i + 1) for i in removed))) for removed in sets]) == layers(sets)
    assert (layers.n_units, units.n_units) == (6, 12)
    assert units.layer_windows == layers.layer_windows
    assert units.layer_windows_alone == layers.layer_windows_alone


def test_shared_beginnings_of_units():
    # Layer 5 runs whole, without attention, without MLP, or not at all, behind the same five layers.
    sets = [(), (10,), (11,), (10, 11)]
    assert shared_layer_forwards(6, sets, "sublayer") == 5 + 3
    assert layer_forwards_alone(6, sets, "sublayer") == 6 + 6 + 6 + 5
    model, calls = build("llama"), []
    for layer in model.model.layers:
        layer.register_forward_hook(lambda *_: calls.append(1))
    found = layer_set_perplexity(model, random_windows(4), sets, batch_size=2, progress=False, unit="sublayer")
    assert (found.layer_forwards, found.layer_forwards_alone) == (2 * 8, 2 * 23)
    # Layer 5 ran once more, on two tokens, with both sublayers silent.
    assert len(calls) == 2 * 8 + 1
    singles = [(unit,) for unit in range(64)]
    # Above the removed one l layers are shared; the rest of the 32 runs for each of the two.
    assert shared_layer_forwards(32, singles, "sublayer") == 31 + 2 * 32 * 33 // 2
    assert layer_forwards_alone(32, singles, "sublayer") == 64 * 32


def test_greedy_over_units_is_brute_force():
    """BlockPruner on three layers, down to the last sublayer but one."""
    model, windows = build("llama", num_hidden_layers=3), random_windows()
    loss = LayerSetLoss(model, windows, unit="sublayer")
    found = greedy(loss.n_units, 4, loss, 0, 0, progress=False)
    chosen: tuple[int, ...] = ()
    for step in found.steps:
        candidates = [tuple(sorted((*chosen, unit))) for unit in range(6) if unit not in chosen]
        losses = [perplexity(remove_sublayers(model, SublayerPlan.from_units(3, c, "x")), windows).nll for c in candidates]
        chosen = candidates[int(np.argmin(losses))]
        assert step.removed == chosen
        assert step.value == pytest.approx(min(losses), abs=1e-5)
    assert len(found.removed) == 4
    assert loss.layer_windows < loss.layer_windows_alone


def test_evolution_conserves_both_kinds():
    seen = []

    def fitness(sets, rows):
        seen.extend(sets)
        # Planted: attention 1, 3 and MLP 4, 6 cost nothing.
        return [sum(unit not in (2, 6, 9, 13) for unit in removed) + 0.0 for removed in sets]

    settings = {"seed": 1, "initial": 4, "offspring": 8, "progress": False}
    assert evolutionary(16, 4, fitness, 3, groups=2, generations=20, **settings).removed == (2, 6, 9, 13)
    assert len(evolutionary(16, 4, fitness, 3, groups=2, **settings).steps) == int(2 * (8 - 2) / 1.5)
    assert {sum(unit % 2 for unit in removed) for removed in seen} == {2}
    assert all(len(removed) == 4 and removed == tuple(sorted(set(removed))) for removed in seen)
    seen.clear()
    evolutionary(16, 4, fitness, 3, **settings)
    assert {sum(unit % 2 for unit in removed) for removed in seen} > {2}
    # Three of one kind and two of the other, which all go: only the first kind is swapped.
    seen.clear()
    evolutionary(5, 4, fitness, 3, groups=2, generations=3, **settings)
    assert set(seen) == {(0, 1, 2, 3), (0, 1, 3, 4), (1, 2, 3, 4)}


def test_evolution_refuses_unequal_parts():
    with pytest.raises(ValueError, match="cannot remove 3 in equal parts from groups=2: give a multiple of 2"):
        evolutionary(16, 3, lambda sets, rows: [0.0] * len(sets), 3, groups=2, progress=False)
    with pytest.raises(ValueError, match="groups=0"):
        evolutionary(16, 4, lambda sets, rows: [0.0] * len(sets), 3, groups=0, progress=False)


def test_evolution_over_the_sublayers_of_a_model():
    model, windows = build("llama"), random_windows(6)
    with torch.no_grad():  # a planted optimum: these two do nothing
        model.model.layers[2].self_attn.o_proj.weight.zero_()
        model.model.layers[4].mlp.down_proj.weight.zero_()
    loss = LayerSetLoss(model, windows, "kl", unit="sublayer")
    settings = {"initial": 4, "offspring": 6, "generations": 12, "stages": ((2, 1), (1, 6)), "progress": False}
    found = evolutionary(loss.n_units, 2, loss, len(windows), groups=2, **settings)
    assert found.removed == (4, 9)
    assert found.value == pytest.approx(0, abs=1e-6)


def test_bad_units_are_refused_before_work():
    model, windows = build("llama"), random_windows()
    for measure in (layer_set_perplexity, layer_set_divergence):
        with pytest.raises(ValueError, match=r"removed sublayers \(12,\): give distinct sublayers .* from 0 to 11"):
            measure(model, windows, [(12,)], progress=False, unit="sublayer")
        with pytest.raises(ValueError, match="cannot remove 12 of 12 sublayers: at least one must stay"):
            measure(model, windows, [tuple(range(12))], progress=False, unit="sublayer")
        with pytest.raises(ValueError, match="unknown unit 'block'; there are: layer, sublayer"):
            measure(model, windows, [(1,)], progress=False, unit="block")
    with pytest.raises(ValueError, match="unknown unit 'block'"):
        LayerSetLoss(model, windows, unit="block")
    assert math.isfinite(LayerSetLoss(model, windows, unit="sublayer")([tuple(range(11))])[0])
    with torch.no_grad():
        model.model.layers[5].mlp.down_proj.weight.fill_(float("nan"))
    with pytest.raises(NotFinite, match=r"without the sublayers \(3,\): the likelihood of window 0"):
        layer_set_perplexity(model, windows, [(3,)], progress=False, unit="sublayer")
