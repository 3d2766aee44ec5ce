"""Chapter 08: what the papers claim, and what the tables say to it."""

import pandas as pd
import seaborn
from matplotlib.colors import ListedColormap

from prunelib import claims as papers
from prunelib.figures import style as fig
from prunelib.figures.save import Chapter, Drawing, figure
from prunelib.lab.runs import PAPERS, PUBLISHED

CHAPTER = "08_claims"
READS = dict.fromkeys(("statistics", "selection", "blocks", "tasks", "slicing", "healing", "combining"))
READS |= dict.fromkeys(("optimum_runs", "converged", "gpu"))
COLORS = {"holds": "#a8d8c2", "fails": "#f3b9a0", "differs": "#f1e3a4"}


def _measured(chapter: Chapter) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The claims of a chapter, one line per claim and model, and the runs behind them."""
    tables = papers.Tables(chapter.parameters)
    found = papers.outcomes(tables)
    return found, tables.code(" ".join(found["runs"].dropna()).split())


@figure("own_table_claims", reads=READS)
def table_claims(chapter: Chapter) -> Drawing:
    """Every claim with its value, interval and verdict on every model, and the run files behind it."""
    found, rows = _measured(chapter)
    return Drawing(None, found.drop(columns="short"), rows, text=papers.markdown(found, PAPERS), published=[PUBLISHED])


@figure("own_claims", reads=READS)
def claims(chapter: Chapter) -> Drawing:
    """One line per claim that could be tested, one column per model: verdict by color and sign, and the measured value."""
    everything, rows = _measured(chapter)
    data = everything[everything["measured"].notna()]
    data = data.assign(line=data["id"] + "   " + data["short"].fillna(data["claim"]))
    marks, numbers = data["verdict_of_model"].map(papers.MARKS), map(papers.number, data["measured"], data["digits"])
    data["label"] = marks + " " + list(numbers)
    data["color"] = data["verdict_of_model"].map(list(COLORS).index)
    columns = ["published", *data["model"].value_counts().drop(papers.PRINTED, errors="ignore").index, papers.PRINTED]
    first = data.drop_duplicates("line").set_index("line")
    cells = data.pivot(index="line", columns="model", values="color").reindex(first.index, columns=columns).astype(float)
    labels = data.pivot(index="line", columns="model", values="label").reindex(first.index, columns=columns)
    labels["published"] = list(map(papers.number, first["published"], first["digits"]))
    grid = fig.Panels(data.assign(all=""), "all", titles=[""], height=0.19 * (len(first) + 3))
    axes = grid.grid[0, 0]
    colors = ListedColormap(list(COLORS.values())).with_extremes(over="white")
    colors = {"cmap": colors, "vmin": -0.5, "vmax": len(COLORS) - 0.5, "cbar": False, "linewidths": 1}
    text = {"annot": labels.fillna(""), "fmt": "", "annot_kws": {"fontsize": 7.5, "color": "black"}}
    seaborn.heatmap(cells.assign(published=float(len(COLORS))), ax=axes, **colors, **text)
    axes.set(xlabel="", ylabel="")
    axes.tick_params(length=0, labelsize=7.5, top=False, labeltop=True, labelbottom=False)
    axes.grid(visible=False)
    for place in first.reset_index().drop_duplicates("paper").index[1:]:
        axes.axhline(place, color="#888888", linewidth=0.8)
    keep = ["id", "model", "published", "measured", "low", "high", "verdict_of_model", "verdict"]
    note = "     ".join(f"{papers.MARKS[verdict]} {verdict}" for verdict in COLORS)
    return grid.done(rows, keep=keep, note=note, published=[PUBLISHED])
