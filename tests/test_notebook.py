"""The runner: what is refused before a kernel starts, and that a run without its result is a failure that says why."""

import json
import os
import shutil
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import papermill
import pytest
from batch_project import write_notebook

from prunelib.lab import run_notebook as notebook
from prunelib.lab import runs as results
from prunelib.lab.run_notebook import NotebookError, Parameter, ParameterError

PARAMETERS = """
width = 2  # layers
ratio = 0.5  # share
mode = "ok"  # how the run ends
fast = False  # skip something
seeds = [0, 1]  # of the draws
data_dir = None  # folder with a copy
limit = None  # int: windows at most
output = "build/result.json"  # result
"""

COMPUTE = """
import os, signal, sys
print(f"mode {mode}")
settings = [width, ratio, fast, seeds, data_dir, limit]
"""

ENDINGS = """
if mode == "kill":
    os.kill(os.getpid(), signal.SIGKILL)
if mode == "raise":
    raise ValueError("no such layer\\nsecond line")
if mode == "exit":
    sys.exit(0)
if mode == "broken":
    open(output, "w").write("{")
    sys.exit(0)
"""

WRITE = """
from prunelib.lab.runs import write_run
extra = {
    "settings": settings,
    "executable": sys.executable,
    "ipython": os.environ["IPYTHONDIR"],
    "startup": "leaked" in globals(),
}
rows = [{"metric": "sum", "value": width + ratio}]
_ = write_run(output, experiment="test", parameters={"limit": limit}, rows=rows, provenance={}, seconds=0.1, extra=extra)
"""


@pytest.fixture
def nb(tmp_path):
    return write_notebook(tmp_path / "nb.ipynb", {"parameters": PARAMETERS, "compute": COMPUTE, "end": ENDINGS, "write": WRITE})


@pytest.fixture
def no_kernel(monkeypatch):
    """Fails the test when a kernel would start."""

    def start(*_, **__):
        pytest.fail("a kernel was started")

    monkeypatch.setattr(papermill, "execute_notebook", start)


# -------------------------------------------------------------------------------------- parameters, without a kernel


def test_parameters_cell(nb):
    found = notebook.parameters(nb)
    assert list(found) == ["width", "ratio", "mode", "fast", "seeds", "data_dir", "limit", "output"]
    assert found["width"] == Parameter("width", 2, "layers")
    assert {name: parameter.kind for name, parameter in found.items()} == {
        "width": int,
        "ratio": float,
        "mode": str,
        "fast": bool,
        "seeds": list,
        "data_dir": str,
        "limit": int,
        "output": str,
    }


@pytest.mark.parametrize(
    ("cell", "message"),
    [
        ("a, b = 1, 2", "is not a plain"),
        ("a: int = 1", "is not a plain"),
        ("import os", "is not a plain"),
        ("a = 2 * 3", "is computed"),
        ("a = 1\nb = a", "is computed"),
        ("a = {'x': 1}", "is a dict"),
        ("a = 1\na = 2", "set twice"),
        ("a = = 1", "is not Python"),
    ],
)
def test_a_parameters_cell_that_papermill_would_misread(tmp_path, cell, message):
    with pytest.raises(ParameterError, match=message):
        notebook.parameters(write_notebook(tmp_path / "a.ipynb", {"parameters": cell}))


def test_the_parameters_cell_is_the_first_code_cell(tmp_path):
    with pytest.raises(ParameterError, match="has 0 cells tagged"):
        notebook.parameters(write_notebook(tmp_path / "a.ipynb", {"other": "a = 1"}))
    with pytest.raises(ParameterError, match="must be the first code cell"):
        notebook.parameters(write_notebook(tmp_path / "a.ipynb", {"other": "b = 1", "parameters": "a = 1"}))
    (tmp_path / "b.ipynb").write_text("not json")
    with pytest.raises(ParameterError, match="is not a notebook"):
        notebook.parameters(tmp_path / "b.ipynb")


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("width", "12", 12),
        ("ratio", "1e-3", 0.001),
        ("ratio", "1", 1.0),
        ("mode", "007", "007"),
        ("mode", "None", "None"),
        ("fast", "true", True),
        ("fast", "False", False),
        ("seeds", "[3, 4]", [3, 4]),
        ("seeds", "3,4", [3, 4]),
        ("seeds", "[]", []),
        ("data_dir", "None", None),
        ("data_dir", "/data/2", "/data/2"),
        ("limit", "null", None),
        ("limit", "5", 5),
    ],
)
def test_texts_are_read_by_the_type_of_the_default(nb, name, text, value):
    read = notebook.check(nb, {name: text}, text=True)[name]
    assert read == value
    assert type(read) is type(value)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("width", "1e3"),
        ("width", "2.0"),
        ("width", "None"),
        ("ratio", "half"),
        ("ratio", "nan"),
        ("ratio", "inf"),
        ("fast", "1"),
        ("fast", "yes"),
        ("seeds", "[1.5]"),
        ("seeds", "1,x"),
        ("seeds", "[1"),
        ("limit", "many"),
    ],
)
def test_ill_typed_texts_are_refused(nb, name, text):
    with pytest.raises(ParameterError, match=f"nb.ipynb: {name} = .* is not of type"):
        notebook.check(nb, {name: text}, text=True)


def test_values_from_python(nb, tmp_path):
    values = {"width": np.int64(3), "ratio": 1, "seeds": (1, 2), "data_dir": tmp_path, "limit": None}
    expected = {"width": 3, "ratio": 1.0, "seeds": [1, 2], "data_dir": str(tmp_path), "limit": None}
    assert notebook.check(nb, values) == expected
    for wrong in ({"width": "3"}, {"width": 3.0}, {"width": True}, {"ratio": float("nan")}, {"mode": 3}, {"mode": None}):
        with pytest.raises(ParameterError, match="is not of type"):
            notebook.check(nb, wrong)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["widht=3"], "has no parameter `widht`; did you mean `width`?"),
        (["width=1e3"], "width = '1e3' is not of type int"),
        (["width"], "`width` is not of the form name=value"),
        (["width=1", "width=2"], "`width` is given twice"),
        (["output=x.json"], "`output` is the second argument"),
    ],
)
def test_refused_before_a_kernel_starts(nb, tmp_path, capsys, no_kernel, settings, message):
    assert notebook.main([str(nb), str(tmp_path / "out" / "a.json"), *settings]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out" / "a.json").exists()


@pytest.mark.parametrize(
    ("source", "read"),
    [
        ("print(seed)", True),
        ("x = f'{seed}'", True),
        ("def f(x):\n    return x + seed", True),
        ("x = [seed for _ in range(2)]", True),
        ("%time\n!ls\nprint(seed)", True),
        ("seed += 1", True),
        ("seed = seed + 1", True),
        ("x = 1", False),
        ("seed = 3\nprint(seed)", False),
        ("def f(seed):\n    return seed", False),
        ("x = [seed for seed in range(3)]", False),
        ("print(other.seed, dict(seed=1))", False),
        ("# seed", False),
        ("%%bash\necho seed", False),
    ],
)
def test_unread_parameters(tmp_path, no_kernel, source, read):
    path = write_notebook(
        tmp_path / "a.ipynb", {"parameters": "seed = 0\noutput = 'x'", "first": source, "last": "print(output)"}
    )
    assert notebook.unread(path) == ([] if read else ["seed"])
    if not read:
        with pytest.raises(ParameterError, match="never reads its parameter `seed`"):
            notebook.run_notebook(path, tmp_path / "out.json", seed=1)


def test_other_refusals(nb, tmp_path, no_kernel, monkeypatch):
    with pytest.raises(ParameterError, match=r"there is no notebook .*absent\.ipynb"):
        notebook.run_notebook(tmp_path / "absent.ipynb", tmp_path / "out.json")
    with pytest.raises(ParameterError, match="would overwrite a notebook"):
        notebook.run_notebook(nb, nb.with_suffix(".json"))
    silent = write_notebook(tmp_path / "silent.ipynb", {"parameters": "a = 1", "read": "a"})
    with pytest.raises(ParameterError, match="has no parameter `output`"):
        notebook.run_notebook(silent, tmp_path / "out.json")
    broken = write_notebook(tmp_path / "broken.ipynb", {"parameters": "output = 'x'", "read": "print(output"})
    with pytest.raises(ParameterError, match="code cell 2 is not Python"):
        notebook.run_notebook(broken, tmp_path / "out.json")

    (tmp_path / "file").write_text("")
    with pytest.raises(ParameterError, match="cannot write to"):
        notebook.run_notebook(nb, tmp_path / "file" / "out.json")
    with monkeypatch.context() as patch:
        usage = types.SimpleNamespace(free=2**20)
        patch.setattr(shutil, "disk_usage", lambda _: usage)
        with pytest.raises(ParameterError, match="only 1 MiB are free"):
            notebook.run_notebook(nb, tmp_path / "out.json")
    with monkeypatch.context() as patch:
        patch.setattr(notebook.importlib.util, "find_spec", lambda name: None if name == "ipykernel" else name)
        with pytest.raises(ParameterError, match="has no ipykernel: install the lock"):
            notebook.run_notebook(nb, tmp_path / "out.json")


def test_read_only_folder(nb, tmp_path, no_kernel):
    folder = tmp_path / "frozen"
    folder.mkdir()
    folder.chmod(0o555)
    if os.access(folder, os.W_OK):
        folder = Path("/proc/self")  # the administrator may write everywhere but there
        if not folder.is_dir():
            pytest.skip("this user may write everywhere")
    with pytest.raises(ParameterError, match=f"cannot write to {folder}"):
        notebook.run_notebook(nb, folder / "out.json")


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
    assert run["extra"]["settings"] == [3, 0.25, True, [7], None, 9]
    assert run["extra"]["executable"] == sys.executable
    assert run["extra"]["ipython"] != str(tmp_path / "ipython")
    assert run["extra"]["startup"] is False
    assert json.loads((tmp_path / "new" / "out.ipynb").read_text())["cells"], "the executed copy lies beside the result"
    assert nb.read_bytes() == source
    assert sorted(path.name for path in done.parent.iterdir()) == ["out.ipynb", "out.json"]


@pytest.mark.parametrize(
    ("mode", "message"),
    [
        (
            "kill",
            r"nb\.ipynb: the kernel died in cell In \[4\] \(`if mode == \"kill\":`\).*no result was written; executed copy: ",
        ),
        ("raise", r"nb\.ipynb, cell In \[4\] \(`if mode == \"kill\":`\) raised ValueError: no such layer; executed copy: "),
        ("exit", r"nb\.ipynb ended but did not write .*out\.json.*; executed copy: "),
    ],
)
def test_a_run_without_result_fails_and_keeps_earlier_ones(nb, tmp_path, mode, message):
    earlier = tmp_path / "earlier.json"
    earlier.write_text("{}")
    with pytest.raises(NotebookError, match=message) as caught:
        notebook.run_notebook(nb, tmp_path / "out.json", mode=mode)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out.json").exists()
    assert (tmp_path / "out.ipynb").is_file(), "the executed copy is kept to look at"
    assert earlier.read_text() == "{}"


def test_an_older_result_is_no_success_and_stays(nb, tmp_path, capfd):
    output = tmp_path / "out.json"
    output.write_text('{"older": 1}')
    assert notebook.main([str(nb), str(output), "mode=exit"]) == 1
    assert "failed: " in capfd.readouterr().err
    assert json.loads(output.read_text()) == {"older": 1}


def test_a_result_that_is_not_json_is_a_failure(nb, tmp_path):
    with pytest.raises(NotebookError, match="which is not JSON"):
        notebook.run_notebook(nb, tmp_path / "out.json", mode="broken")


def test_from_a_shell_and_by_plain_papermill(nb, tmp_path):
    """From any folder; the same notebook needs nothing of the runner."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}
    command = [sys.executable, "-m", "prunelib.lab.run_notebook", "nb.ipynb", "a/out.json", "width=5", "mode=ok"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().endswith("written by " + str(tmp_path / "nb.ipynb"))
    assert done.stderr == "mode ok\n", "only what the notebook prints"
    first = json.loads((tmp_path / "a" / "out.json").read_text())

    output = tmp_path / "b.json"
    command = ["-m", "papermill", "-k", "python3", "-p", "width", "5", "-p", "output", str(output), "nb.ipynb", "b.ipynb"]
    environment["IPYTHONDIR"] = str(tmp_path)
    done = subprocess.run([sys.executable, *command], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert json.loads(output.read_text())["rows"] == first["rows"] == [{"metric": "sum", "value": 5.5}]


def test_another_default_takes_none_only_where_its_help_says_so():
    optional = Parameter("windows", 64, "int or None: windows, None for all")
    assert optional.parse("none") is None
    assert optional.check(None) is None
    assert optional.parse("8") == 8
    with pytest.raises(ParameterError, match="not of type int or None"):
        optional.parse("many")
    with pytest.raises(ParameterError, match="not of type int "):
        Parameter("windows", 64, "windows").parse("none")
