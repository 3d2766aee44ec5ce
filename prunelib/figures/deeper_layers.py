"""Chapter 03: how many of the deep layers does a model need, when one contiguous block is removed?"""

from dataclasses import dataclass

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LogNorm, Normalize
from matplotlib.ticker import PercentFormatter

from prunelib.figures import style as fig
from prunelib.figures.save import Chapter, Drawing, FigureError, figure, markdown, pick
from prunelib.lab.runs import PUBLISHED, published

CHAPTER = "03_deeper_layers"
READS = {"blocks": None}
TASKS = {"tasks": ("blocks",)}
EMBEDDED = ("pydocs_next_line", "pydocs_summary", "pydocs_parameter")
RULES = ("angular", "deepest")
SIZE, START, DROPPED = "block size n", "first layer of the block, l", "layers dropped, %"
NEAREST = {"markersize": 3.6, "color": fig.METHODS["angular"].color, "markeredgecolor": "black", "markeredgewidth": 0.5}
BEST = {"linestyle": "", "marker": "*", "color": "white", "markeredgecolor": "black", "markeredgewidth": 0.5}
AGREE, DIFFER = ("#9a9a9a", "all draws choose the same block"), ("#d55e00", "they differ")
COLLAPSE = {"color": "#999999", "linestyle": (0, (4, 3)), "linewidth": 1}


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


def _sketch(found: Blocks, parts: int = 1, **options: object) -> fig.Sketch:
    """A column for each model, named above it."""
    titles = [f"{name} ({layers} layers)" for name, layers in found.layers.items()]
    return fig.Sketch(found.names, parts, titles=titles, **options)


def _losses(chapter: Chapter, name: str, metric: str) -> pd.DataFrame:
    """One loss of both rules against the fraction of layers dropped, with its range over the calibration draws."""
    rows = pick(chapter.table("blocks"), name=name, metric=metric, role="choice")
    return _with_dense(fig.spread(rows, ["method", "size", "fraction"]))


def _scores(chapter: Chapter, name: str, task: str = "all") -> pd.DataFrame:
    """Accuracy of both rules in a task, or the mean, against the fraction dropped, with the 95 % interval of the items."""
    rows = pick(chapter.table("tasks"), name=name, run_part="blocks", task=task, method=("dense", *RULES))
    data = pick(rows, metric="average" if task == "all" else "acc").fillna({"fraction": 0.0})
    if task == "all":
        for end in ("low", "high"):
            ends = pick(rows, metric=f"average_{end}").set_index(["method", "size"])["value"]
            data[end] = ends.reindex(pd.MultiIndex.from_frame(data[["method", "size"]])).to_numpy()
    else:
        half = 1.96 * data["stderr"].fillna(0)
        data["low"], data["high"] = data["value"] - half, data["value"] + half
    columns = ["name", "method", "size", "fraction", "task", "metric", "value", "low", "high", "n", "run", "code"]
    return _with_dense(data[columns])


def _with_dense(data: pd.DataFrame) -> pd.DataFrame:
    """Every rule begins with the dense model, where nothing is dropped."""
    dense = pick(data, method="dense")
    return pd.concat([pd.concat([dense, data[data["method"] == rule]]).assign(method=rule) for rule in RULES])


def _chance(chapter: Chapter, name: str) -> float:
    rows = pick(chapter.table("tasks"), name=name, run_part="blocks", metric="chance", task=EMBEDDED)
    return float(rows.drop_duplicates("task")["value"].mean())


def _level(axes: Axes, value: float | int, label: str = "chance", line: str = "--") -> None:
    axes.axhline(value, color="#333333", linestyle=line, linewidth=1, zorder=1, label=label)


def _dropped(axes: Axes) -> None:
    axes.set_xlim(-0.02, 1.0)
    axes.xaxis.set_major_formatter(PercentFormatter(1.0, symbol=""))


def _heat(sketch: fig.Sketch, axes: Axes, grid: pd.DataFrame, norm: Normalize, nearest: pd.Series, label: str) -> None:
    """Cells of a table (lines n, columns l) as colors, with the blocks of the rule marked; the last panel carries the scale."""
    cells = axes.pcolormesh(grid.columns, grid.index, grid.to_numpy(dtype=float), norm=norm, cmap="cividis", rasterized=True)
    axes.plot(nearest, nearest.index, fig.METHODS["angular"].marker, label="removed by the rule", **NEAREST)
    axes.grid(visible=False)
    axes.set_xlabel(START)
    fig.whole_numbers(axes)
    if axes is sketch.grid[0, -1]:
        _scale(sketch, cells, label)


def _scale(sketch: fig.Sketch, cells: ScalarMappable, label: str) -> None:
    sketch.figure.colorbar(cells, ax=list(sketch.grid[0]), label=label, pad=0.02).outline.set_visible(False)


def _long(grid: pd.DataFrame, value: str = "value") -> pd.DataFrame:
    return grid.rename_axis(index="size", columns="start").stack().rename(value).reset_index()


@figure("deeper_layers_fig1c_distance_curves", reads=READS)
def fig1c_distance_curves(chapter: Chapter) -> Drawing:
    """Angular distance between the input of layer l and that of layer l + n, a curve per block size n."""
    found = blocks(chapter)
    sketch = _sketch(found, height=3.3, sharey=True)
    sizes = ScalarMappable(Normalize(1, max(found.layers.values()) - 1), "cividis")
    for (axes,), name in sketch:
        nearest = found.typical(name)
        for size, line in found.distance[name].iloc[:: 2 if found.layers[name] <= 24 else 3].iterrows():
            values = line.dropna()
            axes.plot(values.index, values, "-" if len(values) > 2 else ".-", color=sizes.to_rgba(size), linewidth=1.1)
            if size in nearest:
                style = NEAREST | {"markersize": 5, "label": "removed by the rule"}
                axes.plot([nearest[size]], [values[nearest[size]]], fig.METHODS["angular"].marker, **style)
        fig.whole_numbers(axes)
        data = _long(found.distance[name], "angular_distance")
        sketch.keep(data, model=name, nearest=data["start"] == data["size"].map(nearest))
    _scale(sketch, sizes, SIZE)
    return sketch.done(found.rows, x=START, y="angular distance d(l, l + n)")


@figure("deeper_layers_fig4_heatmap", reads=READS)
def fig4_heatmap(chapter: Chapter) -> Drawing:
    """The paper's heat map without the blocks that start at layer 0: the distances of each block size, rescaled to [0, 1]."""
    found = blocks(chapter)
    sketch = _sketch(found, height=3.3)
    for (axes,), name in sketch:
        later = found.distance[name].loc[:, 1:].dropna(how="all")
        low, high = later.min(axis=1), later.max(axis=1)
        rescaled = later.sub(low, axis=0).div((high - low).where(high > low), axis=0).dropna(how="all")
        sketch.keep(_long(rescaled, "rescaled_distance"), model=name)
        nearest = found.typical(name)
        _heat(sketch, axes, rescaled, Normalize(0, 1), nearest[nearest > 0], "distance, each line rescaled to [0, 1]")
    return sketch.done(found.rows, x=START, y=SIZE)


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
    known = every(chapter, found)
    names, costs = list(known.over_dense), known.over_dense.values()
    titles = [f"{name} ({found.layers[name]} layers)" for name in names]
    sketch = fig.Sketch(names, 2, titles=titles, height=3.1, sharey="row")
    everything = np.concatenate([cost.to_numpy().ravel() for cost in costs])
    norm = LogNorm(np.nanmin(everything[everything > 0]), np.nanmax(everything))
    for (above, below), name in sketch:
        cost = known.over_dense[name]
        _heat(sketch, above, cost, norm, found.typical(name), "nats over dense (log)")
        above.plot(cost.idxmin(axis=1), cost.index, markersize=6, label="best block (regret 0)", **BEST)
        sketch.keep(_long(cost), model=name, what="nats over dense")
        sketch.keep(_regret_curves(below, found, known, name), model=name, what="regret against the best block")
    last = "; ".join(
        f"{name}, for {(cost.idxmin(axis=1) + cost.index == found.layers[name]).sum()} of {len(cost)} sizes"
        for name, cost in known.over_dense.items()
    )
    text = f"The best block takes the very last layer, which both rules keep: {last}."
    note = f"angular: median and min–max of {found.draws} calibration draws"
    rows = pd.concat([found.rows, known.rows])
    return sketch.done(rows, x=SIZE, y=[SIZE, "regret, nats per token"], note=note, text=text)


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
    axes.axhline(0, color="black", linewidth=0.8)
    free = mine.loc[mine["method"] == "best", ["method", "size", "value"]]
    if len(free):
        fig.curve(axes, free, "best", x="size", label="best known set, not contiguous")
    fig.whole_numbers(axes)
    return pd.concat([data, spared, free, band])


@figure("deeper_layers_fig3_normalized_loss", reads=READS)
def fig3_normalized_loss(chapter: Chapter) -> Drawing:
    """Loss over the logarithm of the vocabulary size against the fraction of layers dropped, angular blocks."""
    sketch = fig.Sketch(["all"], titles=[""], height=3.2)
    axes = sketch.grid[0, 0]
    looks = zip("Dosv^", ("-", "-.", ":", "--", "-"), ("#56b4e9", "#12507b", "#8c6d1f", "#000000", "#777777"), strict=True)
    for name, (marker, line, color) in zip(chapter.models("blocks"), looks, strict=False):
        data = sketch.keep(pick(_losses(chapter, name, "normalized_loss"), method="angular"), model=name)
        look = fig.Method(name, f"{name}, angular block", color, marker, line)
        fig.curve(axes, data, look, x="fraction", markeredgewidth=1)
        level = pick(data, size=0)["value"].iloc[0]
        axes.axhline(level, color=color, linestyle=":", linewidth=1, label=f"{name}, dense")
    _level(axes, 1, "uniform guess")
    axes.set_ylim(bottom=0)
    _dropped(axes)
    rows = pick(chapter.table("blocks"), metric="normalized_loss", role="choice")
    note = fig.error_note(sketch.drawn[0].query("size > 0"), "calibration draws")
    return sketch.done(rows, x=DROPPED, y="loss / log(vocabulary)", note=note)


@figure("deeper_layers_fig2_accuracy", reads={**TASKS, **READS})
def fig2_accuracy(chapter: Chapter) -> Drawing:
    """Accuracy in the embedded tasks after the angular rule; where published models fall to chance."""
    sketch = _sketch(blocks(chapter), height=4.2, sharey=True)
    for (axes,), name in sketch:
        for task, line in zip(EMBEDDED, ("-", "--", "-."), strict=True):
            data = pick(_scores(chapter, name, task), method="angular").sort_values("fraction")
            label = task.removeprefix("pydocs_").replace("_", " ")
            axes.plot(data["fraction"], data["value"], line, color="#8fb3c7", linewidth=1, label=label)
            sketch.keep(data, data)
        data = pick(_scores(chapter, name), method="angular")
        sketch.keep(data, data)
        fig.curve(axes, data, "angular", x="fraction", label="angular block: mean of the three")
        fig.dense_line(axes, pick(data, size=0)["value"].iloc[0])
        _level(axes, _chance(chapter, name))
        _mark_collapse(axes)
        axes.set_title(axes.get_title("left"), pad=48)
        axes.set_ylim(0, 1)
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, symbol=""))
        _dropped(axes)
    note = "error bars: 95 % interval over the items, one calibration draw"
    return sketch.done(x=DROPPED, y="accuracy, %", note=note, published=[PUBLISHED])


def _mark_collapse(axes: Axes) -> None:
    """Where the published models fall to chance on MMLU (healed)."""
    rows = pick(published("deeper_layers", "headline"), metric="collapse_fraction_percent")
    for family, ends in (rows.groupby("model")["value"].agg(["min", "max"]) / 100).iterrows():
        if ends["max"] > ends["min"]:
            axes.axvspan(*ends, facecolor="none", edgecolor="#bbbbbb", hatch="///", linewidth=0, zorder=0.5)
        else:
            axes.axvline(ends["min"], zorder=0.5, label="falls to chance (published)", **COLLAPSE)
        place = {"xy": (ends.mean(), 1), "xycoords": axes.get_xaxis_transform(), "textcoords": "offset points"}
        axes.annotate(family, xytext=(0, 2), rotation=90, ha="center", va="bottom", fontsize=7.5, color="#555555", **place)


@figure("deeper_layers_fig5_simple_vs_similarity", reads={**TASKS, **READS})
def fig5_simple_vs_similarity(chapter: Chapter) -> Drawing:
    """The simple rule against the angular one: mean accuracy above, loss below."""
    found = blocks(chapter)
    sketch = _sketch(found, 2, height=2.4, sharey="row", sharex=True)
    for (above, below), name in sketch:
        scores, losses = _scores(chapter, name), _losses(chapter, name, "normalized_loss")
        sketch.keep(scores, scores, what="mean accuracy")
        sketch.keep(losses, name=name, what="loss / log(vocabulary)")
        for axes, data, offset in ((above, scores, 0.004), (below, losses, 0)):
            fig.dense_line(axes, pick(data, size=0)["value"].iloc[0])
            for rule, shift in (("deepest", -offset), ("angular", offset)):
                fig.curve(axes, pick(data, method=rule), rule, x="fraction", offset=shift)
        _level(above, _chance(chapter, name))
        _level(below, 1, "uniform guess", "-.")
        above.set_ylim(0, 1)
        below.set_ylim(bottom=0)
        above.yaxis.set_major_formatter(PercentFormatter(1.0, symbol=""))
        _dropped(below)
    rows = pd.concat([*sketch.used, pick(chapter.table("blocks"), metric="normalized_loss", role="choice")])
    note = f"error bars: 95 % interval over items (above), min–max of {found.draws} calibration draws (below)"
    return sketch.done(rows, x=DROPPED, y=["mean accuracy, %", "loss / log(vocabulary)"], note=note)


@figure("own_block_draws", reads=READS)
def block_draws(chapter: Chapter) -> Drawing:
    """Which block each calibration draw chooses, a line per draw from its first to its last layer."""
    found = blocks(chapter)
    sketch = _sketch(found, height=3.6)
    for (axes,), name in sketch:
        sizes = found.sizes(name)
        shown = sizes[1::2] if len(sizes) > 3 else sizes
        agree = [size for size in sizes if found.chosen[name, size].nunique() == 1]
        for size in shown:
            starts = found.chosen[name, size]
            color, label = AGREE if size in agree else DIFFER
            for place, start in enumerate(starts):
                height = size + 0.5 * (place - (len(starts) - 1) / 2)
                axes.plot(
                    [start, start + size - 1], [height] * 2, color=color, linewidth=1.3, solid_capstyle="butt", label=label
                )
        data = pd.concat({size: found.chosen[name, size] for size in sizes}, names=["size", "draw"]).rename("start")
        sketch.keep(data.reset_index(), model=name)
        axes.set_title(f"{name}: all draws agree for {len(agree)} of {len(sizes)} sizes", fontsize=9)
        axes.set_xlim(-0.5, found.layers[name] - 0.5)
        fig.whole_numbers(axes)
        axes.set_yticks(shown)
        axes.tick_params(axis="y", labelsize=7.5)
    return sketch.done(found.rows, x="layer", y=SIZE, note="every second size is drawn")


@figure("own_table_deeper_layers", reads={"optimum_runs": None, **TASKS, **READS})
def table_deeper_layers(chapter: Chapter) -> Drawing:
    """Accuracy, loss per layer and regret of both rules, and how well the distance ranks the blocks."""
    found = blocks(chapter)
    known, lines = every(chapter, found), []
    regret = fig.spread(known.regrets, ["model", "method", "size"]).groupby(["model", "method"])["value"].mean()
    for name in found.names:
        cost, chance = known.over_dense.get(name, pd.DataFrame()), _chance(chapter, name)
        large = [size for size in cost.index if cost.loc[size].notna().sum() >= 10]
        ranks = [found.distance[name].loc[size].corr(cost.loc[size], method="spearman") for size in large]
        middle = cost.sub(cost.min(axis=1), axis=0).median(axis=1).reindex(found.sizes(name)).mean()
        agree = 100 * np.mean([found.chosen[name, size].nunique() == 1 for size in found.sizes(name)])
        for rule in RULES:
            tables = (_scores(chapter, name), *(_losses(chapter, name, metric) for metric in ("nll", "normalized_loss")))
            scores, losses, scaled = (pick(data, method=rule).set_index("size").sort_index() for data in tables)
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
