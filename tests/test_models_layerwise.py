"""The engine against whole models, in every family, and the layers that removals share: what runs, and how often."""

import itertools

import pytest
import torch
from accelerate import hooks
from architectures import ARCHITECTURES, build
from model_helpers import random_windows

from prunelib.models import UnsupportedModel, decoder_layers, final_norm, remove_layers
from prunelib.models.layerwise import (
    LayerwiseModel,
    SharedPrefixEvaluator,
    check_layer_set,
    layer_forwards_alone,
    shared_layer_forwards,
)
from prunelib.models.sublayers import all_sublayers


def run(engine: LayerwiseModel, hidden: torch.Tensor, first: int = 0) -> list[torch.Tensor]:
    states = [hidden]
    for index in range(first, engine.n_layers):
        states.append(engine.run_layer(index, states[-1]))
    return states


@pytest.mark.parametrize("name", ARCHITECTURES)
@torch.inference_mode()
def test_embed_layers_and_head_are_the_model(name):
    model, ids, normed = build(name), random_windows(3, 17), []
    final_norm(model).register_forward_pre_hook(lambda _, args: normed.append(args[0]))
    expected = model(input_ids=ids, use_cache=False).logits
    engine = LayerwiseModel(model)
    states = run(engine, engine.embed(ids))
    assert torch.equal(engine.head(states[-1]), expected)
    assert engine.layers is decoder_layers(model), "the model has its layers back"
    assert torch.equal(normed[0], states[-1])
    assert torch.equal(engine.head(states[-1][:, 5:6])[:, 0], expected[:, 5])
    # Stored states, and the arguments of a batch set again after another one.
    calls = engine.calls
    engine.embed(ids[:1, :4])
    engine.calls = calls
    assert torch.equal(run(engine, states[2], first=2)[-1], states[-1])


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_neox", "opt"])
@torch.inference_mode()
def test_logits_of_sets_are_those_of_pruned_models(name):
    model, windows, sets, seen = build(name), random_windows(5), [(), (1,), (0, 4), (1,)], []
    runs = SharedPrefixEvaluator(model, sets)
    for start, ids, removed, logits in runs.logits(windows, batch_size=2):
        assert torch.equal(ids, windows[start : start + 2])
        assert torch.equal(logits, remove_layers(model, removed)(ids, use_cache=False).logits)
        seen.append((start, removed))
    assert sorted(seen) == sorted(itertools.product((0, 2, 4), set(sets)))  # every set once a batch
    assert [next(removed for at, removed in seen if at == start) for start in (0, 2, 4)] == [()] * 3  # the dense model first
    # Layers 0 and 1 are shared by the dense model and by the others in part: 012345, 02345, 1235.
    assert shared_layer_forwards(6, runs.sets) == runs.layers_per_batch == 6 + 4 + 4
    assert list(runs.logits(windows, batch_size=5))  # can be read twice, and only counts up
    assert (runs.layer_forwards, runs.layer_forwards_alone) == (4 * 14, 4 * 15)


def test_shared_beginnings_of_sublayers():
    # Layer 5 runs whole, without attention, without MLP, or not at all, behind the same five layers.
    sets = [(), ((5, "attn"),), ((5, "mlp"),), ((5, "attn"), (5, "mlp"))]
    assert shared_layer_forwards(6, sets) == 5 + 3
    assert layer_forwards_alone(6, sets) == 6 + 6 + 6 + 5
    assert shared_layer_forwards(6, [(1,), (1, 4)]) == shared_layer_forwards(6, [((1, "attn"), (1, "mlp")), (1, 4)])


@pytest.mark.parametrize(
    ("removed", "message"),
    [
        ((6,), "distinct layers from 0 to 5 in ascending order"),
        ((2, 1), "ascending"),
        ((1, 1), "distinct"),
        (((1, "head"),), "sublayers of them"),
        ((1, (1, "mlp")), "distinct"),
        (tuple(range(6)), "cannot remove 6 of 6 layers"),
        (all_sublayers(6), "cannot remove 6 of 6 layers"),
    ],
)
def test_impossible_sets_are_refused(removed, message):
    with pytest.raises(ValueError, match=message):
        check_layer_set(6, removed)
    with pytest.raises(ValueError, match=message):
        SharedPrefixEvaluator(build("llama"), [(), removed])


def test_models_that_cannot_run_layer_by_layer_are_refused_before_work():
    with pytest.raises(UnsupportedModel, match=r"'bloom', layer 1, a \w+, does not add its attention and its MLP"):
        SharedPrefixEvaluator(build("bloom"), [((1, "attn"),)])
    strange = build("llama")
    strange.model.blocks = strange.model.layers
    del strange.model.layers
    with pytest.raises(UnsupportedModel, match="model type 'llama': no decoder layers"):
        SharedPrefixEvaluator(strange, [(1,)])
    sliced = build("llama")
    sliced.config.__dict__["model_type"] = "prunelib_sliced"
    with pytest.raises(UnsupportedModel, match="remove layers first, then slice"):
        SharedPrefixEvaluator(sliced, [(1,)])


@pytest.mark.parametrize("removed", [(0, 4), ((3, "mlp"),)])
def test_hooks_of_a_model_spread_over_devices_change_nothing(removed):
    """As accelerate places a model: hooks that rewrite `forward` of the whole and of its parts. All on the CPU here."""
    model, windows = build("llama"), random_windows()

    def logits():
        runs = SharedPrefixEvaluator(model, [(), removed])
        return torch.stack([logits for *_, logits in runs.logits(windows, batch_size=5)])

    expected = logits()
    hooks.add_hook_to_module(model, hooks.AlignDevicesHook("cpu", io_same_device=True))
    for part in [model.model.embed_tokens, *model.model.layers, model.model.norm, model.model.rotary_emb, model.lm_head]:
        hooks.add_hook_to_module(part, hooks.AlignDevicesHook("cpu"))
    assert torch.equal(logits(), expected)
    assert not torch.equal(expected[0], expected[1])
