"""The runner: what is refused before a kernel starts, and that a run without its result is a failure that says why."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import types

import numpy as np
import papermill
import psutil
import pytest
from lab_project import write_notebook

from prunelib.lab import run_notebook as notebook
from prunelib.lab import runs as results
from prunelib.lab.parameters import Parameter, ParameterError
from prunelib.lab.run_notebook import NotebookError

PARAMETERS = """
width = 2  # layers
ratio = 0.5  # share
mode = "ok"  # how the run ends
fast = False  # skip something
seeds = [0, 1]  # of the draws
data_dir = None  # folder with a copy
limit = None  # int: windows at most
batch_size = 8  # windows in one forward pass
output = "build/result.json"  # result
"""
WORK = """
import os, signal, sys, time
from prunelib.lab import runs
recorder = runs.start("test", globals())
print(f"mode {mode}", flush=True)
settings = [width, ratio, fast, seeds, data_dir, limit, batch_size]
"""
ENDINGS = """
if mode == "kill":
    os.kill(os.getpid(), signal.SIGKILL)
if mode == "sleep":
    time.sleep(100)
if mode == "raise":
    raise ValueError("no such layer\\nsecond line")
if mode == "exit":
    sys.exit(0)
if mode == "memory":
    bytearray(10**15)
if mode == "full":
    with open("/dev/full", "w") as file:
        file.write("x")
"""
WRITE = """
extra = {"settings": settings, "executable": sys.executable, "startup": "leaked" in globals()}
_ = recorder.write([{"metric": "sum", "value": width + ratio}], extra=extra)
"""


@pytest.fixture
def nb(tmp_path):
    return write_notebook(tmp_path / "nb.ipynb", {"parameters": PARAMETERS, "work": WORK, "end": ENDINGS, "write": WRITE})


@pytest.fixture
def older(tmp_path):
    """A finished result where the next run writes."""
    rows = [{"metric": "older", "value": 1.0}]
    return results.write_run(tmp_path / "runs/a.json", experiment="test", parameters={}, rows=rows, provenance={}, seconds=0.1)


def is_older(path):
    return results.read_run(path)["rows"] == [{"metric": "older", "value": 1.0}]


@pytest.fixture
def no_kernel(monkeypatch):
    """Fails the test when a kernel would start."""
    monkeypatch.setattr(papermill, "execute_notebook", lambda *_, **__: pytest.fail("a kernel was started"))


def test_parameters_cell(nb):
    found = notebook.parameters(nb)
    assert found["width"] == Parameter("width", 2, "layers")
    kinds = {"width": int, "ratio": float, "mode": str, "fast": bool, "seeds": list, "data_dir": str, "limit": int}
    assert {name: parameter.kind for name, parameter in found.items()} == kinds | {"batch_size": int, "output": str}


@pytest.mark.parametrize(
    "cell", ["a, b = 1, 2", "a: int = 1", "import os", "a = 2 * 3", "a = 1\nb = a", "a = {'x': 1}", "a = 1\na = 2", "a = = 1"]
)
def test_a_parameters_cell_that_papermill_would_misread(tmp_path, cell):
    with pytest.raises(ParameterError, match=r"literal|is not of type"):
        notebook.parameters(write_notebook(tmp_path / "a.ipynb", {"parameters": cell}))


def test_the_parameters_cell_is_the_first_code_cell(tmp_path):
    for cells in ({"other": "a = 1"}, {"other": "b = 1", "parameters": "a = 1"}):
        with pytest.raises(ParameterError, match="the first with code"):
            notebook.parameters(write_notebook(tmp_path / "a.ipynb", cells))


def test_values_are_read_by_the_type_of_the_default(nb):
    for name, read in {
        "width": {"12": 12, np.int64(3): 3},
        "ratio": {"1e-3": 0.001, "1": 1.0, 1: 1.0},
        "mode": {"007": "007", "None": "None"},
        "fast": {"true": True},
        "seeds": {"[3, 4]": [3, 4], "3,4": [3, 4], (1, 2): [1, 2]},
        "data_dir": {"None": None, "data/published": "data/published"},
        "limit": {"null": None, "5": 5},
    }.items():
        for text, value in read.items():
            found = notebook.check(nb, {name: text})[name]
            assert (found, type(found)) == (value, type(value))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["widht=3"], "has no parameter `widht`; did you mean `width`?"),
        (["width=1e3"], "width = '1e3' is not of type int"),
        (["width"], "of the form name=value"),
        (["width=1", "width=2"], "each name once"),
        (["output=x.json"], "`output` is the second argument"),
    ],
)
def test_refused_before_a_kernel_starts(nb, tmp_path, capsys, no_kernel, settings, message):
    assert notebook.main([str(nb), str(tmp_path / "out" / "a.json"), *settings]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out" / "a.json").exists()


def test_other_refusals(nb, tmp_path, no_kernel, monkeypatch):
    (tmp_path / "file").write_text("")
    silent = write_notebook(tmp_path / "silent.ipynb", {"parameters": "a = 1", "read": "a"})
    for path, output, message in (
        (tmp_path / "absent.ipynb", tmp_path / "out.json", r"there is no notebook .*absent\.ipynb"),
        (tmp_path / "file", tmp_path / "out.json", "is not a notebook"),
        (nb, nb.with_suffix(".json"), "would overwrite a notebook"),
        (silent, tmp_path / "out.json", "has no parameter `output`"),
        (nb, tmp_path / "file" / "out.json", "cannot write to"),
    ):
        with pytest.raises(ParameterError, match=message):
            notebook.run_notebook(path, output)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: types.SimpleNamespace(free=2**20))
    with pytest.raises(ParameterError, match=r"only 1 MiB are free.*make room"):
        notebook.run_notebook(nb, tmp_path / "out.json")


# ------------------------------------------------------------------------------------------------------ with a kernel


def test_a_run_and_its_isolation(nb, tmp_path, monkeypatch):
    """Typed values arrive; the kernel is this interpreter whatever Jupyter, IPython and PYTHONSTARTUP of the user say."""
    other = tmp_path / "jupyter" / "kernels" / "python3"
    other.mkdir(parents=True)
    (other / "kernel.json").write_text(json.dumps({"argv": ["/bin/false"], "display_name": "x", "language": "python"}))
    startup = tmp_path / "ipython" / "profile_default" / "startup"
    startup.mkdir(parents=True)
    (startup / "00.py").write_text("leaked = 1")
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "jupyter"))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    monkeypatch.setenv("PYTHONSTARTUP", str(startup / "00.py"))
    source = nb.read_bytes()

    done = notebook.run_notebook(nb, tmp_path / "new" / "out.json", width=3, ratio=0.25, seeds=[7], limit=9, fast=True)

    run = results.read_run(done)
    assert run["rows"] == [{"metric": "sum", "value": 3.25}]
    assert run["parameters"]["limit"] == 9
    settings = [3, 0.25, True, [7], None, 9, 8]
    assert run["extra"] == {"settings": settings, "executable": sys.executable, "startup": False}
    assert nb.read_bytes() == source
    assert sorted(path.name for path in done.parent.iterdir()) == ["out.ipynb", "out.json"]


@pytest.mark.parametrize(
    ("mode", "message"),
    [
        ("kill", r"nb\.ipynb: the kernel died \(killed, or out of memory\?\): try batch_size=4 instead of 8; no result"),
        ("raise", r"nb\.ipynb: cell In \[4\] \(`if mode == \"kill\":`\) raised ValueError: no such layer; no result"),
        ("memory", r"raised MemoryError: try batch_size=4 instead of 8; no result"),
        ("full", r"raised OSError: \[Errno 28\] No space left on device: make room at .* and start again; finished"),
        ("exit", r"nb\.ipynb: ended without writing its result"),
    ],
)
def test_a_run_without_result_fails_in_one_line_and_keeps_the_earlier_one(nb, older, mode, message):
    with pytest.raises(NotebookError, match=message + r".*executed copy: .*a\.ipynb") as caught:
        notebook.run_notebook(nb, older, mode=mode)
    assert "\n" not in str(caught.value)
    assert is_older(older)
    assert older.with_suffix(".ipynb").is_file(), "the executed copy is kept to look at"


def test_a_disk_without_room_for_the_executed_copy(nb, older, monkeypatch, capfd):
    """papermill writes it after every cell; a result that was written before counts."""

    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(papermill, "execute_notebook", full)
    assert notebook.main([str(nb), str(older)]) == 1
    assert "No space left on device: make room at" in capfd.readouterr().err
    assert is_older(older)

    def full_in_the_end(*_, **__):
        results.write_run(older, experiment="test", parameters={}, rows=[], provenance={}, seconds=0.1)
        full()

    monkeypatch.setattr(papermill, "execute_notebook", full_in_the_end)
    assert notebook.main([str(nb), str(older)]) == 0


@pytest.mark.slow
def test_from_a_shell_and_by_plain_papermill(nb, tmp_path):
    """From any folder; the same notebook needs nothing of the runner."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}
    command = [sys.executable, "-m", "prunelib.lab.run_notebook", "nb.ipynb", "a/out.json", "width=5", "mode=ok"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("a/out: 1 rows, ")
    first = json.loads((tmp_path / "a" / "out.json").read_text())

    output = tmp_path / "b.json"
    command = ["-m", "papermill", "-k", "python3", "-p", "width", "5", "-p", "output", str(output), "nb.ipynb", "b.ipynb"]
    environment["IPYTHONDIR"] = str(tmp_path)
    done = subprocess.run([sys.executable, *command], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert json.loads(output.read_text())["rows"] == first["rows"] == [{"metric": "sum", "value": 5.5}]


@pytest.mark.slow
@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_ends_its_kernel(nb, older, sent):
    command = [sys.executable, "-m", "prunelib.lab.run_notebook", str(nb), str(older), "mode=sleep"]
    restore = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # noqa: E731 (background jobs of a shell ignore it)
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, preexec_fn=restore) as process:
        assert process.stderr.readline() == "mode sleep\n", "the kernel works"
        assert (kernels := psutil.Process(process.pid).children(recursive=True))
        process.send_signal(sent)
        error = process.communicate(timeout=60)[1]
    assert process.returncode == 130
    assert any(line.startswith("interrupted: ") for line in error.splitlines())  # ipykernel may say something, too
    assert not psutil.wait_procs(kernels, timeout=10)[1], "the kernel ended with its run"
    assert is_older(older)
