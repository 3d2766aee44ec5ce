"""Chapter 08: what the papers claim, and what the tables say to it."""

import functools
import json

import pandas as pd

from prunelib.claims import MARKS, Outcome, Tables, frame, markdown, number, outcomes
from prunelib.figures.save import Chapter, Drawing, figure
from prunelib.figures.style import panels
from prunelib.lab.runs import PAPERS, PUBLISHED

CHAPTER = "08_claims"
READS = dict.fromkeys(("statistics", "selection", "blocks", "tasks", "slicing", "healing", "combining"))
COLORS = {"holds": "#a8d8c2", "fails": "#f3b9a0", "differs": "#f1e3a4"}
SMALL = {"va": "center", "fontsize": 7.5}
GREY = {"color": "#555555", "ha": "right", **SMALL}


@functools.lru_cache(maxsize=1)
def _measured(parameters: str) -> tuple[list[Outcome], pd.DataFrame, pd.DataFrame]:
    """The claims of a chapter (parameters as JSON): outcomes, one line per claim and model, and the runs behind them."""
    tables = Tables(json.loads(parameters))
    found = outcomes(tables)
    used = {run for one in found for part in one.measured for run in part.runs}
    return found, frame(found), tables.code(used)


@figure("own_table_claims", reads=READS)
def table_claims(chapter: Chapter) -> Drawing:
    """Every claim with its value, interval and verdict on every model, and the run files behind it."""
    found, data, rows = _measured(json.dumps(chapter.parameters))
    return Drawing(None, data.drop(columns="short"), rows, text=markdown(found, PAPERS), published=[PUBLISHED])


@figure("own_claims", reads=READS)
def claims(chapter: Chapter) -> Drawing:
    """One line per claim that could be tested, one column per model: verdict by color and sign, and the measured value."""
    _, everything, rows = _measured(json.dumps(chapter.parameters))
    data = everything[everything["measured"].notna()]
    places = {one: place for place, one in enumerate(data["id"].unique())}
    by_use = data["model"].value_counts()
    columns = sorted(data["model"].unique(), key=lambda name: (name == "as printed", -by_use[name]))
    start = 4.6  # of the cells, in units of their width; the words are before them
    drawn, axes = panels(1, 1, height=0.19 * (len(places) + 3))
    write = functools.partial(axes.text, **SMALL)
    for one in data.drop_duplicates("id").itertuples():
        place = places[one.id]
        write(0, place, one.id, color="#555555")
        write(0.86, place, one.short if isinstance(one.short, str) else one.claim)
        axes.text(start - 0.08, place, number(one.published, one.digits), **GREY)
    for one in data.itertuples():
        place, left = places[one.id], start + columns.index(one.model)
        color = COLORS[one.verdict_of_model]
        axes.fill_between([left, left + 0.96], place - 0.45, place + 0.45, color=color, linewidth=0)
        write(left + 0.05, place, MARKS[one.verdict_of_model])
        write(left + 0.91, place, number(one.measured, one.digits), ha="right")
    for first in data.drop_duplicates("paper")["id"].iloc[1:]:
        axes.axhline(places[first] - 0.5, color="#888888", linewidth=0.8)
    axes.text(start - 0.08, -1, "published", **GREY)
    for index, name in enumerate(columns):
        write(start + index + 0.48, -1, name, ha="center")
    write(0, -1, "     ".join(f"{MARKS[verdict]} {verdict}" for verdict in COLORS))
    axes.set(xlim=(0, start + len(columns)), ylim=(len(places) - 0.4, -1.6))
    axes.axis("off")
    kept = ["id", "model", "published", "measured", "low", "high", "verdict_of_model", "verdict"]
    return Drawing(drawn, data[kept].dropna(axis=1, how="all"), rows, published=[PUBLISHED])
