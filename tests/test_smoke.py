"""The smoke profile, from the models and the text to its figures, gives the committed numbers."""

import subprocess
import sys

from prunelib.io import project_root
from prunelib.lab import profile as grid


def test_verification_runs_the_smoke_profile_and_agrees_with_the_committed_values():
    command = [sys.executable, "-m", "prunelib.lab.verify"]
    done = subprocess.run(command, cwd=project_root(), capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stderr
    assert "numbers of the smoke profile agree with the committed ones" in done.stdout
    drawn = {path.stem for path in (project_root() / "build/smoke/figures").glob("*.csv")}
    chapters = ("01_cosine_vs_simdiff", "02_layer_search", "03_deeper_layers", "04_dynamic_slicing")
    chapters += ("05_healing", "06_healing_data", "07_speed_and_memory", "08_claims")
    assert drawn == {stem for chapter in chapters for stem in grid.figure_stems(f"notebooks/{chapter}.ipynb")}
