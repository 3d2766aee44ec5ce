"""Importance by ablation: against independent computations, finite differences, and a layer that does nothing."""

import math

import numpy as np
import pytest
import torch
from architectures import build
from model_helpers import logits, random_windows, silence

from prunelib.criteria import ABLATIONS, CRITERIA
from prunelib.criteria.loss_based import knn_entropy
from prunelib.criteria.statistics import collect
from prunelib.depth import LayerSetLoss, exhaustive, greedy, lowest
from prunelib.evaluation.perplexity import perplexity
from prunelib.models import UnsupportedModel, decoder_layers, remove_layers
from prunelib.models.layerwise import shared_layer_forwards

FAMILIES = ("llama", "gpt_neox", "gemma2", "mixtral")
SMALL_ENTROPY = {"entropy_gain": {"neighbors": 5}, "entropy_gain_attention": {"neighbors": 5}}


def mean_loss(model, windows) -> torch.Tensor:
    logits = model(windows, use_cache=False).logits[:, :-1]
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())


@pytest.mark.parametrize("family", FAMILIES)
def test_leave_one_out_equals_pruned_models(family):
    model, windows = build(family), random_windows()
    found = ABLATIONS["leave_one_out_nll"](model, windows, batch_size=3)
    dense = perplexity(model, windows).nll
    expected = [perplexity(remove_layers(model, [layer]), windows).nll - dense for layer in range(6)]
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert found.argmin() == np.argmin([perplexity(remove_layers(model, [layer]), windows).ppl for layer in range(6)])


def test_leave_one_out_kl_is_the_divergence_of_pruned_models():
    """Against logits of each pruned model, in float64."""
    model, windows = build("llama"), random_windows()
    found = ABLATIONS["leave_one_out_kl"](model, windows)
    models = (model, *(remove_layers(model, [layer]) for layer in range(6)))
    dense, *pruned = (logits(one, windows)[:, :-1].double().log_softmax(-1) for one in models)
    expected = [float((dense.exp() * (dense - other)).sum(-1).mean()) for other in pruned]
    np.testing.assert_allclose(found, expected, rtol=1e-4)


@pytest.mark.parametrize("metric", ["nll", "kl"])
def test_loss_of_some_windows_and_its_cost(metric):
    model, windows = build("llama"), random_windows(6)
    loss = LayerSetLoss(model, windows, metric, batch_size=2)
    sets = [(2,), (1, 3), (2,)]
    everywhere = loss(sets)
    assert everywhere[0] == everywhere[2]
    dense = [()] if metric == "kl" else []
    assert loss.layer_windows == 6 * shared_layer_forwards(6, [*dense, *sets])
    assert loss.layer_windows_alone == 6 * (5 + 4 + 6 * len(dense))
    halves = [loss(sets, rows) for rows in ([4, 0, 2], [1, 3, 5])]
    np.testing.assert_allclose(np.mean(halves, axis=0), everywhere, rtol=1e-5)
    assert loss([]) == []


def test_loss_refuses_before_work():
    windows = random_windows()
    with pytest.raises(ValueError, match="unknown metric 'ppl'; there are: nll, kl"):
        LayerSetLoss(build("llama"), windows, "ppl")
    with pytest.raises(ValueError, match="another model's tokenizer"):
        LayerSetLoss(build("llama"), windows + 100)
    unknown = build("llama")
    unknown.model.blocks = unknown.model.layers
    del unknown.model.layers
    # SLEB's released code takes such a model for one whose layers all cost the same.
    with pytest.raises(UnsupportedModel, match="no decoder layers"):
        greedy(6, 1, LayerSetLoss(unknown, windows), progress=False)
    for name in ABLATIONS:
        with pytest.raises(UnsupportedModel, match="no decoder layers"):
            ABLATIONS[name](unknown, windows)


@pytest.mark.parametrize("family", ["gpt_neox", "opt"])  # Llama's norms compute in float32 in any case
def test_taylor_matches_finite_differences(family):
    """One weight matrix of one layer, weight by weight, in float64; all others by the sum over them."""
    model, windows = build(family).double(), random_windows(2, 7)
    layer = decoder_layers(model)[3]
    name, weight = next((name, weight) for name, weight in layer.named_parameters() if weight.ndim == 2)
    total, step, flat = 0.0, 1e-5, weight.detach().view(-1)
    for place in range(0, weight.numel(), 211):
        value, sides = flat[place].item(), []
        for flat[place] in (value + step, value - step):
            sides.append(mean_loss(model, windows).item())
        flat[place] = value
        total += abs(value * (sides[0] - sides[1]) / (2 * step))
    named = dict(layer.named_parameters())
    gradients = torch.autograd.grad(mean_loss(model, windows), list(named.values()))
    products = {key: (named[key] * gradient).detach().abs() for key, gradient in zip(named, gradients, strict=True)}
    assert products[name].view(-1)[::211].sum().item() == pytest.approx(total, rel=1e-4)
    found = ABLATIONS["taylor"](model, windows)
    expected = sum(product.sum().item() for key, product in products.items() if not key.endswith("bias"))
    assert found[3] == pytest.approx(expected, rel=1e-4)


def test_taylor_sums_over_samples_before_the_absolute_value():
    model, windows = build("llama"), random_windows(5)
    whole = ABLATIONS["taylor"](model, windows, batch_size=5)
    np.testing.assert_allclose(ABLATIONS["taylor"](model, windows, batch_size=2), whole, rtol=1e-4)
    apart = np.mean([ABLATIONS["taylor"](model, windows[row : row + 1]) for row in range(5)], axis=0)
    assert (apart > 1.2 * whole).all()


def test_magnitude_is_the_sum_of_absolute_weights():
    model = build("qwen2")  # with biases, which do not count
    layer = decoder_layers(model)[2]
    expected = sum(p.abs().double().sum().item() for name, p in layer.named_parameters() if not name.endswith("bias"))
    assert sum(name.endswith("bias") for name, _ in layer.named_parameters()) == 3
    assert ABLATIONS["magnitude"](model, random_windows())[2] == pytest.approx(expected, rel=1e-6)


def test_the_model_is_left_as_it_was():
    model, windows = build("llama"), random_windows()
    model.model.layers[1].requires_grad_(False)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for name, rule in ABLATIONS.items():
        rule(model, windows, **SMALL_ENTROPY.get(name, {}))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert [parameter.requires_grad for parameter in model.model.layers[1].parameters()] == [False] * 9
    assert all(parameter.requires_grad for parameter in model.model.layers[2].parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_entropy_of_known_distributions():
    points = torch.randn(1000, 3, generator=torch.Generator().manual_seed(0))
    gaussian = 1.5 * math.log(2 * math.pi * math.e)
    assert knn_entropy(points, 5) == pytest.approx(gaussian, abs=0.2)
    # Scaling by c adds d log c, exactly; a shift adds nothing.
    assert knn_entropy(4 * points, 5) - knn_entropy(points, 5) == pytest.approx(3 * math.log(4), abs=1e-6)
    assert knn_entropy(points + 100, 5) == pytest.approx(knn_entropy(points, 5), abs=1e-3)
    assert math.isfinite(knn_entropy(torch.ones(30, 4), 5))
    with pytest.raises(ValueError, match="25 tokens: the distance to neighbor 25 needs more than 25"):
        knn_entropy(points[:25])


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "gemma2", "opt", "granite"])
def test_entropy_gains_against_states_taken_by_hooks(family):
    model, windows = build(family), random_windows(2, 20)
    states, attentions = [], []
    for layer in decoder_layers(model):
        layer.register_forward_pre_hook(lambda _, args, kwargs: states.append((*args, *kwargs.values())[0]), with_kwargs=True)
        # What follows the attention and a norm in each of these families.
        inner = {"llama": "post_attention_layernorm", "granite": "post_attention_layernorm", "opt": "final_layer_norm"}
        inner["gemma2"] = "pre_feedforward_layernorm"
        if family in inner:
            getattr(layer, inner[family]).register_forward_pre_hook(lambda _, args: attentions.append(args[0]))
        else:  # parallel sublayers, both fed by the input
            layer.attention.register_forward_hook(lambda _, args, output: attentions.append(states[-1] + output[0]))
    decoder_layers(model)[5].register_forward_hook(lambda _, args, output: states.append(output))
    expected, expected_attention = np.zeros(6), np.zeros(6)
    for window in windows:
        states.clear()
        attentions.clear()
        with torch.no_grad():
            model(window[None], use_cache=False)
        entropy = [knn_entropy(state[0], 5) for state in states]
        expected += np.diff(entropy) / 2
        within = [knn_entropy(state.reshape(20, -1), 5) for state in attentions]
        expected_attention += (np.array(within) - entropy[:-1]) / 2
    for module in model.modules():
        module._forward_hooks.clear()
        module._forward_pre_hooks.clear()
    np.testing.assert_allclose(ABLATIONS["entropy_gain"](model, windows, neighbors=5), expected, atol=1e-3)
    found = ABLATIONS["entropy_gain_attention"](model, windows, neighbors=5)
    np.testing.assert_allclose(found, expected_attention, atol=1e-3)
    assert np.abs(expected - expected_attention).max() > 0.1


@pytest.mark.parametrize(("family", "message"), [("bloom", "does not add its attention"), ("lfm2", "no sublayer self_attn or")])
def test_attention_that_cannot_be_told_apart_is_refused(family, message):
    with pytest.raises(UnsupportedModel, match=message):
        ABLATIONS["entropy_gain_attention"](build(family), random_windows(), neighbors=5)
    assert np.isfinite(ABLATIONS["entropy_gain"](build(family), random_windows(), neighbors=5)).all()


@pytest.mark.parametrize("planted", [1, 4])
def test_all_rules_agree_on_a_layer_that_does_nothing(tiny_llama, planted):
    """Every criterion and ablation, and the searches on both losses, in a model whose other layers all matter."""
    with torch.no_grad():
        for parameter in tiny_llama.parameters():
            if parameter.ndim == 2:
                parameter.mul_(4)
    silence(tiny_llama, planted)
    windows = random_windows(6, 16, 97)
    stats = collect(tiny_llama, windows, progress=False)
    for name in ("block_influence", "simdiff_mssd", "simdiff_masd", "relative_magnitude"):
        assert lowest(CRITERIA[name](stats), 1) == (planted,), name
    for name in ("leave_one_out_kl", "taylor", "magnitude", "entropy_gain", "entropy_gain_attention"):
        assert lowest(ABLATIONS[name](tiny_llama, windows, **SMALL_ENTROPY.get(name, {})), 1) == (planted,), name
        if name in ("taylor", *SMALL_ENTROPY):
            assert ABLATIONS[name](tiny_llama, windows, **SMALL_ENTROPY.get(name, {}))[planted] == 0
    # A random model predicts no better with all its layers: its likelihood may gain from a loss, but not from this one.
    assert ABLATIONS["leave_one_out_nll"](tiny_llama, windows)[planted] == pytest.approx(0, abs=1e-6)
    for search in (greedy, exhaustive):
        assert search(6, 1, LayerSetLoss(tiny_llama, windows, "kl"), progress=False).removed == (planted,)


def test_registry():
    protected = {name: (rule.protect_first, rule.protect_last) for name, rule in ABLATIONS.items()}
    assert protected == {
        "leave_one_out_nll": (4, 2),
        "leave_one_out_kl": (0, 0),
        "taylor": (4, 2),
        "magnitude": (4, 2),
        "entropy_gain": (2, 1),
        "entropy_gain_attention": (2, 1),
    }
    assert all(rule.name == name and rule.title and rule.source for name, rule in ABLATIONS.items())
    assert ABLATIONS["entropy_gain"].options == {"neighbors": 25, "batch_size": 1}
