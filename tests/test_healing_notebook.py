"""The healing notebook as a batch runs it, on a tiny model and a small text."""

import pytest
import torch
from transformers import AutoModelForCausalLM
from word_model import write_choices, write_project

from prunelib import models
from prunelib.evaluation.perplexity import PerplexityProtocol, perplexity
from prunelib.lab import runs as results
from prunelib.lab.run_notebook import NotebookError, run_notebook
from prunelib.text.corpora import load

NOTEBOOK = "notebooks/experiments/healing.ipynb"

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a 5-layer model, its tokenizer, a text, and a run file with a choice of two layers."""
    # Words in turn: something that a few steps of training can learn.
    in_turn = [1 + index % 29 for index in range(6000)]
    folder = write_project(tmp_path_factory.mktemp("healing"), n_layers=5, words=in_turn, n_words=30)
    write_choices(folder, {1: (2,), 2: (1, 2)})
    return folder


def _run(place, name, **changes):
    values = {"model": str(place / "model"), "choices": str(place / "choices.json"), "methods": ["dense", "angular"]}
    values |= {"recipes": ["lora"], "learning_rates": [0.02], "steps": 20, "warmup_steps": 1, "batch": 4, "seq_len": 16}
    values |= {"corpora": [f"{place / 'text.txt'}:train"], "measured_steps": [5], "repair_samples": 8, "sizes": [2]}
    values |= {"report_corpora": [str(place / "text.txt")], "report_windows": 4, "report_seq_len": 32}
    run_notebook(NOTEBOOK, place / f"{name}.json", **(values | changes))
    return results.read_run(place / f"{name}.json")


def _nats(run, **conditions):
    wanted = {"metric": "nll", **conditions}
    return {row["step"]: row["value"] for row in run["rows"] if wanted.items() <= row.items()}


def test_a_healing_is_measured_before_on_the_way_and_after(place):
    run = _run(place, "curve", healed_folder=str(place / "healed"))
    before = _nats(run, method="angular", recipe="none")
    after = _nats(run, method="angular", recipe="lora")
    assert set(before) == {0} and set(after) == {5, 20}
    assert after[20] < after[5] < before[0]
    assert set(_nats(run, method="dense", recipe="lora")) == {5, 20}  # the control
    assert {row["tokens"] for row in run["rows"] if row.get("step") == 20} == {20 * 4 * 16}
    assert not (place / "curve.work").exists()
    # What was saved is what was measured.
    (saved,) = [path for path in (place / "healed").iterdir() if path.name.startswith("001")]
    model = AutoModelForCausalLM.from_pretrained(saved, dtype=torch.float32)
    assert model.config.num_hidden_layers == 3
    protocol = PerplexityProtocol(window=32, dtype="float32", limit=4)
    ids = protocol.windows(load(place / "text.txt", "evaluation"), models.load_tokenizer(saved), progress=False)
    found = perplexity(model, ids, batch_size=4)
    assert found.nll == pytest.approx(after[20], abs=1e-5)


def test_repairs_slices_and_random_layers_are_starts_as_well(place):
    starts = {"methods": ["angular"], "repairs": ["none", "refit"], "slice_percentages": [0.25]}
    run = _run(place, "starts", recipes=["none", "lora"], steps=2, **starts)
    for start in ({"method": "angular", "repair": "none"}, {"method": "angular", "repair": "refit"}, {"method": "sliced"}):
        assert set(_nats(run, **start, recipe="none")) == {0}
        assert set(_nats(run, **start, recipe="lora")) == {2}
    drawn = _run(place, "random", methods=[], random_draws=[3], recipes=["none"])
    (row,) = [row for row in drawn["rows"] if row["metric"] == "nll" and row["method"] == "random 3"]
    assert len(row["removed_layers"].split()) == 2


def test_settings_that_change_nothing_are_not_trained_twice(place):
    run = _run(place, "plans", methods=["angular"], recipes=["full"], ranks=[1, 4], modules=["mlp", "attention"], steps=1)
    assert len(_nats(run, recipe="full")) == 1
    assert len(run["extra"]["recipes"]) == 1


def test_texts_are_continued_before_and_after(place):
    run = _run(place, "written", recipes=["none", "lora"], generated_prompts=6, generated_tokens=8, bos=False)
    found = {row["recipe"]: row["value"] for row in run["rows"] if (row["method"], row["metric"]) == ("angular", "agreement")}
    dense = {row["metric"]: row["value"] for row in run["rows"] if (row["method"], row["recipe"]) == ("dense", "none")}
    assert dense["agreement"] == 1.0
    assert set(found) == {"none", "lora"} and all(0 <= value <= 1 for value in found.values())
    written = {row["metric"] for row in run["rows"] if row["method"] == "angular" and row["recipe"] == "lora"}
    assert written >= {"distinct_1", "distinct_2", "distinct_4", "repeated_4", "dense_nll", "agreement"}


def test_a_cut_in_stages_and_rows_that_the_dense_model_writes(place):
    """Both on as many tokens as one healing of the text."""
    at_once = _run(place, "at_once", methods=["angular"])
    staged = _run(place, "staged", methods=["angular"], recipes=["lora", "cut_adjacent"], stages=2)
    own = _run(place, "own", methods=["angular"], self_generated=4)
    for run in (at_once, staged, own):
        (end,) = [row for row in run["rows"] if row["metric"] == "training_loss" and row["recipe"] == "lora"]
        assert (end["step"], end["tokens"]) == (20, 20 * 4 * 16)
        assert _nats(run, recipe="lora")[20] < _nats(run, recipe="none")[0] + 0.5
    ends = [_nats(run, recipe="lora")[20] for run in (at_once, staged, own)]
    assert len(set(ends)) == 3
    with pytest.raises(NotebookError, match=r"cuts=\[\(\), "):
        _run(place, "small", methods=["angular"], stages=4, sizes=[2])


def test_wrong_parameters_are_refused_before_work(place):
    with pytest.raises(NotebookError, match=r"repairs \['glue'\]: take some of none"):
        _run(place, "wrong", repairs=["glue"])
    with pytest.raises(NotebookError, match=r"stages = 2: only with methods of the run"):
        _run(place, "wrong", stages=2)
    with pytest.raises(NotebookError, match=r"self_generated = 4 with packed = False"):
        _run(place, "wrong", self_generated=4, packed=False)
