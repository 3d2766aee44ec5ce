"""The walk-through's bookkeeping, on a small repository whose targets take no time: what is timed, kept, refused, told."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[1] / "benchmarks" / "walkthrough.py"
pytestmark = pytest.mark.skipif(not (shutil.which("git") and shutil.which("make")), reason="needs git and make")

STEPS = ("installation", "figures", "figures_again", "verify", "report", "report_pdf", "quickstart", "test")

# The environment is a shell script that stands for Python; `figures` works once, as Snakemake does.
MAKEFILE = """
CORES ?= 1
.venv/installed:
	@mkdir -p .venv/bin data/runs
	@printf '#!/bin/sh\\necho "$$@" > build.txt; echo ran "$$2"\\n' > .venv/bin/python && chmod +x .venv/bin/python
	@echo "path $$PATH"; echo "found [$$VIRTUAL_ENV$$PYTHONPATH$$MAKEFLAGS$$PRUNELIB_SLURM_TEST] cache $$XDG_CACHE_HOME"
	@test ! -e "$$(dirname "$$PYTHON")/../pyvenv.cfg" && "$$PYTHON" -c "print('python works')"
	@touch $@
figures: data/runs/one
	@echo "Nothing to be done on $(CORES) cores"
data/runs/one:
	@i=0; while [ $$i -lt 200000 ]; do i=$$((i+1)); done
	@mkdir -p data/runs && for file in data/table.csv figures/own.csv figures/own.png new.txt; do echo 2 >> $$file; done
	@touch $@
verify:
	@echo "verify: all 7 numbers agree"
report:
	@echo "$(CURDIR)/build/report.html: 6.1 MiB"
	@test -n "$(ARGS)" || echo "no PDF: no browser"
test:
	@echo "2 failed, 5 passed in 0.1s"; echo "see $(CURDIR)/tests/test_a.py and /opt/some/place/b.py"; exit 1
"""


def git(folder: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=a", "-c", "user.email=a@b.example", "-c", "commit.gpgsign=false"]
    clean = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    return subprocess.run(
        ["git", *identity, "-C", str(folder), *arguments], env=clean, capture_output=True, text=True, check=True
    ).stdout


@pytest.fixture
def toy(tmp_path) -> Path:
    """A git repository with the targets of the real one, and the script."""
    root = tmp_path / "toy"
    for name in ("benchmarks", "data", "figures"):
        (root / name).mkdir(parents=True)
    shutil.copy(SCRIPT, root / "benchmarks")
    (root / "Makefile").write_text(MAKEFILE)
    (root / ".gitignore").write_text(".venv/\ndata/runs/\ndata/benchmarks/\nbuild.txt\n")
    for name in ("data/table.csv", "data/other.csv", "figures/own.csv", "figures/own.png"):
        (root / name).write_text("1\n")
    git(root, "init", "--quiet")
    git(root, "add", "--all")
    git(root, "commit", "--quiet", "-m", "all")
    return root


def change(toy: Path, old: str, new: str) -> None:
    text = (toy / "Makefile").read_text()
    assert old in text
    (toy / "Makefile").write_text(text.replace(old, new))
    git(toy, "commit", "--quiet", "--all", "-m", "another")


# -I and -S: nothing but the standard library is there. Free disk is said to be `free` bytes: a test needs no 10 GB.
START = """
import runpy, shutil, sys, types
free, *sys.argv = sys.argv[1:]
shutil.disk_usage = lambda path: types.SimpleNamespace(free=float(free))
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def command(toy: Path, *arguments: object, free: float = 1e12) -> list[str]:
    return [sys.executable, "-I", "-S", "-c", START, str(free), str(toy / "benchmarks/walkthrough.py"), *map(str, arguments)]


def walk(toy: Path, *arguments: object, free: float = 1e12, **variables: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        command(toy, *arguments, free=free), env=os.environ | variables, capture_output=True, text=True, timeout=60, cwd=toy
    )


def steps(file: Path) -> dict[str, dict]:
    return {one["step"]: one for one in json.loads(file.read_text())["steps"]}


def test_every_step_is_timed_and_a_failing_one_recorded(toy, tmp_path):
    folder, out = tmp_path / "walk", tmp_path / "out" / "times.json"
    (toy / "data/other.csv").write_text("not committed\n")
    environment = tmp_path / "environment"
    (environment / "bin").mkdir(parents=True)
    (environment / "pyvenv.cfg").touch()
    other = tmp_path / "other"  # on the path, though not activated
    (other / "bin").mkdir(parents=True)
    (other / "pyvenv.cfg").touch()
    path = os.pathsep.join([str(environment / "bin"), str(other / "bin"), os.environ["PATH"]])
    variables = {"PATH": path, "VIRTUAL_ENV": str(environment), "PYTHONPATH": "/nowhere", "MAKEFLAGS": "-n"}
    done = walk(toy, "--folder", folder, "--output", out, "--cores", 3, CORES="9", PRUNELIB_SLURM_TEST="1", **variables)
    assert done.returncode == 1, "a step failed"
    assert "not in it: 1 files of" in done.stdout

    found = steps(out)
    assert tuple(found) == STEPS
    assert {name: one.get("exit_status") for name, one in found.items()} == dict.fromkeys(STEPS, 0) | {
        "report_pdf": None,
        "test": 2,
    }
    assert found["report_pdf"] == {"step": "report_pdf", "command": "make report", "left_out": "no PDF: no browser"}
    assert found["installation"]["command"] == "make .venv/installed"
    assert found["figures"]["command"] == "make figures CORES=3"
    timed = [one for one in found.values() if "left_out" not in one]
    assert all(min(one["seconds"], one["peak_mib"]) > 0 <= min(one["cpu_seconds"], one["load_before"]) for one in timed)
    # A loop in a shell below make: its CPU time is counted.
    assert found["figures"]["cpu_seconds"] > found["figures_again"]["cpu_seconds"]
    assert found["figures_again"]["last_line"] == "Nothing to be done on 3 cores"
    assert found["verify"]["last_line"] == "verify: all 7 numbers agree"
    assert found["quickstart"]["last_line"] == "ran prunelib.lab.run_notebook"
    assert found["report"]["last_line"] == "build/report.html: 6.1 MiB"
    assert found["test"]["last_line"] == "see tests/test_a.py and …/b.py"
    assert found["test"]["last_lines"][0] == "2 failed, 5 passed in 0.1s"
    assert found["figures"]["changed"] == {
        "files": 3,
        "kinds": {".csv": 2, ".png": 1},
        "tables": ["data/table.csv", "figures/own.csv"],
        "new_files": 1,
    }

    whole = json.loads(out.read_text())
    assert set(whole) == {"machine", "provenance", "steps"}
    head = git(toy, "rev-parse", "HEAD").strip()
    assert whole["provenance"] == {"git": {"commit": head, "dirty": False}, "uncommitted_files_left_out": 1}
    assert whole["machine"]["cores"] == 3
    assert whole["machine"]["cores_available"] >= 1 and whole["machine"]["memory_gib"] > 0
    assert whole["machine"]["python"].split(".")[0] == "3"
    for place in (str(tmp_path), str(toy), str(Path.home())):
        assert not re.search(rf"{re.escape(place)}(/|\b)", out.read_text()) or place == "/"
    assert (folder / "walkthrough.json").read_text() == out.read_text()
    assert sorted(path.name for path in out.parent.iterdir()) == ["times.json"], "no temporary file stays"

    seen = (folder / "logs" / "installation.log").read_text()
    assert f"found [] cache {folder / 'cache'}" in seen
    assert str(environment) not in seen and str(other) not in seen and "python works" in seen
    assert str(Path(shutil.which("make")).parent) in seen
    # One line a step, which names its log.
    lines = [line for line in done.stdout.splitlines() if line.split(" ")[0] in STEPS]
    assert [line.split()[0] for line in lines] == list(STEPS)
    assert all(line.endswith(f"logs/{name}.log") for line, name in zip(lines, STEPS, strict=True) if name != "report_pdf")
    assert "FAILED (2)" in lines[-1]
    assert "3 committed files came out different" in lines[1]
    assert (toy / "data/other.csv").read_text() == "not committed\n"


def test_some_steps_go_on_in_an_earlier_folder(toy, tmp_path):
    folder, out = tmp_path / "walk", tmp_path / "times.json"
    arguments = ("--folder", folder, "--output", out)
    refused = walk(toy, *arguments, "--only", "figures")
    assert refused.returncode == 2 and "add `installation` to --only" in refused.stderr
    assert not folder.exists()
    assert walk(toy, *arguments, "--only", "report", "installation").returncode == 0
    assert tuple(steps(out)) == ("installation", "report")
    first = steps(out)

    change(toy, "all 7 numbers", "all 8 numbers")
    out.unlink()
    done = walk(toy, *arguments, "--only", "verify", "figures")
    assert done.returncode == 0, done.stderr
    assert "commits that were made since" in done.stdout
    second = steps(out)
    assert tuple(second) == ("installation", "figures", "verify", "report"), "what was there before stays"
    assert second["installation"] == first["installation"]
    assert second["verify"]["last_line"] == "verify: all 7 numbers agree", "the clone stays as it was"

    # Again from the start, not on from where it had ended; the environment stays.
    (folder / "clone/data/runs/half").write_text("of an interrupted batch")
    assert walk(toy, *arguments, "--only", "figures").returncode == 0
    assert steps(out)["figures"]["changed"] == second["figures"]["changed"]
    assert not (folder / "clone/data/runs/half").exists()
    assert (folder / "clone/figures/own.csv").read_text() == "1\n2\n"

    # Without --only: whatever is missing.
    assert walk(toy, *arguments).returncode == 1
    assert tuple(steps(out)) == STEPS
    assert steps(out)["figures_again"]["exit_status"] == 0
    for more, words in (
        (("--only", "installation"), "an installation is timed in another --folder"),
        (("--cores", 7, "--only", "verify"), "walked with another cores"),
    ):
        refused = walk(toy, *arguments, *more)
        assert refused.returncode == 2 and words in refused.stderr
        assert len(refused.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("failing", "line", "left_out"),
    [
        ("installation", "\t@mkdir -p .venv/bin data/runs\n", STEPS[1:]),
        ("figures", "\t@mkdir -p data/runs && for", ["figures_again"]),
    ],
)
def test_what_needs_a_step_that_failed_is_left_out(toy, tmp_path, failing, line, left_out):
    change(toy, line, f"\t@echo broken; exit 3\n{line}")
    out = tmp_path / "times.json"
    assert walk(toy, "--folder", tmp_path / "walk", "--output", out).returncode == 1
    found = steps(out)
    assert tuple(found) == STEPS
    assert (found[failing]["exit_status"], found[failing]["last_line"]) == (2, "broken")
    reason = f"{failing} has not succeeded"
    assert [name for name, one in found.items() if one.get("left_out") == reason] == list(left_out)


def test_refused_before_any_work(toy, tmp_path):
    out = tmp_path / "times.json"
    full = tmp_path / "full"
    full.mkdir()
    (full / "mine.txt").write_text("keep")
    (tmp_path / "file").touch()
    nothing = tmp_path / "nothing"
    nothing.mkdir()
    only_git = tmp_path / "git"
    only_git.mkdir()
    (only_git / "git").symlink_to(shutil.which("git"))
    for arguments, variables, words in (
        (("--folder", full), {}, "neither empty nor the folder of a walk-through"),
        (("--folder", tmp_path / "file"), {}, "neither empty nor the folder of a walk-through"),
        (("--folder", tmp_path / "new", "--only", "fgures"), {}, "invalid choice: 'fgures'"),
        (("--folder", tmp_path / "new"), {"PATH": str(nothing)}, "there is no git"),
        (("--folder", tmp_path / "new"), {"PATH": str(only_git)}, "there is no make"),
        (("--folder", tmp_path / "new", "--cores", 0), {}, "--cores 0: at least one"),
    ):
        refused = walk(toy, "--output", out, *arguments, **variables)
        assert refused.returncode == 2 and words in refused.stderr, refused.stderr
    refused = walk(toy, "--folder", tmp_path / "new", "--output", out, free=9e9)
    assert refused.returncode == 2 and refused.stderr.startswith("refused: 9.0 GB are free at ")
    assert not out.exists() and not (tmp_path / "new").exists()
    assert [path.name for path in full.iterdir()] == ["mine.txt"]


def test_an_interrupt_reaches_the_step_and_loses_nothing(toy, tmp_path):
    """Also where interrupts are ignored, as below `nohup` in the background: the steps hear them again."""
    change(
        toy,
        '\t@echo "verify: all',
        "\t@trap 'touch stopped; exit 1' INT; touch started; sleep 30 & wait\n\t@echo \"verify: all",
    )
    out, clone = tmp_path / "times.json", tmp_path / "walk" / "clone"
    process = subprocess.Popen(
        command(toy, "--folder", tmp_path / "walk", "--output", out, "--only", "installation", "verify"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN),
    )
    limit = time.monotonic() + 30
    while not (clone / "started").exists() and time.monotonic() < limit:
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "interrupted" in errors
    assert (clone / "stopped").exists(), "the step ended itself"
    assert tuple(steps(out)) == ("installation",)


def test_a_temporary_folder_goes(toy, tmp_path):
    (tmp_path / "place").mkdir()
    done = walk(toy, "--only", "installation", "report", TMPDIR=str(tmp_path / "place"))
    assert done.returncode == 0, done.stderr
    assert tuple(steps(toy / "data/benchmarks/walkthrough.json")) == ("installation", "report")
    assert list((tmp_path / "place").iterdir()) == []
