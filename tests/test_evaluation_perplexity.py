"""Perplexity against independent computations, and the protocol that it states."""

import dataclasses
import json
import math
import weakref

import pytest
import torch
from architectures import build

from prunelib.evaluation.perplexity import NotFinite, PerplexityProtocol, perplexity
from prunelib.models import load as load_model
from prunelib.models import load_tokenizer
from prunelib.text.corpora import load

NLL = 1e-4  # nats, over about a hundred tokens in float32
FAMILIES = ("llama", "gpt_neox", "gemma2", "opt", "mixtral", "bloom")


def random_windows(count: int = 7, length: int = 17, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, 128, (count, length), generator=torch.Generator().manual_seed(seed))


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
    model, windows = build(family), random_windows()
    found = perplexity(model, windows, batch_size=3)
    assert perplexity(model, windows, batch_size=100).window_nll == pytest.approx(found.window_nll, abs=NLL)
    sums, hits = one_by_one(model, windows)
    assert found.window_nll == pytest.approx(sums, abs=NLL)
    assert found.window_tokens == (16,) * 7
    assert (found.tokens, found.correct) == (7 * 16, hits)
    assert found.nll_sum == pytest.approx(sum(found.window_nll), abs=1e-9)
    assert found.ppl == pytest.approx(math.exp(sum(sums) / 112), rel=1e-5)
    assert found.accuracy == hits / 112


def test_agrees_with_the_loss_of_transformers():
    model, windows = build("llama"), random_windows()
    with torch.no_grad():
        expected = model(windows, labels=windows).loss.item()
    assert perplexity(model, windows).nll == pytest.approx(expected, abs=1e-6)


def test_certain_model_has_perplexity_one_and_all_hits_and_a_uniform_one_the_vocabulary():
    model, windows = build("llama"), torch.full((3, 9), 5)
    with torch.no_grad():
        model.model.norm.weight.zero_()  # logits of zero everywhere …
    assert perplexity(model, windows).ppl == pytest.approx(128, rel=1e-6)
    with torch.no_grad():
        model.lm_head = torch.nn.Linear(32, 128)
        model.lm_head.bias.copy_(100.0 * (torch.arange(128) == 5))  # … but for one token
    found = perplexity(model, windows)
    assert (found.ppl, found.accuracy, found.correct) == (1.0, 1.0, 24)


def test_only_one_batch_of_logits_exists_at_a_time():
    model, alive = build("llama"), []

    def hook(module, args, output):
        assert len(output) <= 2 and all(reference() is None for reference in alive)
        alive.append(weakref.ref(output))

    model.lm_head.register_forward_hook(hook)
    perplexity(model, random_windows(6), batch_size=2)
    assert len(alive) == 3


def test_bad_requests_are_named():
    model, windows = build("llama"), random_windows()
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
    model, windows = build("llama"), random_windows()
    windows[windows == 77] = 78
    windows[4, 8] = 77
    with torch.no_grad():
        model.model.embed_tokens.weight[77] = math.nan
    with pytest.raises(NotFinite, match=r"window 4 .*not finite"):
        perplexity(model, windows, batch_size=3)


def test_protocol_describes_everything_in_json():
    described = PerplexityProtocol(window=128, bos=True, limit=10, dtype="bfloat16").describe()
    assert json.loads(json.dumps(described)) == described
    assert {field.name for field in dataclasses.fields(PerplexityProtocol)} <= set(described)
    assert (described["window"], described["stride"], described["bos"]) == (128, 127, True)
    assert PerplexityProtocol(window=128).describe()["stride"] == 128


@pytest.mark.parametrize("settings", [{"window": 1}, {"limit": 0}, {"dtype": "float17"}, {"dtype": "nn"}])
def test_impossible_protocols_are_refused(settings):
    ((name, value),) = settings.items()
    with pytest.raises(ValueError, match=f"{name}={value!r}"):
        PerplexityProtocol(**settings)


def test_protocol_is_held_against_model_and_windows():
    model, windows = build("llama"), random_windows()
    protocol = PerplexityProtocol(window=17)
    assert protocol.measure(model, windows) == perplexity(model, windows)
    with pytest.raises(ValueError, match=r"states bfloat16 and .* these are torch\.float32"):
        PerplexityProtocol(window=17, dtype="bfloat16").measure(model, windows)
    with pytest.raises(ValueError, match=r"windows of 16 tokens, these are .* 17 tokens"):
        PerplexityProtocol(window=16).measure(model, windows)
    with pytest.raises(ValueError, match="states bos=True"):
        PerplexityProtocol(window=17, bos=True).measure(model, windows)


def test_a_real_model_prefers_the_text_it_was_made_for(shared_data):
    folder = shared_data / "models" / "stories260k"
    model, tokenizer = load_model(folder), load_tokenizer(folder)
    protocol = PerplexityProtocol(window=128, bos=True, limit=12)
    windows = protocol.windows(load(shared_data / "english" / "valid.txt.xz", "evaluation"), tokenizer, progress=False)
    found = protocol.measure(model, windows)
    assert found.tokens == 12 * 127 and 2 < found.ppl < 512  # better than the uniform model over its 512 tokens
    # A shuffled text is far worse, so the order of tokens was read.
    shuffled = windows[:, torch.randperm(127, generator=torch.Generator().manual_seed(0)).add(1)]
    assert perplexity(model, shuffled).nll > found.nll + 1
