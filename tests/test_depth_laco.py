"""LaCo's merge by its golden facts, as published and as released, and the walk of its search."""

import numpy as np
import pytest
import torch
from architectures import build
from model_helpers import logits, random_windows

from prunelib.depth.laco import RULES, collapse, merge
from prunelib.models import UnsupportedModel, decoder_layers, load, parameter_count, remove_layers, save

FAMILIES = ("llama", "gpt_neox", "gemma2", "gpt2")


def split(layer: torch.nn.Module) -> tuple[dict, dict]:
    """Parameters of attention and MLP, and parameters of norms."""
    named = dict(layer.named_parameters())
    norms = {name: value for name, value in named.items() if "norm" in name or "ln_" in name}
    return {name: value for name, value in named.items() if name not in norms}, norms


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("rule", list(RULES))
def test_one_following_layer_is_copied_under_both_rules(family, rule):
    """theta_l + (theta_{l+1} - theta_l) = theta_{l+1}; the norms stay those of layer l."""
    model = build(family)
    merged = merge(model, 2, 1, rule)
    assert len(decoder_layers(merged)) == merged.config.num_hidden_layers == 5
    weights, norms = split(decoder_layers(merged)[2])
    assert weights and norms
    for found, source in ((weights, 3), (norms, 2)):
        expected = dict(decoder_layers(model)[source].named_parameters())
        assert all(torch.equal(value, expected[name]) for name, value in found.items())


def test_two_following_layers():
    model = build("llama")
    zero, one, two = (split(decoder_layers(model)[index])[0] for index in (1, 2, 3))
    published = split(decoder_layers(merge(model, 1, 2))[1])[0]
    released = split(decoder_layers(merge(model, 1, 2, "released"))[1])[0]
    assert len(zero) == 7
    for name in zero:
        torch.testing.assert_close(published[name], one[name] + two[name] - zero[name])
        assert torch.equal(released[name], two[name])
        assert not torch.allclose(published[name], released[name], atol=1e-2)


@pytest.mark.parametrize("rule", list(RULES))
def test_the_merged_model_is_a_checkpoint_and_the_dense_one_is_as_it_was(tmp_path, rule):
    model, windows = build("llama"), random_windows()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    expected = logits(model, windows)
    merged = merge(model, 1, 3, rule)
    with torch.no_grad():
        decoder_layers(merged)[1].mlp.up_proj.weight.add_(0)  # its own tensor: not one of another layer
    shared = {parameter.data_ptr() for parameter in model.parameters()}
    own = [name for name, parameter in merged.named_parameters() if parameter.data_ptr() not in shared]
    assert sorted(own) == sorted(f"model.layers.1.{name}" for name in split(decoder_layers(model)[1])[0])
    save(merged, None, tmp_path / "merged")
    again = load(tmp_path / "merged")
    assert torch.equal(logits(again, windows), logits(merged, windows))
    assert parameter_count(again) == parameter_count(remove_layers(model, [2, 3, 4]))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(logits(model, windows), expected)


def test_impossible_merges():
    model = build("llama")
    for base, following in ((4, 2), (-1, 1), (2, 0), (6, 1)):
        with pytest.raises(ValueError, match=f"cannot merge {following} layers into layer {base} of 6"):
            merge(model, base, following)
    with pytest.raises(UnsupportedModel, match="cannot merge layer 1 into layer 0: they are not built alike"):
        merge(build("qwen3_moe_mlp_only"), 0, 1)


def test_the_walk():
    """Settings as in the released loop: l = 5 - 2 = 3, then down by one: 3+4, 2+(3,4), 1+(2..4), 0+(1..4)."""
    model, windows = build("llama"), random_windows()
    found = collapse(model, windows, layers_per_merge=2, threshold=-1.0, progress=False)
    assert [(step.base, step.following) for step in found.steps] == [(3, 1), (2, 1), (1, 1), (0, 1)]
    assert found.origins == ((0, 1, 2, 3, 4), (5,))
    assert len(decoder_layers(found.model)) == 2
    # By three: 2+(3,4); then 1 with all that is above it; then 0 with the one that is left.
    found = collapse(model, windows, layers_per_merge=3, threshold=-1.0, progress=False)
    assert [(step.base, step.following) for step in found.steps] == [(2, 2), (1, 2), (0, 1)]
    assert found.origins == ((0, 1, 2, 3, 4, 5),)
    none = collapse(model, windows, layers_per_merge=2, threshold=1.0, progress=False)
    assert [(step.base, step.accepted) for step in none.steps] == [(base, False) for base in (3, 2, 1, 0)]
    assert none.origins == tuple((index,) for index in range(6))
    for count in range(6):
        found = collapse(model, windows, layers_per_merge=4, threshold=-1.0, layers_removed=count, progress=False)
        assert 6 - len(found.origins) == min(count, 5)


@pytest.mark.parametrize("rule", list(RULES))
def test_each_step_against_a_merge_by_hand(rule):
    """The cosine recomputed from `output_hidden_states`, sample by sample, and the choice that follows from it."""
    dense, windows = build("llama"), random_windows()
    samples = [windows[0], windows[1, :4], windows[2, :7]]
    found = collapse(dense, samples, layers_per_merge=3, threshold=0.9, rule=rule, progress=False)
    model, base = dense, 5 - 3
    for step in found.steps:
        assert step.base == base
        candidate = merge(model, base, step.following, rule)
        cosines = []
        for ids in samples:
            pair = [m(ids[None], output_hidden_states=True).hidden_states[-1].flatten() for m in (dense, candidate)]
            cosines.append(torch.dot(*pair).item() / (pair[0].norm() * pair[1].norm()).item())
        assert step.cosine == pytest.approx(np.mean(cosines), abs=1e-5)
        assert step.accepted == (step.cosine > 0.9)
        model = candidate if step.accepted else model
        base -= 1
    torch.testing.assert_close(logits(found.model, windows), logits(model, windows))


def test_settings_are_checked_before_work():
    model, windows = build("llama"), random_windows()
    # 7 layers at a time are too many
    for settings in ({}, {"layers_per_merge": 1}, {"layers_per_merge": 2, "threshold": 1.5}, {"layers_removed": 6}):
        with pytest.raises(ValueError, match="is out of range"):
            collapse(model, windows, **settings)
    with pytest.raises(ValueError, match="unknown rule 'mean'; there are: published, released"):
        collapse(model, windows, layers_per_merge=2, rule="mean")
    for samples in ([], [windows[0], windows[0, :0]]):
        with pytest.raises(ValueError, match="no tokens to compare"):
            collapse(model, samples, layers_per_merge=2)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.fill_(float("nan"))
    with pytest.raises(RuntimeError, match="NaN or infinite"):
        collapse(model, windows, layers_per_merge=2)
