"""Shared beginnings: what comes out first, what it costs, and the divergence from the dense model that stands on it."""

import itertools

import pytest
import torch
from architectures import build

from prunelib.evaluation.layer_sets import layer_set_divergence, layer_set_perplexity
from prunelib.evaluation.perplexity import NotFinite
from prunelib.models import UnsupportedModel, remove_layers
from prunelib.models.layerwise import SharedPrefixEvaluator, check_layer_set, shared_layer_forwards


def random_windows(count: int = 5, length: int = 13) -> torch.Tensor:
    return torch.randint(3, 128, (count, length), generator=torch.Generator().manual_seed(0))


def test_every_set_comes_out_once_a_batch_and_the_dense_model_first():
    sets = [(), (5,), (4, 5), (0,), (1, 5), (5,)]
    runs = SharedPrefixEvaluator(build("llama"), random_windows(), sets, batch_size=2, progress=False)
    seen = [(start, removed) for start, _, removed, _ in runs]
    assert sorted(seen) == sorted(itertools.product((0, 2, 4), set(sets)))
    assert [next(removed for at, removed in seen if at == start) for start in (0, 2, 4)] == [()] * 3


def test_runs_can_be_read_twice_and_only_count_up():
    runs = SharedPrefixEvaluator(build("gpt_neox"), random_windows(), [(1,), (2,)], batch_size=5, progress=False)
    once, twice = (torch.stack([logits for *_, logits in runs]) for _ in range(2))
    assert torch.equal(once, twice)
    # Layer 0 is shared: behind it run 2345 in one branch and 1345 in the other.
    assert shared_layer_forwards(6, [(1,), (2,)]) == 1 + 4 + 4
    assert runs.layer_forwards == 2 * 9
    assert runs.layer_forwards_alone == 2 * 5


@pytest.mark.parametrize("family", ["llama", "gemma2", "opt"])
def test_divergence_against_an_independent_computation(family):
    model, windows = build(family), random_windows()
    found = layer_set_divergence(model, windows, [(1,), (0, 4), ()], batch_size=2, progress=False)
    assert list(found) == [(1,), (0, 4), ()]
    for removed, result in found.items():
        with torch.no_grad():
            p = model(windows, use_cache=False).logits[:, :-1].double().softmax(-1)
            q = remove_layers(model, removed)(windows, use_cache=False).logits[:, :-1].double().softmax(-1)
        expected = (p * (p / q).log()).sum()
        assert result.tokens == 5 * 12
        assert result.kl_sum == pytest.approx(expected.item(), abs=1e-4)
        assert result.kl == result.kl_sum / 60
    assert found[()].kl == 0
    assert min(found[(1,)].kl, found[(0, 4)].kl) > 0.01


def test_divergence_counts_the_dense_model_among_its_runs():
    found = layer_set_divergence(build("llama"), random_windows(), [(1,), (2,)], batch_size=3, progress=False)
    assert found.layer_forwards == 2 * shared_layer_forwards(6, [(), (1,), (2,)])
    assert found.layer_forwards_alone == 2 * (6 + 5 + 5)
    assert layer_set_divergence(build("llama"), random_windows(), [], progress=False) == {}


def test_only_the_dense_logits_are_kept_beside_a_batch():
    import weakref

    model, alive = build("llama"), []

    def hook(module, args, output):
        assert sum(reference() is not None for reference in alive) <= 1
        alive.append(weakref.ref(output))

    model.lm_head.register_forward_hook(hook)
    layer_set_divergence(model, random_windows(3), [(1,), (2,), (3,)], batch_size=2, progress=False)
    assert len(alive) == 2 * 4


def test_what_cannot_be_run_is_refused():
    with pytest.raises(NotFinite, match=r"without the layers \(\).*window 0 is not finite"):
        model = build("llama")
        with torch.no_grad():
            model.model.layers[5].mlp.down_proj.weight.fill_(float("nan"))
        layer_set_divergence(model, random_windows(), [(1,), (5,)], progress=False)
    with pytest.raises(ValueError, match=r"removed layers .* from 0 to 5"):
        layer_set_divergence(build("llama"), random_windows(), [(1,), (6,)], progress=False)
    with pytest.raises(ValueError, match="cannot remove 3 of 3 layers"):
        check_layer_set(3, (0, 1, 2))
    strange = build("llama")
    strange.model.blocks = strange.model.layers
    del strange.model.layers
    for measure in (layer_set_perplexity, layer_set_divergence):
        with pytest.raises(UnsupportedModel, match="model type 'llama': no decoder layers"):
            measure(strange, random_windows(), [(1,)], progress=False)


@pytest.mark.parametrize("unit", ["layer", "sublayer"])
def test_hooks_of_a_model_spread_over_devices_change_nothing(unit):
    """As accelerate places a model: hooks that rewrite `forward` of the whole and of its parts. All on the CPU here."""
    hooks = pytest.importorskip("accelerate.hooks")
    model, windows, sets = build("llama"), random_windows(), [(), (1,), (0, 4), (7,)][: 3 + (unit == "sublayer")]
    expected = layer_set_divergence(model, windows, sets, progress=False, unit=unit)
    parts = [model.model.embed_tokens, *model.model.layers, model.model.norm, model.model.rotary_emb, model.lm_head]
    hooks.add_hook_to_module(model, hooks.AlignDevicesHook("cpu", io_same_device=True))
    for part in parts:
        hooks.add_hook_to_module(part, hooks.AlignDevicesHook("cpu"))
    assert layer_set_divergence(model, windows, sets, progress=False, unit=unit) == expected
    assert expected[(1,)].kl > 0.01
    assert hasattr(model, "_hf_hook")
