"""The notebook of combinations as a batch runs it, on a tiny model: its costs and acceptances computed again."""

import pytest
from word_model import drawn_words, write_choices, write_project

from prunelib import models
from prunelib.evaluation.perplexity import PerplexityProtocol, perplexity
from prunelib.lab import runs as results
from prunelib.lab.run_notebook import NotebookError, run_notebook
from prunelib.models.quantization import to_format, weight_bytes
from prunelib.speed.speculative import acceptance, best_drafted, expected_speedup
from prunelib.text.corpora import load

NOTEBOOK = "notebooks/experiments/combining.ipynb"

pytestmark = pytest.mark.slow
SETS = {2: (1, 2), 3: (1, 2, 4)}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a 6-layer model, its tokenizer, a text, and a run file with two choices."""
    folder = write_project(tmp_path_factory.mktemp("combining"), n_layers=6, words=drawn_words(60))
    write_choices(folder, SETS)
    return folder


@pytest.fixture(scope="module")
def run(place):
    return _run(place, "all")


def _run(place, name, **changes):
    values = {"model": str(place / "model"), "choices": str(place / "choices.json"), "methods": ["angular"], "sizes": [2, 3]}
    values |= {"formats": ["int8"], "resamples": 50, "draft_sizes": [2], "healed_sizes": [2]}
    values |= {"steps": 2, "warmup_steps": 1, "batch": 2, "seq_len": 16, "healing_corpus": f"{place / 'text.txt'}:train"}
    values |= {"drafted": [2], "prompts": 2, "prompt_tokens": 5, "new_tokens": 9, "repeats": 1}
    values |= {"report_corpus": str(place / "text.txt"), "report_windows": 6, "report_seq_len": 32}
    run_notebook(NOTEBOOK, place / f"{name}.json", **(values | changes))
    return results.read_run(place / f"{name}.json")


def _value(run, metric, **conditions):
    (row,) = [row for row in run["rows"] if row["metric"] == metric and conditions.items() <= row.items()]
    return row["value"]


def _windows(place):
    protocol = PerplexityProtocol(window=32, dtype="float32", limit=6)
    return protocol.windows(load(place / "text.txt", "evaluation"), models.load_tokenizer(place / "model"), progress=False)


def test_costs_are_differences_of_models_made_one_by_one(place, run):
    windows, nats = _windows(place), {}
    for name in ("float32", "int8"):
        for size, removed in {0: (), **SETS}.items():
            model = models.remove_layers(models.load(place / "model", dtype="float32", device="cpu"), removed)
            if name != "float32":
                to_format(model, name)
            nats[name, size] = perplexity(model, windows).nll
            assert _value(run, "nll", role="format", format=name, size=size) == pytest.approx(nats[name, size], abs=1e-5)
            assert _value(run, "bytes", role="format", format=name, size=size) == weight_bytes(model)
    for size in SETS:
        expected = {
            "cost_of_pruning": nats["float32", size] - nats["float32", 0],
            "cost_of_quantizing": nats["int8", 0] - nats["float32", 0],
            "cost_of_both": nats["int8", size] - nats["float32", 0],
        }
        found = {metric: _value(run, metric, format="int8", size=size) for metric in (*expected, "sum_of_costs", "interaction")}
        assert {metric: found[metric] for metric in expected} == pytest.approx(expected, abs=1e-5)
        assert found["sum_of_costs"] == pytest.approx(found["cost_of_pruning"] + found["cost_of_quantizing"], abs=1e-9)
        assert found["interaction"] == pytest.approx(found["cost_of_both"] - found["sum_of_costs"], abs=1e-9)
    for row in run["rows"]:
        if row.get("role") == "cost":
            assert row["low"] <= row["value"] <= row["high"] and row["n"] == 6 * 31


def test_drafts_are_measured_and_leave_the_text_alone(place, run):
    dense = models.load(place / "model", dtype="float32", device="cpu")
    again = acceptance(dense, {"draft": models.remove_layers(dense, SETS[2])}, _windows(place))["draft"]
    for kind, rates in again.items():
        assert _value(run, f"acceptance_{kind}", recipe="none") == pytest.approx(rates.mean(), abs=1e-6)
    for recipe in ("none", "distillation"):
        of = {"role": "decoding", "recipe": recipe, "size": 2}
        assert _value(run, "same_text", **of) == _value(run, "same_text_assisted", **of) == 1
        rate, cost = _value(run, "acceptance_decoded", **of), _value(run, "draft_over_dense", **of)
        assert 0 <= rate <= 1
        assert _value(run, "expected_speedup", **of) == expected_speedup(rate, 2, cost)
        assert _value(run, "best_drafted", **of) == best_drafted(_value(run, "acceptance_greedy", recipe=recipe), cost)
        assert 1 <= _value(run, "tokens_per_run", **of) <= 3
        assert _value(run, "speedup", **of) > 0
    assert _value(run, "tokens", recipe="distillation") == 2 * 2 * 16
    assert _value(run, "nll", role="draft", recipe="distillation") != _value(run, "nll", role="draft", recipe="none")
    assert not list(place.glob("*.work"))
    assert {f"report {place / 'text.txt'}", f"training {place / 'text.txt'}:train"} == set(run["provenance"]["data"])


def test_drafts_alone_and_prompts_that_must_be_there(place):
    only = _run(place, "drafts", sizes=[], healed_sizes=[], drafted=[1])
    assert {row["role"] for row in only["rows"]} == {"draft", "decoding"}
    assert {row["recipe"] for row in only["rows"]} == {"none"}
    with pytest.raises(NotebookError, match="prompts=7 of 5 tokens, but there are 6 windows of 32"):
        _run(place, "none", prompts=7)
