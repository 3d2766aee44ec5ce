"""Many sets of removed layers in one walk: the numbers of one pruned model at a time, for fewer layer calls."""

import random

import pytest
import torch
from architectures import build
from model_helpers import random_windows

from prunelib.evaluation.layer_sets import (
    Continuation,
    layer_set_divergence,
    layer_set_likelihoods,
    layer_set_perplexity,
)
from prunelib.evaluation.perplexity import NotFinite, perplexity
from prunelib.models import remove_layers

NLL = 1e-4  # nats, over about a hundred tokens in float32
FAMILIES = ("llama", "gpt_neox", "gemma2", "gpt2", "bloom")


@pytest.mark.parametrize("family", FAMILIES)
def test_every_set_equals_the_pruned_model(family):
    model, windows = build(family), random_windows(5)
    sets = [(), (0,), (1,), (5,), (1, 2), (1, 3), (0, 5), (2, 3, 4), (0, 1, 2, 3)]
    shared = layer_set_perplexity(model, windows, sets, batch_size=2, progress=False)
    assert list(shared) == sets
    for removed in sets:
        alone = perplexity(remove_layers(model, removed), windows)
        assert shared[removed].window_nll == pytest.approx(alone.window_nll, abs=NLL)
        assert shared[removed].window_tokens == alone.window_tokens
        assert shared[removed].correct == alone.correct
    # Different sets are different models: otherwise equality above would say little.
    assert len({round(result.nll_sum, 3) for result in shared.values()}) == len(sets)


def test_sets_are_checked_before_work_and_repeated_ones_run_once():
    model, windows = build("llama"), random_windows()
    with pytest.raises(ValueError, match=r"removed \(6,\).*from 0 to 5"):
        layer_set_perplexity(model, windows, [(), (6,)], progress=False)
    assert layer_set_perplexity(model, windows, [(1,), (1,)], progress=False).layer_forwards == 5
    assert layer_set_perplexity(model, windows, [], progress=False) == layer_set_divergence(model, windows, []) == {}


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_divergence_is_that_of_the_pruned_model(family):
    model, windows, sets = build(family), random_windows(5), [(1,), (0, 4)]
    found = layer_set_divergence(model, windows, sets, batch_size=2, progress=False)
    with torch.inference_mode():
        dense = model(windows, use_cache=False).logits[:, :-1].double().log_softmax(-1)
        for removed in sets:
            pruned = remove_layers(model, removed)(windows, use_cache=False).logits[:, :-1].double().log_softmax(-1)
            expected = (dense.exp() * (dense - pruned)).sum((1, 2))
            assert found[removed].window_kl == pytest.approx(expected.tolist(), rel=1e-3, abs=NLL)
    zero = layer_set_divergence(model, windows, [()], progress=False)[()]
    assert zero.kl == pytest.approx(0, abs=1e-6) and zero.tokens == 5 * 15


def test_a_likelihood_that_is_not_finite_names_the_set():
    model, windows = build("llama"), random_windows()
    with torch.no_grad():
        model.model.layers[5].mlp.down_proj.weight.fill_(float("nan"))
    with pytest.raises(NotFinite, match=r"without layers \(1,\): .*window 0"):
        layer_set_perplexity(model, windows, [(1,)], batch_size=3, progress=False)
    with pytest.raises(NotFinite, match=r"without layers \(\)"):
        layer_set_divergence(model, windows, [(1,)], progress=False)


SETS = [(), (1,), (0, 4), (0, 3)]


def questions(vocabulary: int = 128) -> list[Continuation]:
    """Questions with one text before several answers, of one token and of more; and one text split at three places."""
    numbers, found = random.Random(0), []

    def text(length: int) -> list[int]:
        return [numbers.randrange(1, vocabulary) for _ in range(length)]

    for item in range(4):
        context = text(12 + 3 * item)
        for length in (1, 1, 3) if item % 2 else (4, 5, 6):
            continuation = text(length)
            found.append(Continuation(tuple((context + continuation)[:-1]), tuple(continuation)))
    whole = text(15)
    return found + [Continuation(tuple(whole[:-1]), tuple(whole[cut:])) for cut in (4, 8, 11)]


def one_by_one(model, asked: list[Continuation]) -> list[tuple[float, bool]]:
    answers = []
    for one in asked:
        with torch.inference_mode():
            logits = model(torch.tensor([one.read]), use_cache=False).logits[0].double()
        predicted, scored = logits.log_softmax(-1)[-len(one.scored) :], torch.tensor(one.scored)
        answers.append((float(predicted.gather(-1, scored[:, None]).sum()), bool((predicted.argmax(-1) == scored).all())))
    return answers


@pytest.mark.parametrize("family", ["llama", "mistral", "bloom", "qwen3_5_text"])
def test_every_answer_is_that_of_one_text_on_one_pruned_model(family):
    model, asked = build(family), questions()
    # A continuation that the model itself would write, so that not every answer is "not the most likely".
    with torch.inference_mode():
        likeliest = int(model(torch.tensor([asked[0].read]), use_cache=False).logits[0, -1].argmax())
    asked.append(Continuation(asked[0].read, (likeliest,)))
    sets = [removed for removed in SETS if not removed or removed[-1] < model.config.num_hidden_layers]
    for batch_size in (5, 100):
        found = layer_set_likelihoods(model, asked, sets, batch_size=batch_size, progress=False)
        assert list(found) == sets
        for removed in sets:
            expected = one_by_one(remove_layers(model, removed) if removed else model, asked)
            assert [value for value, _ in found[removed]] == pytest.approx([value for value, _ in expected], abs=2e-5)
            assert [greedy for _, greedy in found[removed]] == [greedy for _, greedy in expected]
    assert found[()][-1][1]
    assert found.layer_forwards < found.layer_forwards_alone


LONGROPE = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [30.0] * 4}
LONGROPE = {"rope_parameters": LONGROPE, "original_max_position_embeddings": 16}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("family", "changes"),
    [
        *((family, {}) for family in ("mistral", "qwen2_sliding", "gemma2", "gemma3_text", "gpt_neox", "opt")),
        ("phi3", LONGROPE),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_shared_likelihoods_are_those_of_one_text_alone(family, changes, dtype):
    """Texts shorter and longer than the window, and frequencies that change with the longest text of a batch."""
    model, asked = build(family, **changes).to(dtype), questions()
    expected = one_by_one(model, asked)
    for together in (asked, asked[::-1], asked[:3]):
        found = dict(zip(together, layer_set_likelihoods(model, together, [()], batch_size=5, progress=False)[()], strict=True))
        values = [value for one, (value, _) in zip(asked, expected, strict=True) if one in found]
        # In 16 bits the logits of another batch are rounded otherwise; their logarithms are not.
        rounding = 2e-5 if dtype == torch.float32 else 0.03
        assert [found[one][0] for one in asked if one in found] == pytest.approx(values, abs=rounding)


@pytest.mark.parametrize(
    ("asked", "sets", "settings", "message"),
    [
        ([Continuation((1,) * 65, (3,))], SETS, {}, "windows of 65 tokens exceed the 64 positions"),
        ([Continuation((1, 200), (3,))], SETS, {}, "token ids 1 to 200, but the model knows 0 to 127"),
        ([Continuation((1, 2), (3,))], SETS, {"batch_size": 0}, "batch_size=0"),
        ([Continuation((1,), (2, 3))], SETS, {}, "continuation 0: 2 tokens to score on 1"),
        ([Continuation((1, 2), (3,))], [(6,)], {}, r"removed \(6,\)"),
    ],
)
def test_bad_continuations_are_refused(asked, sets, settings, message):
    with pytest.raises(ValueError, match=message):
        layer_set_likelihoods(build("llama"), asked, sets, **settings)
