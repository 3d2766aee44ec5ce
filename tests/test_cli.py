"""The command line on a tiny model: what it writes, its exit status, and its one line of error."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from typer.testing import CliRunner
from word_model import write_project

from prunelib import models, text
from prunelib.apps import cli
from prunelib.criteria import CRITERIA, collect
from prunelib.evaluation.perplexity import PerplexityProtocol
from prunelib.models import export
from prunelib.models.plans import DropPlan

ROOT = Path(__file__).resolve().parents[1]
SHORT = ["--n-samples", "4", "--seq-len", "16"]


def invoke(*words):
    return CliRunner().invoke(cli.app, list(map(str, words)))


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return write_project(tmp_path_factory.mktemp("cli"), n_layers=5, words=[1 + index % 29 for index in range(800)], n_words=30)


@pytest.fixture(scope="module")
def pruned(place):
    done = invoke(
        "prune",
        place / "model",
        place / "pruned",
        "--layers",
        2,
        "--method",
        "simdiff_mssd",
        "--text",
        place / "text.txt",
        *SHORT,
    )
    assert done.exit_code == 0, done.output
    return place / "pruned", done


@pytest.fixture(scope="module")
def worth(place):
    """The importance of every layer, computed without the command."""
    corpus, tokenizer = text.load(place / "text.txt"), models.load_tokenizer(place / "model")
    windows = text.sample_windows(corpus, tokenizer, 4, 16, seed=0, progress=False)
    return CRITERIA["simdiff_mssd"](collect(models.load(place / "model"), windows, progress=False))


def test_score_gives_the_importance_of_every_layer(place, worth):
    done = invoke("score", place / "model", "--text", place / "text.txt", *SHORT, "--output", place / "scores.csv")
    assert done.exit_code == 0, done.output
    found = pd.read_csv(place / "scores.csv")
    np.testing.assert_allclose(found.set_index("layer").sort_index()["importance"], worth)
    assert found["importance"].is_monotonic_increasing, "the first to go on top"
    assert done.stdout.endswith(f"wrote {place / 'scores.csv'}\nmore: notebooks/09_explorer.ipynb\n")


def test_prune_saves_the_model_without_the_lowest_layers_and_what_others_read(place, pruned, worth):
    folder, done = pruned
    plan = DropPlan.read(folder / "plan.json")
    assert plan.removed == tuple(sorted(np.argsort(worth)[:2]))
    expected = models.remove_layers(models.load(place / "model"), plan.removed).state_dict()
    found = models.load(folder).state_dict()
    assert all(found[name].equal(tensor) for name, tensor in expected.items())
    assert export.removed_by((folder / "mergekit.yaml").read_text(), 5) == plan.removed
    assert f"--prune-layers {plan.removed[0]},{plan.removed[1]} in.gguf" in (folder / "llama-quantize.txt").read_text()
    for name in ("plan.json", "mergekit.yaml", "model.safetensors"):
        assert f"wrote {folder / name}" in done.stdout
    assert done.stdout.endswith("more: notebooks/own_model.ipynb\n")


def test_export_writes_them_again(place, pruned):
    folder, _ = pruned
    before = (folder / "mergekit.yaml").read_text()
    (folder / "mergekit.yaml").unlink()
    done = invoke("export", folder, place / "model")
    assert done.exit_code == 0, done.output
    assert (folder / "mergekit.yaml").read_text() == before
    for name in ("mergekit.yaml", "llama-quantize.txt"):
        assert f"wrote {folder / name}" in done.stdout


def test_evaluate_gives_the_perplexity_of_the_protocol(place):
    done = invoke(
        "evaluate", place / "model", "--text", place / "text.txt", "--seq-len", 32, "--windows", 4, "--output", place / "e.json"
    )
    assert done.exit_code == 0, done.output
    protocol = PerplexityProtocol(window=32, limit=4)
    cut = protocol.windows(text.load(place / "text.txt"), models.load_tokenizer(place / "model"), progress=False)
    rows = {row["metric"]: row["value"] for row in json.loads((place / "e.json").read_text())}
    assert rows["ppl"] == pytest.approx(protocol.measure(models.load(place / "model"), cut).ppl)


@pytest.mark.slow
def test_heal_saves_an_ordinary_checkpoint(place, pruned):
    folder, _ = pruned
    settings = ["--set", "steps=2", "batch=2", "seq_len=16", "warmup_steps=1"]
    done = invoke("heal", folder, place / "healed", "--corpus", place / "text.txt", "--quiet", *settings)
    assert done.exit_code == 0, done.output
    assert len(models.decoder_layers(models.load(place / "healed" / "healed"))) == 3
    assert f"wrote {place / 'healed' / 'healed'}" in done.stdout


def test_run_refuses_what_the_notebook_does_not_know(place):
    done = invoke("run", ROOT / "notebooks/own_model.ipynb", place / "run.json", "kep=0.5")
    assert done.exit_code == 2
    assert not (place / "run.json").exists()


def test_models_lists_what_can_be_named():
    done = invoke("models")
    assert done.exit_code == 0
    for name in ("smollm2-135m-instruct", "greedy_kl", "simdiff_masd", "leave_one_out_nll", "angular"):
        assert f"  {name}: " in done.stdout


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (
            ["score", "MODEL", "--criterion", "angular"],
            "'angular' is no criterion of single layers; there are: block_influence",
        ),
        (["score", "./nowhere", "--text", "TEXT"], "'./nowhere' does not exist"),
        (["prune", "MODEL", "PLACE", "--layers", "2", "--text", "TEXT"], "give an empty or a new folder"),
        (["prune", "MODEL", "PLACE/new", "--layers", "5", "--text", "TEXT", *SHORT], "5"),
        (["prune", "MODEL", "PLACE/new", "--layers", "1", "--text", "TEXT", *SHORT, "--gguf", "f16"], "this tokenizer"),
        (["prune", "MODEL", "PLACE/new", "--layers", "1", "--text", "nowhere.txt"], "'nowhere.txt' does not exist"),
        (["evaluate", "MODEL", "--text", "TEXT", "--dtype", "float31"], "float31"),
        (["export", "PLACE", "MODEL"], "plan.json"),
        (["heal", "--recipe", "lora", "MODEL", "PLACE/new"], "MODEL and OUT come first"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(place, words, says):
    names = {
        "MODEL": str(place / "model"),
        "TEXT": str(place / "text.txt"),
        "PLACE": str(place),
        "PLACE/new": str(place / "new"),
    }
    done = invoke(*(names.get(word, word) for word in words))
    assert done.exit_code == 2
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and says in errors[0], done.output
    assert done.stderr.splitlines()[-1] == errors[0]
    assert not (place / "new").exists()


def test_the_console_script_starts_fast_and_shows_examples():
    code = "import sys; from prunelib.apps.cli import app; print('torch' in sys.modules); app()"
    done = subprocess.run([sys.executable, "-c", code, "prune", "--help"], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("False\n") and "Example: prunelib prune" in done.stdout
