"""Healing in processes of their own: killed without warning, and shared by two."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from architectures import build
from pretrain_reference import train_tokenizer
from transformers import AutoTokenizer

from prunelib import models
from prunelib.healing import RECIPES, heal
from prunelib.healing.__main__ import main
from prunelib.text import corpora
from prunelib.text.sequences import document_rows

ROOT = Path(__file__).resolve().parents[1]
SETTINGS = {"batch": 4, "seq_len": 16, "steps": 8, "warmup_steps": 1, "dropout": 0.0}


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A pruned model with its tokenizer, and a text."""
    folder = tmp_path_factory.mktemp("project")
    text = folder / "text.txt"
    sentences = [f"Returns the {i}-th eigenvalue of {'a symmetric ' * (i % 4)}matrix." for i in range(40)]
    text.write_text("\n<|endoftext|>\n".join(sentences))
    train_tokenizer([text], folder / "tokenizer")
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    pruned = models.keep_layers(build("gpt_neox", vocab_size=len(tokenizer)), [0, 1, 4, 5])
    models.save(pruned, tokenizer, folder / "pruned")
    return folder


def environment():
    return os.environ | {
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "tests", ROOT / "scripts"))),
    }


def arguments(project, out):
    settings = [f"{name}={value}" for name, value in SETTINGS.items()]
    text, pruned = str(project / "text.txt"), str(project / "pruned")
    return [pruned, str(out), "--corpus", text, "--rows", "documents", "--quiet", "--set", *settings]


def rows_of(project, recipe):
    tokenizer = models.load_tokenizer(project / "pruned")
    corpus = corpora.load(project / "text.txt")
    return document_rows(corpus, tokenizer, recipe.rows, recipe.seq_len, 0, progress=False)


@pytest.mark.slow
def test_two_processes_train_as_one_does_and_the_command_saves_an_ordinary_model(project, tmp_path, capsys):
    # What `accelerate launch` runs too; it starts several processes on GPUs alone.
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "prunelib.healing"]
    quiet = {"env": environment(), "cwd": ROOT, "capture_output": True, "text": True, "timeout": 300}
    two = subprocess.run([*launch, *arguments(project, tmp_path / "two")], **quiet)
    assert two.returncode == 0, two.stderr[-3000:]
    assert main(arguments(project, tmp_path / "one")) == 0
    found = {name: json.loads((tmp_path / name / "healing.json").read_text()) for name in ("one", "two")}
    requests = {name: json.loads((tmp_path / name / "training" / "request.json").read_text()) for name in found}
    assert [requests[name]["world_size"] for name in ("one", "two")] == [1, 2]
    losses = {name: [entry["loss"] for entry in result["log"]] for name, result in found.items()}
    assert len(losses["one"]) == SETTINGS["steps"]
    np.testing.assert_allclose(losses["two"], losses["one"], rtol=1e-5)
    assert found["one"]["tokens"] == found["two"]["tokens"] == 8 * 4 * 16
    assert found["one"]["real_tokens"] == found["two"]["real_tokens"] < 8 * 4 * 16
    one, two = (models.load(tmp_path / name / "healed").state_dict() for name in ("one", "two"))
    for name, weight in one.items():
        torch.testing.assert_close(two[name], weight, rtol=1e-3, atol=1e-5)
    assert models.load_tokenizer(tmp_path / "two" / "healed")("eigenvalue")["input_ids"]

    assert main([*arguments(project, tmp_path / "one"), "steps=7"]) == 1
    assert "holds another training: recipe.steps is 7, was 8" in capsys.readouterr().err


KILLED = """
import os, signal, sys
from pathlib import Path
import test_healing_processes as test

def measure(model):
    os.kill(os.getpid(), signal.SIGKILL)

test.train(Path(sys.argv[1]), sys.argv[2], measure)
"""


def train(project, folder, measure):
    pruned = models.load(project / "pruned")
    recipe = replace(RECIPES["lora"], **SETTINGS | {"dropout": 0.2})
    options = {"measure": measure, "measure_at": [6], "save_every": 2, "progress": False}
    return heal(pruned, rows_of(project, recipe), recipe, folder, **options)


@pytest.mark.slow
def test_a_training_killed_without_warning_loses_and_repeats_no_step(project, tmp_path):
    command = [sys.executable, "-c", KILLED, str(project), str(tmp_path / "killed")]
    killed = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=300)
    assert killed.returncode == -9, killed.stderr[-3000:]
    assert [path.name for path in (tmp_path / "killed").glob("checkpoint-*")] == ["checkpoint-4"]
    whole, resumed = (train(project, tmp_path / name, lambda model: {"one": 1.0}) for name in ("whole", "killed"))
    assert [entry["step"] for entry in resumed.log] == [1, 2, 3, 4, 5, 6, 6, 7, 8]
    assert resumed.losses == whole.losses
    for name, weight in whole.model.state_dict().items():
        assert torch.equal(weight, resumed.model.state_dict()[name]), name


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--recipe", "qlora"], "unknown recipe 'qlora'; there are"),
        (["--set", "stepz=4"], "--set stepz=4: give NAME=VALUE"),
        (["--corpus", "nowhere.txt"], "'nowhere.txt' does not exist"),
    ],
)
def test_the_command_says_in_one_line_what_is_wrong(more, message, project, tmp_path, capsys):
    assert main([str(project / "pruned"), str(tmp_path / "out"), *more]) == 1
    error = capsys.readouterr().err
    assert message in error
    assert len(error.splitlines()) == 1 and not (tmp_path / "out").exists()
