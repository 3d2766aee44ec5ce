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

import pytest

from prunelib.io import project_root

ROOT = project_root()


@pytest.fixture
def lab(tmp_path):
    """Asks the server that `make lab` starts, by this interpreter; settings of the user have no say."""
    folders = ("JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR", "IPYTHONDIR")
    (line,) = re.findall(r"^lab: .*\n\t@\$\(BIN\)/jupyter (.*) \$\(ARGS\)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    options = ["--no-browser", "--allow-root", "--ip=127.0.0.1", f"--port={port}", "--IdentityProvider.token=test"]
    command = [sys.executable, "-m", "jupyter", *shlex.split(line), *options]
    environment = os.environ | {name: str(tmp_path / name) for name in folders}
    with open(tmp_path / "log", "w") as log:
        started = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log)

    def ask(path):
        deadline = time.monotonic() + 60
        while True:
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/{path}?token=test", timeout=10) as answer:
                    return answer.read().decode()
            except OSError:
                if started.poll() is not None or time.monotonic() > deadline:
                    pytest.fail((tmp_path / "log").read_text())
                time.sleep(0.3)

    yield ask
    started.terminate()
    started.wait(30)


@pytest.mark.slow
def test_the_notebooks_are_listed_and_have_a_kernel_and_widgets(lab):
    listed = {entry["name"] for entry in json.loads(lab("api/contents/notebooks"))["content"]}
    assert listed == {path.name for path in (ROOT / "notebooks").iterdir() if not path.name.startswith(".")}
    opened = json.loads(lab("api/contents/notebooks/09_explorer.ipynb"))
    assert json.loads(lab("api/contents/figures/own_hero.png"))["mimetype"] == "image/png", "chapters show ../figures"
    assert opened["content"]["metadata"]["kernelspec"]["name"] in json.loads(lab("api/kernelspecs"))["kernelspecs"]
    assert "@jupyter-widgets/jupyterlab-manager" in lab("lab"), "ipywidgets draws nothing without its part in the browser"
