"""A small project for the tests of the runner and the Snakefile: real Snakefile and package, notebooks without torch."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

STATISTICS = {
    "parameters": """
model = "tiny"  # folder or hub name
corpus = "pydocs"  # corpus to calibrate on
split = "calibration"  # its split
data_dir = None  # folder with an offline copy
n_samples = 4  # windows
seed = 0  # of the windows
crash = []  # seeds that fail
dtype = "float32"  # of the weights
output = "build/statistics.json"  # result
""",
    "compute": """
import os, signal, time
from pathlib import Path
from prunelib.lab import provenance
from prunelib.lab import runs as results
with open(os.environ["BATCH_LOG"], "a") as log:
    log.write(f"statistics {model} {corpus} {split} {data_dir} {n_samples} {dtype} {seed}\\n")
if seed in crash:
    os.kill(os.getpid(), signal.SIGKILL)
time.sleep(float(os.environ.get("BATCH_SLEEP", "0")))
""",
    "write": """
provenance.at_root(output).with_suffix(".safetensors").write_bytes(bytes([seed]))
_ = results.write_run(output, experiment="statistics", parameters={"model": model, "corpus": corpus, "seed": seed},
                  rows=[{"metric": "windows", "value": n_samples}], provenance={"source_sha256": "0" * 64}, seconds=0.1)
""",
}

DEPTH = {
    "parameters": """
model = "tiny"  # folder or hub name
statistics = []  # run files of the statistics of this model
layers_removed = 0  # how many
alphas = [0.0, 0.5]  # grid
dtype = "float32"  # of the weights
output = "build/depth.json"  # result
""",
    "compute": """
import os
from prunelib.lab import provenance
from prunelib.lab import runs as results
with open(os.environ["BATCH_LOG"], "a") as log:
    log.write(f"depth {model} {dtype} {layers_removed}\\n")
total = sum(provenance.at_root(path).with_suffix(".safetensors").read_bytes()[0] for path in statistics)
rows = [{"metric": "ppl", "value": total + alpha * layers_removed, "alpha": alpha, "n": 1} for alpha in alphas]
_ = results.write_run(output, experiment="depth", parameters={"model": model, "layers_removed": layers_removed},
                  rows=rows, provenance={"source_sha256": "0" * 64}, seconds=0.1)
""",
}

CHAPTER = {
    "parameters": """
results = "results.csv"  # the table
figures = "figures"  # where the pictures go
output = "build/chapter.json"  # result
""",
    "# Chapter": None,
    "## Figure 1: perplexity against `layers_removed` (`simdiff_fig1_perplexity`)": None,
    "compute": """
import csv, os
from prunelib.lab import provenance
from prunelib.lab import runs
with open(os.environ["BATCH_LOG"], "a") as log:
    log.write("chapter\\n")
rows = list(csv.DictReader(open(provenance.at_root(results))))
for suffix in (".png", ".pdf", ".csv", ".json"):
    path = provenance.at_root(figures) / ("simdiff_fig1_perplexity" + suffix)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("{}" if suffix == ".json" else f"{len(rows)} rows")
""",
    "write": """
_ = runs.write_run(output, experiment="chapter", parameters={}, rows=[], provenance={"source_sha256": "0" * 64}, seconds=0.1)
""",
}

PROFILE = {
    "runs": "data/runs/test",
    "results": "data/results.csv",
    "costs": "data/costs.csv",
    "figures": "figures",
    "models": {"tiny": {"model": "data/tiny", "dtype": "float32"}},
    "calibration": {"pydocs": {"split": "calibration", "data_dir": None, "n_samples": 4}},
    "calibration_seeds": [0, 1, 2],
    "layers_removed": [0, 2],
    "statistics": {"crash": []},
    "depth": {"alphas": [0.0, 0.5, 1.0]},
    "chapters": {"01_chapter": {}},
}


def write_notebook(path: Path, cells: dict) -> Path:
    """A notebook of the cells: text None makes the key a markdown cell, the key `parameters` is the tag."""
    notebook = {
        "cells": [],
        "metadata": {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}},
        "nbformat": 4,
        "nbformat_minor": 5,
    }
    for name, source in cells.items():
        cell = {"id": f"cell{len(notebook['cells'])}", "metadata": {}}
        if source is None:
            cell |= {"cell_type": "markdown", "source": name}
        else:
            cell |= {"cell_type": "code", "source": source.strip(), "execution_count": None, "outputs": []}
            cell["metadata"] = {"tags": ["parameters"]} if name == "parameters" else {}
        notebook["cells"].append(cell)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(notebook))
    return path


class Project:
    """A copy of the project's machinery in `root` with the notebooks above; `run` starts Snakemake in it."""

    def __init__(self, root: Path) -> None:
        self.root, self.log = root, root / "log.txt"
        shutil.copytree(ROOT / "prunelib", root / "prunelib", ignore=shutil.ignore_patterns("__pycache__"))
        for name in ("Snakefile", "pyproject.toml"):
            shutil.copy(ROOT / name, root / name)
        (root / "data" / "tiny").mkdir(parents=True)
        (root / "data" / "tiny" / "model.safetensors").write_bytes(b"weights")
        write_notebook(root / "notebooks/experiments/statistics.ipynb", STATISTICS)
        write_notebook(root / "notebooks/experiments/depth.ipynb", DEPTH)
        write_notebook(root / "notebooks/01_chapter.ipynb", CHAPTER)
        self.profile()

    def profile(self, **changes: object) -> None:
        """Write the profile, with these keys changed (JSON is YAML)."""
        (self.root / "profile.yaml").write_text(json.dumps(PROFILE | changes))

    def environment(self, **extra: str) -> dict[str, str]:
        clean = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}
        return clean | {"BATCH_LOG": str(self.log), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(self.root)} | extra

    def command(self, *arguments: str) -> list[str]:
        return [sys.executable, "-m", "snakemake", *arguments, "--cores", "2", "--configfile", "profile.yaml"]

    def run(self, *arguments: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            self.command(*arguments), cwd=self.root, env=self.environment(), capture_output=True, text=True, timeout=120
        )

    def started(self) -> list[str]:
        """What the notebooks logged so far, sorted; then forgets it."""
        lines = sorted(self.log.read_text().splitlines()) if self.log.exists() else []
        self.log.unlink(missing_ok=True)
        return lines
