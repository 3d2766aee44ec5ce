"""Likelihoods under many removals: the numbers of one text and one model at a time, for less."""

import random

import pytest
import torch
from architectures import build

from prunelib import models
from prunelib.evaluation.likelihoods import Request, layer_set_likelihoods
from prunelib.models.plans import SublayerPlan
from prunelib.models.sublayers import remove_sublayers

SETS = [(), (1,), (0, 4), (0, 5)]


def questions(vocabulary: int = 128) -> list[Request]:
    """Questions with one text before several answers (of one token, and of more), and two with a beginning of their own."""
    numbers, found = random.Random(0), []

    def text(length: int) -> list[int]:
        return [numbers.randrange(1, vocabulary) for _ in range(length)]

    for item in range(4):
        context = text(12 + 3 * item)
        for length in (1, 1, 3) if item % 2 else (4, 5, 6):
            continuation = text(length)
            found.append(Request(tuple((context + continuation)[:-1]), tuple(continuation), item))
    found += [Request(tuple(text(9 + extra)), (5, 6), "own beginnings") for extra in range(2)]
    return found


def one_by_one(model, requests: list[Request]) -> list[tuple[float, bool]]:
    answers = []
    for request in requests:
        with torch.inference_mode():
            logits = model(torch.tensor([request.read]), use_cache=False).logits[0].double()
        predicted = logits.log_softmax(-1)[-len(request.scored) :]
        scored = torch.tensor(request.scored)
        answers.append((float(predicted.gather(-1, scored[:, None]).sum()), bool((predicted.argmax(-1) == scored).all())))
    return answers


# Those that share beginnings, those whose windows, distances or states forbid it, and one whose layers lie elsewhere.
@pytest.mark.parametrize(
    ("family", "shares"),
    [
        ("llama_tied", True),
        ("gpt_neox", True),
        ("gpt2", True),
        ("opt", True),
        ("falcon", True),
        ("phi", True),
        ("mixtral", True),
        ("mistral", False),
        ("gemma3_text", False),
        ("bloom", False),
        ("mpt", False),
        ("qwen3_5_text", False),
    ],
)
def test_every_answer_is_that_of_one_text_on_one_pruned_model(family, shares):
    model, requests = build(family), questions()
    # A continuation that the model itself would write, so that not every answer is "not the most likely".
    with torch.inference_mode():
        likeliest = int(model(torch.tensor([requests[0].read]), use_cache=False).logits[0, -1].argmax())
    requests.append(Request(requests[0].read, (likeliest,), "likeliest"))
    sets = [removed for removed in SETS if not removed or removed[-1] < model.config.num_hidden_layers]
    found = layer_set_likelihoods(model, requests, sets, batch_size=7, progress=False)
    assert list(found) == sets
    for removed in sets:
        expected = one_by_one(models.remove_layers(model, removed) if removed else model, requests)
        assert [value for value, _ in found[removed]] == pytest.approx([value for value, _ in expected], abs=2e-5)
        assert [greedy for _, greedy in found[removed]] == [greedy for _, greedy in expected]
    assert found[()][-1][1]
    assert (found.tokens < 0.6 * found.tokens_alone) == shares
    assert found.tokens < found.tokens_alone  # equal texts of one question run once in any case
    assert found.layer_forwards < found.layer_forwards_alone


def test_batches_and_order_change_nothing():
    model, requests = build("llama"), questions()
    expected = layer_set_likelihoods(model, requests, SETS, batch_size=16, progress=False)
    for size in (1, 3, 100):
        found = layer_set_likelihoods(model, requests, SETS, batch_size=size, progress=False)
        backwards = layer_set_likelihoods(model, requests[::-1], SETS[::-1], batch_size=size, progress=False)
        for removed in SETS:
            values = [value for value, _ in expected[removed]]
            assert [value for value, _ in found[removed]] == pytest.approx(values, abs=1e-5)
            assert [value for value, _ in backwards[removed]][::-1] == pytest.approx(values, abs=1e-5)


def test_the_cost_is_counted():
    model, calls = build("llama"), []
    for layer in model.model.layers:
        layer.register_forward_pre_hook(lambda *_: calls.append(1))
    requests = [Request((1, 2, 3, 4, last), (5,), 0) for last in (6, 7)]
    found = layer_set_likelihoods(model, requests, [(5,), (4, 5), (5,)], batch_size=2, progress=False)
    # Layers 0 to 3 once for both sets; before that each layer twice or so, to see what the model can do.
    assert (found.layer_forwards, found.layer_forwards_alone) == (5, 9)
    assert (found.tokens, found.tokens_alone) == (6, 10)
    assert len(calls) > 5
    assert layer_set_likelihoods(model, requests, [], progress=False) == {}


def test_a_head_that_looks_back_gets_the_whole_text():
    class Back(torch.nn.Module):
        def forward(self, hidden):
            return hidden + hidden.cumsum(1)

    model, requests = build("llama"), questions()[-2:]  # texts of their own: what a row shares, such a head would mix
    model.lm_head = torch.nn.Sequential(Back(), model.lm_head)
    found = layer_set_likelihoods(model, requests, [()], progress=False)[()]
    assert [value for value, _ in found] == pytest.approx([value for value, _ in one_by_one(model, requests)], abs=2e-5)


def test_no_row_is_longer_than_the_model_reads():
    requests = questions()
    free = layer_set_likelihoods(build("gpt_neox"), requests, [()], progress=False)
    short = build("gpt_neox", max_position_embeddings=28)  # longer than any text, shorter than some rows
    found = layer_set_likelihoods(short, requests, [()], progress=False)
    assert max(len(request.read) for request in requests) <= 28
    assert found.tokens > free.tokens
    expected = [value for value, _ in one_by_one(short, requests)]
    assert [value for value, _ in found[()]] == pytest.approx(expected, abs=2e-5)


def test_sublayers_are_units_too():
    model, requests = build("gpt_neox"), questions()
    found = layer_set_likelihoods(model, requests, [(3,), (2, 3)], progress=False, unit="sublayer")
    for removed in found:
        plan = SublayerPlan.from_units(6, removed, "by hand")
        expected = [value for value, _ in one_by_one(remove_sublayers(model, plan), requests)]
        assert [value for value, _ in found[removed]] == pytest.approx(expected, abs=2e-5)


def test_bad_requests_are_refused():
    model, requests = build("llama"), questions()
    with pytest.raises(ValueError, match="0 requests"):
        layer_set_likelihoods(model, [], SETS)
    with pytest.raises(ValueError, match="batch_size=0"):
        layer_set_likelihoods(model, requests, SETS, batch_size=0)
    with pytest.raises(ValueError, match="request 0: 2 tokens to score on 1"):
        layer_set_likelihoods(model, [Request((1,), (2, 3), 0)], SETS)
    with pytest.raises(ValueError, match=r"removed layers \(6,\)"):
        layer_set_likelihoods(model, requests, [(6,)])
    with pytest.raises(ValueError, match="training mode"):
        layer_set_likelihoods(build("llama").train(), requests, SETS)
