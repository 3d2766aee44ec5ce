"""The walk-through, on a small repository whose targets take no time."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[1] / "benchmarks" / "walkthrough.py"
MAKEFILE = """
.venv/installed:
	@mkdir -p .venv/bin && touch $@ && echo "found [$$VIRTUAL_ENV$$PYTHONPATH$$MAKEFLAGS]"
figures:
	@echo 2 >> data.csv; echo "on $(CORES) cores"
test:
	@echo "2 failed"; exit 1
"""


@pytest.mark.skipif(not (shutil.which("git") and shutil.which("make")), reason="needs git and make")
def test_every_step_is_timed_in_a_clone_and_a_failing_one_recorded(tmp_path):
    root = tmp_path / "toy"
    (root / "benchmarks").mkdir(parents=True)
    shutil.copy(SCRIPT, root / "benchmarks")
    (root / "Makefile").write_text(MAKEFILE)
    (root / "data.csv").write_text("1\n")
    clean = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    identity = ["-c", "user.name=a", "-c", "user.email=a@b.example", "-c", "commit.gpgsign=false"]
    for command in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "first"]):
        subprocess.run(["git", *identity, *command], cwd=root, env=clean, check=True)
    output = tmp_path / "out.json"
    command = [sys.executable, str(root / "benchmarks/walkthrough.py"), "--output", str(output), "--only"]
    environment = clean | {"VIRTUAL_ENV": "/somewhere", "PYTHONPATH": "/elsewhere"}
    assert subprocess.run([*command, "figures"], env=environment, timeout=60).returncode == 0
    assert subprocess.run([*command, "test"], env=environment, timeout=60).returncode == 1
    steps = {step["step"]: step for step in json.loads(output.read_text())["steps"]}
    assert list(steps) == ["installation", "figures", "test"], "figures is kept from the first call"
    assert steps["installation"]["last_line"] == "found []"
    assert steps["figures"]["last_line"] == "on 2 cores"
    assert steps["figures"]["changed"] == 2, "the table, and the environment that no .gitignore names"
    assert steps["test"]["exit_status"] == 2
    assert (root / "data.csv").read_text() == "1\n"
    assert str(tmp_path) not in output.read_text()
