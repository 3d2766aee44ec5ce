"""Figures: one look per method, and a `save` that is complete, traceable and repeatable."""

import hashlib
import itertools
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
import pytest
from PIL import Image

matplotlib.use("agg")

from matplotlib import pyplot as plt
from matplotlib.colors import to_hex, to_rgb
from seaborn.utils import relative_luminance

from prunelib.figures import Chapter, Drawing, FigureError, save
from prunelib.figures import style as figures
from prunelib.figures.style import METHODS

ROOT = Path(__file__).resolve().parents[1]
COMPARED = ("block_influence", "simdiff_mssd", "simdiff_masd", "deepest", "angular", "relative_magnitude", "random")


@pytest.fixture(autouse=True)
def style():
    figures.use_style()
    plt.rcParams["savefig.dpi"] = 50  # a fraction of the time, everything else as it is
    yield
    plt.close("all")


@pytest.fixture
def rows() -> pd.DataFrame:
    """What a chapter reads from results.csv: three methods, four counts, five seeds."""
    generator = np.random.default_rng(0)
    table = []
    for method, count, seed in itertools.product(("random", "block_influence", "simdiff_mssd"), (0, 2, 4, 6), range(5)):
        place = {
            "run": f"depth/tiny__k{count}",
            "code": "0123456789ab",
            "method": method,
            "layers_removed": count,
            "seed": seed,
        }
        table.append({**place, "value": 8 * 1.2**count + (count and generator.uniform())})
    return pd.DataFrame(table)


def draw(summary: pd.DataFrame):
    grid = figures.Panels(summary.assign(all=""), "all")
    for axes, part in grid:
        figures.lines(axes, part)
        figures.level(axes, 8)
        figures.log_scale(axes)
    figures.legend(grid.figure, "points: medians")
    return grid.figure


def hashes(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def test_every_criterion_has_its_look():
    from prunelib.criteria import CRITERIA

    assert set(CRITERIA) <= set(METHODS)
    with pytest.raises(FigureError, match="no color for method 'cosin'; there are: dense, random, "):
        METHODS["cosin"]


def test_methods_in_one_figure_differ_in_color_marker_and_title():
    for kind in ("color", "title", "marker"):
        looks = [getattr(METHODS[name], kind) for name in COMPARED if (name, kind) != ("random", "marker")]
        assert len(set(looks)) == len(looks), kind
        assert "" not in looks, kind
    assert METHODS["shortgpt"].color == METHODS["block_influence"].color, "one criterion under two names"


# Machado, Oliveira and Fernandes 2009, severity 1, on linear RGB.
DEFICIENCIES = {
    "none": np.eye(3),
    "protanopia": np.array([[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]]),
    "deuteranopia": np.array([[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.01182, 0.04294, 0.968881]]),
}


def lab(color: str, deficiency: str) -> np.ndarray:
    """CIE Lab of a color as seen with a deficiency."""
    channels = np.array(to_rgb(color))
    linear = np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)
    seen = np.clip(DEFICIENCIES[deficiency] @ linear, 0, 1)
    matrix = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    ratio = matrix @ seen / np.array([0.9505, 1.0, 1.089])
    f = np.where(ratio > (6 / 29) ** 3, np.cbrt(ratio), ratio / (3 * (6 / 29) ** 2) + 4 / 29)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


@pytest.mark.parametrize("deficiency", DEFICIENCIES)
def test_colors_are_told_apart_by_everyone(deficiency):
    """A difference of 2.3 in Lab is just noticeable; ten times that between thin lines."""
    for one, other in itertools.combinations(COMPARED, 2):
        difference = np.linalg.norm(lab(METHODS[one].color, deficiency) - lab(METHODS[other].color, deficiency))
        # Grey and the palest color differ in form: a band against a line with markers.
        assert difference > (10 if "random" in (one, other) else 20), (one, other, difference)


def test_style_is_the_same_whatever_was_set_before():
    plt.rcParams.update({"font.size": 30, "axes.grid": False})
    figures.use_style()
    assert (plt.rcParams["font.size"], plt.rcParams["axes.grid"], plt.rcParams["figure.facecolor"]) == (9, True, "white")
    assert plt.rcParams["savefig.dpi"] * figures.WIDTH == 1440, "sharp at twice the width of a README"


def test_spread_gives_centre_and_interval_and_does_not_invent(rows):
    summary = figures.spread(rows, ["method", "layers_removed"])
    group = rows[(rows["method"] == "random") & (rows["layers_removed"] == 4)]["value"]
    row = summary[(summary["method"] == "random") & (summary["layers_removed"] == 4)].iloc[0]
    assert (row["value"], row["low"], row["high"], row["n"]) == (group.median(), group.min(), group.max(), 5)
    table = pd.DataFrame({"k": [1, 1, 2], "value": [3.0, None, 5.0]})
    assert list(figures.spread(table, "k")["n"]) == [1, 1]
    with pytest.raises(FigureError, match="all of them are missing"):
        figures.spread(table.assign(value=float("nan")), "k")


@pytest.fixture
def axes():
    return plt.subplots(layout="constrained")[1]


@pytest.mark.parametrize("hollow", [False, True])
def test_a_curve_draws_its_rows_and_published_ones_look_published(rows, axes, hollow):
    summary = figures.spread(rows, ["method", "layers_removed"])
    data, look = summary[summary["method"] == "block_influence"], METHODS["block_influence"]
    look = replace(look, hollow=hollow, line="--" if hollow else "-")
    figures.curve(axes, data.iloc[::-1], look)
    (container,) = axes.containers
    line, _, (bars,) = container
    np.testing.assert_allclose(line.get_xdata(), data["layers_removed"])
    np.testing.assert_array_equal(line.get_ydata(), data["value"])
    ends = np.array([segment[:, 1] for segment in bars.get_segments()])
    np.testing.assert_allclose(ends, data[["low", "high"]].to_numpy())
    assert to_hex(line.get_color()) == look.color
    assert to_hex(line.get_markerfacecolor()) == ("#ffffff" if hollow else look.color)
    assert (line.get_linestyle(), container.get_label()) == (look.line, "cosine (block influence)")


def test_curve_refuses_seeds_that_were_not_summarized(rows, axes):
    for where, message in (
        ({"data": rows[rows["method"] == "random"]}, r"several values of value at layers_removed = \[0, 2, 4, 6\]: summarize"),
        ({"data": rows.assign(value=None)}, "nothing to draw"),
    ):
        with pytest.raises(FigureError, match=message):
            figures.curve(axes, look=METHODS["random"], **where)


def test_lines_follow_the_methods_and_not_the_random_band(rows, axes):
    rows.loc[(rows["method"] == "random") & (rows["seed"] == 0), "value"] = 1000.0
    summary = figures.spread(rows, ["method", "layers_removed"])
    summary = pd.concat([summary, pd.DataFrame([{"method": "dense", "layers_removed": 0, "value": 7.0}])])
    figures.lines(axes, summary)
    band = summary[summary["method"] == "random"]
    edges = axes.collections[-1].get_paths()[0].vertices[:, 1]
    assert (edges.min(), edges.max()) == (band["low"].min(), band["high"].max())
    assert axes.get_ylim()[1] == pytest.approx(1.15 * summary.loc[summary["method"].isin(COMPARED[:3]), "value"].max())
    assert [text.get_text() for text in axes.texts] == ["band goes up to 1,000"]
    band = "random layers (median and min–max of 5 draws)"
    assert set(axes.get_legend_handles_labels()[1]) == {METHODS[name].title for name in COMPARED[:2]} | {"dense", band}
    assert list(axes.get_xticks()) == [0, 2, 4, 6]


def test_dots_stand_in_their_order_and_those_beyond_the_axis_say_so(axes):
    data = pd.DataFrame({"method": ["simdiff_mssd", "deepest"], "value": [1.0, 9.0], "low": [0.5, 8.0], "high": [2.0, 10.0]})
    figures.dots(axes, data, order=["deepest", "simdiff_mssd"], high=3.0)
    assert [text.get_text() for text in axes.get_yticklabels()] == ["deepest layers", "SimDiff (MSSD)"]
    assert [(*line.get_xdata(), *line.get_ydata()) for line in axes.lines] == [(0.5, 2.0, 1, 1), (1.0, 1), (3, 0)]
    assert [text.get_text().strip() for text in axes.texts] == ["9.0"]


def test_lines_are_labeled_at_their_ends_apart_and_at_the_top_where_they_leave(axes):
    table = pd.DataFrame({"greedy": [1.0, 2.0], "block_influence": [1.0, 2.01], "deepest": [3.0, 20.0]}, index=[1, 2])
    axes.set_ylim(0, 4)
    figures.end_labels(axes, table)
    places = {text.get_text(): text.xy for text in axes.texts}
    assert list(places) == ["greedy NLL", "cosine", "deepest layers: 20.0 at 2"]
    assert places["cosine"][1] - places["greedy NLL"][1] > 0.05 * 4
    assert places["deepest layers: 20.0 at 2"] == (2, pytest.approx(3.88))


def test_layer_bars_are_pale_where_layers_go(axes):
    data = pd.DataFrame({"layer": [0, 1, 2], "value": [3.0, 1.0, 2.0], "removed": [False, True, False]})
    figures.layer_bars(axes, data, replace(METHODS["simdiff"], hollow=True))
    assert [(bar.get_height(), bar.get_alpha()) for bar in axes.patches] == [(3, None), (1, 0.3), (2, None)]
    assert {bar.get_hatch() for bar in axes.patches} == {"////"}


def test_heatmap_numbers_can_be_read(axes):
    table = pd.DataFrame(np.linspace(0, 1, 20).reshape(4, 5), index=[8, 10, 12, 14], columns=[0.1, 0.2, 0.3, 0.4, 0.5])
    table.iloc[1, 2] = None
    figures.heatmap(axes, table, label="accuracy", annot=True, fmt=".2f")
    assert [text.get_text() for text in axes.texts] == [f"{value:.2f}" for value in table.to_numpy().ravel() if value == value]
    colors = axes.collections[0].get_facecolors()[table.notna().to_numpy().ravel()]
    for text, color in zip(axes.texts, colors, strict=True):
        light, dark = sorted([relative_luminance(text.get_color()), relative_luminance(color)], reverse=True)
        assert (light + 0.05) / (dark + 0.05) >= 4.5, "contrast that WCAG 2 asks of text"


def test_panels_hold_the_rows_of_their_column_and_row_and_the_legend_fits(rows):
    summary = figures.spread(rows, ["method", "layers_removed"]).assign(half=lambda one: one["layers_removed"] > 3)
    looks = {name: replace(METHODS[name], title=f"{METHODS[name].title} and more words") for name in METHODS}
    grid = figures.Panels(summary, "half", "method", titles={False: "few"})
    for axes, part in grid:
        assert len(part) == 2
        figures.curve(axes, part, looks[part["method"].iloc[0]])
    drawing = grid.done(rows, x=["a", "b"], y=["c", "d", "e"], note="about", keep=["method", "value"])
    assert [axes.get_title("left") for axes in grid.grid[0]] == ["few", "True"]
    assert [axes.get_xlabel() for axes in grid.grid[-1]] + [axes.get_ylabel() for axes in grid.grid[:, 0]] == [*"abcde"]
    assert list(drawing.data) == ["method", "value"]
    grid.figure.canvas.draw()
    (drawn,) = grid.figure.legends
    assert len(drawn.get_texts()) == 3, "every label once"
    assert drawn.get_title().get_text() == "about"
    assert 0 <= drawn.get_window_extent().x0 < drawn.get_window_extent().x1 <= grid.figure.bbox.width


def drawing(rows: pd.DataFrame, figure: bool = True, **options) -> Drawing:
    summary = figures.spread(rows, ["method", "layers_removed"])
    return Drawing(draw(summary) if figure else None, summary, rows, **options)


def test_save_writes_picture_numbers_and_origin(rows, tmp_path):
    one = drawing(rows, published=["data/published/published.csv"])
    chapter = Chapter(
        tmp_path, {"selection": str(tmp_path / "a.csv"), "alpha": 0.5, "model": str(tmp_path / "mine"), "output": "x"}
    )
    paths = save.save(one, "simdiff_fig5a_perplexity", tmp_path / "figures", provenance=save.origin(draw, chapter, one))
    assert [path.name for path in paths] == [f"simdiff_fig5a_perplexity{end}" for end in (".png", ".pdf", ".csv", ".json")]
    assert sorted(paths) == sorted((tmp_path / "figures").iterdir()), "no temporary file stays"
    png, pdf, csv, record = paths
    with Image.open(png) as image:
        assert image.size == (360, 150)
        assert image.convert("RGB").getpixel((2, 2)) == (255, 255, 255)
        assert not {"Software", "Creation Time"} & set(image.info)
    assert b"CreationDate" not in pdf.read_bytes()
    pd.testing.assert_frame_equal(pd.read_csv(csv), one.data, rtol=1e-9, check_dtype=False)

    record = json.loads(record.read_text(encoding="utf-8"))
    assert (record["paper"], record["number"]) == ("SimDiff, arXiv 2604.19520", "fig5a")
    assert record["function"].endswith("test_figures_style.draw")
    assert record["parameters"] == {"alpha": 0.5, "model": "mine"}, "no tables, no paths of one machine"
    assert set(record["inputs"]) == {"data/published/published.csv"}
    assert record["runs"] == [f"depth/tiny__k{count}" for count in (0, 2, 4, 6)]
    assert record["run_code"] == ["0123456789ab"]
    assert record["files"] == {path.suffix[1:]: hashlib.sha256(path.read_bytes()).hexdigest() for path in (png, pdf, csv)}
    assert plt.get_fignums() == [one.figure.number], "the notebook shows it once, at the end of its cell"


def test_the_same_data_give_the_same_bytes_in_another_process(rows, tmp_path):
    """With another hash seed: the order of sets must not show, in the pdf's font subsets for instance."""
    rows.to_csv(tmp_path / "rows.csv", index=False)
    save.save(drawing(rows), "own_repeat", tmp_path / "one", provenance={})
    code = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
import pandas, test_figures_style as t
t.figures.use_style()
t.plt.rcParams["savefig.dpi"] = 50
rows = pandas.read_csv({str(tmp_path / "rows.csv")!r}, dtype={{"code": str}})
t.save.save(t.drawing(rows), "own_repeat", {str(tmp_path / "two")!r}, provenance={{}})
"""
    environment = os.environ | {"PYTHONHASHSEED": "12345", "MPLBACKEND": "agg", "SOURCE_DATE_EPOCH": "1"}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment, cwd=tmp_path)
    assert hashes(tmp_path / "one") == hashes(tmp_path / "two")
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "one").iterdir()}
    save.save(drawing(rows), "own_repeat", tmp_path / "one", provenance={})
    assert {path: path.stat().st_mtime_ns for path in times} == times, "files that would not change are left as they are"


@pytest.mark.parametrize(
    ("stem", "message"),
    [
        ("fig5", "names no figure: a stem is <paper>_<fig|table><n>_<what>, with a paper of"),
        ("simdiff_fig5a", "names no figure"),
        ("own_../x", "names no figure"),
        ("simdif_fig5a_ppl", "with a paper of simdiff, dynamic_slicing"),
        ("simdiff_table3_layers", "is the stem of a table, the drawing is not"),
    ],
)
def test_stems_follow_the_rule(stem, message, rows, tmp_path):
    with pytest.raises(FigureError, match=message.replace("|", "\\|")):
        save.save(drawing(rows), stem, tmp_path / "figures", provenance={})
    assert not (tmp_path / "figures").exists()


def test_data_without_numbers_are_refused(rows, tmp_path):
    for data, message in (
        (rows.iloc[:0], "the plotted data are empty"),
        (rows.assign(high=float("nan")), "column 'high' of the plotted data has no value or an infinite one"),
        (rows.assign(value=float("inf")), "column 'value' of the plotted data has no value or an infinite one"),
    ):
        with pytest.raises(FigureError, match=message):
            save.save(Drawing(None, data, rows), "own_table_empty", tmp_path / "figures", provenance={})
    assert not (tmp_path / "figures").exists()


def test_a_failed_drawing_leaves_the_older_set(rows, tmp_path):
    save.save(drawing(rows), "own_kept", tmp_path, provenance={})
    before = hashes(tmp_path)
    with pytest.raises(TypeError):
        save.save(drawing(rows.assign(value=1.0)), "own_kept", tmp_path, provenance={"what": object()})
    assert hashes(tmp_path) == before


def test_tables_have_numbers_and_origin(rows, tmp_path):
    table = pd.DataFrame({"method": ["dense", "a|b"], "layers_removed": [0, 8], "ppl": [1234.567, None]})
    csv, record = save.save(Drawing(None, table, rows), "simdiff_table3_layers", tmp_path, provenance={})
    assert json.loads(record.read_text())["number"] == "table3"
    assert csv.read_text() == "method,layers_removed,ppl\ndense,0,1234.567\na|b,8,\n"
    assert save.markdown(table, digits={"ppl": 1}).splitlines() == [
        "| method | layers_removed | ppl |",
        "| --- | ---: | ---: |",
        "| dense | 0 | 1,234.6 |",
        "| a\\|b | 8 | – |",
    ]
    with pytest.raises(FigureError, match="`rows` has no column code: give rows of results"):
        save.origin(draw, Chapter(tmp_path), Drawing(None, table, rows.drop(columns="code")))


def test_pick_names_what_is_missing(rows):
    assert len(save.pick(rows, method=("random", "simdiff_mssd"), layers_removed=4)) == 10
    with pytest.raises(FigureError, match="no rows of results for method = 'cosine': method is one of random, block_influence"):
        save.pick(rows, method="cosine")
    with pytest.raises(FigureError, match="no column 'corpus'; it has run, code"):
        save.pick(rows, corpus="pydocs")
    assert save.pick(rows, may_be_empty=True, method="cosine").empty


def test_chapter_reads_tables_or_run_files(tmp_path):
    whole = Chapter(tmp_path, {"blocks": "data/blocks.csv"})
    assert whole.models("blocks") == ["ref-llama-32l", "ref-neox-24l"]
    with pytest.raises(FigureError, match="no parameter 'tasks' in this chapter; there are: blocks"):
        whole.table("tasks")
    with pytest.raises(FigureError, match=r"nothing\.csv'.*run the experiment or pass its table"):
        Chapter(tmp_path, {"blocks": "data/nothing.csv"}).table("blocks")
    run = "data/optimum/blocks/ref-neox-24l__every_block.json"
    assert set(Chapter(tmp_path, {"blocks": [run]}).table("blocks")["run_part"]) == {"every_block"}
