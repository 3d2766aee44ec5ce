"""Provenance: what a record says, and that a file is there complete or not at all."""

import hashlib
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open

from prunelib import io
from prunelib.lab import provenance
from prunelib.models.gguf import PACKAGED


def test_paths_at_root_and_back(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    root = io.project_root()
    assert (root / "pyproject.toml").is_file()
    assert io.at_root("data/runs/a.json") == root / "data/runs/a.json"
    assert io.at_root(tmp_path / "a.json") == tmp_path / "a.json"
    assert io.from_root(root / "data" / "runs" / "a.json") == "data/runs/a.json"
    assert io.from_root("a.json") == str(tmp_path / "a.json"), "a relative path is relative to the working folder"


def test_write_json_is_plain_data_and_readable_by_others(tmp_path):
    path = tmp_path / "new" / "a.json"
    io.write_json(path, {"α": np.float64(0.5), "counts": np.arange(3), "where": Path("x/y")})
    assert json.loads(path.read_text()) == {"α": 0.5, "counts": [0, 1, 2], "where": "x/y"}
    mask = os.umask(0)
    os.umask(mask)
    assert path.stat().st_mode & 0o777 == 0o666 & ~mask
    assert [child.name for child in path.parent.iterdir()] == ["a.json"]


@pytest.mark.parametrize("bad", [{"value": float("nan")}, {"value": np.float64("inf")}, {"value": object()}])
def test_a_refused_write_keeps_the_older_file(tmp_path, bad):
    path = io.write_json(tmp_path / "a.json", {"value": 1})
    with pytest.raises((ValueError, TypeError)):
        io.write_json(path, bad)
    assert json.loads(path.read_text()) == {"value": 1}
    assert [child.name for child in tmp_path.iterdir()] == ["a.json"]


def test_file_and_source_hashes(tmp_path):
    (tmp_path / "a.py").write_bytes(b"x = 1\n")
    assert io.file_sha256(tmp_path / "a.py") == hashlib.sha256(b"x = 1\n").hexdigest()
    first = provenance.source_sha256(tmp_path)
    (tmp_path / "notes.txt").write_text("not code")
    assert provenance.source_sha256(tmp_path) == first
    (tmp_path / "a.py").write_bytes(b"x = 1\r\n")
    assert provenance.source_sha256(tmp_path) == first, "a checkout with other line endings is the same code"
    (tmp_path / "a.py").rename(tmp_path / "b.py")
    assert provenance.source_sha256(tmp_path) != first


def test_titles_of_models_say_their_size():
    assert set(PACKAGED) < set(provenance.TITLES)
    for name in set(provenance.TITLES) - set(PACKAGED):
        folder = io.at_root("data/reference") / name
        layers = json.loads((folder / "config.json").read_text())["num_hidden_layers"]
        with safe_open(folder / "model.safetensors", "np") as file:
            sizes = sum(math.prod(file.get_slice(key).get_shape()) for key in file.keys())  # noqa: SIM118
        assert f"({layers} layers, {sizes / 1e6:.1f}M, " in provenance.model_title(f"data/reference/{name}")
    assert provenance.model_title("owner/other-7b") == "other-7b"
    assert provenance.model_description("gemma-3-270m")["title"].startswith("Gemma-3-270m (18 layers, 268M, 4-bit weights ")


def test_notebook_hash_sees_code_only(tmp_path):
    def sha(source, outputs=(), tags=(), *more):
        cell = {"cell_type": "code", "source": source, "outputs": list(outputs), "metadata": {"tags": list(tags)}}
        (tmp_path / "a.ipynb").write_text(json.dumps({"cells": [cell, *more], "metadata": {}}))
        return provenance.notebook_source_sha(tmp_path / "a.ipynb")

    markdown = {"cell_type": "markdown", "source": "# text", "metadata": {}}
    injected = {"cell_type": "code", "source": "a = 5", "metadata": {"tags": ["injected-parameters"]}}
    first = sha("a = 1\nb = 2")
    assert sha(["a = 1\n", "b = 2"], [{"output_type": "stream"}]) == sha("a = 1\nb = 2", (), (), markdown, injected) == first
    assert len({first, sha("a = 1\nb = 3"), sha("a = 1\nb = 2", (), ["parameters"])}) == 3


def test_record_names_code_libraries_and_machine():
    record = provenance.record(data={"pydocs": "ab" * 32}, model={"name": "m"})
    assert record["source_sha256"] == provenance.source_sha256()
    assert record["libraries"]["numpy"] == np.__version__
    assert record["python"] == ".".join(map(str, sys.version_info[:3]))
    assert record["device"] == "cpu"
    assert record == provenance.record(data={"pydocs": "ab" * 32}, model={"name": "m"}), "no clock in it"
    assert 10 * 2**20 < provenance.peak_bytes() < 2**40
    assert str(io.project_root()) not in json.dumps(record)


def test_git_commit_and_dirty_flag(tmp_path, monkeypatch):
    def git(*arguments):
        identity = ["-c", "user.name=t", "-c", "user.email=t@example.org", "-c", "commit.gpgsign=false"]
        command = ["git", *identity, *arguments]
        return subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True).stdout.strip()

    monkeypatch.setattr(provenance, "project_root", lambda: tmp_path.resolve())
    for name in [name for name in os.environ if name.startswith("GIT_")]:
        monkeypatch.delenv(name)
    assert provenance.record()["git"] is None, "an unpacked archive has no commit, its source hash remains"
    (tmp_path / "prunelib").mkdir()
    (tmp_path / "prunelib" / "a.py").write_text("x = 1\n")
    git("init", "-q")
    git("add", ".")
    git("commit", "-q", "-m", "first")
    commit = git("rev-parse", "HEAD")
    (tmp_path / "results.csv").write_text("made by the batch")
    assert provenance.record()["git"] == {"commit": commit, "dirty": False}
    (tmp_path / "prunelib" / "new.py").write_text("x = 1\n")
    assert provenance.record()["git"] == {"commit": commit, "dirty": True}
    monkeypatch.setattr(provenance, "project_root", lambda: (tmp_path / "prunelib").resolve())
    assert provenance.record()["git"] is None, "the commit of a repository around an unpacked archive is not ours"
