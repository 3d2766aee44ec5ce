"""Repair at the cut: equal to least squares by hand, exact where a map exists, harmless where nothing is lost."""

import copy
import itertools
import math
from contextlib import ExitStack, contextmanager

import pytest
import torch
from architectures import build
from model_helpers import logits, random_windows, silence
from torch import nn

from prunelib.depth.repair import DAMPINGS, METHODS, repair
from prunelib.models import UnsupportedModel, decoder_layers, load, remove_layers, save
from prunelib.slicing.modeling import ARCHITECTURES

FAMILIES = ("llama", "gpt_neox", "opt", "gemma")
PARALLEL = ("gpt_neox", "phi")
UNSCALED = ("replaceme", "refit")


def windows_of(count: int = 12, length: int = 16, seed: int = 0) -> torch.Tensor:
    return random_windows(count, length, seed=seed)


def double(family: str, seed: int = 0, **changes):
    return build(family, seed, **changes).double()


def writers(model, index: int) -> list[nn.Linear]:
    """The matrices that write to the stream in the last step of a layer, the MLP's at the end."""
    steps = ARCHITECTURES[model.config.model_type].steps(model.config)
    return [decoder_layers(model)[index].get_submodule(branch.output) for branch in steps[-1]]


def recorded(model, windows, index: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Output of layer `index` (its input for -1), and its MLP's last matrix's outputs, the last writers' inputs: [token, _]."""
    found = {}
    with ExitStack() as hooks:
        layer = decoder_layers(model)[max(index, 0)]
        take = lambda module, args, kwargs: found.update(before=args[0] if args else kwargs["hidden_states"])  # noqa: E731
        hooks.callback(layer.register_forward_pre_hook(take, with_kwargs=True).remove)
        take = lambda module, args, output: found.update(after=output if torch.is_tensor(output) else output[0])  # noqa: E731
        hooks.callback(layer.register_forward_hook(take).remove)
        names = writers(model, max(index, 0))
        for number, writer in enumerate(names):
            hook = writer.register_forward_hook(lambda m, args, out, number=number: found.update({number: (args[0], out)}))
            hooks.callback(hook.remove)
        logits(model, windows)
    inputs = [found[number][0].reshape(windows.numel(), -1) for number in range(len(names))]
    outputs = found[len(names) - 1][1].reshape(windows.numel(), -1)
    return found["before" if index < 0 else "after"].flatten(0, 1), outputs, torch.cat(inputs, dim=1)


def difference(x: torch.Tensor, y: torch.Tensor) -> float:
    return float((y - x).norm() / y.norm())


def with_ones(columns: torch.Tensor, wanted: bool) -> torch.Tensor:
    return torch.cat([columns, torch.ones(len(columns), 1, dtype=columns.dtype)], dim=1) if wanted else columns


@contextmanager
def replaced_by_hand(dense, removed, windows):
    """ReplaceMe unfused: a hook on the MLP output before each cut, its map from torch.linalg.lstsq, cut after cut."""
    pruned = remove_layers(dense, removed)
    kept = [index for index in range(len(decoder_layers(dense))) if index not in removed]
    with ExitStack() as hooks:
        for new, (index, following) in enumerate(zip(kept, [*kept[1:], len(decoder_layers(dense))], strict=True)):
            if following == index + 1:
                continue
            y = recorded(dense, windows, following - 1)[0]
            x, a, _ = recorded(pruned, windows, new)
            writer = writers(pruned, new)[-1]
            biased = writer.bias is not None
            solution = torch.linalg.lstsq(with_ones(a, biased), y - (x - a)).solution
            matrix, constant = (solution[:-1], solution[-1]) if biased else (solution, 0.0)
            hook = writer.register_forward_hook(lambda m, args, out, matrix=matrix, constant=constant: out @ matrix + constant)
            hooks.callback(hook.remove)
        yield pruned


@pytest.mark.parametrize("family", FAMILIES)
def test_replaceme_is_lstsq_and_fused_equals_unfused(family):
    """Two cuts, of one and of two layers; the second sees the repair of the first."""
    dense, windows = double(family), windows_of()
    found = repair(dense, [2, 4, 5], windows, damping=0, progress=False)
    assert [cut.removed for cut in found.spans] == [(2,), (4, 5)]
    other = windows_of(3, seed=1)
    with replaced_by_hand(dense, [2, 4, 5], windows) as expected:
        for ids in (windows, other):
            torch.testing.assert_close(logits(found.model, ids), logits(expected, ids), atol=1e-9, rtol=1e-9)
    assert (logits(found.model, other) - logits(remove_layers(dense, [2, 4, 5]), other)).abs().max() > 1e-2


@pytest.mark.parametrize("family", FAMILIES)
def test_refit_is_lstsq_on_the_inputs_of_the_last_writers(family):
    dense, windows = double(family), windows_of()
    x, _, u = recorded(dense, windows, 1)
    y = recorded(dense, windows, 3)[0]
    old = writers(dense, 1)
    new = writers(repair(dense, [2, 3], windows, method="refit", damping=0, progress=False).model, 1)
    assert len(new) == (2 if family in PARALLEL else 1)
    biased = old[-1].bias is not None
    change = torch.linalg.lstsq(with_ones(u, biased), y - x).solution
    changes = change[: u.shape[1]].split([writer.in_features for writer in old])
    for before, after, part in zip(old, new, changes, strict=True):
        torch.testing.assert_close(after.weight, before.weight + part.T, atol=1e-8, rtol=1e-7)
    if biased:
        torch.testing.assert_close(new[-1].bias, old[-1].bias + change[-1], atol=1e-8, rtol=1e-7)


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_reported_errors_are_those_of_the_models(family):
    dense, windows = double(family), windows_of()
    for method in METHODS:
        found = repair(dense, [1, 4], windows, method=method, progress=False)
        first, second = found.spans
        y = recorded(dense, windows, 1)[0]
        assert first.error_before == pytest.approx(difference(recorded(dense, windows, 0)[0], y), rel=1e-9)
        assert first.error_after == pytest.approx(difference(first.scale * recorded(found.model, windows, 0)[0], y), rel=1e-7)
        y = recorded(dense, windows, 4)[0] / first.scale
        x = second.scale * recorded(found.model, windows, 2)[0]
        # A factor at the first cut passes all norms but for their epsilon.
        assert second.error_after == pytest.approx(difference(x, y), rel=1e-4 if method == "refit_scale" else 1e-7)


@pytest.mark.parametrize("family", FAMILIES)
def test_an_identity_block_needs_no_repair(family):
    """T = I, s = 1, whatever the damping and the number of tokens."""
    dense = build(family)
    silence(dense, 2, 3)
    expected = remove_layers(dense, [2, 3]).state_dict()
    for windows, method in itertools.product((windows_of(), windows_of(2, 4)), METHODS):
        found = repair(dense, [2, 3], windows, method=method, progress=False)
        (cut,) = found.spans
        assert (cut.error_before, cut.error_after, cut.scale) == (0.0, 0.0, 1.0)
        assert all(torch.equal(value, expected[name]) for name, value in found.model.state_dict().items())


@pytest.mark.parametrize("family", FAMILIES)
def test_the_dense_model_is_untouched_and_the_result_reloads(family, tmp_path):
    dense, windows = build(family), windows_of(6)
    before = copy.deepcopy(dense.state_dict())
    model = repair(dense, [2, 3], windows, method="refit_scale", progress=False).model
    save(model, None, tmp_path)
    again = load(tmp_path)
    assert (type(again), again.config.num_hidden_layers) == (type(dense), 4)
    assert torch.equal(logits(again, windows), logits(model, windows))
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(*(again.generate(windows[:1], use_cache=use_cache, **options) for use_cache in (True, False)))
    assert all(torch.equal(value, before[name]) for name, value in dense.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in (*dense.modules(), *model.modules()))


def test_batches_do_not_matter():
    dense, windows = double("gpt_neox"), windows_of(7)
    for method in ("replaceme", "refit_scale"):
        one, other = (repair(dense, [1, 4], windows, method=method, batch_size=size, progress=False) for size in (1, 5))
        assert [cut.damping for cut in one.spans] == [cut.damping for cut in other.spans]
        torch.testing.assert_close(one.model.state_dict(), other.model.state_dict(), atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("family", ["llama", "gemma", "gpt_neox", "phi"])
def test_the_factor_is_one_on_the_stream_as_the_norms_see_it(family):
    """Fused into the layers above, it gives the logits of a hook on the stream, when the norms' epsilon is negligible."""
    tiny = {"rms_norm_eps": 1e-15} if family in ("llama", "gemma") else {"layer_norm_eps": 1e-15}
    # transformers' RMSNorm computes in float32, whatever the model's dtype.
    tolerance = 1e-9 if family in PARALLEL else 1e-5
    dense, windows = double(family, **tiny), windows_of()
    found = repair(dense, [3, 4], windows, method="refit_scale", damping=0, progress=False)
    scale = found.spans[0].scale
    by_hand = remove_layers(dense, [3, 4])
    decoder_layers(by_hand)[2].load_state_dict(decoder_layers(found.model)[2].state_dict())
    decoder_layers(by_hand)[2].register_forward_hook(lambda module, args, output: output * scale)
    torch.testing.assert_close(logits(found.model, windows), logits(by_hand, windows), atol=tolerance, rtol=tolerance)


def test_factor_and_map_are_fitted_together_and_the_norm_is_matched():
    """The jointly fitted direction is that of lstsq with the stream, flattened, as one more regressor."""
    dense, windows = double("llama"), windows_of(4)
    x, _, u = recorded(dense, windows, 2)
    y = recorded(dense, windows, 3)[0]
    found = repair(dense, [3], windows, method="refit_scale", damping=0, progress=False)
    design = torch.cat([x.reshape(-1, 1), torch.kron(u, torch.eye(32, dtype=u.dtype))], dim=1)
    expected = (design @ torch.linalg.lstsq(design, y.reshape(-1), driver="gelsd").solution).reshape(y.shape)
    expected = expected * (y.norm() / expected.norm())
    states = found.spans[0].scale * recorded(found.model, windows, 2)[0]
    torch.testing.assert_close(states, expected, atol=1e-6, rtol=1e-6)
    assert float(states.norm()) == pytest.approx(float(y.norm()), rel=1e-8)


def test_damping_shrinks_towards_no_repair():
    dense, windows = double("llama"), windows_of()
    x, a, _ = recorded(dense, windows, 1)
    y = recorded(dense, windows, 3)[0]
    old = writers(dense, 1)[-1].weight
    eye, gram, errors = torch.eye(32, dtype=torch.float64), a.T @ a, []
    for damping in (0.0, 0.01, 1.0, 100.0):
        ridge = gram + damping * gram.diagonal().mean() * eye
        found = repair(dense, [2, 3], windows, damping=damping, progress=False)
        expected = eye + torch.linalg.solve(ridge, a.T @ (y - x))
        torch.testing.assert_close(writers(found.model, 1)[-1].weight, expected.T @ old, atol=1e-8, rtol=1e-7)
        errors.append(found.spans[0].error_after)
    assert errors == sorted(errors)
    nearly = repair(dense, [2, 3], windows, damping=1e12, progress=False).model
    torch.testing.assert_close(logits(nearly, windows), logits(remove_layers(dense, [2, 3]), windows))


@pytest.mark.parametrize("method", UNSCALED)
def test_the_damping_is_chosen_on_held_out_windows(method):
    """With two windows: each in its turn is fitted on by hand and measured on the other, with the fused model."""
    dense, windows = double("opt"), windows_of(2, 48)
    found = repair(dense, [2, 3], windows, method=method, progress=False).spans[0]
    squared = {}
    for damping in DAMPINGS:
        squared[damping] = 0.0
        for fit, held_out in ((windows[:1], windows[1:]), (windows[1:], windows[:1])):
            model = repair(dense, [2, 3], fit, method=method, damping=damping, progress=False).model
            y = recorded(dense, held_out, 3)[0]
            squared[damping] += float((recorded(model, held_out, 1)[0] - y).square().sum())
    assert found.damping == min(squared, key=squared.__getitem__)
    assert found.damping > 0
    given = repair(dense, [2, 3], windows, method=method, damping=found.damping, progress=False).spans[0]
    assert given.error_after == pytest.approx(found.error_after)


@pytest.mark.parametrize("method", UNSCALED)
def test_fewer_tokens_than_columns(method):
    """Everything is fitted, by the smallest change that does it, which is that of the pseudo-inverse."""
    dense, windows = double("llama"), windows_of(2, 8)
    x, a, u = recorded(dense, windows, 1)
    missing = recorded(dense, windows, 3)[0] - x
    found = repair(dense, [2, 3], windows, method=method, damping=0, progress=False)
    assert found.spans[0].error_after < 1e-6
    old, new = writers(dense, 1)[-1].weight, writers(found.model, 1)[-1].weight
    change = (torch.linalg.pinv(a) @ missing).T @ old if method == "replaceme" else (torch.linalg.pinv(u) @ missing).T
    torch.testing.assert_close(new, old + change, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "gemma", "opt"])
def test_a_cut_at_layer_0_goes_into_the_embeddings(family):
    """Learned positions (OPT) and a factor on the embeddings (Gemma) included."""
    untied = {"tie_word_embeddings": False} if family in ("gemma", "opt") else {}
    dense, windows = double(family, **untied), windows_of()
    before = copy.deepcopy(dense.state_dict())
    x, y = recorded(dense, windows, -1)[0], recorded(dense, windows, 1)[0]
    matrix = torch.linalg.lstsq(x, y).solution
    for method in UNSCALED:
        found = repair(dense, [0, 1], windows, method=method, damping=0, progress=False)
        assert found.spans[0].removed == (0, 1)
        torch.testing.assert_close(recorded(found.model, windows, -1)[0], x @ matrix, atol=1e-8, rtol=1e-8)
    assert all(torch.equal(value, before[name]) for name, value in dense.state_dict().items())


@pytest.mark.parametrize("family", ["gemma2", "gemma3_text", "olmo2", "mixtral", "qwen3_moe_step_2", "granite", "gpt2"])
def test_families_that_cannot_take_it_in_are_refused_by_name(family):
    dense = build(family)
    with pytest.raises(UnsupportedModel, match=f"model type '{dense.config.model_type}' cannot be repaired"):
        repair(dense, [2], windows_of(), progress=False)
    if family == "gemma2":
        with pytest.raises(UnsupportedModel, match=r"layer 0 of this llama model.*shares it: keep layer 0"):
            repair(build("llama_tied"), [0, 3], windows_of(), progress=False)
        with pytest.raises(UnsupportedModel, match=r"opt model cannot be repaired: it has no model\.decoder\.final_layer_norm"):
            repair(build("opt", do_layer_norm_before=False), [2], windows_of(), progress=False)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "ghost"}, "unknown method 'ghost'; there are: replaceme"),
        ({"damping": -1}, "damping=-1: 0"),
        ({"damping": math.nan}, "damping=nan"),
        ({"removed": [6]}, "give distinct layers from 0 to 5"),
        ({"windows": windows_of(1)}, "cannot be chosen with 1 window"),
        ({"windows": windows_of() + 100}, "token ids"),
    ],
)
def test_bad_arguments_are_refused_before_work(changes, message):
    arguments = {"dense": build("llama"), "removed": [2], "windows": windows_of(), "progress": False} | changes
    arguments["dense"].model.register_forward_hook(lambda *_: pytest.fail("the model ran"))
    with pytest.raises(ValueError, match=message):
        repair(**arguments)
    dense = build("llama")
    dense.model.layers[2].mlp.up_proj.weight.data.fill_(math.nan)
    with pytest.raises(RuntimeError, match="NaN or infinity at the layers 2 to 2"):
        repair(dense, [2], windows_of(), progress=False)


SCALED = ("llama_tied", "gemma", "gemma2", "gemma3_text", "gpt_neox", "opt")


def sublayer_outputs(model, index):
    layer, sandwiched = decoder_layers(model)[index], model.config.model_type.startswith(("gemma2", "gemma3"))
    if sandwiched:
        return [layer.post_attention_layernorm, layer.post_feedforward_layernorm]
    architecture = ARCHITECTURES[model.config.model_type]
    return [layer.get_submodule(part.output) for part in (architecture.attn, architecture.mlp)]


@pytest.mark.parametrize("family", SCALED)
def test_prune_comp_of_an_identity_changes_no_logits(family):
    """On tied heads and norms behind the sublayers as well; also where the first layer is the identity."""
    dense, windows = build(family), windows_of()
    for index in (0, 3):
        for module in sublayer_outputs(dense, index):
            for name, parameter in module.named_parameters():
                nn.init.constant_(parameter, -1.0 if "norm" in type(module).__name__.lower() and name == "weight" else 0.0)
    found = repair(dense, [0, 3], windows, method="prune_comp", progress=False)
    assert [span.scale for span in found.spans] == [1.0, 1.0]
    torch.testing.assert_close(logits(found.model, windows), logits(dense, windows), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("family", SCALED)
def test_prune_comp_is_the_factor_of_the_paper_on_the_stream(family):
    """Equal to hooks on the stream, cut after cut, when the norms' epsilon is negligible; a cut at layer 0 included."""
    tiny = {"gpt_neox": {"layer_norm_eps": 1e-15}, "opt": {}}.get(family, {"rms_norm_eps": 1e-15})  # OPT's cannot be set
    tolerance = 2e-3 if family == "opt" else 1e-4
    dense, windows = double(family, **tiny), windows_of()
    found = repair(dense, [0, 3, 4], windows, method="prune_comp", progress=False)
    by_hand, scales = remove_layers(dense, [0, 3, 4]), []

    def state(model, index):
        layer, taken = decoder_layers(model)[index], []
        take = lambda module, args, kwargs: taken.append(args[0] if args else kwargs["hidden_states"])  # noqa: E731
        with ExitStack() as hooks:
            hooks.callback(layer.register_forward_pre_hook(take, with_kwargs=True).remove)
            logits(model, windows)
        return taken[0].flatten(0, 1)

    for place, behind in ((0, 1), (2, 5)):
        scales.append(float((state(dense, behind).abs().mean(0) / state(by_hand, place).abs().mean(0)).mean()))

        def scaled(module, args, kwargs, scale=scales[-1]):
            if args:
                return (args[0] * scale, *args[1:]), kwargs
            return args, kwargs | {"hidden_states": kwargs["hidden_states"] * scale}

        decoder_layers(by_hand)[place].register_forward_pre_hook(scaled, with_kwargs=True)
    assert [span.scale for span in found.spans] == pytest.approx(scales, rel=1e-4)
    assert all(abs(scale - 1) > 0.02 for scale in scales)
    torch.testing.assert_close(logits(found.model, windows), logits(by_hand, windows), atol=tolerance, rtol=tolerance)
    shared = found.model.get_input_embeddings().weight is found.model.get_output_embeddings().weight
    assert shared == (dense.get_input_embeddings().weight is dense.get_output_embeddings().weight)
