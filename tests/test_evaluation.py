"""Perplexity against independent computations, and many removals against each removal by itself."""

import dataclasses
import itertools
import json
import math

import numpy as np
import pytest
import torch
from architectures import build
from torch.nn import functional

from prunelib.evaluation.intervals import paired_bootstrap
from prunelib.evaluation.layer_sets import layer_set_perplexity
from prunelib.evaluation.perplexity import NotFinite, Perplexity, PerplexityProtocol, perplexity
from prunelib.models import decoder_layers, load_tokenizer, remove_layers
from prunelib.models import load as load_model
from prunelib.models.layerwise import shared_layer_forwards
from prunelib.text.corpora import load

NLL = 1e-4  # nats, over about a hundred tokens in float32
# Llama, parallel attention, sandwich norms with sliding windows and soft-capping, post-norms, learned positions (twice).
FAMILIES = ("llama", "gpt_neox", "gemma2", "olmo2", "gpt2", "opt", "mixtral", "bloom")


def random_windows(count: int = 7, length: int = 17, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, 128, (count, length), generator=torch.Generator().manual_seed(seed))


def one_by_one(model, windows, scored) -> tuple[list[float], int]:
    """Token by token, one window a time: no batch, no shift by slices, log-softmax in float64."""
    sums, hits = [], 0
    for number, window in enumerate(windows.tolist()):
        with torch.no_grad():
            likelihood = model(torch.tensor([window]), use_cache=False).logits[0].double().log_softmax(-1)
        sums.append(0.0)
        for position in scored(number):
            sums[-1] -= likelihood[position - 1, window[position]].item()
            hits += likelihood[position - 1].argmax().item() == window[position]
    return sums, hits


# --- one model


@pytest.mark.parametrize("family", FAMILIES)
def test_agrees_with_a_loop_over_tokens(family):
    model, windows = build(family), random_windows()
    found = perplexity(model, windows, batch_size=3)
    sums, hits = one_by_one(model, windows, lambda number: range(1, 17))
    assert found.window_nll == pytest.approx(sums, abs=NLL)
    assert found.window_tokens == (16,) * 7
    assert (found.tokens, found.correct) == (7 * 16, hits)
    assert found.nll == pytest.approx(sum(found.window_nll), abs=1e-9)
    assert found.ppl == pytest.approx(math.exp(sum(sums) / 112), rel=1e-5)
    assert found.accuracy == hits / 112


def test_agrees_with_the_loss_of_transformers():
    model, windows = build("llama"), random_windows()
    with torch.no_grad():
        expected = model(windows, labels=windows).loss.item()
    assert perplexity(model, windows).nll == pytest.approx(expected, abs=1e-6)


def test_overlapping_windows_score_every_token_once():
    stream = random_windows(1, 30)[0]
    model, window, stride = build("gpt_neox"), 12, 3
    windows = stream.unfold(0, window, stride)
    found = perplexity(model, windows, stride=stride, batch_size=2)
    assert found.window_tokens == (window - 1, *[stride] * (len(windows) - 1))
    assert found.tokens == 29  # all but the first of 30: each once
    sums, hits = one_by_one(model, windows, lambda number: range(window - stride if number else 1, window))
    assert found.window_nll == pytest.approx(sums, abs=NLL)
    assert found.correct == hits
    # The last token by itself, with exactly the context of the last window.
    with torch.no_grad():
        last = functional.cross_entropy(model(windows[-1:]).logits[0, -2:-1], windows[-1, -1:]).item()
    alone = perplexity(model, windows, stride=1).window_nll[-1]
    assert alone == pytest.approx(last, abs=1e-5)
    # No overlap, said or unsaid, is the same.
    assert perplexity(model, windows, stride=window) == perplexity(model, windows)


def test_batch_size_does_not_matter():
    model, windows = build("gemma2"), random_windows(7)
    results = [perplexity(model, windows, batch_size=size) for size in (1, 2, 7, 100)]
    for result in results[1:]:
        assert result.window_nll == pytest.approx(results[0].window_nll, abs=NLL)
        assert result.correct == results[0].correct
    order = torch.randperm(7, generator=torch.Generator().manual_seed(0))
    assert perplexity(model, windows[order]).nll == pytest.approx(results[0].nll, abs=NLL)


def test_uniform_model_has_the_vocabulary_as_perplexity():
    model = build("llama")
    with torch.no_grad():
        model.lm_head.weight.zero_()
    found = perplexity(model, random_windows())
    assert found.ppl == pytest.approx(128, rel=1e-6)
    assert found.nll == pytest.approx(math.log(128), rel=1e-6)


def test_certain_model_has_perplexity_one_and_all_hits():
    model, windows = build("llama"), torch.full((3, 9), 5)
    with torch.no_grad():
        model.model.norm.weight.zero_()  # logits of zero everywhere …
        model.lm_head = torch.nn.Linear(32, 128)
        model.lm_head.bias.copy_(100.0 * (torch.arange(128) == 5))  # … but for one token
    found = perplexity(model, windows)
    assert (found.ppl, found.accuracy, found.correct) == (1.0, 1.0, 24)


def test_only_one_batch_of_logits_exists_at_a_time():
    import weakref

    model, windows = build("llama"), random_windows(6)
    alive: list[weakref.ref] = []

    def hook(module, args, output):
        assert len(output) <= 2
        assert all(reference() is None for reference in alive)
        alive.append(weakref.ref(output))

    model.lm_head.register_forward_hook(hook)
    perplexity(model, windows, batch_size=2)
    layer_set_perplexity(model, windows, [(), (1,), (2,)], batch_size=2, progress=False)
    assert len(alive) == 3 + 3 * 3


def test_low_precision_is_scored_in_float32():
    model = build("llama").to(torch.bfloat16)
    windows = random_windows()
    found = perplexity(model, windows, batch_size=1)
    sums, _ = one_by_one(model, windows, lambda number: range(1, 17))
    # A log-likelihood in bfloat16 would be off by about 0.01 per token.
    assert found.window_nll == pytest.approx(sums, abs=NLL)


def test_large_loss_is_infinite_not_an_error():
    result = Perplexity(nll=1e6, tokens=10, correct=0, window_nll=(1e6,), window_tokens=(10,))
    assert result.ppl == math.inf


def test_bad_requests_are_named():
    model, windows = build("llama"), random_windows()
    for arguments, message in [
        ((windows[:0],), "at least 1 window"),
        ((windows[:, :1],), "at least 2 tokens"),
        ((torch.full((1, 65), 3),), "windows of 65 tokens exceed the 64 positions"),
        ((windows + 100,), "token ids .* but the model knows 0 to 127"),
        ((windows - 100,), "token ids -"),
    ]:
        for evaluate in (perplexity, lambda *a: layer_set_perplexity(*a, [()], progress=False)):
            with pytest.raises(ValueError, match=message):
                evaluate(model, *arguments)
    with pytest.raises(ValueError, match="stride=18"):
        perplexity(model, windows, stride=18)
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
    with pytest.raises(NotFinite, match=r"without the layers \(1,\): .*window 4"):
        layer_set_perplexity(model, windows, [(1,)], batch_size=3, progress=False)


# --- the protocol


def test_protocol_describes_everything_in_json():
    described = PerplexityProtocol(window=128, bos=True, limit=10, dtype="bfloat16").describe()
    assert json.loads(json.dumps(described)) == described
    assert {field.name for field in dataclasses.fields(PerplexityProtocol)} <= set(described)
    assert (described["window"], described["stride"], described["bos"]) == (128, 127, True)
    assert PerplexityProtocol(window=128).describe()["stride"] == 128
    assert PerplexityProtocol(join=" ").describe()["join"] == " "


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"window": 1}, "window=1"),
        ({"window": 8, "stride": 9}, "stride=9"),
        ({"window": 8, "stride": 8, "bos": True}, "stride=8: between 1 and the 7"),
        ({"limit": 0}, "limit=0"),
        ({"dtype": "float17"}, "float17"),
        ({"dtype": "nn"}, "nn"),
    ],
)
def test_impossible_protocols_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        PerplexityProtocol(**settings)


def test_protocol_is_held_against_model_and_windows():
    model, windows = build("llama"), random_windows()
    protocol = PerplexityProtocol(window=17)
    assert protocol.measure(model, windows) == perplexity(model, windows)
    assert PerplexityProtocol(window=17, stride=4).measure(model, windows) == perplexity(model, windows, stride=4)
    with pytest.raises(ValueError, match=r"states dtype=bfloat16, the model is in torch\.float32"):
        PerplexityProtocol(window=17, dtype="bfloat16").measure(model, windows)
    with pytest.raises(ValueError, match="windows of 16 tokens, these have 17"):
        PerplexityProtocol(window=16).measure(model, windows)
    with pytest.raises(ValueError, match="states bos=True"):
        PerplexityProtocol(window=17, bos=True).measure(model, windows)


# --- many removals


@pytest.mark.parametrize("family", FAMILIES)
def test_every_set_equals_the_pruned_model(family):
    model, windows = build(family), random_windows(5)
    sets = [(), (0,), (1,), (5,), (1, 2), (1, 3), (0, 5), (2, 3, 4), (0, 1, 2, 3, 4), (1, 2, 3, 4, 5)]
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    shared = layer_set_perplexity(model, windows, sets, batch_size=2, progress=False)
    assert list(shared) == sets
    for removed in sets:
        alone = perplexity(remove_layers(model, removed), windows)
        assert shared[removed].window_nll == pytest.approx(alone.window_nll, abs=NLL)
        assert shared[removed].window_tokens == alone.window_tokens
        assert shared[removed].correct == alone.correct
    # Different sets are different models: otherwise equality above would say little.
    assert len({round(result.nll, 3) for result in shared.values()}) == len(sets)
    # And the model is as it was.
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert perplexity(model, windows).window_nll == pytest.approx(shared[()].window_nll, abs=NLL)


def test_strides_work_for_layer_sets_too():
    model, windows = build("gemma2"), random_windows(1, 40)[0].unfold(0, 12, 4)
    shared = layer_set_perplexity(model, windows, [(2,), (3, 4)], stride=4, batch_size=3, progress=False)
    for removed, result in shared.items():
        alone = perplexity(remove_layers(model, removed), windows, stride=4)
        assert result.window_nll == pytest.approx(alone.window_nll, abs=NLL)
        assert result.window_tokens == alone.window_tokens == (11, *[4] * 7)


def test_each_shared_beginning_runs_once():
    model, windows = build("llama"), random_windows(5)
    sets = list(itertools.combinations(range(6), 2))
    calls = [0] * 6
    for index, layer in enumerate(decoder_layers(model)):
        layer.register_forward_hook(lambda *_, index=index: calls.__setitem__(index, calls[index] + 1))
    shared = layer_set_perplexity(model, windows, sets, batch_size=2, progress=False)
    kept = [tuple(layer for layer in range(6) if layer not in removed) for removed in sets]
    beginnings = {layers[:end] for layers in kept for end in range(1, 5)}
    batches = 3
    assert sum(calls) == shared.layer_forwards == batches * len(beginnings)
    assert shared_layer_forwards(6, sets) == len(beginnings)
    assert shared.layer_forwards_alone == batches * 15 * 4
    assert shared.layer_forwards < shared.layer_forwards_alone
    # A last layer that goes is a beginning of what stays: it costs nothing on top.
    assert shared_layer_forwards(6, [(), (5,), (4, 5)]) == 6


def test_sets_are_checked_before_work():
    model, windows = build("llama"), random_windows()
    for removed, message in [
        ((6,), r"removed layers \(6,\).*from 0 to 5"),
        ((-1, 2), "from 0 to 5"),
        ((2, 1), "ascending"),
        ((1, 1), "distinct"),
        (tuple(range(6)), "cannot remove 6 of 6 layers"),
    ]:
        with pytest.raises(ValueError, match=message):
            layer_set_perplexity(model, windows, [(), removed], progress=False)
    twice = layer_set_perplexity(model, windows, [(1,), (1,)], progress=False)
    assert twice.layer_forwards == 5
    assert layer_set_perplexity(model, windows, [], progress=False) == {}


# --- paired bootstrap


def test_bootstrap_of_a_constant_difference_is_a_point():
    b = np.random.default_rng(0).uniform(10, 20, size=30)
    found = paired_bootstrap((b + 8).tolist(), b.tolist(), 0, window_tokens=[16] * 30)
    assert (found.difference, found.low, found.high) == pytest.approx((0.5, 0.5, 0.5))


def test_bootstrap_interval_has_the_width_of_theory():
    generator = np.random.default_rng(1)
    a, b = generator.normal(50, 10, size=(2, 400))
    tokens = [20] * 400
    found = paired_bootstrap(a.tolist(), b.tolist(), 0, 2000, sizes=tokens)
    error = (a - b).std(ddof=1) / math.sqrt(400) / 20
    assert found.difference == pytest.approx((a.mean() - b.mean()) / 20)
    assert found.high - found.low == pytest.approx(2 * 1.96 * error, rel=0.1)
    assert found.low < found.difference < found.high
    # Swapping the models turns the interval round; the same seed gives the same interval.
    swapped = paired_bootstrap(b.tolist(), a.tolist(), 0, 2000, sizes=tokens)
    assert (swapped.difference, swapped.low, swapped.high) == pytest.approx((-found.difference, -found.high, -found.low))
    assert paired_bootstrap(a.tolist(), b.tolist(), 0, 2000, sizes=tokens) == found
    assert paired_bootstrap(a.tolist(), b.tolist(), 1, 2000, sizes=tokens) != found
    narrow = paired_bootstrap(a.tolist(), b.tolist(), 0, 2000, window_tokens=tokens, level=0.5)
    assert found.low < narrow.low < narrow.high < found.high


def test_bootstrap_weighs_windows_by_their_tokens():
    found = paired_bootstrap([30.0, 1.0], [0.0, 0.0], 0, window_tokens=[10, 1])
    assert found.difference == pytest.approx(31 / 11)
    assert (found.low, found.high) == pytest.approx((1.0, 3.0))


def test_bootstrap_refuses_what_is_not_paired():
    with pytest.raises(ValueError, match="3 and 2 windows, 3 token counts"):
        paired_bootstrap([1.0, 2.0, 3.0], [1.0, 2.0], 0, window_tokens=[1, 1, 1])
    with pytest.raises(ValueError, match="at least 2"):
        paired_bootstrap([1.0], [1.0], 0, window_tokens=[1])
    with pytest.raises(ValueError, match="n=0"):
        paired_bootstrap([1.0, 1.0], [1.0, 1.0], 0, 0, window_tokens=[1, 1])


# --- a real model on real text


def test_real_model_prefers_the_text_it_was_made_for(shared_data):
    folder = shared_data / "models" / "stories260k"
    model, tokenizer = load_model(folder), load_tokenizer(folder)
    protocol = PerplexityProtocol(window=128, bos=True, limit=12)
    corpora = {
        "wikitext2": load("wikitext2", "evaluation", data_dir=shared_data / "benchmarks"),
        "c4": load("c4", data_dir=shared_data, max_documents=200),
        "alpaca": load("alpaca", data_dir=shared_data),
        "english": load(shared_data / "english" / "valid.txt.xz", "evaluation"),
    }
    windows = {name: protocol.windows(corpus, tokenizer, progress=False) for name, corpus in corpora.items()}
    dense = {name: protocol.measure(model, found) for name, found in windows.items()}
    for name, result in dense.items():
        assert result.tokens == 12 * 127, name
        assert 2 < result.ppl < 512, name  # better than the uniform model over its 512 tokens
    # A shuffled text is far worse, so the order of tokens was read.
    shuffled = windows["english"][:, torch.randperm(127, generator=torch.Generator().manual_seed(0)).add(1)]
    assert perplexity(model, shuffled).nll > dense["english"].nll + 1
    # Layer sets on the real checkpoint, and the paired test between two of them.
    sets = [(), (1,), (2,), (1, 2), (4,)]
    shared = layer_set_perplexity(model, windows["english"], sets, progress=False)
    for removed in sets:
        alone = perplexity(remove_layers(model, removed), windows["english"])
        assert shared[removed].nll == pytest.approx(alone.nll, rel=1e-6)
    worse = paired_bootstrap(shared[(1, 2)].window_nll, shared[()].window_nll, 0, window_tokens=shared[()].window_tokens)
    assert worse.low > 0
