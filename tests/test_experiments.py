"""The experiment notebooks, run as a batch runs them, on a tiny model and a small text."""

import itertools
import math

import pytest
from safetensors.numpy import load_file
from word_model import drawn_words, write_project

from prunelib import models
from prunelib.criteria import ABLATIONS, LayerStats, difference_term, layer_difference, similarity_term
from prunelib.criteria.similarity import block_influence
from prunelib.depth import alpha_path
from prunelib.evaluation import perplexity, tasks
from prunelib.io import at_root
from prunelib.lab import runs as results
from prunelib.lab.parameters import ParameterError
from prunelib.lab.run_notebook import NotebookError, run_notebook
from prunelib.text import consecutive_windows, corpora

pytestmark = pytest.mark.slow  # each run starts a kernel

STATISTICS = "notebooks/experiments/statistics.ipynb"
SELECTION = "notebooks/experiments/selection.ipynb"
OPTIMUM = "notebooks/experiments/optimum.ipynb"
BLOCKS = "notebooks/experiments/blocks.ipynb"
TASKS = "notebooks/experiments/tasks.ipynb"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a 6-layer model, its tokenizer and a text."""
    return write_project(tmp_path_factory.mktemp("experiment"), n_layers=6, words=drawn_words(60))


@pytest.fixture(scope="module")
def statistics(place):
    """Two draws, the second of them by a model that is read layer by layer."""
    common = {"model": str(place / "model"), "corpus": str(place / "text.txt"), "n_samples": 8, "seq_len": 16}
    return [str(run_notebook(STATISTICS, place / f"s{seed}.json", seed=seed, stream=seed == 1, **common)) for seed in (0, 1)]


def reported(place, windows):
    """What is reported."""
    text = str(place / "text.txt")
    return {"report_corpus": text, "report_split": "train", "report_windows": windows, "report_seq_len": 16}


def test_statistics_writes_the_scores_of_its_own_sums(statistics):
    runs = [results.read_run(path) for path in statistics]
    for path, run in zip(statistics, runs, strict=True):
        stats = LayerStats.load(at_root(path).with_suffix(".safetensors"))
        for metric, expected in (("block_influence", block_influence(stats)), ("mssd", layer_difference(stats, "mssd"))):
            written = [row["value"] for row in run["rows"] if row["metric"] == metric and row["tokens"] == "all"]
            assert written == expected.tolist()
    assert len({run["provenance"]["data"]["windows"] for run in runs}) == 2


def test_every_choice_of_every_size_and_the_exact_alpha_is_never_worse(place, statistics):
    values = {"alpha_corpora": [str(place / "text.txt")], "alpha_splits": ["train"], "alpha_samples": 8, "alpha_seq_len": 16}
    values |= {"statistics": statistics, "sizes": [2, 3], "block_criteria": [], "random_seeds": [0, 1]}
    values |= {"model": str(place / "model")} | reported(place, 8)
    found = results.read_run(run_notebook(SELECTION, place / "simdiff.json", **values))["rows"]
    choices = [row for row in found if row["role"] == "choice" and row["layers_removed"]]
    assert {row["method"] for row in choices} == {
        "block_influence", "relative_magnitude", "deepest", "random", "random_protected", "simdiff_mssd", "simdiff_masd"
    }  # fmt: skip
    assert all(len(row["removed_layers"].split()) == row["layers_removed"] for row in choices)
    gaps = [row for row in choices if row["metric"] == "nll_over_cosine" and row["method"] == "block_influence"]
    assert len(gaps) == 4 and not any(row["value"] for row in gaps), "the cosine rule loses nothing over itself"
    pairs = 0
    for exact in choices:
        if exact.get("search") == "exact" and exact["metric"] == "nll":
            keys = ("method", "calibration_seed", "alpha_corpus", "metric", "layers_removed")
            ternary = next(r for r in choices if r.get("search") == "ternary" and all(r[k] == exact[k] for k in keys))
            assert exact["alpha_nll"] <= ternary["alpha_nll"]
            pairs += 1
    assert pairs == 8
    stats = LayerStats.load(at_root(statistics[0]).with_suffix(".safetensors"))
    sets = [i.removed for i in alpha_path(similarity_term(stats), difference_term(stats, "masd"), 2)]
    path = {"role": "path", "method": "simdiff_masd", "calibration_seed": 0, "layers_removed": 2, "metric": "nll"}
    rows = [row for row in found if path.items() <= row.items() and row.get("corpus")]
    assert [row["removed_layers"] for row in rows] == [" ".join(map(str, removed)) for removed in sets]


# ------------------------------------------------------------------------------------------- every way to choose the layers


@pytest.fixture(scope="module")
def truth(place):
    values = {"corpus": str(place / "text.txt"), "split": "train", "windows": 6, "seq_len": 16}
    sizes = {"exhaustive_sizes": [1, 2], "searched_sizes": [3], "beam_width": 2, "random_draws": 5}
    return run_notebook(OPTIMUM, place / "truth.json", model=str(place / "model"), **values, **sizes)


@pytest.fixture(scope="module")
def chosen(place):
    values = {"calibration_corpus": str(place / "text.txt"), "calibration_split": "train", "n_samples": 4, "seq_len": 32}
    values |= {"sizes": [1, 2, 3], "ablations": list(ABLATIONS), "random_seeds": [], "calibration_seeds": [0, 1]}
    searches = ["greedy", "greedy_kl", "beam", "surrogate_kl", "evolutionary", "blockpruner", "evolutionary_sublayers"]
    values |= {"model": str(place / "model"), "searches": searches, "evolved_sizes": [2]} | reported(place, 6)
    return run_notebook(SELECTION, place / "chosen.json", **values)


def losses(run, **coordinates):
    return {
        row["method"]: row["value"]
        for row in run["rows"]
        if row["metric"] == "nll" and row.get("calibration_seed", 0) == 0 and coordinates.items() <= row.items()
    }


def test_the_optimum_is_that_of_all_sets_one_by_one(place, truth):
    run, arrays = results.read_run(truth), load_file(at_root(truth).with_suffix(".safetensors"))
    dense = models.load(place / "model")
    windows = consecutive_windows(corpora.load(place / "text.txt"), models.load_tokenizer(place / "model"), 16, 6)
    alone = {
        removed: perplexity(models.remove_layers(dense, removed), windows).nll
        for removed in itertools.combinations(range(6), 2)
    }
    assert arrays["all_k2"] == pytest.approx(list(alone.values()), abs=1e-6)
    row = next(row for row in run["rows"] if row["layers_removed"] == 2)
    assert (row["role"], row["sets"]) == ("optimum", 15)
    assert tuple(map(int, row["removed_layers"].split())) == min(alone, key=alone.get)
    best_of_3 = next(row for row in run["rows"] if row["layers_removed"] == 3)
    assert best_of_3["role"] == "best_known"
    assert best_of_3["value"] <= arrays["random_k3"].min()


def test_no_choice_is_better_than_the_optimum_and_searches_see_no_more_than_the_calibration(chosen, truth):
    run, best = results.read_run(chosen), results.read_run(truth)
    for size in (1, 2):
        optimum = next(row["value"] for row in best["rows"] if row["layers_removed"] == size)
        found = losses(run, layers_removed=size, role="choice")
        whole = {method: nats for method, nats in found.items() if "sublayers" not in method and method != "blockpruner"}
        assert len(whole) > 10
        assert min(whole.values()) >= optimum - 1e-6
    assert losses(run, layers_removed=0)["dense"] == pytest.approx(
        next(row["value"] for row in best["rows"] if row["layers_removed"] == 0), abs=1e-6
    )
    text = run["parameters"]["calibration_corpus"]
    assert run["provenance"]["data"].keys() == {f"calibration {text} 0", f"calibration {text} 1", f"report {text}"}


def test_every_rule_has_importance_a_cost_and_a_choice_for_every_size(chosen):
    run = results.read_run(chosen)
    by_score = {row["method"] for row in run["rows"] if row["metric"] == "importance"}
    costs = {row["method"] for row in run["rows"] if row["metric"] == "forwards"}
    choices = {row["method"] for row in run["rows"] if row.get("role") == "choice"} - {"dense"}
    assert {"block_influence", "leave_one_out_kl", "taylor", "entropy_gain", "angular"} <= by_score
    # PPL+, Taylor+ and Mag+ keep the first four and the last two layers: of six layers nothing is left to choose.
    assert costs - choices == {"taylor", "magnitude", "leave_one_out_nll"}
    assert choices <= costs
    halves = [row for row in run["rows"] if row.get("method") == "evolutionary_sublayers" and row["metric"] == "nll"]
    assert [len(row["removed_sublayers"].split()) for row in halves] == [4, 4], "one for each draw"
    assert {word.split(".")[1] for word in halves[0]["removed_sublayers"].split()} == {"attn", "mlp"}


def test_blocks_are_contiguous_and_every_block_is_one_of_the_exhaustive_sets(place, statistics, truth):
    values = {"model": str(place / "model"), "calibration": str(place / "text.txt"), "step": 1, "every_block": True}
    run = results.read_run(run_notebook(BLOCKS, place / "blocks.json", statistics=statistics, **values, **reported(place, 6)))
    for row in run["rows"]:
        if row.get("role") == "choice" and row["method"] != "dense":
            removed = [int(layer) for layer in row["removed_layers"].split()]
            assert removed == list(range(removed[0], removed[0] + row["size"]))
            assert 5 not in removed, "the last layer stays"
            assert row["fraction"] == row["size"] / 6
    single = [row["value"] for row in run["rows"] if row.get("role") == "every_block" and row["size"] == 1]
    assert single == pytest.approx(load_file(at_root(truth).with_suffix(".safetensors"))["all_k1"].tolist(), abs=1e-6)
    assert sum(row.get("role") == "every_block" for row in run["rows"]) == sum(range(2, 7))
    normalized = next(row for row in run["rows"] if row["metric"] == "normalized_loss")
    nats = next(row for row in run["rows"] if row["metric"] == "nll" and row.get("role") == "choice")
    assert normalized["value"] == pytest.approx(nats["value"] / math.log(60))


def test_tasks_are_those_of_the_pruned_model_alone(place):
    model, choices = "data/reference/ref-neox-24l", "data/optimum/selection/ref-neox-24l__s0__searches.json"
    values = {"model": model, "choices": choices, "methods": ["block_influence", "greedy"], "sizes": [8], "limit": 10}
    values |= {"tasks": ["pydocs_summary"]}
    first = results.read_run(run_notebook(TASKS, place / "tasks.json", **values))["rows"]
    assert first == results.read_run(run_notebook(TASKS, place / "tasks_alone.json", together=False, **values))["rows"]
    row = next(row for row in first if row["method"] == "greedy" and row["metric"] == "acc")
    dense, tokenizer = models.load(at_root(model)), models.load_tokenizer(at_root(model))
    pruned = models.remove_layers(dense, [int(layer) for layer in row["removed_layers"].split()])
    found = tasks.evaluate_tasks(pruned, tokenizer, "pydocs_summary", bos=True, limit=10, progress=False)
    assert (row["value"], row["n"]) == (found["pydocs_summary"].value(), 10)
    assert {row["metric"] for row in first if row["method"] == "greedy"} >= {"average", "over_dense", "over_cosine"}


@pytest.mark.parametrize(
    ("notebook", "changes", "message"),
    [
        (SELECTION, {"sizes": [1], "searches": ["gredy"]}, "unknown gredy; there are: greedy"),
        (SELECTION, {"sizes": [6]}, "the model has 6 layers, and at least one must stay"),
        (BLOCKS, {"step": 6}, "step = 6: between 1 and 5"),
    ],
)
def test_a_wrong_request_is_one_clear_error_before_work(place, notebook, changes, message):
    with pytest.raises((NotebookError, ParameterError), match=message):
        run_notebook(notebook, place / "refused.json", model=str(place / "model"), **changes, **reported(place, 6))
    assert not (place / "refused.json").exists()
