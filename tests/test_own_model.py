"""A model of your own: how many layers, which ones, what it costs; the notebook on a tiny model; refusals before a push."""

import math
from dataclasses import replace

import huggingface_hub
import pytest
import torch
from transformers import AutoModelForCausalLM
from word_model import write_project

from prunelib import io, models, text
from prunelib.apps import model_card, own_model, publishing
from prunelib.criteria import ABLATIONS, CRITERIA, collect
from prunelib.depth import lowest
from prunelib.evaluation.intervals import paired_bootstrap
from prunelib.evaluation.perplexity import PerplexityProtocol, perplexity
from prunelib.healing import RECIPES
from prunelib.lab.run_notebook import NotebookError, run_notebook
from prunelib.lab.runs import read_run
from prunelib.models import export

NOTEBOOK = "notebooks/own_model.ipynb"


def test_a_fraction_of_the_layers_is_kept_and_one_of_the_parameters_not_exceeded(tiny_llama):
    sizes = {0.75: 1, 0.5: 3, 2 / 3: 2, 0.17: 4, 5 / 6: 1}
    assert {keep: own_model.layers_to_remove(tiny_llama, keep) for keep in sizes} == sizes
    for keep in (0.9, 0.75, 0.5):
        count = own_model.layers_to_remove(tiny_llama, keep, "parameters")
        stays = {n: 1 - models.parameter_fraction(tiny_llama, range(n)) for n in (count - 1, count)}
        assert stays[count] <= keep < stays[count - 1]


@pytest.mark.parametrize(
    ("keep", "of", "message"),
    [
        (0.9, "layers", "removes 0 of them: give a fraction from 0.167 to 0.833"),
        (0.05, "parameters", "give a fraction from"),
        (0.5, "weights", "keep_of='weights': a fraction of the layers or of the parameters"),
    ],
)
def test_impossible_fractions_name_the_possible_ones(tiny_llama, keep, of, message):
    with pytest.raises(ValueError, match=message):
        own_model.layers_to_remove(tiny_llama, keep, of)


@pytest.fixture
def windows():
    return torch.randint(0, 97, (4, 40), generator=torch.Generator().manual_seed(5))


def test_every_method_chooses_as_it_does_elsewhere(tiny_llama, windows):
    stats = collect(tiny_llama, windows, progress=False)
    for name, rule in CRITERIA.items():
        expected = lowest(rule(stats), 2, rule.protect_first, rule.protect_last)
        assert own_model.choose(name, tiny_llama, windows, 2) == expected
    rule = ABLATIONS["leave_one_out_kl"]
    expected = lowest(rule(tiny_llama, windows), 2, rule.protect_first, rule.protect_last)
    assert own_model.choose("leave_one_out_kl", tiny_llama, windows, 2) == expected
    block = own_model.choose("angular", tiny_llama, windows, 3)
    assert block == tuple(range(block[0], block[0] + 3))
    without = {layer: perplexity(models.remove_layers(tiny_llama, [layer]), windows).nll for layer in range(1, 5)}
    assert own_model.choose("greedy", tiny_llama, windows, 1) == (min(without, key=without.get),), "SLEB keeps both ends"
    with pytest.raises(ValueError, match="unknown method 'gredy'; there are: greedy, greedy_kl, block_influence"):
        own_model.choose("gredy", tiny_llama, windows, 1)


def test_rows_hold_every_state_and_paired_intervals(tiny_llama, windows):
    removed = {"dense": [], "pruned": [2, 3], "healed": [3]}
    states = {name: {"a": perplexity(models.remove_layers(tiny_llama, gone), windows)} for name, gone in removed.items()}
    rows = {(row["state"], row["metric"]): row for row in own_model.loss_rows(states, seed=3)}
    for state, texts in states.items():
        assert rows[state, "nll"]["value"] == texts["a"].nll
        assert rows[state, "ppl"]["value"] == pytest.approx(math.exp(texts["a"].nll))
    for state, other in (("pruned", "dense"), ("healed", "dense"), ("healed", "pruned")):
        a, b = states[state]["a"], states[other]["a"]
        gap = paired_bootstrap(a.window_nll, b.window_nll, 3, sizes=a.window_tokens)
        row = rows[state, f"nats_over_{other}"]
        assert (row["value"], row["low"], row["high"], row["level"]) == (gap.value, gap.low, gap.high, 0.95)
    assert len(rows) == 3 * 3 + 3


def test_a_reported_text_that_was_seen_and_a_folder_in_use_are_refused(tmp_path):
    for name, words in {"a": "one two three", "b": "one two three", "c": "something else"}.items():
        (tmp_path / f"{name}.txt").write_text(words)
    a, b, c = (str(tmp_path / f"{name}.txt") for name in "abc")
    report, used = own_model.read_texts([a], {"healing": c})
    assert (list(report), list(used)) == (["a.txt"], ["healing"])
    with pytest.raises(ValueError, match=r"100% of the reported text a\.txt are documents of the text of healing"):
        own_model.read_texts([a], {"calibration": c, "healing": b})
    own_model.check_folder(tmp_path / "new")
    with pytest.raises(ValueError, match="holds something other than a pruned model"):
        own_model.check_folder(tmp_path)
    (tmp_path / "plan.json").write_text("{}")
    own_model.check_folder(tmp_path)


def test_a_saved_model_that_differs_is_refused_and_a_budget_keeps_what_is_not_given(tiny_llama, windows, tmp_path):
    models.save(tiny_llama, None, tmp_path / "saved")
    measured = lambda model: {"text": perplexity(model, windows)}  # noqa: E731
    again, difference = own_model.reload(tmp_path / "saved", measured(tiny_llama), measured, dtype="float32", device="cpu")
    assert difference < 1e-6
    assert again.config.num_hidden_layers == tiny_llama.config.num_hidden_layers
    found = measured(tiny_llama)["text"]
    other = {"text": replace(found, nll_sum=found.nll_sum + found.tokens)}
    with pytest.raises(RuntimeError, match="nats from the one in memory; do not use"):
        own_model.reload(tmp_path / "saved", other, measured, dtype="float32", device="cpu")
    plan = own_model.planned("lora", steps=7, batch=None)
    assert (plan.steps, plan.batch) == (7, RECIPES["lora"].batch)
    assert own_model.planned("none", steps=7) is None
    with pytest.raises(ValueError, match="no repair 'glue'; there are: none, "):
        own_model.check("greedy", "glue", tmp_path / "new")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a 5-layer model that has a card, its tokenizer, and texts for choosing, training and reporting."""
    in_turn = [1 + index % 29 for index in range(6000)]  # something that a few steps of training can learn
    folder = write_project(tmp_path_factory.mktemp("own"), n_layers=5, words=in_turn, n_words=30)
    words = (folder / "text.txt").read_text().split()
    for name, part in (("calibration", words[:1500]), ("healing", words[1500:4500]), ("report", words[4501:])):
        (folder / f"{name}.txt").write_text(" ".join(part))
    (folder / "model" / "README.md").write_text("---\nlicense: apache-2.0\n---\n# a base\n")
    return folder


def settings(place, **changes):
    return {
        "model": str(place / "model"),
        "keep": 0.6,
        "calibration": str(place / "calibration.txt"),
        "n_samples": 4,
        "seq_len": 16,
        "healing_text": str(place / "healing.txt"),
        "steps": 20,
        "warmup_steps": 1,
        "batch": 4,
        "healing_seq_len": 16,
        "learning_rate": 0.02,
        "report_texts": [str(place / "report.txt")],
        "report_windows": 6,
        "report_seq_len": 32,
        "prompt": "w1 w2 w3",
        "folder": str(place / "pruned"),
    } | changes


@pytest.fixture(scope="module")
def run(place):
    pytest.importorskip("lm_eval")
    asked = {"tasks": ["pydocs_parameter"], "tasks_limit": 5}
    output = run_notebook(NOTEBOOK, place / "run.json", **settings(place, repair="refit_scale", **asked))
    return read_run(output)


@pytest.mark.slow
def test_the_saved_model_loses_what_the_run_and_its_card_say(place, run):
    model, info = AutoModelForCausalLM.from_pretrained(
        place / "pruned", dtype=torch.float32, local_files_only=True, output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert model.config.num_hidden_layers == 3
    tokenizer = models.load_tokenizer(place / "pruned")
    report = text.load(str(place / "report.txt"))
    windows = PerplexityProtocol(window=32, limit=6).windows(report, tokenizer, progress=False)
    value = {(row["state"], row["metric"]): row["value"] for row in run["rows"]}
    assert value["healed", "nll"] == pytest.approx(perplexity(model.eval(), windows).nll, abs=1e-5)
    dense = models.load(place / "model")
    assert value["dense", "nll"] == pytest.approx(perplexity(dense, windows).nll, abs=1e-6)
    removed = run["extra"]["card"]["removed"]
    pruned = models.remove_layers(dense, removed)
    assert value["pruned", "nll"] == pytest.approx(perplexity(pruned, windows).nll, abs=1e-6)
    assert value["healed", "removed"] == models.removed_fraction(dense, pruned)
    assert value["healed", "nll"] < value["repaired", "nll"], "words in turn are learnt in a few steps"
    assert len(removed) == 2
    assert export.removed_by((place / "pruned" / "mergekit.yaml").read_text(), 5) == tuple(removed)
    assert not list(place.glob("run.work")), "checkpoints go when the run is complete"
    card = (place / "pruned" / "README.md").read_text()
    assert card == model_card.card(run)
    assert huggingface_hub.ModelCard(card).data.license == "apache-2.0"
    assert str(place) not in card, "no path of a machine"
    found = {(row["state"], row["metric"]): row for row in run["rows"] if row.get("task") == "pydocs_parameter"}
    answers, others, gap = (found[key] for key in (("dense", "acc"), ("healed", "acc"), ("healed", "acc_over_dense")))
    assert gap["value"] == pytest.approx(others["value"] - answers["value"])
    assert answers["n"] == 5
    assert f"| pydocs_parameter | acc | {answers['value']:.3f} ± " in card


@pytest.mark.slow
def test_what_cannot_be_published_is_refused_before_any_work(place):
    values = settings(place, folder=str(place / "refused"), push_to="someone/something")
    with pytest.raises(NotebookError, match="push_to='someone/something', but HF_HUB_OFFLINE is set: unset it"):
        run_notebook(NOTEBOOK, place / "refused.json", **values)
    assert not (place / "refused").exists()
    assert not (place / "refused.json").exists()


class Hub:
    """Stands for the hub's client."""

    def __init__(self, exists=False, fails=None):
        self.exists, self.fails = exists, fails

    def whoami(self):
        return {"name": "somebody"}

    def repo_exists(self, repository):
        return self.exists

    def create_repo(self, repository, *, private):
        assert private

    def upload_folder(self, **settings):
        if self.fails:
            raise self.fails
        return f"https://hub/{settings['repo_id']}/commit/1"


def test_a_push_that_would_fail_in_the_end_is_refused(monkeypatch):
    def refused(message, repository="some/model"):
        with pytest.raises(publishing.PublishError, match=message):
            publishing.check(repository)

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "a stand-in")
    monkeypatch.setattr(io, "hub_unreachable", lambda: None)
    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    assert publishing.check("some/model") == "somebody"
    for name in ("model", "a/b/c", "../x", "a b/c"):
        refused("is no repository of the hub", name)
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: Hub(exists=True))
    refused("exists on the hub: nothing there is replaced")
    monkeypatch.setattr(io, "hub_unreachable", lambda: "ConnectError: no route")
    refused(r"cannot be reached \(ConnectError: no route\): connect, or leave push_to")
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    refused("there is no token of the hub: run `hf auth login`")


def test_a_failed_upload_loses_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    (tmp_path / "README.md").write_text("# card")
    assert publishing.push_to_hub(tmp_path, "some/model") == "https://hub/some/model/commit/1"
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: Hub(fails=OSError("gone")))
    with pytest.raises(publishing.PublishError, match=r"failed \(OSError: gone\).*hf upload some/model"):
        publishing.push_to_hub(tmp_path, "some/model")
    assert (tmp_path / "README.md").is_file()
