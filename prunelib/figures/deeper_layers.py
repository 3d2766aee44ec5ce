"""Chapter 03: how many of the deep layers does a model need, when one contiguous block is removed?"""

from dataclasses import replace

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LogNorm, Normalize

from prunelib.figures import style as fig
from prunelib.figures.save import Chapter, Drawing, FigureError, figure, pick
from prunelib.lab.runs import PUBLISHED, published

CHAPTER = "03_deeper_layers"
READS = {"blocks": None}
TASKS = {"tasks": ("blocks",)}
EMBEDDED = ("pydocs_next_line", "pydocs_summary", "pydocs_parameter")
RULES = ("angular", "deepest")
SPARED = "best block that spares the last layer"
SIZE, START, DROPPED = "block size n", "first layer of the block, l", "layers dropped, %"
MARK = {"linestyle": "", "markeredgecolor": "black", "markeredgewidth": 0.5}
NEAREST = {**MARK, "marker": "D", "color": fig.METHODS["angular"].color, "markersize": 3.6, "label": "removed by the rule"}


def _distances(chapter: Chapter) -> pd.DataFrame:
    """Angular distance of every block and calibration draw; `chosen`: the rule removes it; `layers`: of its model."""
    rows = pick(chapter.table("blocks"), metric="angular").astype({"size": int, "start": int, "calibration_seed": int})
    rows["layers"] = rows.groupby("model")["start"].transform("max") + 1
    allowed = rows[rows["start"] + rows["size"] <= rows["layers"] - rows["protect_last"].astype(int)]
    nearest = allowed.sort_values("value", kind="stable").drop_duplicates(["model", "size", "calibration_seed"])
    return rows.assign(chosen=rows.index.isin(nearest.index))


def _medians(rows: pd.DataFrame) -> pd.DataFrame:
    """Median of the draws for every block, and whether most draws choose it (`nearest`)."""
    chosen = rows[rows["chosen"]].groupby(["model", "size"])["start"].agg(lambda starts: starts.mode().iloc[0])
    data = rows.groupby(["model", "size", "start"], sort=False)["value"].median().reset_index()
    data = data.join(chosen.rename("nearest"), on=["model", "size"])
    return data.assign(nearest=data["start"] == data["nearest"])


def _titles(rows: pd.DataFrame) -> dict[str, str]:
    layers = rows.groupby("model", sort=False)["layers"].first()
    return {name: f"{fig.SHORT.get(name, name)} ({count} layers)" for name, count in layers.items()}


def _scores(chapter: Chapter) -> pd.DataFrame:
    """Accuracy of both rules in every task, and the mean (`all`) with its 95 % interval over the items."""
    rows = pick(chapter.table("tasks"), run_part="blocks", task=["all", *EMBEDDED], method=("dense", *RULES))
    rows, keys = rows.fillna({"fraction": 0.0}), ["model", "method", "size", "task"]
    ends = pick(rows, metric=["average_low", "average_high"]).pivot(index=keys, columns="metric", values="value")
    ends = ends.rename(columns={"average_low": "low", "average_high": "high"})
    data = pick(rows, metric=["average", "acc"]).drop(columns=["low", "high"]).join(ends, on=keys)
    columns = ["model", "method", "size", "fraction", "task", "metric", "value", "low", "high", "n", "run", "code"]
    return _with_dense(data[columns])


def _with_dense(data: pd.DataFrame) -> pd.DataFrame:
    """Every rule begins with the dense model, where nothing is dropped."""
    both = [data[data["method"].isin(("dense", rule))].assign(method=rule) for rule in RULES]
    return pd.concat(both).sort_values(["model", "size"], kind="stable")


def _chance(chapter: Chapter) -> pd.Series:
    rows = pick(chapter.table("tasks"), run_part="blocks", metric="chance", task=EMBEDDED)
    return rows.drop_duplicates(["model", "task"]).groupby("model")["value"].mean()


def _color_bar(grid: fig.Panels, colors: ScalarMappable, label: str) -> None:
    grid.figure.colorbar(colors, ax=list(grid.grid[0]), label=label, pad=0.02).outline.set_visible(False)


@figure("deeper_layers_fig1c_distance_curves", reads=READS)
def fig1c_distance_curves(chapter: Chapter) -> Drawing:
    """Angular distance between the input of layer l and that of layer l + n, a curve per block size n."""
    rows = _distances(chapter)
    data = _medians(rows).rename(columns={"value": "angular_distance"})
    grid = fig.Panels(data, "model", titles=_titles(rows), height=3.3, sharey=True)
    colors = ScalarMappable(Normalize(1, data["size"].max()), "cividis")
    for axes, part in grid:
        shown = part["size"].unique()[:: 2 if len(part["size"].unique()) < 24 else 3]
        for size, line in part[part["size"].isin(shown)].groupby("size"):
            style = {"marker": "" if len(line) > 2 else ".", "linewidth": 1.1}
            axes.plot(line["start"], line["angular_distance"], color=colors.to_rgba(size), **style)
        near = part[part["nearest"] & part["size"].isin(shown)]
        axes.plot(near["start"], near["angular_distance"], **NEAREST)
    _color_bar(grid, colors, SIZE)
    return grid.done(rows, x=START, y="angular distance d(l, l + n)")


def _heat(axes: Axes, part: pd.DataFrame, norm: Normalize) -> ScalarMappable:
    """Blocks as cells (up n, along l) colored by `value`, those of the rule marked."""
    cells = part.pivot(index="size", columns="start", values="value")
    near = part[part["nearest"]]
    axes.plot(near["start"], near["size"], **NEAREST)
    axes.grid(visible=False)
    axes.set_xlabel(START)
    return axes.pcolormesh(cells.columns, cells.index, cells.to_numpy(dtype=float), norm=norm, cmap="cividis", rasterized=True)


@figure("deeper_layers_fig4_heatmap", reads=READS)
def fig4_heatmap(chapter: Chapter) -> Drawing:
    """The paper's heat map without the blocks that start at layer 0: the distances of each block size, rescaled to [0, 1]."""
    rows = _distances(chapter)
    data = _medians(rows).query("start > 0")
    sizes = data.groupby(["model", "size"])["value"]
    low, high = sizes.transform("min"), sizes.transform("max")
    data = data.assign(value=(data["value"] - low) / (high - low).where(high > low)).dropna(subset="value")
    grid = fig.Panels(data, "model", titles=_titles(rows), height=3.3)
    for axes, part in grid:
        cells = _heat(axes, part, Normalize(0, 1))
    _color_bar(grid, cells, "distance, each line rescaled to [0, 1]")
    grid.data = data.rename(columns={"value": "rescaled_distance"})
    return grid.done(rows, x=START, y=SIZE)


def _every_block(chapter: Chapter, distances: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame]:
    """The measured loss without every contiguous block, from committed runs.

    Returns nats over dense of all blocks, with the `regret` against the best one of that size; the regrets of both rules and of
    the best known set that need not be contiguous (`best`); the rows behind them. Raises FigureError when there are none.
    """
    keys, layers = ["model", "size"], distances.groupby("model")["layers"].first()
    committed = pick(chapter.table("optimum_runs"), may_be_empty=True, model=list(layers.index))
    rows = pick(committed, may_be_empty=True, role="every_block").astype({"size": int, "start": int})
    free = pick(committed, may_be_empty=True, experiment="optimum", role=("optimum", "best_known"))
    if rows.empty:
        place, names = chapter["optimum_runs"], ", ".join(layers.index)
        raise FigureError(f"{place} holds the loss of every block for none of {names}: run profiles/optimum.yaml")
    dense = pick(committed, method="dense", metric="nll").groupby("model")["value"].first()
    cost = rows.assign(value=rows["value"] - rows["model"].map(dense))[[*keys, "start", "value"]]
    best = cost.groupby(keys)["value"].min().rename("best").reset_index()
    cost = cost.merge(best, on=keys).assign(regret=lambda one: one["value"] - one["best"])
    chosen = distances.loc[distances["chosen"], [*keys, "start", "calibration_seed"]].assign(method="angular")
    deepest = best[keys].assign(method="deepest", start=best["model"].map(layers) - 1 - best["size"])
    ruled = pd.concat([chosen, deepest]).merge(cost, on=[*keys, "start"])
    sets = free.assign(method="best", size=free["layers_removed"].astype(int)).merge(best, on=keys)
    sets["regret"] = sets["value"] - sets["model"].map(dense) - sets["best"]
    regrets = pd.concat([ruled, sets])[[*keys, "method", "regret"]].rename(columns={"regret": "value"})
    return cost, regrets, pd.concat([rows, free])


@figure("own_every_block", reads={"optimum_runs": None, **READS})
def every_block(chapter: Chapter) -> Drawing:
    """The measured loss without every block, and how much worse the rules choose than the best block."""
    rows, keys = _distances(chapter), ["model", "size"]
    cost, regrets, measured = _every_block(chapter, rows)
    worse = cost.groupby(keys)["regret"]
    band = worse.quantile([0.05, 0.5, 0.95]).unstack().set_axis(["low", "value", "high"], axis=1).reset_index()
    band = band.assign(method="random", n=worse.count().to_numpy())
    last = cost["start"] + cost["size"] == cost["model"].map(rows.groupby("model")["layers"].first())
    spared = cost[~last].groupby(keys)["regret"].min().rename("value").reset_index().assign(method=SPARED)
    lines = pd.concat([fig.spread(regrets, ["model", "method", "size"]), spared, band])
    cells = cost.merge(_medians(rows).drop(columns="value"), on=[*keys, "start"], how="left")
    cells = cells.assign(nearest=cells["nearest"].eq(True), what="nats over dense")
    data = pd.concat([cells, lines.assign(what="regret against the best block")])
    grid = fig.Panels(data, "model", "what", titles=_titles(rows), height=3.1, sharey="row")
    looks = {**fig.METHODS, "best": replace(fig.METHODS["best"], title="best known set, not contiguous")}
    looks[SPARED] = fig.Method(SPARED, "#000000", "", "--")
    norm = LogNorm(cells.loc[cells["value"] > 0, "value"].min(), cells["value"].max())
    for axes, part in grid:
        if part["start"].notna().any():
            best, star = part[part["regret"] == 0], {"marker": "*", "color": "white", "markersize": 6, **MARK}
            colors = _heat(axes, part, norm)
            axes.plot(best["start"], best["size"], label="best block (regret 0)", **star)
            continue
        sets, ruled = part[part["method"] == "random"], part[part["method"] != "random"]
        fig.lines(axes, ruled, looks, x="size", markersize=3.5)
        fig.random_band(axes, sets, x="size", below=ruled["value"].max(), label="all blocks: median and 5–95 %")
        axes.axhline(0, color="black", linewidth=0.8)
    _color_bar(grid, colors, "nats over dense (log)")
    taken = last[cost["regret"] == 0].groupby(cost["model"], sort=False).agg(["sum", "size"])
    draws = rows[rows["chosen"]].groupby(keys)["start"].nunique().eq(1).groupby("model", sort=False).agg(["sum", "size"])
    last_taken, agreed = ("; ".join(f"{one.Index} {one[1]} of {one[2]}" for one in of.itertuples()) for of in (taken, draws))
    text = f"Sizes at which the best block takes the very last layer, which both rules keep: {last_taken}. "
    text += f"Sizes at which all calibration draws choose the same block: {agreed}."
    note = f"angular: median and min–max of {rows['calibration_seed'].nunique()} calibration draws"
    grid.data = data.drop(columns=["nearest", "best", "regret"])
    return grid.done(pd.concat([rows, measured]), x=SIZE, y=[SIZE, "regret, nats per token"], note=note, text=text)


@figure("deeper_layers_fig2_accuracy", reads={**TASKS, **READS})
def fig2_accuracy(chapter: Chapter) -> Drawing:
    """Accuracy in the embedded tasks after the angular rule; where published models fall to chance."""
    data = pick(_scores(chapter), method="angular")
    data = pd.concat([data[data["task"] != "all"], data[data["task"] == "all"]])
    grid = fig.Panels(data, "model", titles=_titles(_distances(chapter)), height=4.2, sharey=True)
    looks = {"all": replace(fig.METHODS["angular"], title="angular block: mean of the three")}
    for task, line in zip(EMBEDDED, ("-", "--", "-."), strict=True):
        looks[task] = fig.Method(task.removeprefix("pydocs_").replace("_", " "), "#8fb3c7", "", line)
    chance = _chance(chapter)
    for axes, part in grid:
        fig.lines(axes, part, looks, x="fraction", series="task")
        fig.level(axes, part.loc[(part["task"] == "all") & (part["size"] == 0), "value"].iloc[0])
        fig.level(axes, chance[part["model"].iloc[0]], "chance", "#333333", "--")
        _mark_collapse(axes)
        axes.set_title(axes.get_title("left"), pad=48)
        axes.set(xlim=(-0.02, 1), ylim=(0, 1))
        fig.percent(axes.yaxis)
    note = "error bars: 95 % interval over the items, one calibration draw"
    return grid.done(data, x=DROPPED, y="accuracy, %", note=note, published=[PUBLISHED])


def _mark_collapse(axes: Axes) -> None:
    """Where the published models fall to chance on MMLU (healed)."""
    rows = pick(published("deeper_layers", "headline"), metric="collapse_fraction_percent")
    hatched = {"facecolor": "none", "edgecolor": "#999999", "hatch": "///", "linewidth": 1, "zorder": 0.5}
    above = {"rotation": 90, "ha": "center", "va": "bottom", "fontsize": 7.5, "color": "#555555"}
    for family, ends in (rows.groupby("model")["value"].agg(["min", "max"]) / 100).iterrows():
        axes.axvspan(*ends, label="falls to chance (published)", **hatched)
        axes.text(ends.mean(), 1.01, family, transform=axes.get_xaxis_transform(), **above)


@figure("deeper_layers_fig5_simple_vs_similarity", reads={**TASKS, **READS})
def fig5_simple_vs_similarity(chapter: Chapter) -> Drawing:
    """The simple rule against the angular one: mean accuracy above, loss below."""
    scores, chance = pick(_scores(chapter), task="all"), _chance(chapter)
    rows = pick(chapter.table("blocks"), metric="normalized_loss", role="choice")
    losses = _with_dense(fig.spread(rows, ["model", "method", "size", "fraction"]))
    data = pd.concat([scores.assign(what="mean accuracy"), losses.assign(what="loss / log(vocabulary)")])
    titles = _titles(_distances(chapter))
    grid = fig.Panels(data, "model", "what", titles=titles, height=2.4, sharey="row", sharex=True)
    for axes, part in grid:
        accuracy = "mean accuracy" in set(part["what"])
        fig.lines(axes, part, x="fraction", dodge=0.008 if accuracy else 0)
        fig.level(axes, part.loc[part["size"] == 0, "value"].iloc[0])
        least, line = (chance[part["model"].iloc[0]], "--") if accuracy else (1, "-.")
        fig.level(axes, least, "chance" if accuracy else "uniform guess", "#333333", line)
        axes.set(xlim=(-0.02, 1), ylim=(0, 1 if accuracy else None))
        if accuracy:
            fig.percent(axes.yaxis)
    note = f"error bars: 95 % interval over items (above), min–max of {losses['n'].max()} calibration draws (below)"
    return grid.done(pd.concat([scores, rows]), x=DROPPED, y=["mean accuracy, %", "loss / log(vocabulary)"], note=note)
