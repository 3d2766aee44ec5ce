"""Chapter 03: how many of the deep layers does a model need, when one contiguous block is removed?"""

from dataclasses import replace

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LogNorm, Normalize
from matplotlib.ticker import MultipleLocator

from prunelib.claims import load
from prunelib.figures import style as fig
from prunelib.figures.save import Chapter, Drawing, FigureError, figure, markdown, pick

CHAPTER = "03_deeper_layers"
READS = {"blocks": None}
MEASURED = {**READS, "optimum_runs": None}
RULES = ("angular", "deepest")
SIZE, START, DROPPED = "block size n", "first layer of the block, l", "layers removed, %"
MARK = {"linestyle": "", "markeredgecolor": "black", "markeredgewidth": 0.5}
NEAREST = {**MARK, "marker": "D", "color": fig.METHODS["angular"].color, "markersize": 3.6, "label": "removed by the rule"}
BEST = {**MARK, "marker": "*", "color": "white", "markersize": 7, "label": "best block of its size"}
LOOKS = {**fig.METHODS, "best": replace(fig.METHODS["best"], title="best known set, not contiguous", line="")}
LOOKS["block"] = fig.Method("best block", "#000000", "")


def _distances(table: pd.DataFrame) -> pd.DataFrame:
    """Angular distance of every block and calibration draw; `chosen`: the rule removes it; `layers`: of its model."""
    rows = pick(table, metric="angular").astype({"size": int, "start": int, "calibration_seed": int})
    rows["layers"] = rows.groupby("model")["start"].transform("max") + 1
    allowed = rows[rows["start"] + rows["size"] <= rows["layers"] - rows["protect_last"].astype(int)]
    nearest = allowed.sort_values("value", kind="stable").drop_duplicates(["model", "size", "calibration_seed"])
    return rows.assign(chosen=rows.index.isin(nearest.index))


def _medians(rows: pd.DataFrame) -> pd.DataFrame:
    """Median of the draws for every block but those at layer 0, and whether most draws choose it (`nearest`)."""
    chosen = rows[rows["chosen"]].groupby(["model", "size"])["start"].agg(lambda starts: starts.mode().iloc[0])
    data = rows[rows["start"] > 0].groupby(["model", "size", "start"], sort=False)["value"].median().reset_index()
    data = data.join(chosen.rename("nearest"), on=["model", "size"])
    return data.assign(nearest=data["start"] == data["nearest"])


def _titles(layers: pd.Series) -> dict[str, str]:
    """Titles of models by their number of layers."""
    return {name: f"{fig.short(name)} ({count:.0f} layers)" for name, count in layers.items()}


def _layers(rows: pd.DataFrame) -> pd.Series:
    return rows.groupby("model", sort=False)["layers"].first()


def _over_dense(parts: list[pd.DataFrame]) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The measured loss over dense, in nats, without every contiguous block; and without the best known sets of any layers.

    Each is over the dense model on the windows of its own run. Raises FigureError where a model of the first table lacks it.
    """
    rows = pick(pd.concat(parts, ignore_index=True), metric="nll")
    dense = rows[(rows["method"] == "dense") | (rows["role"] == "dense")].groupby("run")["value"].first()
    rows = rows.assign(value=rows["value"] - rows["run"].map(dense))
    blocks = pick(rows, role="every_block", may_be_empty=True).drop_duplicates(["model", "size", "start"])
    if lacking := set(parts[0]["model"]) - set(blocks["model"]):
        raise FigureError(
            f"no loss of every block for {', '.join(lacking)}: set every_block in `blocks`, or run profiles/optimum.yaml"
        )
    sets = pick(rows, experiment="optimum", role=("optimum", "best_known"), may_be_empty=True)
    sets = sets.assign(size=sets["layers_removed"]).drop_duplicates(["model", "size"])
    return blocks.astype({"size": int, "start": int}), sets.astype({"size": int})


@figure("deeper_layers_fig1c_distance_curves", reads=READS)
def fig1c_distance_curves(chapter: Chapter) -> Drawing:
    """Angular distance between the input of layer l and that of layer l + n, a curve per block size n."""
    rows = _distances(chapter.table("blocks"))
    data = _medians(rows).rename(columns={"value": "angular_distance"})
    data = data[data["size"] % 3 == 1]
    grid = fig.Panels(data, "model", titles=_titles(_layers(rows)), height=3.3, sharey=True)
    colors = ScalarMappable(Normalize(1, data["size"].max()), "cividis")
    for axes, part in grid:
        for size, line in part.groupby("size"):
            style = {"marker": "" if len(line) > 1 else ".", "linewidth": 1.1}
            axes.plot(line["start"], line["angular_distance"], color=colors.to_rgba(size), **style)
            axes.annotate(f" n = {size}", line[["start", "angular_distance"]].iloc[-1], fontsize=7, va="center")
        near = part[part["nearest"]]
        axes.plot(near["start"], near["angular_distance"], **NEAREST)
        axes.set_xlim(0, axes.get_xlim()[1] + 2)
    near = data[data["nearest"]]
    left = (near["model"].map(_layers(rows)) - near["start"] - near["size"]).groupby(near["model"], sort=False)
    told = ", ".join(f"{one.min():.0f} to {one.max():.0f} ({fig.short(name)})" for name, one in left)
    return grid.done(rows, x=START, y="angular distance d(l, l + n)", title=f"Layers behind the nearest block: {told}")


def _heat(axes: Axes, part: pd.DataFrame, norm: Normalize) -> ScalarMappable:
    """Blocks as cells (up n, along l) colored by `value`, those of the rule marked, and the best ones (`best`)."""
    cells = part.pivot(index="size", columns="start", values="value")
    for marked, style in (("best", BEST), ("nearest", NEAREST)):
        here = part[part[marked]]
        axes.plot(here["start"], here["size"], **style)
    axes.grid(visible=False)
    axes.yaxis.set_major_locator(MultipleLocator(5))
    return axes.pcolormesh(cells.columns, cells.index, cells.to_numpy(dtype=float), norm=norm, cmap="cividis", rasterized=True)


@figure("deeper_layers_fig4_heatmap", reads=MEASURED)
def fig4_heatmap(chapter: Chapter) -> Drawing:
    """The paper's heat map, the distances of each block size rescaled to [0, 1], beside the measured loss without the block."""
    keys, rows = ["model", "size", "start"], _distances(chapter.table("blocks"))
    blocks, _ = _over_dense([chapter.table("blocks"), chapter.table("optimum_runs")])
    near = _medians(rows)
    sizes = near.groupby(["model", "size"])["value"]
    low, high = sizes.transform("min"), sizes.transform("max")
    rescaled = near.assign(value=(near["value"] - low) / (high - low).where(high > low), best=False, what="distance")
    cost = near[[*keys, "nearest"]].merge(blocks[[*keys, "value"]], on=keys)
    cost["best"] = cost["value"] == cost.groupby(["model", "size"])["value"].transform("min")
    data = pd.concat([rescaled.dropna(subset="value"), cost.assign(what="loss")])
    both = cost.merge(near, on=keys, suffixes=("", "_distance")).groupby(["model", "size"])
    ranks = both.apply(lambda one: one["value"].corr(one["value_distance"], method="spearman") if len(one) > 3 else None)
    titles = ("angular distance, each row rescaled", "extra loss vs dense, measured")
    grid = fig.Panels(data, "what", "model", titles=titles, height=3.4)
    norms = {"distance": Normalize(0, 1), "loss": LogNorm(cost["value"].clip(lower=0.01).min(), cost["value"].max())}
    for place, (axes, part) in enumerate(grid):
        cells = _heat(axes, part, norms[part["what"].iloc[0]])
        if place < 2:
            label, column = ("0: nearest block of its size", "nats/token (log)")[place], list(grid.grid[:, place])
            bar = grid.figure.colorbar(cells, ax=column, label=label, format="%g", location="bottom")
            bar.outline.set_visible(False)
    found = [f"{fig.short(name)} {part.median():.2f}" for name, part in ranks.groupby("model", sort=False)]
    title = f"Rank correlation of distance and loss, median over block sizes: {', '.join(found)}"
    agree = rows[rows["chosen"]].groupby(["model", "size"])["start"].nunique().eq(1).groupby("model", sort=False)
    agree = [f"{one.Index} {one.sum} of {one.size}" for one in agree.agg(["sum", "size"]).itertuples()]
    text = f"Block sizes at which all calibration draws choose the same block: {', '.join(agree)}."
    y = [f"{fig.short(name)}\n{SIZE}" for name in chapter.models("blocks")]
    return grid.done(pd.concat([rows, blocks]), x=START, y=y, text=text, title=title)


@figure("deeper_layers_fig5_simple_vs_similarity", reads={**MEASURED, "reference": ("blocks",)})
def fig5_simple_vs_similarity(chapter: Chapter) -> Drawing:
    """The loss by the simple rule and by the distance, beside the best block, all blocks, and the best set of any layers."""
    tables, more, keys = [chapter.table("blocks")], [chapter.table("optimum_runs")], ["model", "size"]
    if folder := chapter["reference"]:
        tables, more = [*tables, load(f"{folder}/blocks.csv")], [*more, load(f"{folder}/optimum")]
    rows = pd.concat([_distances(table) for table in tables], ignore_index=True)
    layers = _layers(rows)
    blocks, sets = _over_dense([*tables, *more])
    blocks = blocks[blocks["size"] <= blocks["model"].map(layers) * 2 / 3]
    each = blocks.groupby(keys)["value"]
    band = each.quantile([0.05, 0.5, 0.95]).unstack().set_axis(["low", "value", "high"], axis=1).reset_index()
    best = each.min().rename("best").reset_index()
    chosen = rows.loc[rows["chosen"], [*keys, "start", "calibration_seed"]].assign(method="angular")
    deepest = best[keys].assign(method="deepest", start=best["model"].map(layers) - 1 - best["size"])
    ruled = pd.concat([chosen, deepest]).merge(blocks[[*keys, "start", "value"]], on=[*keys, "start"])
    free = sets[sets["size"] <= sets["model"].map(layers) / 2].assign(method="best")
    lines = fig.spread(pd.concat([ruled, free]), [*keys, "method"])
    data = pd.concat([lines, band.assign(method="random"), best.rename(columns={"best": "value"}).assign(method="block")])
    data["order"] = data["model"].map(list(layers.index).index)
    titles = {name: title.replace(" (", "\n(") for name, title in _titles(layers).items()}
    grid = fig.Panels(data.sort_values(["order", "size"], kind="stable"), "model", titles=titles, height=3.9, sharey=True)
    for axes, part in grid:
        others = part[part["method"] == "random"]
        fig.lines(axes, part[part["method"] != "random"], LOOKS, x="size", markersize=3.5)
        fig.random_band(axes, others, x="size", below=1e9, label="all blocks: median and 5–95 %")
        fig.log_scale(axes)
    lost = data.pivot(index=keys, columns="method", values="value")
    text = markdown(pd.DataFrame([{"model": name, **_compared(lost.loc[name])} for name in layers.index]))
    first, name = lost.loc[layers.index[0]], fig.short(layers.index[0])
    fewer = (first["angular"] < first["deepest"]).sum()
    title = f"{name}: the nearest block costs less than the deepest layers at {fewer} of {len(first)} sizes"
    note = f"angular: median and min–max of {rows['calibration_seed'].nunique()} calibration draws"
    grid.data = grid.data.drop(columns="order")
    behind = pd.concat([rows, blocks, free])
    return grid.done(behind, x=SIZE, y="extra loss (nats/token, log)", note=note, text=text, title=title)


def _compared(lost: pd.DataFrame) -> dict[str, object]:
    """What the two rules lose (a line per block size) beside each other, the best block of a size and the best known set."""
    nearest, simple = (lost[rule] - lost["block"] for rule in RULES)
    found = {"block sizes": len(lost), "nearest costs less than deepest": (nearest < simple).sum()}
    found |= {"more": (nearest > simple).sum(), "nearest over the best block: median": nearest.median(), "most": nearest.max()}
    found |= {"deepest over it: median": simple.median(), "most, deepest": simple.max()}
    free = (lost["block"] - lost["best"]).dropna().tail(1)
    return found | {f"best block over the best set of {size} layers": nats for size, nats in free.items()}


@figure("deeper_layers_fig2_accuracy", reads={"tasks": ("blocks",)})
def fig2_accuracy(chapter: Chapter) -> Drawing:
    """Mean accuracy in the tasks by both rules."""
    table = pick(chapter.table("tasks"), run_part="blocks")
    rows = pick(table, task="all", method=("dense", *RULES)).fillna({"fraction": 0.0})
    keys = ["model", "method", "size", "fraction"]
    data = pick(rows, metric=["average", "average_low", "average_high"]).pivot(index=keys, columns="metric", values="value")
    data = data.set_axis(["value", "high", "low"], axis=1).reset_index()
    data = pd.concat([data[data["method"].isin(("dense", rule))].assign(method=rule) for rule in RULES])
    guessed = pick(table, may_be_empty=True, metric="at_chance")["task"]  # not in the averages
    dense = table[(table["method"] == "dense") & (table["task"] != "all") & ~table["task"].isin(guessed)]
    chance = dense.pivot_table("value", ["model", "task"], "metric")["chance"]
    chance = chance.fillna(0).groupby("model").mean()  # a next word is not guessed
    layers = (data["size"] / data["fraction"]).groupby(data["model"]).max().round()
    grid = fig.Panels(data, "model", titles=_titles(layers), height=3.4, sharey=True)
    for axes, part in grid:
        fig.lines(axes, part, x="fraction", dodge=0.008)
        fig.level(axes, part.loc[part["size"] == 0, "value"].iloc[0])
        fig.level(axes, chance[part["model"].iloc[0]], "chance", "#333333", "-")
        axes.set(xlim=(-0.02, 0.8), ylim=(0, 1))
        fig.percent(axes.yaxis)
    note = "error bars: 95 % interval over the items, one calibration draw"
    ends = data.sort_values("size").groupby("model", sort=False)["value"].agg(["first", "min"])
    title = ", ".join(f"{one['first']:.0%} to {one['min']:.0%} ({fig.short(name)})" for name, one in ends.iterrows())
    return grid.done(rows, x=DROPPED, y="mean accuracy, %", note=note, title=f"Accuracy falls before healing: {title}")
