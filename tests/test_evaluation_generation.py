"""Generation: continuations that are the first choices, and measures equal to a count by hand."""

import itertools

import pytest
import torch
from architectures import build
from model_helpers import logits, random_windows
from torch.nn import functional

from prunelib.evaluation import continuations, generated
from prunelib.models import remove_layers

FAMILIES = ("llama_tied", "gemma3_text", "gpt_neox", "opt")


def by_hand(model, prompts, tokens):
    """Greedy decoding without a cache."""
    ids = prompts
    for _ in range(tokens):
        ids = torch.cat([ids, logits(model, ids)[:, -1:].argmax(-1)], dim=1)
    return ids[:, prompts.shape[1] :]


@pytest.mark.parametrize("family", FAMILIES)
def test_continuations_are_the_first_choices(family):
    model, prompts = build(family), random_windows(3, 6)
    expected = by_hand(model, prompts, 8)
    model.generation_config.eos_token_id = int(expected[0, 2])  # it would end the text
    model.generation_config.repetition_penalty = 5.0
    for batch_size in (1, 8):
        assert torch.equal(continuations(model, prompts, 8, batch_size=batch_size), expected)
    assert model.generation_config.repetition_penalty == 5.0


def test_drawn_continuations_follow_the_seed_alone():
    model, prompts = build("llama"), random_windows(3, 6)
    torch.manual_seed(1)
    state = torch.random.get_rng_state()
    one, again, other = (continuations(model, prompts, 8, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(one, again) and not torch.equal(one, other)
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize("family", FAMILIES)
def test_measures_are_those_of_a_count_by_hand(family):
    dense, prompts = build(family), random_windows(3, 6)
    pruned, reference = remove_layers(dense, [2, 3]), by_hand(dense, prompts, 12)
    written = by_hand(pruned, prompts, 12)
    found = generated(pruned, dense, prompts, reference, batch_size=2)

    def grams(text, n):
        return list(itertools.pairwise(text)) if n == 2 else [tuple(text[i : i + n]) for i in range(len(text) - n + 1)]

    texts = written.tolist()
    for n in (1, 2, 4):
        every = [gram for text in texts for gram in grams(text, n)]
        assert found[f"distinct_{n}"] == len(set(every)) / len(every)
    seen = [sum(gram in fours[:i] for i, gram in enumerate(fours)) / len(fours) for fours in (grams(t, 4) for t in texts)]
    assert found["repeated_4"] == pytest.approx(sum(seen) / 3)
    scores = logits(dense, torch.cat([prompts, written], dim=1))[:, 5:-1]
    nll = functional.cross_entropy(scores.flatten(0, 1), written.flatten())
    assert found["dense_nll"] == pytest.approx(float(nll), rel=1e-5)
    first = logits(pruned, torch.cat([prompts, reference], dim=1))[:, 5:-1].argmax(-1)
    assert found["agreement"] == float((first == reference).double().mean())
    assert found["agreement"] < 1 == generated(dense, dense, prompts, reference)["agreement"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"reference": random_windows(3, 3)}, "reference of 3 tokens has no 4-grams"),
        ({"reference": random_windows(3, 60)}, "windows of 66 tokens exceed the 64 positions"),
        ({"prompts": random_windows(3, 6) + 200}, "token ids"),
    ],
)
def test_bad_arguments_are_refused_before_work(changes, message):
    model = build("llama")
    model.model.register_forward_hook(lambda *_: pytest.fail("the model ran"))
    arguments = {"prompts": random_windows(3, 6), "reference": random_windows(3, 8)} | changes
    with pytest.raises(ValueError, match=message):
        generated(model, model, **arguments)
    with pytest.raises(ValueError, match="tokens=0: continue by at least 1"):
        continuations(model, random_windows(3, 6), 0)
