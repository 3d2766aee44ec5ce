"""`make lab`: JupyterLab starts, and finds the notebooks and a kernel for them. No browser."""

import json
import os
import re
import shlex
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


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """Asks the server that `make lab` starts, by this interpreter; settings of the user have no say."""
    place = tmp_path_factory.mktemp("lab")
    folders = ("JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR", "IPYTHONDIR")
    (line,) = re.findall(r"^lab: .*\n\t@\$\(BIN\)/jupyter (.*) \$\(ARGS\)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = ["--no-browser", "--allow-root", "--ip=127.0.0.1", f"--port={port}", "--IdentityProvider.token=test"]
    command = [sys.executable, "-m", "jupyter", *shlex.split(line), *options]
    environment = os.environ | {name: str(place / name) for name in folders}
    with open(place / "log", "w") as log:
        started = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log)

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
    started.terminate()
    started.wait(30)


def test_the_notebooks_are_listed_and_have_a_kernel_and_widgets(lab):
    listed = {entry["name"] for entry in json.loads(lab("api/contents"))["content"]}
    assert listed == {path.name for path in Path(ROOT / "notebooks").iterdir() if not path.name.startswith(".")}
    opened = json.loads(lab("api/contents/09_explorer.ipynb"))
    assert opened["content"]["metadata"]["kernelspec"]["name"] in json.loads(lab("api/kernelspecs"))["kernelspecs"]
    assert "@jupyter-widgets/jupyterlab-manager" in lab("lab"), "ipywidgets draws nothing without its part in the browser"
