"""The slicing notebook as a batch runs it, on a tiny model and a small text."""

import pytest
from word_model import drawn_words, write_project

from prunelib import models
from prunelib.criteria.statistics import LayerStats
from prunelib.evaluation.perplexity import perplexity
from prunelib.io import at_root
from prunelib.lab import runs
from prunelib.lab.run_notebook import NotebookError, run_notebook
from prunelib.slicing import constant, count_parameters, dynamic, layer_redundancy, slice_model
from prunelib.text import corpora
from prunelib.text.windows import consecutive_windows, sample_windows

LENGTH = 16


pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a 4-layer model, its tokenizer, a text, and statistics of the model on it."""
    folder = write_project(tmp_path_factory.mktemp("slicing"), n_layers=4, words=drawn_words(60), bos=True)
    common = {"model": str(folder / "model"), "corpus": str(folder / "text.txt"), "n_samples": 8, "seq_len": LENGTH}
    run_notebook("notebooks/experiments/statistics.ipynb", folder / "s0.json", seed=0, **common)
    return folder


def run(place, name, **changes):
    text = str(place / "text.txt")
    values = {
        "model": str(place / "model"),
        "statistics": [str(place / "s0.json")],
        "redundancy_corpus": text,
        "corpus": text,
        "split": "train",
        "n_samples": 16,
        "seq_len": LENGTH,
        "slice_percentages": [0.25],
        "slice_bases": [0.125],
        "control_percentage": 0.25,
        "control_base": 0.125,
        "random_seeds": [0],
        "normalizations": ["rank"],
        "window_seeds": [1],
        "other_percentages": [0.5],
        "bare_percentages": [0.25],
        "counted_percentages": [0.25],
        "depth_sizes": [1, 4],
        "latency_repeats": 1,
        "tasks": [],
        "report_corpus": text,
        "report_split": "train",
        "report_windows": 4,
        "report_seq_len": LENGTH,
    }
    return runs.read_run(run_notebook("notebooks/experiments/slicing.ipynb", place / name, **(values | changes)))


def test_the_rows_are_those_of_the_sliced_models(place):
    rows = run(place, "sliced.json")["rows"]
    dense, tokenizer = models.load(place / "model"), models.load_tokenizer(place / "model")
    corpus = corpora.load(place / "text.txt")
    windows = {seed: sample_windows(corpus, tokenizer, 16, LENGTH, seed=seed) for seed in (0, 1)}
    report = consecutive_windows(corpus, tokenizer, LENGTH, 4)
    redundancy = layer_redundancy(LayerStats.load(at_root(str(place / "s0.safetensors"))))

    def value(metric, **where):
        found = [row for row in rows if row["metric"] == metric and all(row.get(key) == where[key] for key in where)]
        assert len(found) == 1, (metric, where, found)
        return found[0]["value"]

    assert value("nll", role="dense") == pytest.approx(perplexity(dense, report).nll, abs=1e-6)
    for method, plan in (("constant", constant(4, 32, 0.25)), ("dynamic", dynamic(redundancy, 32, 0.25, 0.125))):
        for seed, part in ((0, "sweep"), (1, "windows")):
            nll = perplexity(slice_model(dense, plan, windows[seed], progress=False), report).nll
            assert value("nll", role="plan", part=part, method=method) == pytest.approx(nll, abs=1e-6)
        counted = count_parameters(dense.config, plan)
        assert value("removed", role="plan", part="sweep", method=method) == counted.removed
        assert value("removed", role="count", method=method, shortcuts="folded") == counted.removed
        # Even the controls have the mean slice that was asked for.
    assert {row["value"] for row in rows if row["metric"] == "mean_slice" and row["slice_percentage"] == 0.25} >= {0.25}
    one_layer = models.removed_fraction(dense, models.remove_layers(dense, [2]))
    assert value("removed", role="count", method="layers", layers_removed=1) == pytest.approx(one_layer)
    assert not any(row.get("layers_removed") == 4 for row in rows), "a model without layers is none"


def test_tasks_are_scored_on_every_plan_of_the_sweep(place):
    pytest.importorskip("lm_eval")
    from prunelib.evaluation.tasks import evaluate_tasks

    changes = {"random_seeds": [], "normalizations": [], "window_seeds": [], "other_percentages": [], "bare_percentages": []}
    changes |= {"slice_bases": [0.0, 0.125], "latency_repeats": 0, "depth_sizes": []}
    asked = {"tasks": ["pydocs_parameter"], "tasks_limit": 5, "together": False}
    run_file = run(place, "tasks.json", **changes, **asked)
    rows = [row for row in run_file["rows"] if row["role"] == "task"]
    dense, tokenizer = models.load(place / "model"), models.load_tokenizer(place / "model")
    windows = sample_windows(corpora.load(place / "text.txt"), tokenizer, 16, LENGTH, seed=0)
    redundancy = layer_redundancy(LayerStats.load(at_root(str(place / "s0.safetensors"))))
    widths = {"constant": constant(4, 32, 0.25), "dynamic": dynamic(redundancy, 32, 0.25, 0.125)}
    expected = {name: slice_model(dense, plan, windows, progress=False) for name, plan in widths.items()} | {"dense": dense}
    for method, model in expected.items():
        # The same batches: this tokenizer knows no word of the items, so that choices of one length tie.
        found = evaluate_tasks(model, tokenizer, "pydocs_parameter", bos=True, limit=5, batch_size=8, progress=False)
        found = found["pydocs_parameter"]
        mine = [row for row in rows if row["method"] == method and row.get("slice_base") != 0]
        assert {row["value"] for row in mine if row["metric"] in ("acc", "average")} == {found.value()}
        assert run_file["provenance"]["data"]["pydocs_parameter"] == found.items_sha256
    plans = [(row["method"], row["slice_base"]) for row in rows if row["metric"] == "over_constant"]
    assert plans == [("dynamic", 0.0), ("dynamic", 0.125), ("keep_first_full", 0.0)]
    assert all(row["low"] <= row["value"] <= row["high"] for row in rows if row["metric"] == "over_constant")
    assert [row["value"] for row in rows if row["method"] == "chance"] == [0.25]


def test_statistics_of_another_text_are_one_clear_error(place):
    with pytest.raises(NotebookError, match="none of the 1 statistics is of redundancy_corpus='pydocs'"):
        run(place, "wrong.json", redundancy_corpus="pydocs")
    with pytest.raises(NotebookError, match=r"control_base = 0.2: one of slice_percentages = \[0.25\]"):
        run(place, "wrong.json", control_base=0.2)
    assert not (place / "wrong.json").exists()
