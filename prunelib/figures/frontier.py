"""Chapter 02, own: what a search finds for the evaluations that it spends."""

import pandas as pd

from prunelib.figures import layer_search
from prunelib.figures import style as fig
from prunelib.figures.save import Chapter, Drawing, figure, markdown, pick

CHAPTER = layer_search.CHAPTER
PARTS = ("frontier", "frontier_kl", "frontier_beam", "frontier_evolution")
SEARCHES = ("greedy", "surrogate", "beam", "greedy_kl", "surrogate_kl", "surrogate_kl_half", "evolutionary")
PAIRS = (("surrogate", "greedy"), ("surrogate_kl", "greedy_kl"), ("surrogate_kl_half", "greedy_kl"))
NOTE = "dots and bars: median and min–max of the calibration draws\ngrey: sets evaluated (by evolution on few windows each)"


def _gaps(rows: pd.DataFrame) -> pd.DataFrame:
    """Loss of each search less that of its partner of `PAIRS` from the same draw, on every text: one row per draw."""
    draw = ["model", "corpus", "layers_removed", "calibration_seed"]
    losses = rows.pivot_table(index=draw, columns="method", values="value")
    pairs = [(one, other) for one, other in PAIRS if {one, other} <= set(losses)]
    gaps = [(losses[one] - losses[other]).rename("value").reset_index().assign(method=one, less=other) for one, other in pairs]
    return pd.concat([pd.DataFrame(columns=[*draw, "value", "method", "less"]), *gaps]).dropna(subset=["value"])


def _said(gaps: pd.DataFrame, names: list[str], sizes: list[int]) -> str:
    """The finding: the surrogate against greedy search, both on KL; nothing without them."""
    medians = gaps[gaps["method"] == "surrogate_kl"].groupby(["model", "layers_removed"])["value"].median()
    texts = []
    for name in [name for name in names if name in medians]:
        values = " and ".join(f"{medians[name][k]:+.2f}".replace("-", "−") for k in sizes if k in medians[name])
        texts.append(f"{fig.short(name)} {values}")
    what = f"Surrogate less greedy search on KL, as many evaluations, nats without {' and '.join(map(str, sizes))} layers:"
    return f"{what}\n{'; '.join(texts)}" if texts else ""


@figure("own_frontier_equal_cost", reads={"selection": (*layer_search.READS["selection"], *PARTS), "optimum_runs": None})
def equal_cost(chapter: Chapter) -> Drawing:
    """Regret of every search over the sets that it evaluated, at three K; in the text the paired differences on all texts."""
    found = layer_search.search(chapter, (*layer_search.READS["selection"], *PARTS))
    rows = pick(found.rows, metric="nll", role=("choice", "other_text"), method=SEARCHES)
    if rows["run_part"].isin(PARTS).any():
        rows = rows[rows["run_part"].isin(PARTS)]  # five draws, instead of the three of the other figures
    regrets = pick(found.regrets, run=set(rows["run"]), method=SEARCHES)
    regrets = regrets[regrets["layers_removed"].isin({4, 8, 12} & set(found.sizes))]
    keys = ["model", "layers_removed", "method"]
    data = fig.spread(regrets.dropna(subset=["evaluations"]), keys)
    data = data.merge(fig.spread(regrets, keys, value="evaluations")[[*keys, "value"]], on=keys, suffixes=("", "_evaluations"))
    data = found.arranged(data.rename(columns={"value_evaluations": "evaluations"}).sort_values("layers_removed"))
    order = [name for name in SEARCHES if name in set(data["method"])]
    titles = {k: f"K = {k}" for k in data["layers_removed"]}
    grid = fig.Panels(data, "layers_removed", "model", titles=titles, height=3.1, sharey=True)
    for axes, part in grid:
        fig.dots(axes, part, order=order, high=1.5 * part["high"].max() + 0.01)
        for row in part.itertuples():
            end = {"xycoords": ("axes fraction", "data"), "ha": "right", "va": "center", "color": "#666666", "fontsize": 7}
            axes.annotate(f"{row.evaluations:,.0f}", (1, order.index(row.method)), **end)
    gaps = _gaps(rows)
    here = gaps[gaps["corpus"] == regrets["corpus"].iloc[0]]
    title = _said(here, list(found.truth), [k for k in (8, 12) if k in titles])
    text = markdown(_table(gaps, found.rows)) if len(gaps) else None
    return grid.done(rows, x="regret (nats/token)", y=grid.rows, note=NOTE, title=title, text=text)


def _table(gaps: pd.DataFrame, rows: pd.DataFrame) -> pd.DataFrame:
    """Median and range of the paired differences at K = 4, 8 and 12, and the cost of the whole search beside its partner's."""
    lines = fig.spread(gaps[gaps["layers_removed"].isin((4, 8, 12))], ["model", "corpus", "method", "less", "layers_removed"])
    spent = pick(rows, metric="layer_tokens", method=SEARCHES).groupby(["model", "method"])["value"].median()
    cost = [spent[one.model, one.method] / spent[one.model, one.less] for one in lines.itertuples()]
    lines = lines.astype({"layers_removed": int}).assign(corpus=lines["corpus"].map(fig.text_title), cost=cost)
    for column in ("method", "less"):
        lines[column] = [fig.METHODS[name].title for name in lines[column]]
    names = {
        "corpus": "text",
        "layers_removed": "K",
        "value": "median (nats)",
        "low": "least",
        "high": "greatest",
        "n": "draws",
    }
    return lines.rename(columns=names | {"cost": "layer tokens, ratio"})
