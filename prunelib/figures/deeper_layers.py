"""Chapter 03: how many of the deep layers does a model need, when one contiguous block is removed?"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from prunelib.figures import style as fig
from prunelib.figures.save import Chapter, Drawing, FigureError, figure, markdown, pick
from prunelib.lab.runs import PUBLISHED, published

CHAPTER = "03_deeper_layers"
READS = {"blocks": None}
TASKS = {"tasks": ("blocks",)}
EMBEDDED = ("pydocs_next_line", "pydocs_summary", "pydocs_parameter")
RULES = ("angular", "deepest")
ITEMS = "error bars: 95 % interval over the items, one calibration draw"
SIZE, START = "block size n", "first layer of the block, l"
NEAREST = {"markersize": 3.6, "color": fig.METHODS["angular"].color, "markeredgecolor": "black", "markeredgewidth": 0.5}
BEST = {"linestyle": "", "marker": "*", "color": "white", "markeredgecolor": "black", "markeredgewidth": 0.5}
COLLAPSE = {"color": "#999999", "linestyle": (0, (4, 3)), "linewidth": 1}
PROMPTS = {
    "prompts": fig.Method("0", "0 shots", "#56b4e9", "D"),
    "prompts_2_shots": fig.Method("2", "2 shots", "#12507b", "o", "--"),
    "prompts_2_shots_reseeded": fig.Method("2'", "2 other shots", "#8c6d1f", "s", "-."),
}


@dataclass(frozen=True)
class Blocks:
    """The angular distances of a chapter's models, and the blocks that the rule chooses by them.

    rows: of the distances. distance: model → median over the calibration draws, a line per size n and a column per start l.
    chosen: (model, n) → start of the block that each draw chooses, without the protected last layers. layers: of each model.
    """

    rows: pd.DataFrame
    distance: dict[str, pd.DataFrame]
    chosen: dict[tuple[str, int], pd.Series]
    layers: dict[str, int]

    @property
    def names(self) -> list[str]:
        return list(self.layers)

    @property
    def draws(self) -> int:
        return self.rows["calibration_seed"].nunique()

    def sizes(self, name: str) -> list[int]:
        return [size for model, size in self.chosen if model == name]

    def typical(self, name: str) -> pd.Series:
        """Block size → start of the block that most calibration draws choose."""
        return pd.Series({size: int(self.chosen[name, size].mode().iloc[0]) for size in self.sizes(name)})


def blocks(chapter: Chapter) -> Blocks:
    """Distances and choices from the table `blocks`."""
    rows = pick(chapter.table("blocks"), metric="angular").astype({"size": int, "start": int, "calibration_seed": int})
    distance, chosen, layers = {}, {}, {}
    for name, part in rows.groupby("name", sort=False):
        layers[name] = int(part["start"].max()) + 1
        distance[name] = part.groupby(["size", "start"])["value"].median().unstack()
        allowed = part[part["start"] + part["size"] <= layers[name] - int(part["protect_last"].iloc[0])]
        for size, group in allowed.groupby("size"):
            nearest = group.loc[group.groupby("calibration_seed")["value"].idxmin()]
            chosen[name, size] = nearest.set_index("calibration_seed")["start"]
    return Blocks(rows, distance, chosen, layers)


def _titled(found: Blocks, rows: int = 1, **options: object) -> tuple[Figure, np.ndarray]:
    """A figure with a column for each model, named above it."""
    figure, grid = fig.panels(rows, len(found.names), squeeze=False, **options)
    for axes, name in zip(grid[0], found.names, strict=True):
        axes.set_title(f"{name} ({found.layers[name]} layers)")
    return figure, grid


def _losses(chapter: Chapter, name: str, metric: str) -> pd.DataFrame:
    """One loss of both rules against the fraction of layers dropped, with its range over the calibration draws."""
    rows = pick(chapter.table("blocks"), name=name, metric=metric, role="choice")
    return _with_dense(fig.spread(rows, ["method", "size", "fraction"]))


def _scores(chapter: Chapter, name: str, kind: str, task: str, metric: str = "acc") -> pd.DataFrame:
    """A task (or `all`) of both rules against the fraction of layers dropped, with the 95 % interval over its items."""
    rows = pick(chapter.table("tasks"), name=name, run_part=kind, task=task, method=("dense", *RULES)).fillna({"fraction": 0.0})
    data = pick(rows, metric=metric)
    if task == "all":
        for end in ("low", "high"):
            ends = pick(rows, metric=f"{metric}_{end}").set_index(["method", "size"])["value"]
            data[end] = ends.reindex(pd.MultiIndex.from_frame(data[["method", "size"]])).to_numpy()
    else:
        half = 1.96 * data["stderr"].fillna(0)
        data["low"], data["high"] = data["value"] - half, data["value"] + half
    return _with_dense(
        data[["name", "method", "size", "fraction", "task", "metric", "value", "low", "high", "n", "run", "code"]]
    )


def _with_dense(data: pd.DataFrame) -> pd.DataFrame:
    """Every rule begins with the dense model, where nothing is dropped."""
    dense = pick(data, method="dense")
    return pd.concat([pd.concat([dense, data[data["method"] == rule]]).assign(method=rule) for rule in RULES])


def _chance(chapter: Chapter, name: str, kind: str, tasks: Sequence[str]) -> float:
    rows = pick(chapter.table("tasks"), name=name, run_part=kind, metric="chance", task=tuple(tasks))
    return float(rows.drop_duplicates("task")["value"].mean())


def _level(axes: Axes, value: float | int, label: str = "chance", line: str = "--") -> None:
    axes.axhline(value, color="#333333", linestyle=line, linewidth=1, zorder=1, label=label)


def _percent(*axes: Axes) -> None:
    """Fractions as percent: on the y axes of all, and on the x axis of the lowest."""
    for one in axes:
        one.yaxis.set_major_formatter(PercentFormatter(1.0, symbol=""))
    _dropped(axes[-1])


def _dropped(axes: Axes) -> None:
    axes.set(xlim=(-0.02, 1.0), xlabel="layers dropped, %")
    axes.xaxis.set_major_formatter(PercentFormatter(1.0, symbol=""))


def _heat(axes: Axes, grid: pd.DataFrame, norm: Normalize, nearest: pd.Series) -> ScalarMappable:
    """Cells of a table (lines n, columns l) as colors, with the blocks of the rule marked."""
    cells = axes.pcolormesh(grid.columns, grid.index, grid.to_numpy(dtype=float), norm=norm, cmap="cividis", rasterized=True)
    axes.plot(nearest, nearest.index, fig.METHODS["angular"].marker, label="removed by the rule", **NEAREST)
    axes.grid(visible=False)
    axes.set_xlabel(START)
    fig.whole_numbers(axes)
    return cells


def _bar(figure: Figure, cells: ScalarMappable, axes: np.ndarray, label: str) -> None:
    figure.colorbar(cells, ax=list(axes), label=label, pad=0.02).outline.set_visible(False)


def _rescaled(grid: pd.DataFrame) -> pd.DataFrame:
    """Every line shifted and rescaled to [0, 1]; lines of one value are missing."""
    low, high = grid.min(axis=1), grid.max(axis=1)
    return grid.sub(low, axis=0).div((high - low).where(high > low), axis=0)


def _long(grid: pd.DataFrame, name: str, value: str = "value") -> pd.DataFrame:
    return grid.rename_axis(index="size", columns="start").stack().rename(value).reset_index().assign(model=name)


def _scored(figure: Figure, drawn: list[pd.DataFrame], *more: pd.DataFrame, **options: object) -> Drawing:
    """A drawing of scores: their rows are the plotted numbers."""
    rows = pd.concat([part[["run", "code"]] for part in (*drawn, *more) if "run" in part])
    return Drawing(figure, pd.concat(drawn).drop(columns=["run", "code"]), rows, **options)


@figure("deeper_layers_fig1c_distance_curves", reads=READS)
def fig1c_distance_curves(chapter: Chapter) -> Drawing:
    """Angular distance between the input of layer l and that of layer l + n, a curve per block size n."""
    found, drawn = blocks(chapter), []
    figure, grid = _titled(found, height=3.3, sharey=True)
    norm = Normalize(1, max(found.layers.values()) - 1)
    for axes, name in zip(grid[0], found.names, strict=True):
        nearest = found.typical(name)
        for size, line in found.distance[name].iloc[:: 2 if found.layers[name] <= 24 else 3].iterrows():
            values = line.dropna()
            color = plt.get_cmap("cividis")(norm(size))
            axes.plot(values.index, values, "-" if len(values) > 2 else ".-", color=color, linewidth=1.1)
            if size in nearest:
                style = NEAREST | {"markersize": 5, "markeredgewidth": 0.6}
                axes.plot([nearest[size]], [values[nearest[size]]], fig.METHODS["angular"].marker, **style)
        fig.whole_numbers(axes)
        data = _long(found.distance[name], name, "angular_distance")
        drawn.append(data.assign(nearest=data["start"] == data["size"].map(nearest)))
    fig.label_axes(grid, x=START, y="angular distance d(l, l + n)")
    _bar(figure, ScalarMappable(norm, "cividis"), grid[0], SIZE)
    return Drawing(figure, pd.concat(drawn), found.rows)


@figure("deeper_layers_fig4_heatmap", reads=READS)
def fig4_heatmap(chapter: Chapter) -> Drawing:
    """The paper's heat map: the distances of each block size, rescaled to [0, 1] by themselves."""
    found, drawn = blocks(chapter), []
    figure, grid = _titled(found, height=3.3)
    for axes, name in zip(grid[0], found.names, strict=True):
        cells = _heat(axes, _rescaled(found.distance[name]), Normalize(0, 1), found.typical(name))
        axes.set_title(name)
        drawn.append(_long(_rescaled(found.distance[name]), name, "rescaled_distance"))
    fig.label_axes(grid, x=START, y=SIZE)
    _bar(figure, cells, grid[0], "distance, each line rescaled to [0, 1]")
    fig.legend(figure)
    return Drawing(figure, pd.concat(drawn), found.rows)


@figure("own_angular_heatmap", reads=READS)
def angular_heatmap(chapter: Chapter) -> Drawing:
    """The same distances on one scale, and rescaled without the blocks that start at layer 0."""
    found, drawn = blocks(chapter), []
    figure, grid = _titled(found, 2, height=3.0)
    norm = Normalize(0, max(distance.max(axis=None) for distance in found.distance.values()))
    for (above, below), name in zip(grid.T, found.names, strict=True):
        later = _rescaled(found.distance[name].loc[:, 1:].dropna(how="all")).dropna(how="all")
        cells = _heat(above, found.distance[name], norm, found.typical(name))
        rescaled = _heat(below, later, Normalize(0, 1), found.typical(name))
        below.set(xlim=above.get_xlim(), ylim=above.get_ylim())
        drawn.append(_long(found.distance[name], name).assign(what="angular distance"))
        drawn.append(_long(later, name).assign(what="rescaled per size, without start 0"))
    fig.label_axes(grid, x=START, y=SIZE)
    _bar(figure, cells, grid[0], "angular distance")
    _bar(figure, rescaled, grid[1], "rescaled, without l = 0")
    fig.legend(figure)
    return Drawing(figure, pd.concat(drawn), found.rows)


@dataclass(frozen=True)
class EveryBlock:
    """The measured loss without every contiguous block, from committed runs.

    over_dense: model → nats per token over dense, lines n and columns l. regrets: of both rules against the best block of the
    size, per draw, and of the best known set that need not be contiguous (`best`). rows: behind them.
    """

    over_dense: dict[str, pd.DataFrame]
    regrets: pd.DataFrame
    rows: pd.DataFrame


def every(chapter: Chapter, found: Blocks) -> EveryBlock:
    """Raises FigureError when the loss of every block is known for none of the models."""
    committed = pick(chapter.table("optimum_runs"), may_be_empty=True, name=tuple(found.names))
    rows = pick(committed, may_be_empty=True, role="every_block").astype({"size": int, "start": int})
    free = pick(committed, may_be_empty=True, experiment="optimum", role=("optimum", "best_known"))
    if rows.empty:
        place = chapter["optimum_runs"]
        raise FigureError(
            f"{place} holds the loss of every block for none of {', '.join(found.names)}: run profiles/optimum.yaml"
        )
    over_dense, regrets = {}, []
    for name in dict.fromkeys(rows["name"]):
        dense = pick(committed, name=name, method="dense", metric="nll")["value"].iloc[0]
        over_dense[name] = cost = pick(rows, name=name).pivot(index="size", columns="start", values="value") - dense
        for size, best in cost.min(axis=1).items():
            starts = {("angular", draw): start for draw, start in found.chosen.get((name, size), pd.Series(dtype=int)).items()}
            if found.layers[name] - 1 - size >= 0:
                starts["deepest", 0] = found.layers[name] - 1 - size
            for (method, draw), start in starts.items():
                value = cost.loc[size, start] - best
                regrets.append({"model": name, "method": method, "size": size, "draw": draw, "value": value})
        for one in pick(free, may_be_empty=True, name=name).astype({"layers_removed": int}).itertuples():
            value = one.value - dense - cost.min(axis=1)[one.layers_removed]
            regrets.append({"model": name, "method": "best", "size": one.layers_removed, "value": value})
    return EveryBlock(over_dense, pd.DataFrame(regrets), pd.concat([rows, free]))


@figure("own_every_block", reads={"optimum_runs": None, **READS})
def every_block(chapter: Chapter) -> Drawing:
    """The measured loss without every block, and how much worse the rules choose than the best block."""
    found = blocks(chapter)
    known, drawn = every(chapter, found), []
    names = list(known.over_dense)
    figure, grid = fig.panels(2, len(names), height=3.1, squeeze=False, sharey="row")
    costs = np.concatenate([cost.to_numpy().ravel() for cost in known.over_dense.values()])
    norm = LogNorm(np.nanmin(costs[costs > 0]), np.nanmax(costs))
    for (above, below), (name, cost) in zip(grid.T, known.over_dense.items(), strict=True):
        cells = _heat(above, cost, norm, found.typical(name))
        above.plot(cost.idxmin(axis=1), cost.index, markersize=6, **BEST)
        above.set_title(f"{name} ({found.layers[name]} layers)")
        drawn.append(_long(cost, name).assign(what="nats over dense"))
        drawn.append(_regret_curves(below, found, known, name).assign(model=name, what="regret against the best block"))
    fig.label_axes(grid, x=SIZE, y=[SIZE, "regret, nats per token"])
    for axes in grid[0]:
        axes.set_xlabel(START)
    _bar(figure, cells, grid[0], "nats over dense (log)")
    fig.legend(figure, grid[1], note=f"angular: median and min–max of {found.draws} calibration draws")
    last = "; ".join(
        f"{name}, for {(cost.idxmin(axis=1) + cost.index == found.layers[name]).sum()} of {len(cost)} sizes"
        for name, cost in known.over_dense.items()
    )
    text = f"The best block takes the very last layer, which both rules keep: {last}."
    rows = pd.concat([found.rows, known.rows])
    return Drawing(figure, pd.concat(drawn), rows, text)


def _regret_curves(axes: Axes, found: Blocks, known: EveryBlock, name: str) -> pd.DataFrame:
    """Regret of both rules, of all blocks, of the best one that keeps the last layer, and of free sets; returns the numbers."""
    cost = known.over_dense[name]
    worse = cost.sub(cost.min(axis=1), axis=0)
    low, middle, high = (worse.quantile(share, axis=1) for share in (0.05, 0.5, 0.95))
    band = pd.DataFrame({"value": middle, "low": low, "high": high, "n": worse.notna().sum(axis=1)}).reset_index()
    band = band.assign(method="random", interval="median and 5–95 % quantiles")
    fig.random_band(axes, band, x="size", label="all blocks: median and 5–95 %")
    mine = known.regrets[known.regrets["model"] == name]
    data = fig.spread(mine[mine["method"] != "best"], ["method", "size"])
    for rule in ("deepest", "angular"):
        fig.curve(axes, pick(data, method=rule), rule, x="size", markersize=3.5)
    inside = cost.columns.to_numpy() + cost.index.to_numpy()[:, None] < found.layers[name]
    spared = worse.where(inside).min(axis=1).rename("value").reset_index()
    spared["method"] = "best block that spares the last layer"
    axes.plot(spared["size"], spared["value"], "--", color="black", linewidth=1, zorder=4, label=spared["method"][0])
    axes.plot([], [], label="best block (regret 0)", **BEST)
    axes.axhline(0, color="black", linewidth=0.8)
    free = mine.loc[mine["method"] == "best", ["method", "size", "value"]]
    if len(free):
        fig.curve(axes, free, "best", x="size", label="best known set, not contiguous")
    fig.whole_numbers(axes)
    return pd.concat([data, spared, free, band])


@figure("deeper_layers_fig3_normalized_loss", reads=READS)
def fig3_normalized_loss(chapter: Chapter) -> Drawing:
    """Loss over the logarithm of the vocabulary size against the fraction of layers dropped, angular blocks."""
    figure, axes = fig.panels(height=3.2)
    drawn = []
    names = chapter.models("blocks")
    looks = zip("Dosv^", ("-", "-.", ":", "--", "-"), ("#56b4e9", "#12507b", "#8c6d1f", "#000000", "#777777"), strict=True)
    for name, (marker, line, color) in zip(names, looks, strict=False):
        data = pick(_losses(chapter, name, "normalized_loss"), method="angular")
        look = fig.Method(name, f"{name}, angular block", color, marker, line)
        fig.curve(axes, data, look, x="fraction", markeredgewidth=1)
        level = pick(data, size=0)["value"].iloc[0]
        axes.axhline(level, color=color, linestyle=":", linewidth=1, label=f"{name}, dense")
        drawn.append(data.assign(model=name))
    _level(axes, 1, "uniform guess")
    axes.set(ylim=(0, None), ylabel="loss / log(vocabulary)")
    _dropped(axes)
    fig.legend(figure, note=fig.error_note(drawn[0].query("size > 0"), "calibration draws"))
    rows = pick(chapter.table("blocks"), metric="normalized_loss", role="choice")
    return Drawing(figure, pd.concat(drawn), rows)


@figure("deeper_layers_fig2_accuracy", reads={"tasks": ("blocks", "prompts"), **READS})
def fig2_accuracy(chapter: Chapter) -> Drawing:
    """Accuracy after the angular rule: the embedded tasks above, letters below; where published models fall to chance."""
    found, drawn = blocks(chapter), []
    figure, grid = _titled(found, 2, height=2.5, sharey="row", sharex=True)
    for (above, below), name in zip(grid.T, found.names, strict=True):
        for task, line in zip(EMBEDDED, ("-", "--", "-."), strict=True):
            data = pick(_scores(chapter, name, "blocks", task), method="angular").sort_values("fraction")
            label = task.removeprefix("pydocs_").replace("_", " ")
            above.plot(data["fraction"], data["value"], line, color="#8fb3c7", linewidth=1, label=label)
            drawn.append(data)
        for axes, kind, task, metric in ((above, "blocks", "all", "average"), (below, "prompts", "pydocs_letters", "acc")):
            data = pick(_scores(chapter, name, kind, task, metric), method="angular")
            fig.curve(axes, data, "angular", x="fraction", label="angular: mean of the three (above), letters (below)")
            fig.dense_line(axes, pick(data, size=0)["value"].iloc[0])
            _level(axes, _chance(chapter, name, kind, EMBEDDED if task == "all" else [task]))
            _mark_collapse(axes, named=axes is above)
            axes.set_ylim(0, 1)
            drawn.append(data)
        above.set_title(above.get_title("left"), pad=48)
        _percent(above, below)
    grid[0, 0].plot([], [], label="falls to chance (published)", **COLLAPSE)
    fig.label_axes(grid, x="layers dropped, %", y=["accuracy, %", "accuracy of letters, %"])
    fig.legend(figure, columns=2, note=ITEMS)
    return _scored(figure, drawn, published=[PUBLISHED])


def _mark_collapse(axes: Axes, *, named: bool) -> None:
    """Where the published models fall to chance on MMLU (healed)."""
    rows = pick(published("deeper_layers", "headline"), metric="collapse_fraction_percent")
    for family, ends in (rows.groupby("model")["value"].agg(["min", "max"]) / 100).iterrows():
        if ends["max"] > ends["min"]:
            axes.axvspan(*ends, facecolor="none", edgecolor="#bbbbbb", hatch="///", linewidth=0, zorder=0.5)
        else:
            axes.axvline(ends["min"], zorder=0.5, **COLLAPSE)
        if named:
            place = {"xy": (ends.mean(), 1), "xycoords": axes.get_xaxis_transform(), "textcoords": "offset points"}
            axes.annotate(family, xytext=(0, 2), rotation=90, ha="center", va="bottom", fontsize=7.5, color="#555555", **place)


@figure("deeper_layers_fig5_simple_vs_similarity", reads={**TASKS, **READS})
def fig5_simple_vs_similarity(chapter: Chapter) -> Drawing:
    """The simple rule against the angular one: mean accuracy above, loss below."""
    found, drawn = blocks(chapter), []
    figure, grid = _titled(found, 2, height=2.4, sharey="row", sharex=True)
    for (above, below), name in zip(grid.T, found.names, strict=True):
        scores = _scores(chapter, name, "blocks", "all", "average").assign(what="mean accuracy")
        losses = _losses(chapter, name, "normalized_loss").assign(name=name, what="loss / log(vocabulary)")
        for axes, data, offset in ((above, scores, 0.004), (below, losses, 0)):
            fig.dense_line(axes, pick(data, size=0)["value"].iloc[0])
            for rule, shift in (("deepest", -offset), ("angular", offset)):
                fig.curve(axes, pick(data, method=rule), rule, x="fraction", offset=shift)
            drawn.append(data)
        _level(above, _chance(chapter, name, "blocks", EMBEDDED))
        _level(below, 1, "uniform guess", "-.")
        above.set_ylim(0, 1)
        below.set_ylim(bottom=0)
        above.yaxis.set_major_formatter(PercentFormatter(1.0, symbol=""))
        _dropped(below)
    fig.label_axes(grid, x="layers dropped, %", y=["mean accuracy, %", "loss / log(vocabulary)"])
    fig.legend(figure, note=f"error bars: 95 % interval over items (above), min–max of {found.draws} calibration draws (below)")
    return _scored(figure, drawn, pick(chapter.table("blocks"), metric="normalized_loss", role="choice"))


@figure("deeper_layers_fig6_boolq", reads={"tasks": ("prompts",), **READS})
def fig6_boolq(chapter: Chapter) -> Drawing:
    """The yes-or-no task: accuracy, and the share of the more frequent answer."""
    found, drawn = blocks(chapter), []
    figure, grid = _titled(found, height=2.8, sharey=True)
    for axes, name in zip(grid[0], found.names, strict=True):
        share = pick(_scores(chapter, name, "prompts", "pydocs_yes_no", "constant_share"), method="angular")
        right = pick(_scores(chapter, name, "prompts", "pydocs_yes_no"), method="angular")
        look = fig.Method("share", "share of the more frequent answer", "#777777", "o", "--")
        share = share.drop(columns=["low", "high"])
        fig.curve(axes, share, look, x="fraction", markerfacecolor="white", markeredgewidth=1)
        fig.curve(axes, right, "angular", x="fraction", label="accuracy, angular block")
        fig.dense_line(axes, pick(right, size=0)["value"].iloc[0])
        _level(axes, _chance(chapter, name, "prompts", ["pydocs_yes_no"]))
        axes.set_ylim(0, 1.04)
        _percent(axes)
        drawn += [share, right]
    fig.label_axes(grid, x="layers dropped, %", y="items, %")
    fig.legend(figure, columns=2, note=ITEMS)
    return _scored(figure, drawn)


@figure("deeper_layers_fig7_prompts", reads={"tasks": tuple(PROMPTS), **READS})
def fig7_prompts(chapter: Chapter) -> Drawing:
    """The letters task without examples, with two, and with two others: accuracy and share of the most frequent letter."""
    found, drawn = blocks(chapter), []
    figure, grid = _titled(found, 2, height=2.2, sharey="row", sharex=True)
    for (above, below), name in zip(grid.T, found.names, strict=True):
        for place, (kind, look) in enumerate(PROMPTS.items()):
            right = pick(_scores(chapter, name, kind, "pydocs_letters"), method="angular").assign(prompt=look.title)
            share = pick(_scores(chapter, name, kind, "pydocs_letters", "constant_share"), method="angular")
            fig.curve(above, right, look, x="fraction", offset=0.006 * (place - 1), markeredgewidth=1)
            fig.curve(below, share.assign(low=share["value"], high=share["value"]), look, x="fraction", markeredgewidth=1)
            above.axhline(pick(right, size=0)["value"].iloc[0], color=look.color, linestyle=":", linewidth=1)
            drawn += [right, share.assign(prompt=look.title)]
        above.plot([], [], color="#777777", linestyle=":", linewidth=1, label="dense, in the color of its prompt")
        for axes, top in ((above, 0.6), (below, 1.04)):
            _level(axes, _chance(chapter, name, "prompts", ["pydocs_letters"]))
            axes.set_ylim(0, top)
        _percent(above, below)
    fig.label_axes(grid, x="layers dropped, %", y=["accuracy, %", "most frequent letter, %"])
    fig.legend(figure, note=ITEMS)
    return _scored(figure, drawn)


@figure("own_block_draws", reads=READS)
def block_draws(chapter: Chapter) -> Drawing:
    """Which block each calibration draw chooses, a line per draw from its first to its last layer."""
    found, drawn = blocks(chapter), []
    figure, grid = _titled(found, height=3.6)
    kinds = {True: ("#9a9a9a", "all draws choose the same block"), False: ("#d55e00", "they differ")}
    for axes, name in zip(grid[0], found.names, strict=True):
        sizes = found.sizes(name)
        shown = sizes[1::2] if len(sizes) > 3 else sizes
        agree = {size: found.chosen[name, size].nunique() == 1 for size in sizes}
        for size in shown:
            starts = found.chosen[name, size]
            for place, start in enumerate(starts):
                height = size + 0.5 * (place - (len(starts) - 1) / 2)
                color = kinds[agree[size]][0]
                axes.plot([start, start + size - 1], [height, height], color=color, linewidth=1.3, solid_capstyle="butt")
        data = pd.concat({size: found.chosen[name, size] for size in sizes}, names=["size", "draw"]).rename("start")
        drawn.append(data.reset_index().assign(model=name))
        axes.set_title(f"{name}: all draws agree for {sum(agree.values())} of {len(sizes)} sizes", fontsize=9)
        axes.set_xlim(-0.5, found.layers[name] - 0.5)
        fig.whole_numbers(axes)
        axes.set_yticks(shown)
        axes.tick_params(axis="y", labelsize=7.5)
    for color, label in kinds.values():
        grid[0, 0].plot([], [], color=color, label=label)
    fig.label_axes(grid, x="layer", y=SIZE)
    fig.legend(figure, note="every second size is drawn")
    return Drawing(figure, pd.concat(drawn), found.rows)


@figure("own_table_deeper_layers", reads={"optimum_runs": None, **TASKS, **READS})
def table_deeper_layers(chapter: Chapter) -> Drawing:
    """Accuracy, loss per layer and regret of both rules, and how well the distance ranks the blocks."""
    found = blocks(chapter)
    known, lines = every(chapter, found), []
    regret = fig.spread(known.regrets, ["model", "method", "size"]).groupby(["model", "method"])["value"].mean()
    for name in found.names:
        cost, chance = known.over_dense.get(name, pd.DataFrame()), _chance(chapter, name, "blocks", EMBEDDED)
        large = [size for size in cost.index if cost.loc[size].notna().sum() >= 10]
        ranks = [found.distance[name].loc[size].corr(cost.loc[size], method="spearman") for size in large]
        middle = cost.sub(cost.min(axis=1), axis=0).median(axis=1).reindex(found.sizes(name)).mean()
        agree = 100 * np.mean([found.chosen[name, size].nunique() == 1 for size in found.sizes(name)])
        for rule in RULES:
            scores, losses, scaled = (
                pick(data, method=rule).set_index("size").sort_index()
                for data in (
                    _scores(chapter, name, "blocks", "all", "average"),
                    _losses(chapter, name, "nll"),
                    _losses(chapter, name, "normalized_loss"),
                )
            )
            rise = (losses["value"] - losses["value"].iloc[0]) / losses.index.to_numpy().clip(1)
            line = {
                "model": name,
                "rule": fig.METHODS[rule].title,
                "dense accuracy, %": 100 * scores["value"].iloc[0],
                "chance, %": 100 * chance,
                "half-way at, % of layers": _half_way(scores, chance),
                "nats per layer, smallest n": rise.iloc[1],
                "nats per layer, a quarter gone": rise.loc[: found.layers[name] / 4].iloc[-1] or None,
                "loss / log(vocabulary), half gone": scaled["value"].loc[: found.layers[name] / 2].iloc[-1],
                "regret, mean over n": regret.get((name, rule)),
                "regret of the median block": middle,
            }
            if rule == "angular":
                line["rank correlation with the loss"] = np.median(ranks) if ranks else None
                line["draws agree, % of sizes"] = agree
            lines.append(line)
    numbers = pd.DataFrame(lines).dropna(axis=1, how="all")
    whole = ("dense accuracy, %", "chance, %", "half-way at, % of layers", "draws agree, % of sizes")
    rows = pd.concat([chapter.table("blocks"), pick(chapter.table("tasks"), run_part="blocks"), known.rows])
    return Drawing(None, numbers, rows, markdown(numbers, digits=dict.fromkeys(whole, 0)))


def _half_way(scores: pd.DataFrame, chance: float) -> float | None:
    """Percent of layers where the accuracy falls through the middle between dense and chance, interpolated; or None."""
    level = (scores["value"].iloc[0] + chance) / 2
    places, values = scores["fraction"].to_numpy(), scores["value"].to_numpy()
    falls = np.flatnonzero((values[:-1] >= level) & (values[1:] < level))
    if not len(falls):
        return None
    left = falls[0]
    share = (values[left] - level) / (values[left] - values[left + 1])
    return 100 * (places[left] + share * (places[left + 1] - places[left]))
