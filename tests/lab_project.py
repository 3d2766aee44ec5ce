"""A small project for the tests of the runner and the Snakefile: real Snakefile and package, notebooks without torch."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
from nbformat import v4

ROOT = Path(__file__).resolve().parents[1]

COMPUTE = """
import os, signal, time
from prunelib.io import at_root
from prunelib.lab import runs
recorder = runs.start(EXPERIMENT, globals())
with open(os.environ["BATCH_LOG"], "a") as log:
    log.write(f"{EXPERIMENT} {os.path.basename(output)}\\n")
time.sleep(float(os.environ.get("BATCH_SLEEP", "0")))
"""
STATISTICS = {
    "parameters": """
model = "tiny"  # folder or hub name
corpus = "pydocs"  # corpus to calibrate on
n_samples = 4  # windows
seed = 0  # of the windows
crash = []  # seeds that fail
dtype = "float32"  # of the weights
output = "build/statistics.json"  # result
""",
    "compute": COMPUTE.replace("EXPERIMENT", "'statistics'")
    + """
if seed in crash:
    os.kill(os.getpid(), signal.SIGKILL)
at_root(output).with_suffix(".safetensors").write_bytes(bytes([seed]))
_ = recorder.write([{"metric": "windows", "value": n_samples, "role": corpus + dtype + model}])
""",
}
BLOCKS = {
    "parameters": """
model = "tiny"  # folder or hub name
statistics = []  # run files of the statistics of this model
sizes = [0]  # how many layers go
dtype = "float32"  # of the weights
output = "build/blocks.json"  # result
""",
    "compute": COMPUTE.replace("EXPERIMENT", "'blocks'")
    + """
total = sum(at_root(path).with_suffix(".safetensors").read_bytes()[0] for path in statistics)
rows = [{"metric": "ppl", "value": total + size, "size": size, "role": f"{model} {dtype}", "n": 1} for size in sizes]
_ = recorder.write(rows)
""",
}
CHAPTER = {
    "parameters": """
blocks = "blocks.csv"  # the table
figures = "figures"  # where the pictures go
live = "data"  # folder of the tables of this batch
output = "build/chapter.json"  # result
""",
    "# Chapter": None,
    "## Figure 1: perplexity against `size` (`own_sizes`)": None,
    "compute": COMPUTE.replace("EXPERIMENT", "'chapter'"),
    "draw": """
from prunelib.figures.chapter import own_sizes
from prunelib.figures.save import Chapter
from prunelib.figures.style import use_style
use_style()
files = {path: path.read_bytes() for path in at_root(figures).iterdir()}
_ = own_sizes(Chapter(figures, {"blocks": blocks, "live": live}))
assert files == {path: path.read_bytes() for path in at_root(figures).iterdir()}, "the rule drew the same from run files"
_ = recorder.write([])
""",
}
FIGURE = '''
"""The figure of the chapter."""

from matplotlib.figure import Figure

from prunelib.figures.save import Chapter, Drawing, figure

CHAPTER = "01_chapter"


@figure("own_sizes", reads={"blocks": ["some"]}, models=0)
def own_sizes(chapter: Chapter) -> Drawing:
    """Perplexity against the number of layers removed."""
    rows = chapter.table("blocks").query("run == 'blocks/tiny__some'")
    return Drawing(Figure(), rows[["run", "size", "value"]], rows)
'''
TINY = {"model": "data/tiny", "dtype": "float32"}
PROFILE = {
    "runs": "data/runs/test",
    "tables": "data",
    "figures": "figures",
    "models": {"tiny": TINY},
    "calibration": {"pydocs": {"n_samples": 4}},
    "calibration_seeds": [0, 1],
    "statistics": {"crash": []},
    "blocks": {name: {"models": ["tiny"], "sizes": [size]} for name, size in (("some", 2), ("more", 4))},
    "chapters": {"01_chapter": {}},
}


def write_notebook(path: Path, cells: dict) -> Path:
    """A notebook of the cells: text None makes the key a markdown cell, the key `parameters` is the tag."""
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    notebook = v4.new_notebook(metadata={"kernelspec": kernel})
    for name, source in cells.items():
        tags = {"tags": ["parameters"]} if name == "parameters" else {}
        cell = v4.new_markdown_cell(name) if source is None else v4.new_code_cell(source.strip(), metadata=tags)
        notebook.cells.append(cell)
    path.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(notebook, path)
    return path


class Project:
    """A copy of the project's machinery in `root` with the notebooks above; `run` starts Snakemake in it."""

    def __init__(self, root: Path) -> None:
        self.root, self.log = root, root / "log.txt"
        for package in ("lab", "figures"):
            shutil.copytree(ROOT / "prunelib" / package, root / "prunelib" / package)
        for path in (root / "prunelib/figures").glob("*.py"):
            if path.stem not in ("__main__", "save", "style"):
                path.unlink()
        for name in (
            "Snakefile",
            "pyproject.toml",
            "data/models/titles.json",
            "prunelib/io.py",
            "profiles/default/config.yaml",
        ):
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, root / name)
        for package in ("prunelib", "prunelib/figures"):
            (root / package / "__init__.py").touch()
        (root / "prunelib/figures/chapter.py").write_text(FIGURE.lstrip())
        (root / "data/tiny").mkdir(parents=True)
        (root / "data/tiny/model.safetensors").write_bytes(b"weights")
        write_notebook(root / "notebooks/experiments/statistics.ipynb", STATISTICS)
        write_notebook(root / "notebooks/experiments/blocks.ipynb", BLOCKS)
        write_notebook(root / "notebooks/01_chapter.ipynb", CHAPTER)
        self.profile()

    def profile(self, **changes: object) -> None:
        """Write the profile, with these keys changed (JSON is YAML)."""
        (self.root / "profile.yaml").write_text(json.dumps(PROFILE | changes))

    def environment(self, **extra: str) -> dict[str, str]:
        clean = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}
        return clean | {"BATCH_LOG": str(self.log), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(self.root)} | extra

    def command(self, *arguments: str) -> list[str]:
        return [sys.executable, "-m", "snakemake", *arguments, "--configfile", "profile.yaml"]

    def run(self, *arguments: str) -> subprocess.CompletedProcess:
        command = self.command(*arguments)
        return subprocess.run(command, cwd=self.root, env=self.environment(), capture_output=True, text=True, timeout=600)

    def started(self) -> list[str]:
        """What the notebooks logged so far, sorted; then forgets it."""
        lines = sorted(self.log.read_text().splitlines()) if self.log.exists() else []
        self.log.unlink(missing_ok=True)
        return lines
