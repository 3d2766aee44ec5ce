"""Chapter 08: what the papers claim, and what the tables say to it."""

import textwrap

import pandas as pd
import seaborn
from matplotlib.colors import ListedColormap

from prunelib import claims as papers
from prunelib.figures import style as fig
from prunelib.figures.save import Chapter, Drawing, figure
from prunelib.lab.runs import PUBLISHED

CHAPTER = "08_claims"
READS = dict.fromkeys(("statistics", "selection", "blocks", "tasks", "slicing", "healing", "combining"))
READS |= dict.fromkeys(("optimum_runs", "converged", "gpu"))
COLORS = {"holds": "#a8d8c2", "fails": "#f3b9a0", "differs": "#f1e3a4"}


def _measured(chapter: Chapter) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The claims of a chapter, one line per claim and model, and the runs behind them."""
    sources = [papers.Tables(chapter.parameters)]
    sources += [papers.Tables.of_profile(path) for path in [chapter["reference"]] if path]
    found = papers.outcomes(*sources)
    used = " ".join(found["runs"].dropna()).split()
    return found, pd.concat([one.code(used) for one in sources]).drop_duplicates("run")


@figure("own_table_claims", reads=READS)
def table_claims(chapter: Chapter) -> Drawing:
    """Every claim with its value, interval and verdict on every model, and the run files behind it."""
    found, rows = _measured(chapter)
    data = found.drop(columns="short").replace("", None).dropna(axis=1, how="all")
    return Drawing(None, data, rows, papers.page(found, "../figures"), [PUBLISHED])


@figure("own_claims", reads=READS)
def claims(chapter: Chapter) -> Drawing:
    """One line per claim that could be tested, one column per model: verdict by color and sign, and the measured value."""
    everything, rows = _measured(chapter)
    data = everything[everything["measured"].notna()].copy()
    first = data.drop_duplicates("id").set_index("id")
    numbers = pd.Series(map(papers.number, data["measured"], data["digits"]), index=data.index)
    data["label"] = data["verdict_of_model"].map(papers.MARKS) + " " + numbers
    few = [name for name, count in data["model"].value_counts().items() if count == 1 and name != papers.PRINTED]
    shown = data.replace({"model": dict.fromkeys(few, papers.PRINTED)})
    both = shown.pivot(index="id", columns="model", values=["label", "verdict_of_model"]).reindex(first.index)
    labels, cells = (both[name][papers.models(shown)] for name in ("label", "verdict_of_model"))
    labels.insert(0, "published", list(map(papers.number, first["published"], first["digits"])))
    labels.insert(1, "holds if", first["holds_if"])
    cells = cells.map(list(COLORS).index, na_action="ignore").reindex(columns=labels.columns).astype(float)
    cells[["published", "holds if"]] = len(COLORS)
    tally, changed = papers.summary(everything), papers.changes(everything)
    counts = tally.set_index("judged on")
    one = counts.loc[counts.sum(axis=1).idxmax()]
    title = f"{one.name}: " + ", ".join(f"{count} {verdict[:-1]}" for verdict, count in one.items() if count)
    grid = fig.Panels(data.assign(all=""), "all", titles=[""], height=0.19 * (len(first) + 7))
    axes = grid.grid[0, 0]
    colors = ListedColormap(list(COLORS.values())).with_extremes(over="white")
    colors = {"cmap": colors, "vmin": -0.5, "vmax": len(COLORS) - 0.5, "cbar": False, "linewidths": 1}
    text = {"annot": labels.fillna(""), "fmt": "", "annot_kws": {"fontsize": 7, "color": "black"}}
    seaborn.heatmap(cells, ax=axes, **colors, **text)
    axes.set(xlabel="", ylabel="")
    axes.set_yticks([place + 0.5 for place in range(len(first))], first.index + "  " + first["short"])
    axes.set_xticklabels([textwrap.fill(name.replace(papers.PRINTED, "other"), 10) for name in labels], linespacing=0.9)
    axes.tick_params(length=0, labelsize=7, rotation=0, top=False, labeltop=True, labelbottom=False)
    axes.grid(visible=False)
    for label, name in zip(axes.get_yticklabels(), first.index, strict=True):
        label.set_weight("bold" if name in set(changed["id"]) else "normal")
    for place in first.reset_index().drop_duplicates("paper").index[1:]:
        axes.axhline(place, color="#888888", linewidth=0.8)
    keep = ["id", "model", "published", "measured", "low", "high", "verdict_of_model", "judged_on", "verdict"]
    note = "     ".join(f"{papers.MARKS[verdict]} {verdict}" for verdict in COLORS)
    note += f"\nother: {', '.join([*few, papers.PRINTED])}"
    note += f"     bold: the {len(changed)} claims on which real and reference models disagree" * (len(changed) > 0)
    text = "\n\n".join(papers.markdown(table) for table in (tally, changed) if len(table))
    return grid.done(rows, keep=keep, note=note, text=text, title=title, published=[PUBLISHED])
