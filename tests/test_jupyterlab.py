"""`make lab`: JupyterLab starts, and finds the notebooks and a kernel for them. No browser."""

import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from prunelib.io import project_root

pytestmark = pytest.mark.slow

ROOT = project_root()
PATIENCE = 60


def command() -> list[str]:
    """What `make lab` runs, by this interpreter."""
    (line,) = re.findall(
        r"^lab: \$\(READY\)\n\t@\$\(BIN\)/jupyter (.*) \$\(ARGS\)$", (ROOT / "Makefile").read_text(), re.MULTILINE
    )
    return [sys.executable, "-m", "jupyter", *shlex.split(line)]


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """Asks the running server; settings of the user have no say."""
    place = tmp_path_factory.mktemp("lab")
    folders = {
        name: str(place / name) for name in ("JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR", "IPYTHONDIR")
    }
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = ["--no-browser", "--allow-root", "--ip=127.0.0.1", f"--port={port}", "--IdentityProvider.token=test"]
    with open(place / "log", "w") as log:
        started = subprocess.Popen(
            [*command(), *options], cwd=ROOT, env=os.environ | folders, stdout=log, stderr=subprocess.STDOUT
        )

    def ask(path):
        deadline = time.monotonic() + PATIENCE
        while True:
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/{path}?token=test", timeout=10) as answer:
                    return answer.read().decode()
            except OSError:
                if started.poll() is not None or time.monotonic() > deadline:
                    pytest.fail((place / "log").read_text())
                time.sleep(0.3)

    yield ask
    started.send_signal(signal.SIGTERM)
    started.wait(30)


def test_the_notebooks_are_listed_and_have_a_kernel(lab):
    listed = {entry["name"] for entry in json.loads(lab("api/contents"))["content"]}
    assert listed == {path.name for path in Path(ROOT / "notebooks").iterdir() if not path.name.startswith(".")}
    assert "09_explorer.ipynb" in listed
    opened = json.loads(lab("api/contents/09_explorer.ipynb"))
    assert opened["content"]["metadata"]["kernelspec"]["name"] in json.loads(lab("api/kernelspecs"))["kernelspecs"]
    assert "<title>JupyterLab</title>" in lab("lab")


def test_widgets_have_their_part_in_the_browser(lab):
    """ipywidgets draws nothing without its extension, which must be there beside the Python package."""
    assert "@jupyter-widgets/jupyterlab-manager" in lab("lab")
