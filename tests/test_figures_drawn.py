"""Every figure, drawn from the committed tables: its numbers are those in figures/, and a missing group is named."""

import hashlib
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import matplotlib
import pandas as pd
import pytest
import yaml

matplotlib.use("agg")

from matplotlib import pyplot as plt

from prunelib.figures import Chapter, FigureError, save, use_style
from prunelib.figures.save import figure_suffixes, registry
from prunelib.lab import profile

ROOT = Path(__file__).resolve().parents[1]
REGISTRY = registry()
DRAWN = sorted(stem for stem, entry in REGISTRY.items() if entry.reads)  # the others need a model
CHAPTERS = sorted({entry.chapter for entry in REGISTRY.values()})


@pytest.fixture(scope="module")
def chapters() -> dict[str, Chapter]:
    """The chapters of the default profile."""
    default = profile.read(yaml.safe_load((ROOT / "profiles/smollm2.yaml").read_text(encoding="utf-8")))
    return {name: Chapter("", profile.chapter_values(default, name)) for name in CHAPTERS}


@pytest.fixture(autouse=True)
def style(monkeypatch):
    def coarse(figure, suffix):
        if suffix == ".png":
            figure.savefig(io.BytesIO(), dpi=40)
        return b""

    use_style()
    monkeypatch.setattr(save, "picture", coarse)
    yield
    plt.close("all")


@pytest.mark.parametrize("stem", DRAWN)
def test_every_figure_is_drawn_with_the_committed_numbers(stem, chapters, tmp_path):
    entry = REGISTRY[stem]
    entry.draw(Chapter(tmp_path, chapters[entry.chapter].parameters, chapters[entry.chapter]._tables))
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(f"{stem}{suffix}" for suffix in figure_suffixes(stem))
    pd.testing.assert_frame_equal(
        pd.read_csv(tmp_path / f"{stem}.csv"), pd.read_csv(ROOT / "figures" / f"{stem}.csv"), rtol=1e-8
    )
    record = json.loads((tmp_path / f"{stem}.json").read_text(encoding="utf-8"))
    assert record["runs"] == json.loads((ROOT / f"figures/{stem}.json").read_text(encoding="utf-8"))["runs"]
    assert record["runs"], "numbers come from runs"


@pytest.mark.parametrize("chapter", CHAPTERS)
def test_chapters_are_short(chapter):
    cells = json.loads((ROOT / f"notebooks/{chapter}.ipynb").read_text(encoding="utf-8"))["cells"]
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    assert sum(bool(line.strip()) for cell in code for line in cell.splitlines()) <= 120


MISSING = [  # stem, table, rows that are taken away, what the error names
    ("simdiff_fig5a_perplexity", "selection", {"method": "simdiff_masd"}, "simdiff_masd"),
    ("simdiff_fig4a_alpha_mssd", "selection", {"role": "path"}, "path"),
    ("simdiff_fig2_importance", "statistics", {"metric": "mssd"}, "mssd"),
    ("simdiff_table3_layers_removed", "tasks", {"run_part": ["items", "more_sizes", "full"]}, "items"),
    ("own_regret", "optimum_runs", {"experiment": "optimum"}, "profiles/optimum.yaml"),
    ("deeper_layers_fig5_simple_vs_similarity", "blocks", {"role": "every_block"}, "profiles/optimum.yaml"),
    ("deeper_layers_fig2_accuracy", "tasks", {"run_part": "blocks"}, "blocks"),
    ("dynamic_slicing_fig1_lr", "statistics", {"metric": "block_influence"}, "block_influence"),
    ("dynamic_slicing_fig2to7_slice_base", "slicing", {"method": "dynamic"}, "dynamic"),
    ("own_healing_tokens", "healing", {"recipe": "none"}, "none"),
    ("own_depth_vs_slicing", "selection", {"run_part": "rules"}, "rules"),
]


@pytest.mark.parametrize(("stem", "table", "where", "named"), MISSING, ids=[stem for stem, *_ in MISSING])
def test_a_missing_group_is_named(stem, table, where, named, chapters, tmp_path):
    whole = chapters[REGISTRY[stem].chapter]
    rows = whole.table(table)
    rest = rows.drop(index=save.pick(rows, **where).index)
    chapter = Chapter(tmp_path, whole.parameters, {**whole._tables, table: rest})
    with pytest.raises(FigureError, match=named):
        REGISTRY[stem].draw(chapter)
    assert not list(tmp_path.iterdir())


def test_healings_of_one_size_and_without_ablations(chapters, tmp_path):
    whole = chapters["05_healing"]
    rows = whole.table("healing")
    chapter = Chapter(tmp_path, whole.parameters | {"converged": None}, {"healing": rows[rows["run_part"] == "choices"]})
    for stem in ("deeper_layers_fig3_healed_loss", "own_healing_tokens"):
        assert set(REGISTRY[stem].draw(chapter).data["method"]) == set(rows["method"]) - {"dense"}
    for stem in ("own_healing_ablations", "deeper_layers_fig9_rank"):
        with pytest.raises(FigureError, match="no rows of results"):
            REGISTRY[stem].draw(chapter)


def test_few_functions_between_table_and_picture(chapters, tmp_path, monkeypatch):
    """Who reads Figure 5a from its function to its table or its png follows at most 8 calls, one inside the other."""
    inside, deepest, folder = [], [], f"{os.sep}prunelib{os.sep}"
    monkeypatch.setattr(save, "picture", lambda *_: b"")

    def watch(frame, event, _):
        if event not in ("call", "return") or folder not in frame.f_code.co_filename or frame.f_code.co_name.startswith("<"):
            return
        if event == "call":
            inside.append(frame.f_code.co_name)
            deepest[:] = max(deepest, inside, key=len)
        else:
            inside.pop()

    entry = REGISTRY["simdiff_fig5a_perplexity"]
    chapter = Chapter(tmp_path, chapters[entry.chapter].parameters)  # its tables are still to be read
    sys.setprofile(watch)
    try:
        entry.draw(chapter)
    finally:
        sys.setprofile(None)
    assert len(deepest) - 1 <= 8, " → ".join(deepest)


@pytest.mark.slow
def test_one_figure_from_the_command_line(tmp_path):
    command = [
        sys.executable,
        "-m",
        "prunelib.figures",
        "deeper_layers_fig1c_distance_curves",
        str(tmp_path),
        "blocks=data/pretrained/blocks.csv",
    ]
    subprocess.run(command, cwd=ROOT, check=True)
    drawn = pd.read_csv(tmp_path / "deeper_layers_fig1c_distance_curves.csv")
    pd.testing.assert_frame_equal(drawn, pd.read_csv(ROOT / "figures/deeper_layers_fig1c_distance_curves.csv"), rtol=1e-8)
    unknown = subprocess.run(
        [*command[:3], "own_nothing", str(tmp_path)], cwd=ROOT, check=False, capture_output=True, text=True
    )
    assert unknown.returncode == 2
    assert "there is no figure 'own_nothing'; there are: deeper_layers_fig1c" in unknown.stderr


def test_committed_figures_are_complete_and_untouched():
    """Every json in figures/ has the files it lists, with their hashes: no half-replaced set, no number edited by hand."""
    records = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in (ROOT / "figures").glob("*.json")}
    assert set(records) == set(REGISTRY)
    for stem, record in records.items():
        assert {f".{kind}" for kind in record["files"]} | {".json"} == set(figure_suffixes(stem))
        for kind, digest in record["files"].items():
            if kind != "pdf":  # made, not kept
                content = (ROOT / "figures" / f"{stem}.{kind}").read_bytes()
                assert hashlib.sha256(content).hexdigest() == digest, f"{stem}.{kind}"
