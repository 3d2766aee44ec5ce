"""The slicing notebook as a batch runs it, on a tiny model and a small text."""

import pytest
from word_model import drawn_words, write_project

from prunelib import models
from prunelib.criteria.statistics import collect
from prunelib.evaluation import tasks
from prunelib.evaluation.perplexity import perplexity
from prunelib.lab import runs
from prunelib.lab.parameters import ParameterError
from prunelib.lab.run_notebook import NotebookError, run_notebook
from prunelib.slicing import constant, count_parameters, dynamic, layer_redundancy, slice_model
from prunelib.text import corpora
from prunelib.text.windows import consecutive_windows, sample_windows

pytestmark = pytest.mark.slow
LENGTH = 16


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a 4-layer model, its tokenizer and a text."""
    return write_project(tmp_path_factory.mktemp("slicing"), n_layers=4, words=drawn_words(60), bos=True)


def run(place, stats, **changes):
    text, model = str(place / "text.txt"), str(place / "model")
    stats.save(place / "s0.safetensors", {"model": model, "corpus": text, "seed": "0"})
    (place / "s0.json").write_text("{}")  # the run file itself is not read
    values = {"model": model, "statistics": [str(place / "s0.json")], "redundancy_corpus": text, "corpus": text}
    values |= {"split": "train", "seq_len": LENGTH, "random_seeds": [0], "normalizations": [], "window_seeds": [1]}
    values |= {"slice_percentages": [0.25], "slice_bases": [0.0, 0.125], "control_percentage": 0.25, "control_base": 0.125}
    values |= {"other_percentages": [0.5], "bare_percentages": [], "counted_percentages": [0.25], "depth_sizes": [1, 3]}
    values |= {"tasks": ["pydocs_parameter"], "tasks_limit": 5}
    values |= {"report_corpus": text, "report_split": "train", "report_windows": 4, "report_seq_len": LENGTH}
    return runs.read_run(run_notebook("notebooks/experiments/slicing.ipynb", place / "sliced.json", **(values | changes)))


def test_rows_and_tasks_are_those_of_the_sliced_models(place):
    dense, tokenizer = models.load(place / "model"), models.load_tokenizer(place / "model")
    corpus = corpora.load(place / "text.txt")
    windows = {seed: sample_windows(corpus, tokenizer, 16, LENGTH, seed=seed) for seed in (0, 1)}
    report = consecutive_windows(corpus, tokenizer, LENGTH, 4)
    stats = collect(dense, windows[0], progress=False)
    with pytest.raises(NotebookError, match="none of the 1 statistics is of redundancy_corpus='pydocs'"):
        run(place, stats, redundancy_corpus="pydocs")
    assert not (place / "sliced.json").exists()
    whole = run(place, stats)
    rows = whole["rows"]

    def value(metric, **where):
        found = [row for row in rows if row["metric"] == metric and all(row.get(key) == where[key] for key in where)]
        assert len(found) == 1, (metric, where, found)
        return found[0]["value"]

    plans = {"constant": (0.25, constant(4, 32, 0.25)), "dynamic": (0.125, dynamic(layer_redundancy(stats), 32, 0.25, 0.125))}
    assert value("nll", role="dense") == pytest.approx(perplexity(dense, report).nll, abs=1e-6)
    for method, (base, plan) in plans.items():
        for seed, part in ((0, "sweep"), (1, "windows")):
            narrow = slice_model(dense, plan, windows[seed], progress=False)
            where = {"role": "plan", "part": part, "method": method, "slice_base": base}
            assert value("nll", **where) == pytest.approx(perplexity(narrow, report).nll, abs=1e-6)
        removed = count_parameters(dense.config, plan).removed
        assert value("removed", **where) == value("removed", role="count", method=method, shortcuts="folded") == removed
    assert {row["value"] for row in rows if row["metric"] == "mean_slice" and row["slice_percentage"] == 0.25} >= {0.25}
    one_layer = models.removed_fraction(dense, models.remove_layers(dense, [2]))
    assert value("removed", role="count", method="layers", layers_removed=1) == pytest.approx(one_layer)
    with pytest.raises(ParameterError, match=r"depth_sizes = .*4 layers"):  # a model without layers is none
        run(place, stats, depth_sizes=[1, 4])

    # The same batches: this tokenizer knows no word of the items, so that choices of one length tie.
    asked = {"bos": True, "limit": 5, "num_fewshot": 0, "batch_size": 32, "progress": False}
    answers = tasks.evaluate_layer_sets(dense, tokenizer, "pydocs_parameter", [()], **asked)[()]["pydocs_parameter"]
    assert value("acc", method="dense") == value("average", method="dense") == answers.value()
    assert whole["provenance"]["data"]["pydocs_parameter"] == answers.items_sha256
    over = [row for row in rows if row["metric"] == "over_constant"]
    compared = [("dynamic", 0.0), ("dynamic", 0.125), ("keep_first_full", 0.0)]
    assert [(row["method"], row["slice_base"]) for row in over] == compared
    assert all(row["low"] <= row["value"] <= row["high"] for row in over)
    assert value("average", method="chance") == 0.25
