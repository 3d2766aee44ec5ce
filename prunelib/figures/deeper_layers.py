"""Chapter 03: how many of the deep layers does a model need, when one contiguous block is removed?"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LogNorm, Normalize

from prunelib.figures import style as fig
from prunelib.figures.save import Chapter, Drawing, FigureError, figure, markdown, pick
from prunelib.lab.runs import PUBLISHED, published

CHAPTER = "03_deeper_layers"
READS = {"blocks": None}
TASKS = {"tasks": ("blocks",)}
EMBEDDED = ("pydocs_next_line", "pydocs_summary", "pydocs_parameter")
RULES = ("angular", "deepest")
SIZE, START, DROPPED = "block size n", "first layer of the block, l", "layers dropped, %"
MARK = {"linestyle": "", "markeredgecolor": "black", "markeredgewidth": 0.5}
NEAREST = {**MARK, "marker": "D", "color": fig.METHODS["angular"].color, "markersize": 3.6, "label": "removed by the rule"}


@dataclass(frozen=True)
class Blocks:
    """The angular distances of a chapter's models, and the blocks that the rule chooses by them.

    rows: of the distances. distance: their median over the calibration draws, by `model`, `size` and `start`, and whether most
    draws choose this block (`nearest`). chosen: the `start` that each draw chooses. layers: of each model.
    """

    rows: pd.DataFrame
    distance: pd.DataFrame
    chosen: pd.DataFrame
    layers: Mapping[str, int]

    @property
    def titles(self) -> dict[str, str]:
        return {name: f"{name} ({layers} layers)" for name, layers in self.layers.items()}


def blocks(chapter: Chapter) -> Blocks:
    """Distances and choices from the table `blocks`."""
    rows = pick(chapter.table("blocks"), metric="angular").astype({"size": int, "start": int, "calibration_seed": int})
    layers = rows.groupby("model", sort=False)["start"].max() + 1
    distance = rows.groupby(["model", "size", "start"], sort=False)["value"].median().reset_index()
    allowed = rows[rows["start"] + rows["size"] <= rows["model"].map(layers) - rows["protect_last"].astype(int)]
    draws = ["model", "size", "calibration_seed"]
    chosen = allowed.sort_values("value", kind="stable").drop_duplicates(draws).sort_values(draws)
    typical = chosen.groupby(["model", "size"])["start"].agg(lambda starts: starts.mode().iloc[0]).rename("nearest")
    distance = distance.merge(typical.reset_index(), on=["model", "size"], how="left")
    return Blocks(rows, distance.assign(nearest=distance["start"] == distance["nearest"]), chosen, layers.to_dict())


def _losses(chapter: Chapter, metric: str) -> pd.DataFrame:
    """One loss of both rules against the fraction of layers dropped, with its range over the calibration draws."""
    rows = pick(chapter.table("blocks"), metric=metric, role="choice")
    return _with_dense(fig.spread(rows, ["model", "method", "size", "fraction"]))


def _scores(chapter: Chapter, task: str | tuple[str, ...] = "all") -> pd.DataFrame:
    """Accuracy of both rules in tasks, or the mean, against the fraction dropped, with the 95 % interval of the items."""
    rows = pick(chapter.table("tasks"), run_part="blocks", task=task, method=("dense", *RULES))
    data = pick(rows, metric="average" if task == "all" else "acc").fillna({"fraction": 0.0})
    if task == "all":
        for end in ("low", "high"):
            ends = pick(rows, metric=f"average_{end}").set_index(["model", "method", "size"])["value"]
            data[end] = ends.reindex(pd.MultiIndex.from_frame(data[["model", "method", "size"]])).to_numpy()
    else:
        half = 1.96 * data["stderr"].fillna(0)
        data = data.assign(low=data["value"] - half, high=data["value"] + half)
    columns = ["model", "method", "size", "fraction", "task", "metric", "value", "low", "high", "n", "run", "code"]
    return _with_dense(data[columns])


def _with_dense(data: pd.DataFrame) -> pd.DataFrame:
    """Every rule begins with the dense model, where nothing is dropped."""
    both = [data[data["method"].isin(("dense", rule))].assign(method=rule) for rule in RULES]
    return pd.concat(both).sort_values(["model", "size"], kind="stable")


def _chance(chapter: Chapter) -> pd.Series:
    rows = pick(chapter.table("tasks"), run_part="blocks", metric="chance", task=EMBEDDED)
    return rows.drop_duplicates(["model", "task"]).groupby("model")["value"].mean()


@figure("deeper_layers_fig1c_distance_curves", reads=READS)
def fig1c_distance_curves(chapter: Chapter) -> Drawing:
    """Angular distance between the input of layer l and that of layer l + n, a curve per block size n."""
    found = blocks(chapter)
    data = found.distance.rename(columns={"value": "angular_distance"})
    grid = fig.Panels(data, "model", titles=found.titles, height=3.3, sharey=True)
    colors = ScalarMappable(Normalize(1, data["size"].max()), "cividis")
    for axes, part in grid:
        shown = part["size"].unique()[:: 2 if len(part["size"].unique()) < 24 else 3]
        for size, line in part[part["size"].isin(shown)].groupby("size"):
            style = {"marker": "" if len(line) > 2 else ".", "linewidth": 1.1}
            axes.plot(line["start"], line["angular_distance"], color=colors.to_rgba(size), **style)
        near = part[part["nearest"] & part["size"].isin(shown)]
        axes.plot(near["start"], near["angular_distance"], **NEAREST)
    grid.figure.colorbar(colors, ax=list(grid.grid[0]), label=SIZE, pad=0.02).outline.set_visible(False)
    return grid.done(found.rows, x=START, y="angular distance d(l, l + n)")


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
    found = blocks(chapter)
    data = found.distance[found.distance["start"] > 0]
    sizes = data.groupby(["model", "size"])["value"]
    low, high = sizes.transform("min"), sizes.transform("max")
    data = data.assign(value=(data["value"] - low) / (high - low).where(high > low)).dropna(subset="value")
    grid = fig.Panels(data, "model", titles=found.titles, height=3.3)
    for axes, part in grid:
        cells = _heat(axes, part, Normalize(0, 1))
    label = "distance, each line rescaled to [0, 1]"
    grid.figure.colorbar(cells, ax=list(grid.grid[0]), label=label, pad=0.02).outline.set_visible(False)
    grid.data = data.rename(columns={"value": "rescaled_distance"})
    return grid.done(found.rows, x=START, y=SIZE)


@dataclass(frozen=True)
class EveryBlock:
    """The measured loss without every contiguous block, from committed runs.

    cost: nats per token over dense by `model`, `size` and `start`, and the `regret` against the best block of that size.
    regrets: of both rules, per draw, and of the best known set that need not be contiguous (`best`). rows: behind them.
    """

    cost: pd.DataFrame
    regrets: pd.DataFrame
    rows: pd.DataFrame


def every(chapter: Chapter, found: Blocks) -> EveryBlock:
    """Raises FigureError when the loss of every block is known for none of the models."""
    keys, committed = ["model", "size"], pick(chapter.table("optimum_runs"), may_be_empty=True, model=list(found.layers))
    rows = pick(committed, may_be_empty=True, role="every_block").astype({"size": int, "start": int})
    free = pick(committed, may_be_empty=True, experiment="optimum", role=("optimum", "best_known"))
    if rows.empty:
        place, names = chapter["optimum_runs"], ", ".join(found.layers)
        raise FigureError(f"{place} holds the loss of every block for none of {names}: run profiles/optimum.yaml")
    dense = pick(committed, method="dense", metric="nll").groupby("model")["value"].first()
    cost = rows.assign(value=rows["value"] - rows["model"].map(dense))[[*keys, "start", "value"]]
    best = cost.groupby(keys)["value"].min().rename("best").reset_index()
    cost = cost.merge(best, on=keys).assign(regret=lambda one: one["value"] - one["best"])
    chosen = found.chosen[[*keys, "start", "calibration_seed"]].assign(method="angular")
    deepest = best[keys].assign(method="deepest", start=best["model"].map(found.layers) - 1 - best["size"])
    ruled = pd.concat([chosen, deepest]).merge(cost, on=[*keys, "start"])
    sets = free.assign(method="best", size=free["layers_removed"].astype(int)).merge(best, on=keys)
    sets["regret"] = sets["value"] - sets["model"].map(dense) - sets["best"]
    regrets = pd.concat([ruled, sets])[[*keys, "method", "calibration_seed", "regret"]]
    return EveryBlock(cost, regrets.rename(columns={"regret": "value"}), pd.concat([rows, free]))


@figure("own_every_block", reads={"optimum_runs": None, **READS})
def every_block(chapter: Chapter) -> Drawing:
    """The measured loss without every block, and how much worse the rules choose than the best block."""
    found = blocks(chapter)
    known, keys = every(chapter, found), ["model", "method", "size"]
    worse = known.cost.groupby(["model", "size"])["regret"]
    band = worse.quantile([0.05, 0.5, 0.95]).unstack().set_axis(["low", "value", "high"], axis=1).reset_index()
    band = band.assign(method="random", n=worse.count().to_numpy())
    layers = known.cost["model"].map(found.layers)
    spared = known.cost[known.cost["start"] + known.cost["size"] < layers].groupby(["model", "size"])["regret"].min()
    spared = spared.rename("value").reset_index().assign(method="best block that spares the last layer")
    lines = pd.concat([fig.spread(known.regrets, keys), spared, band]).assign(what="regret against the best block")
    cells = known.cost.merge(found.distance.drop(columns="value"), on=["model", "size", "start"], how="left")
    cells = cells.assign(nearest=cells["nearest"].eq(True), what="nats over dense")
    grid = fig.Panels(pd.concat([cells, lines]), "model", "what", titles=found.titles, height=3.1, sharey="row")
    looks = {**fig.METHODS, "best": replace(fig.METHODS["best"], title="best known set, not contiguous")}
    looks[spared["method"].iloc[0]] = fig.Method(spared["method"].iloc[0], "#000000", "", "--")
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
    grid.figure.colorbar(colors, ax=list(grid.grid[0]), label="nats over dense (log)", pad=0.02).outline.set_visible(False)
    last = known.cost[known.cost["regret"] == 0].assign(end=lambda one: one["start"] + one["size"])
    taken = (last["end"] == last["model"].map(found.layers)).groupby(last["model"], sort=False).agg(["sum", "size"])
    counts = "; ".join(f"{one.Index}, for {one[1]} of {one[2]} sizes" for one in taken.itertuples())
    text = f"The best block takes the very last layer, which both rules keep: {counts}."
    note = f"angular: median and min–max of {found.rows['calibration_seed'].nunique()} calibration draws"
    grid.data = grid.data.drop(columns=["nearest", "best", "regret"])
    return grid.done(pd.concat([found.rows, known.rows]), x=SIZE, y=[SIZE, "regret, nats per token"], note=note, text=text)


@figure("deeper_layers_fig2_accuracy", reads={**TASKS, **READS})
def fig2_accuracy(chapter: Chapter) -> Drawing:
    """Accuracy in the embedded tasks after the angular rule; where published models fall to chance."""
    data = pd.concat([_scores(chapter, EMBEDDED), _scores(chapter)])
    data = data[data["method"] == "angular"]
    data.loc[data["task"] != "all", ["low", "high"]] = np.nan
    grid = fig.Panels(data, "model", titles=blocks(chapter).titles, height=4.2, sharey=True)
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
    for family, ends in (rows.groupby("model")["value"].agg(["min", "max"]) / 100).iterrows():
        if ends["max"] > ends["min"]:
            axes.axvspan(*ends, facecolor="none", edgecolor="#bbbbbb", hatch="///", linewidth=0, zorder=0.5)
        else:
            dashed = {"color": "#999999", "linestyle": "--", "linewidth": 1, "zorder": 0.5}
            axes.axvline(ends["min"], label="falls to chance (published)", **dashed)
        place = {"xy": (ends.mean(), 1), "xycoords": axes.get_xaxis_transform(), "textcoords": "offset points"}
        axes.annotate(family, xytext=(0, 2), rotation=90, ha="center", va="bottom", fontsize=7.5, color="#555555", **place)


@figure("deeper_layers_fig5_simple_vs_similarity", reads={**TASKS, **READS})
def fig5_simple_vs_similarity(chapter: Chapter) -> Drawing:
    """The simple rule against the angular one: mean accuracy above, loss below."""
    found, scores, chance = blocks(chapter), _scores(chapter), _chance(chapter)
    losses = _losses(chapter, "normalized_loss").assign(what="loss / log(vocabulary)")
    data = pd.concat([scores.assign(what="mean accuracy"), losses])
    grid = fig.Panels(data, "model", "what", titles=found.titles, height=2.4, sharey="row", sharex=True)
    for axes, part in grid:
        accuracy = "mean accuracy" in set(part["what"])
        fig.lines(axes, part, x="fraction", dodge=0.008 if accuracy else 0)
        fig.level(axes, part.loc[part["size"] == 0, "value"].iloc[0])
        least, line = (chance[part["model"].iloc[0]], "--") if accuracy else (1, "-.")
        fig.level(axes, least, "chance" if accuracy else "uniform guess", "#333333", line)
        axes.set(xlim=(-0.02, 1), ylim=(0, 1 if accuracy else None))
        if accuracy:
            fig.percent(axes.yaxis)
    rows = pd.concat([scores, pick(chapter.table("blocks"), metric="normalized_loss", role="choice")])
    draws = found.rows["calibration_seed"].nunique()
    note = f"error bars: 95 % interval over items (above), min–max of {draws} calibration draws (below)"
    return grid.done(rows, x=DROPPED, y=["mean accuracy, %", "loss / log(vocabulary)"], note=note)


@figure("own_block_draws", reads=READS)
def block_draws(chapter: Chapter) -> Drawing:
    """Which block each calibration draw chooses, a line per draw from its first to its last layer."""
    found = blocks(chapter)
    data = found.chosen.rename(columns={"calibration_seed": "draw"})
    agree = data.groupby(["model", "size"])["start"].transform("nunique") == 1
    grid = fig.Panels(data.assign(agree=agree), "model", height=3.6)
    for axes, part in grid:
        sizes = part.drop_duplicates("size")
        for same, color, label in ((True, "#9a9a9a", "all draws choose the same block"), (False, "#d55e00", "they differ")):
            one = part[(part["agree"] == same) & part["size"].isin(sizes["size"].iloc[1::2])]
            heights = one["size"] + 0.5 * (one["draw"] - part["draw"].mean())
            axes.hlines(heights, one["start"], one["start"] + one["size"] - 1, color=color, linewidth=1.3, label=label)
        title = f"{part['model'].iloc[0]}: all draws agree for {sizes['agree'].sum()} of {len(sizes)} sizes"
        axes.set_title(title, fontsize=9)
        axes.set_yticks(sizes["size"].iloc[1::2])
    return grid.done(found.rows, x="layer", y=SIZE, note="every second size is drawn", keep=["size", "draw", "start", "model"])


@figure("own_table_deeper_layers", reads={"optimum_runs": None, **TASKS, **READS})
def table_deeper_layers(chapter: Chapter) -> Drawing:
    """Accuracy, loss per layer and regret of both rules, and how well the distance ranks the blocks."""
    found = blocks(chapter)
    known, chance, lines = every(chapter, found), _chance(chapter), []
    regret = fig.spread(known.regrets, ["model", "method", "size"]).groupby(["model", "method"])["value"].mean()
    both = known.cost.merge(found.distance, on=["model", "size", "start"], suffixes=("", "_distance"))
    tables = [_scores(chapter), _losses(chapter, "nll"), _losses(chapter, "normalized_loss")]
    for name in found.layers:
        mine = [one for _, one in both[both["model"] == name].groupby("size") if len(one) >= 10]
        draws = found.chosen[found.chosen["model"] == name].groupby("size")["start"]
        ranks = [one["value"].corr(one["value_distance"], method="spearman") for one in mine]
        middle = known.cost[known.cost["model"] == name].groupby("size")["regret"].median().reindex(draws.groups).mean()
        for rule in RULES:
            scores, losses, scaled = (pick(data, model=name, method=rule).set_index("size").sort_index() for data in tables)
            rise = (losses["value"] - losses["value"].iloc[0]) / losses.index.to_numpy().clip(1)
            lines.append(
                {
                    "model": name,
                    "rule": fig.METHODS[rule].title,
                    "dense accuracy, %": 100 * scores["value"].iloc[0],
                    "chance, %": 100 * chance[name],
                    "half-way at, % of layers": _half_way(scores, chance[name]),
                    "nats per layer, smallest n": rise.iloc[1],
                    "nats per layer, a quarter gone": rise.loc[: found.layers[name] / 4].iloc[-1] or None,
                    "loss / log(vocabulary), half gone": scaled["value"].loc[: found.layers[name] / 2].iloc[-1],
                    "regret, mean over n": regret.get((name, rule)),
                    "regret of the median block": middle,
                    "rank correlation with the loss": np.median(ranks) if ranks and rule == "angular" else None,
                    "draws agree, % of sizes": 100 * (draws.nunique() == 1).mean() if rule == "angular" else None,
                }
            )
    numbers = pd.DataFrame(lines).dropna(axis=1, how="all")
    whole = ("dense accuracy, %", "chance, %", "half-way at, % of layers", "draws agree, % of sizes")
    rows = pd.concat([chapter.table("blocks"), pick(chapter.table("tasks"), run_part="blocks"), known.rows])
    return Drawing(None, numbers, rows, markdown(numbers, digits=dict.fromkeys(whole, 0)))


def _half_way(scores: pd.DataFrame, chance: float) -> float | None:
    """Percent of layers where the accuracy falls through the middle between dense and chance, interpolated; or None."""
    level, places, values = (scores["value"].iloc[0] + chance) / 2, scores["fraction"].to_numpy(), scores["value"].to_numpy()
    falls = np.flatnonzero((values[:-1] >= level) & (values[1:] < level))
    return 100 * np.interp(-level, -values[falls[0] :][:2], places[falls[0] :][:2]) if len(falls) else None
