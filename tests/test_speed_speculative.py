"""Speculative decoding: the text stays the dense model's, acceptance is what it says it is, formulas are the paper's."""

import math

import pytest
import torch
from architectures import build
from model_helpers import random_windows

from prunelib.models import remove_layers
from prunelib.speed.speculative import acceptance, best_drafted, decode, expected_speedup


@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_acceptance_against_its_definition(family):
    model, windows = build(family), random_windows()
    drafts = {"short": remove_layers(model, (1, 3)), "shorter": remove_layers(model, (1, 2, 3, 4))}
    found = acceptance(model, drafts, windows, batch_size=2)
    with torch.no_grad():
        p = model(windows, use_cache=False).logits[:, :-1].double().softmax(-1)
        for name, draft in drafts.items():
            q = draft(windows, use_cache=False).logits[:, :-1].double().softmax(-1)
            assert found[name]["greedy"] == pytest.approx((p.argmax(-1) == q.argmax(-1)).double().mean(-1).numpy())
            distance = (p - q).abs().sum(-1) / 2
            assert found[name]["sampled"] == pytest.approx(1 - distance.mean(-1).numpy(), abs=1e-6)
    assert found["shorter"]["sampled"].mean() < found["short"]["sampled"].mean() < 1
    assert (acceptance(model, drafts, windows, batch_size=5)["short"]["greedy"] == found["short"]["greedy"]).all()


def test_drafts_that_do_not_fit_are_refused():
    model = build("llama")
    with pytest.raises(ValueError, match="draft 'wide' has 160 tokens, the dense model 128"):
        acceptance(model, {"wide": build("llama", vocab_size=160)}, random_windows())
    with pytest.raises(ValueError, match="draft 'draft' has 160 tokens"):
        decode(model, random_windows()[0], 4, draft=build("llama", vocab_size=160))
    with pytest.raises(ValueError, match="training mode"):
        acceptance(model, {"draft": build("llama").train()}, random_windows())
    with pytest.raises(ValueError, match="all from 1"):
        decode(model, random_windows()[0], 3, draft=model, drafted=0)
    with pytest.raises(ValueError, match="66 tokens exceed the 64 positions"):
        decode(model, random_windows()[0], 50)


def test_published_formulas():
    """Speed-ups of Table 1 of Leviathan et al.: drafts of no cost, their rates and numbers of proposals."""
    table = {(0.6, 2): 1.96, (0.7, 3): 2.53, (0.8, 2): 2.44, (0.8, 5): 3.69, (0.9, 2): 2.71, (0.9, 10): 6.86}
    assert {key: round(expected_speedup(*key, 0.0), 2) for key in table} == table
    assert expected_speedup(0.9, 10, 0.2) == pytest.approx((1 - 0.9**11) / 0.1 / 3)


def test_limits_of_the_formulas():
    assert expected_speedup(1.0, 7, 0.0) == 8
    assert expected_speedup(0.0, 7, 0.0) == expected_speedup(0.5, 0, 0.3) == 1
    assert expected_speedup(1.0, 1000, 0.25) == pytest.approx(4, rel=0.01)
    assert expected_speedup(1.0, 3, 1.0) == 1  # the model as its own draft
    for rate, cost in ((0.5, 0.5), (0.3, 0.75), (0.0, 0.0)):
        assert best_drafted(rate, cost) == 0
    for rate, cost in ((0.51, 0.5), (0.8, 0.75), (0.1, 0.05)):
        drafted = best_drafted(rate, cost)
        assert drafted >= 1
        assert expected_speedup(rate, drafted, cost) == max(expected_speedup(rate, g, cost) for g in range(33)) > 1
    with pytest.raises(ValueError, match="from 0"):
        expected_speedup(1.1, 1, 0.5)


@pytest.mark.parametrize("drafted", [1, 3, 8])
@pytest.mark.parametrize("family", ["llama", "gpt_neox", "qwen3", "opt"])
def test_drafted_text_is_the_greedy_text(family, drafted):
    model, prompt = build(family), random_windows(1, 7)[0]
    alone = decode(model, prompt, 20)
    assert len(alone.tokens) == len(alone.accepted) == 20 and set(alone.proposed) == {0}
    text = model.generate(prompt[None], max_new_tokens=20, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert text[0, 7:].tolist() == alone.tokens
    for removed in ((), (2,), (0, 1, 2, 3)):
        found = decode(model, prompt, 20, draft=remove_layers(model, removed), drafted=drafted)
        assert found.tokens == alone.tokens
        assert sum(found.accepted) + len(found.accepted) == 20
        assert all(0 <= kept <= proposed <= drafted for kept, proposed in zip(found.accepted, found.proposed, strict=True))
        if removed == ():
            assert found.accepted == found.proposed  # its own proposals are all believed
            assert len(found.accepted) == math.ceil(20 / (drafted + 1))


@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_assisted_generation_of_transformers_agrees(family):
    """The same text and, with a fixed number of proposals, as many runs of the dense model."""
    model, prompt = build(family), random_windows(1, 7)[0]
    draft = remove_layers(model, (1, 4))
    fixed = {"num_assistant_tokens_schedule": "constant", "assistant_confidence_threshold": 0.0}
    draft.generation_config.update(num_assistant_tokens=3, **fixed)
    runs = [0]
    handle = model.register_forward_hook(lambda *_: runs.__setitem__(0, runs[0] + 1))
    settings = {"max_new_tokens": 20, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    text = model.generate(prompt[None], attention_mask=torch.ones(1, 7, dtype=int), assistant_model=draft, **settings)
    handle.remove()
    found = decode(model, prompt, 20, draft=draft, drafted=3)
    assert text[0, 7:].tolist() == found.tokens
    assert runs[0] == len(found.accepted)
