"""Perplexity against independent computations, and the protocol that it states."""

import math
import weakref

import pytest
import torch
from architectures import build
from model_helpers import random_windows

from prunelib.evaluation.perplexity import NotFinite, PerplexityProtocol, perplexity

NLL = 1e-4  # nats, over about a hundred tokens in float32
FAMILIES = ("llama", "gpt_neox", "gemma2", "opt", "mixtral", "bloom")


def one_by_one(model, windows) -> tuple[list[float], int]:
    """Token by token, one window a time: no batch, no shift by slices, log-softmax in float64."""
    sums, hits = [], 0
    for window in windows.tolist():
        with torch.no_grad():
            likelihood = model(torch.tensor([window]), use_cache=False).logits[0].double().log_softmax(-1)
        sums.append(-sum(likelihood[place - 1, window[place]].item() for place in range(1, len(window))))
        hits += sum(likelihood[place - 1].argmax().item() == window[place] for place in range(1, len(window)))
    return sums, hits


@pytest.mark.parametrize("family", FAMILIES)
def test_agrees_with_a_loop_over_tokens(family):
    model, windows = build(family), random_windows(7, 17)
    found = perplexity(model, windows, batch_size=3)
    assert perplexity(model, windows, batch_size=100).window_nll == pytest.approx(found.window_nll, abs=NLL)
    sums, hits = one_by_one(model, windows)
    assert found.window_nll == pytest.approx(sums, abs=NLL)
    assert (found.window_tokens, found.correct, found.accuracy) == ((16,) * 7, hits, hits / 112)
    assert found.ppl == pytest.approx(math.exp(sum(sums) / 112), rel=1e-5)


def test_only_one_batch_of_logits_exists_at_a_time():
    model, alive = build("llama"), []

    def hook(module, args, output):
        assert len(output) <= 2 and all(reference() is None for reference in alive)
        alive.append(weakref.ref(output))

    model.lm_head.register_forward_hook(hook)
    perplexity(model, random_windows(6), batch_size=2)
    assert len(alive) == 3


def test_bad_requests_are_named():
    model, windows = build("llama"), random_windows(7, 17)
    for arguments, message in [
        ((windows[:0],), "windows of shape .0, 17"),
        ((windows[:, :1],), "windows of shape .7, 1"),
        ((torch.full((1, 65), 3),), "windows of 65 tokens exceed the 64 positions"),
        ((windows + 100,), "token ids .* but the model knows 0 to 127"),
        ((windows - 100,), "token ids -"),
    ]:
        with pytest.raises(ValueError, match=message):
            perplexity(model, *arguments)
    with pytest.raises(ValueError, match="batch_size=0"):
        perplexity(model, windows, batch_size=0)
    with pytest.raises(ValueError, match=r"call model\.eval"):
        perplexity(model.train(), windows)


def test_nan_is_an_error_that_names_the_window():
    model, windows = build("llama"), random_windows(7, 17)
    windows[windows == 77] = 78
    windows[4, 8] = 77
    with torch.no_grad():
        model.model.embed_tokens.weight[77] = math.nan
    with pytest.raises(NotFinite, match=r"window 4 .*not finite"):
        perplexity(model, windows, batch_size=3)


def test_protocol_is_held_against_model_and_windows():
    model, windows = build("llama"), random_windows(7, 17)
    protocol = PerplexityProtocol(window=17)
    assert protocol.measure(model, windows) == perplexity(model, windows)
    assert (protocol.describe()["stride"], PerplexityProtocol(window=17, bos=True).describe()["stride"]) == (17, 16)
    with pytest.raises(ValueError, match=r"states bfloat16 and .* these are torch\.float32"):
        PerplexityProtocol(window=17, dtype="bfloat16").measure(model, windows)
    with pytest.raises(ValueError, match=r"windows of 16 tokens, these are .* 17 tokens"):
        PerplexityProtocol(window=16).measure(model, windows)
    with pytest.raises(ValueError, match="states bos=True"):
        PerplexityProtocol(window=17, bos=True).measure(model, windows)
    for name, value in (("window", 1), ("limit", 0), ("dtype", "float17")):
        with pytest.raises(ValueError, match=f"{name}={value!r}"):
            PerplexityProtocol(**{name: value})
