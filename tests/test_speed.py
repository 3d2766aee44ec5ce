"""Counts against independent ones, limits, the order of measurements, fits, and the notebook. Nothing here is timed."""

import itertools

import numpy as np
import pytest
import torch
from architectures import build
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from prunelib import models
from prunelib.lab import runs as results
from prunelib.lab.run_notebook import NotebookError, run_notebook
from prunelib.slicing import constant, count_parameters, slice_model
from prunelib.speed import Decoder, Roofline, Setting, roofline, shapes, timing

NOTEBOOK = "notebooks/experiments/speed.ipynb"


def counted_flops(call):
    """FLOPs of matrix products, as torch counts them."""
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def eager(model):
    """Attention by plain matrix products, which the counter of torch sees."""
    model.set_attn_implementation("eager")
    return model


PUBLISHED = {
    "llama-2-7b": 6_738_415_616,
    "llama-2-13b": 13_015_864_320,
    "mistral-7b-v0.3": 7_248_023_552,
    "llama-3.1-8b": 8_030_261_248,
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-1.5b": 1_543_714_304,
    "qwen2.5-3b": 3_085_938_688,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_shapes_have_the_parameters_of_the_published_models(name):
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(shapes.shape_configuration(name))
    assert models.parameter_count(model) == PUBLISHED[name]


def test_an_unknown_shape_or_dtype_is_refused(tiny_llama):
    with pytest.raises(ValueError, match=r"there is no shape 'llama-9b'; there are: .*llama-2-7b"):
        shapes.shape_configuration("llama-9b")
    with pytest.raises(ValueError, match="dtype 'int8'"):
        shapes.random_model(tiny_llama.config, dtype="int8")


def test_a_random_sliced_model_is_shaped_as_a_sliced_one(tiny_llama):
    plan, windows = constant(6, 32, 0.25), torch.randint(0, 97, (8, 16))
    narrow, random = slice_model(tiny_llama, plan, windows, progress=False), shapes.random_sliced(tiny_llama.config, plan)
    found = [{name: tuple(one.shape) for name, one in model.state_dict().items()} for model in (narrow, random)]
    assert found[0] == found[1]
    assert torch.isfinite(random(windows).logits).all()
    assert random.dtype == torch.get_default_dtype() == torch.float32 and not random.training


def test_layers_are_left_out_without_copies(tiny_llama):
    shorter = shapes.without_layers(tiny_llama, 2)
    kept = [models.decoder_layers(tiny_llama)[index] for index in (0, 1, 2, 5)]
    for mine, theirs in zip(models.decoder_layers(shorter), kept, strict=True):
        assert mine.mlp.up_proj.weight.data_ptr() == theirs.mlp.up_proj.weight.data_ptr()
    with pytest.raises(ValueError, match="cannot remove 6 of 6 layers"):
        shapes.without_layers(tiny_llama, 6)


@pytest.mark.parametrize("tied", [False, True])
def test_work_of_a_step(tied):
    sizes = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
    config = LlamaConfig(**sizes, num_key_value_heads=2, tie_word_embeddings=tied)
    model = eager(LlamaForCausalLM(config).eval())
    decoder = Decoder(model, Setting(5, 11, 19))
    decoder.fill(11)
    work = roofline.step_ops(model, 5, 12)
    assert work.flops == counted_flops(lambda: decoder.steps(1))
    layer = 32 * 32 * 2 + 2 * 32 * 16 + 3 * 32 * 64 + 2 * 32  # q, o; k, v; MLP; norms
    weights = 4 * (3 * layer + 32 + 97 * 32)
    looked_up = 0 if tied else 4 * 5 * 32
    cache = 4 * 3 * 5 * 2 * 16  # of one token, all rows
    assert work.bytes == weights + looked_up + 12 * cache
    assert roofline.step_ops(model, 5, 12, read=30).bytes == weights + looked_up + 31 * cache, "a masked cache is read whole"
    assert roofline.read_bytes(model, 5) == weights + looked_up


def test_work_of_a_prefill(tiny_llama):
    model = eager(tiny_llama)
    decoder = Decoder(model, Setting(3, 7, 13))
    tokens = torch.randint(0, 97, (3, 7))
    # The counter sees the whole square of attention, of which causal attention needs the lower triangle.
    square, triangle = (3 * places * 6 * 4 * 32 for places in (7 * 7, 7 * 8 / 2))
    assert roofline.prefill_ops(model, 3, 7).flops == counted_flops(lambda: decoder.prefill(tokens)) - square + triangle
    cache = 4 * 6 * 3 * 7 * 2 * 16
    assert roofline.prefill_ops(model, 3, 7).bytes == roofline.read_bytes(model, 21) + cache


def test_flops_of_a_sliced_model_are_those_of_its_account(tiny_llama):
    plan = constant(6, 32, 0.25)
    counted = count_parameters(tiny_llama.config, plan, context=10)
    assert roofline.step_ops(shapes.random_sliced(tiny_llama.config, plan), 1, 10).flops == counted.flops
    assert roofline.step_ops(tiny_llama, 1, 10).flops == counted.dense_flops


def test_the_limit_is_the_larger_of_two_times():
    ceiling = Roofline(bandwidth=100.0, rate=1000.0)
    assert roofline.OpCount(500.0, 10.0).seconds(ceiling) == 0.5
    assert roofline.OpCount(500.0, 80.0).seconds(ceiling) == 0.8


def test_settings():
    setting = Setting.parse("16x4x2048")
    assert setting == Setting(16, 4, 2048) and str(setting) == "16x4x2048"
    assert (setting.capacity, setting.steps) == (2052, 2047)
    assert setting.mean_length == np.mean([4 + step for step in range(1, 2048)])
    assert Setting.parse("8x2048x0").steps == 0
    for wrong in ("16x4", "ax4x8", "0x4x8", "2x4x1"):
        with pytest.raises(ValueError):
            Setting.parse(wrong)


def test_sampled_steps_stand_for_all_of_them():
    setting = Setting(1, 4, 129)
    for segments, chunk in ((1, 128), (4, 32), (4, 2), (8, 16), (128, 1)):
        starts = setting.sampled_lengths(segments, chunk)
        assert len(starts) == segments
        assert starts[0] >= 4
        assert starts[-1] + chunk <= setting.capacity - 1
        attended = [start + step + 1 for start in starts for step in range(chunk)]
        assert np.mean(attended) == pytest.approx(setting.mean_length, abs=0.51)
    every = setting.sampled_lengths(4, 32)
    assert sorted(start + step for start in every for step in range(32)) == list(range(4, 132))
    with pytest.raises(ValueError, match="have no such samples"):
        setting.sampled_lengths(4, 33)


def test_measurements_take_turns(monkeypatch):
    done = []
    clock = itertools.count(0.0)
    monkeypatch.setattr(timing.time, "perf_counter", lambda: next(clock))
    calls = {name: lambda name=name: done.append(name) for name in "abc"}
    times = timing.interleaved(calls, 3, torch.device("cpu"), warmup=1)
    rounds = ["".join(done[start : start + 3]) for start in range(0, 12, 3)]
    assert all(sorted(one) == ["a", "b", "c"] for one in rounds)
    assert rounds[1:] == ["abc", "bca", "cab"], "nobody is always first"
    assert times == {name: [1, 1, 1] for name in "abc"}, "the warm-up is not among them"
    with pytest.raises(ValueError, match="rounds=0"):
        timing.interleaved(calls, 0, torch.device("cpu"))


def test_the_ceiling_is_that_of_the_measured_rates():
    rates = roofline.measured_rates(torch.device("cpu"), torch.float32, rounds=2)
    assert all(len(one) == 2 and (one > 0).all() for one in rates.values())
    found = {"read": np.array([1.0, 2.0, 9.0]), "copy": np.array([1.0, 3.0, 5.0]), "matmul": np.array([4.0])}
    assert Roofline.of(found) == Roofline(3.0, 4.0)


def test_times_of_every_model_segment_and_round(tiny_llama):
    setting = Setting(2, 3, 13)
    dense = Decoder(tiny_llama, setting)
    decoders = {"0": dense, "3": Decoder(shapes.without_layers(tiny_llama, 3), setting, beside=dense)}
    times = timing.step_seconds(decoders, 3, segments=2, chunk=4, progress=False)
    assert {name: found.shape for name, found in times.items()} == {"0": (2, 3), "3": (2, 3)}
    assert all((found > 0).all() for found in times.values())
    reading = timing.prefill_seconds(decoders, 3)
    assert {name: len(found) for name, found in reading.items()} == {"0": 3, "3": 3}
    assert timing.whole_seconds(dense) > 0
    assert dense.cache.get_seq_length() == setting.capacity - 1, "the last token is chosen, not read"


def generated(decoder, prompts, count):
    decoder.prefill(prompts)
    chosen = [decoder.tokens.clone()]
    for _ in range(count - 1):
        decoder.steps(1)
        chosen.append(decoder.tokens.clone())
    return torch.cat(chosen, dim=1)


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "sliced"])
@pytest.mark.parametrize("compiled", [False, True])
def test_tokens_are_those_of_generate_also_in_a_shared_cache(family, compiled, monkeypatch):
    if not torch.cuda.is_available():  # without a compiler the static cache alone is under test
        monkeypatch.setattr(torch, "compile", lambda call, **_: call)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = build("llama" if family == "sliced" else family)
    if family == "sliced":
        model = slice_model(model, constant(6, 32, 0.25), torch.randint(0, 128, (8, 16)), progress=False)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.3)  # choices that are no near ties
    model = model.to(device)
    setting = Setting(3, 5, 20)
    first = Decoder(model, setting, compiled=compiled)
    prompts = timing.random_tokens(model, setting)
    pruned = [(model, first)]
    if family != "sliced":
        shorter = models.remove_layers(model, [1])
        pruned.append((shorter, Decoder(shorter, setting, compiled=compiled, beside=first)))
    for _ in range(2):
        for one, decoder in pruned:
            expected = one.generate(prompts, max_new_tokens=20, do_sample=False, eos_token_id=None, pad_token_id=0)[:, 5:]
            assert torch.equal(generated(decoder, prompts, 20), expected)
    first.fill(9)
    assert int(first.cache.get_seq_length()) == 9
    assert first.cache.layers[0].keys[:, :, :9].std() > 0.5, "random numbers"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_peak_memory_holds_weights_and_cache(tiny_llama):
    model, setting = tiny_llama.cuda(), Setting(4, 8, 1000)
    cache = 4 * 6 * 2 * 2 * 8 * 4 * 1008
    found = timing.peak_memory(model, setting)
    assert found >= 4 * models.parameter_count(model) + cache
    assert found < 2 * (4 * models.parameter_count(model) + cache) + 2**20


@pytest.fixture(scope="module")
def run_file(tmp_path_factory):
    folder = tmp_path_factory.mktemp("speed")
    model = build("llama")
    model.save_pretrained(folder / "model")
    values = {"model": str(folder / "model"), "settings": ["2x3x9", "2x8x0"], "sizes": [0, 2, 4], "sliced_as": [2]}
    values |= {"rounds": 3, "segments": 2, "steps": 2, "whole_sizes": [4], "multiple": 1}
    return model, results.read_run(run_notebook(NOTEBOOK, folder / "speed.json", **values))


@pytest.mark.slow
def test_the_notebook_measures_every_model_in_every_setting(run_file):
    model, run = run_file
    rows = run["rows"]

    def values(metric, **where):
        return [row for row in rows if row["metric"] == metric and where.items() <= row.items()]

    def value(metric, **where):
        (row,) = values(metric, **where)
        return row["value"]

    for size in (0, 2, 4):
        pruned = shapes.without_layers(model, size)
        assert value("parameters", role="variant", layers_removed=size) == models.parameter_count(pruned)
        expected = roofline.step_ops(pruned, 2, Setting(2, 3, 9).mean_length).flops
        assert value("flops", phase="decode", layers_removed=size) == expected
        for setting, phase in (("2x3x9", "prefill"), ("2x3x9", "decode"), ("2x3x9", "generation"), ("2x8x0", "prefill")):
            at = {"role": "speed", "setting": setting, "phase": phase, "layers_removed": size}
            (row,) = values("seconds", **at)
            per_call = {"prefill": 2 * (3 if setting == "2x3x9" else 8), "decode": 2, "generation": 2 * 9}[phase]
            assert 0 < row["low"] <= row["value"] <= row["high"] and row["n"] == 3
            assert value("tokens_per_s", **at) == pytest.approx(per_call / row["value"])
            assert value("limit_share", **at) == pytest.approx(value("limit_seconds", **at) / row["value"])
            gains = value("speedup", **at), value("limit_speedup", **at)
            assert value("speedup_share", **at) == pytest.approx(gains[0] / gains[1])
            assert size or gains == (1, 1)
    removed = [row["value"] for row in values("removed", role="variant")]
    as_layers = value("removed", role="variant", method="sliced", as_layers=2)
    assert as_layers == pytest.approx(removed[1], abs=0.02), "sliced to as many parameters as two layers have"
    assert len(values("seconds", role="segment")) == 4 * 2
    assert len(values("whole_seconds", layers_removed=4)) == 1
    assert {row["phase"] for row in values("slope", role="fit", setting="2x3x9")} == {"prefill", "decode", "generation"}
    at = {"setting": "2x3x9", "phase": "decode"}
    seconds = [row["value"] for row in values("seconds", role="speed", method="layers", **at)]
    assert value("slope", role="fit", **at) == pytest.approx(np.polyfit([0, 2, 4], seconds, 1)[0])
    assert 0 <= value("r2", role="fit", **at) <= 1
    assert {row["load"] for row in rows if row["role"] == "ceiling"} == {"read", "copy", "matmul"}
    assert not values("peak_bytes") or torch.cuda.is_available(), "missing is missing"


@pytest.mark.slow
def test_the_notebook_refuses_what_cannot_be(tmp_path):
    with pytest.raises(NotebookError, match=r"sliced_as and whole_sizes name \[5\]"):
        run_notebook(NOTEBOOK, tmp_path / "x.json", sliced_as=[5])
