"""Chapter 02: how far from the best possible choice is each way of choosing layers?"""

import itertools
from dataclasses import dataclass

import numpy as np
import pandas as pd
from matplotlib.ticker import FixedLocator, LogLocator
from safetensors.numpy import load_file

from prunelib.figures import style as fig
from prunelib.figures.save import Chapter, Drawing, FigureError, figure, markdown, pick
from prunelib.io import at_root

CHAPTER = "02_layer_search"
READS = {"selection": ("rules",), "optimum_runs": None}
APART = {"dense", "laco_published", "laco_released", "blockpruner", "evolutionary_sublayers"}  # these choose no sets of layers
MARKED = ("block_influence", "simdiff_mssd", "deepest", "leave_one_out_kl", "greedy")
GREY = fig.METHODS["random"].color
BAND = {"color": GREY, "alpha": 0.25, "linewidth": 0, "zorder": 0.5}
SMALL = {"fontsize": 9}


@dataclass(frozen=True)
class Search:
    """What the chapter draws from: the rules of the profile, and the committed runs of the optimum profile.

    rows: of all methods. choices: loss of every chosen set. regrets: `choices` less the loss of the best set known of that
    size. best: (model, K) → that loss. truth: model → losses of all sets (`all_k1`, …) or of random ones (`random_k12`). dense:
    model → loss. order: methods by their mean rank.
    """

    rows: pd.DataFrame
    choices: pd.DataFrame
    regrets: pd.DataFrame
    best: pd.Series
    optima: pd.DataFrame
    truth: dict[str, dict[str, np.ndarray]]
    dense: dict[str, float]
    order: list[str]

    @property
    def names(self) -> list[str]:
        return list(self.truth)

    @property
    def sizes(self) -> list[int]:
        """Every K asked for where the distribution of the losses is known."""
        asked = sorted(set(self.regrets["layers_removed"]))
        return [k for k in asked if all(self.population(name, k) is not None for name in self.truth)]

    @property
    def size(self) -> int:
        """The K of the figures that show one: 8, or the largest."""
        return 8 if 8 in self.sizes else self.sizes[-1]

    def population(self, name: str, k: int) -> np.ndarray | None:
        """Losses of all sets of K layers, or of random ones; None where neither was computed."""
        return self.truth[name].get(f"all_k{k}", self.truth[name].get(f"random_k{k}"))

    def layers(self, name: str) -> int:
        return len(self.truth[name]["all_k1"])

    def regret(self, name: str, k: int) -> pd.DataFrame:
        """Regret of every ranked method, one row per calibration draw."""
        return pick(self.regrets, name=name, layers_removed=k, method=tuple(self.order))

    def note(self) -> str:
        draws = pick(self.rows, experiment="selection")["calibration_seed"].nunique()
        return f"median and min–max of {draws} calibration draws"


def search(chapter: Chapter) -> Search:
    """The tables of a chapter as `Search`. Raises FigureError for a model without committed optimum."""
    table, committed = pick(chapter.table("selection"), run_part="rules"), chapter.table("optimum_runs")
    # The rows that say which share of the parameters K layers hold; older runs call that a method.
    table["method"] = table["method"].mask(table["role"].eq("size"), "layers")
    names = list(dict.fromkeys(table["name"]))
    known = pick(committed, may_be_empty=True, experiment="optimum", name=tuple(names))
    if missing := set(names) - set(known["name"]):
        raise FigureError(f"{chapter['optimum_runs']} has no optimum for {min(missing)}: make it with profiles/optimum.yaml")
    # What only a GPU ran; the rules themselves come from the profile's own table.
    extra = pick(committed, may_be_empty=True, experiment="selection", name=tuple(names))
    extra = extra[~extra["method"].isin(table["method"])]
    # A run of all draws says the draw in its rows, a run of one draw in its parameter `seed`.
    draw, alone = (extra.get(column, pd.Series(index=extra.index, dtype=float)) for column in ("calibration_seed", "seed"))
    extra = extra.assign(calibration_seed=draw.fillna(alone)).drop(columns="seed", errors="ignore")
    rows = pd.concat([table, extra.drop(columns="calibration", errors="ignore")], ignore_index=True)
    choices = pick(rows, role="choice", metric="nll").astype({"layers_removed": int})
    optima = pick(known, metric="nll").astype({"layers_removed": int})
    found = pd.concat([optima, choices[choices["removed_layers"].notna()]])
    best = found.groupby(["name", "layers_removed"])["value"].min()
    regrets = choices[choices["method"] != "dense"].set_index(["name", "layers_removed"])
    regrets = regrets.assign(value=regrets["value"] - best.reindex(regrets.index)).reset_index()
    middle = fig.spread(regrets[~regrets["method"].isin(APART)], ["name", "layers_removed", "method"])
    middle["rank"] = middle.groupby(["name", "layers_removed"])["value"].rank()
    ranks = middle.groupby("method")["rank"].mean()
    folder, runs = at_root(chapter["optimum_runs"]), known.groupby("name")["run"].first()
    return Search(
        rows, choices, regrets, best, optima,
        truth={name: load_file(folder / f"{runs[name]}.safetensors") for name in names},
        dense=pick(optima, role="dense").groupby("name")["value"].first().to_dict(),
        order=sorted((name for name in fig.METHODS if name in ranks), key=lambda name: ranks[name]),
    )  # fmt: skip


@figure("own_regret", reads=READS)
def regret(chapter: Chapter) -> Drawing:
    """Regret of every method at three K, beside the middle 90 % of all sets."""
    found = search(chapter)
    shown = [k for k in (1, 3, 8) if k in found.sizes] or found.sizes[:3]
    sketch = fig.Sketch(found.names, len(shown), down=True, height=0.19 * len(found.order) + 0.8, sharey=True)
    for line, name in sketch:
        for axes, k in zip(line, shown, strict=True):
            rows, losses = found.regret(name, k), found.population(name, k) - found.best[name, k]
            low, middle, high = np.quantile(losses, [0.05, 0.5, 0.95])
            random = {"method": "random", "value": middle, "low": low, "high": high, "n": len(losses)}
            data = fig.spread(rows, "method")
            sketch.keep(pd.concat([data, pd.DataFrame([random])]), rows, model=name, layers_removed=k)
            axes.axvspan(low, high, **BAND)
            axes.axvline(middle, color=GREY, zorder=0.6)
            axes.axvline(0, color="black", linewidth=1)
            limit = 1.25 * max(middle, data["value"].quantile(0.9))
            fig.ranked_dots(axes, data, found.order, low=-0.03 * limit, high=limit)
            what = f"all {len(losses):,} sets" if f"all_k{k}" in found.truth[name] else f"{len(losses)} random sets"
            axes.set_title(f"K = {k}, {what}", **SMALL)
    below = f"dots and bars: {found.note()}; grey: 5–95 % of the sets, line: their median"
    return sketch.done(x="regret, nats per token", y=found.names, below=below)


@figure("own_every_set", reads=READS)
def every_set(chapter: Chapter) -> Drawing:
    """The distribution of the loss over all sets of up to three layers, and where some choices fall in it."""
    found = search(chapter)
    marked = [name for name in MARKED if name in found.order]
    sizes = [k for k in (1, 2, 3) if k in found.sizes] or found.sizes[:1]
    sketch = fig.Sketch(found.names, len(sizes), down=True, height=2.2)
    for line, name in sketch:
        for axes, k in zip(line, sizes, strict=True):
            losses = np.sort(found.population(name, k) - found.dense[name])
            share = 100 * np.arange(1, len(losses) + 1) / len(losses)
            axes.plot(losses, share, color="#555555", drawstyle="steps-post", label="all sets")
            rows = pick(found.regret(name, k), method=tuple(marked))
            data = rows.groupby("method")["value"].median()[marked] + found.best[name, k] - found.dense[name]
            data = data.rename("over_dense").reset_index()
            data["better_sets_percent"] = [100 * (losses < loss - 1e-6).mean() for loss in data["over_dense"]]
            for row in data.itertuples():
                look = fig.METHODS[row.method]
                axes.plot(row.over_dense, row.better_sets_percent, look.marker, color=look.color, label=look.title)
            places = np.linspace(0, 100, 101)
            whole = {"method": "all sets", "over_dense": np.percentile(losses, places), "better_sets_percent": places}
            sketch.keep(pd.concat([data, pd.DataFrame(whole)]), rows, model=name, layers_removed=k)
            fig.log_scale(axes, "x")
            axes.set_title(f"{name}, K = {k}: {len(losses):,} sets", **SMALL)
    note = "markers: median of the calibration draws"
    return sketch.done(x="nats over dense (log)", y="sets that are better, %", note=note)


@figure("own_cost_quality", reads=READS)
def cost_quality(chapter: Chapter) -> Drawing:
    """Regret at one K against measured cost in dense forward passes."""
    found = search(chapter)
    k = found.size
    sketch = fig.Sketch(found.names, titles=[f"{name}, K = {k}" for name in found.names], height=4.2, sharey=True)
    for (axes,), name in sketch:
        rows, losses = found.regret(name, k), found.population(name, k) - found.best[name, k]
        costs = _costs(found, name, k)
        data = costs.to_frame().join(rows.groupby("method")["value"].median().rename("regret"), how="inner")
        data = sketch.keep(data.sort_values("regret").reset_index(), rows, model=name, layers_removed=k)
        top, labels = 1.15 * max(data["regret"].max(), np.median(losses)), []
        for row in data.itertuples():
            look, cost, height = fig.METHODS[row.method], max(row.forwards, 0.5), row.regret
            while any(abs(np.log10(cost / other)) < 2.2 and abs(height - taken) < 0.032 * top for other, taken in labels):
                height += 0.004 * top  # a label that would cover another goes higher
            labels.append((cost, height))
            axes.plot([cost], [row.regret], look.marker, color=look.color)
            leader = {"arrowstyle": "-", "color": "#888888", "linewidth": 0.5, "shrinkA": 0, "shrinkB": 2}
            place = {"xytext": (cost * 1.35, height), "fontsize": 7, "va": "center"}
            axes.annotate(look.title, (cost, row.regret), arrowprops=leader, **place)
        axes.axhspan(*np.quantile(losses, [0.05, 0.95]), **BAND)
        axes.axhline(np.median(losses), color=GREY, label="random sets: median and 5–95 %")
        axes.set_xscale("log")
        axes.set(xlim=(0.35, 300 * costs.max()), ylim=(-0.03 * top, top))
        fig.log_scale(axes, "x")
        axes.xaxis.set_major_locator(FixedLocator([1, 10, 100, 1000, 10000]))
    note = "costs below one half are drawn at one half; evolution, beam and greedy KL: timed on a GPU"
    return sketch.done(x="cost, dense forward passes (log)", y="regret, nats per token", note=note)


def _costs(found: Search, name: str, k: int) -> pd.Series:
    """Median cost of every method, in dense forward passes over the calibration windows."""
    spent = pick(found.rows, name=name, metric="forwards")
    spent = spent[spent["layers_removed"].isna() | (spent["layers_removed"] == k)]
    return spent.groupby("method")["value"].median().rename("forwards")


@figure("own_zoo", reads=READS)
def zoo(chapter: Chapter) -> Drawing:
    """Which layers every method removes at one K; the best set known on top."""
    found = search(chapter)
    k = found.size
    titles = [f"{name}, K = {k}" for name in found.names]
    figure, grid = fig.panels(len(found.names), 1, height=0.19 * len(found.order) + 0.9, squeeze=False)
    drawn = []
    for axes, name, title in zip(grid[:, 0], found.names, titles, strict=True):
        best = pick(found.optima, name=name, layers_removed=k).nsmallest(1, "value")
        lines, rows = {"best set known": best["removed_layers"]}, found.regret(name, k)
        for method in [method for method in found.order if method in set(rows["method"])]:
            mine = pick(rows, method=method)
            lines[f"{fig.METHODS[method].title}  +{mine['value'].median():.2f}"] = mine["removed_layers"]
        drawn.append(fig.layer_shares(axes, lines, found.layers(name)).assign(model=name, layers_removed=k))
        axes.set(title=title, xlabel="layer (beside each method: regret, nats per token)")
    return Drawing(figure, pd.concat(drawn), pick(found.regrets, layers_removed=k, method=tuple(found.order)))


@figure("own_rank_correlation", reads=READS)
def rank_correlation(chapter: Chapter) -> Drawing:
    """Importance against the true cost of one layer, and sums of single costs against the true cost of pairs and triples."""
    found = search(chapter)
    correlations, sums = _correlations(found), _sums(found)
    methods = [name for name in found.order if name in set(correlations["method"])]
    sketch = fig.Sketch(found.names, 2, down=True, height=0.19 * len(methods) + 1.3)
    for (left, right), name in sketch:
        data = fig.spread(pick(correlations, name=name), "method")
        sketch.keep(data, model=name, what="spearman with the true single cost")
        fig.ranked_dots(left, pick(data, method=tuple(methods)), methods, low=-1, high=1)
        left.axvline(0, color="black", linewidth=0.8)
        left.set_title("importance v. true cost of one layer", **SMALL)
        for row in sums[sums["model"] == name].itertuples():
            x, y = _pairs(found, name, row.K)
            style = {"markersize": 2, "color": "#cccccc" if row.K == 3 else "#0072b2", "rasterized": True}
            right.plot(x, y, ".", label=f"{row.K} layers: rank correlation {row.spearman:.2f}", **style)
        single = found.truth[name]["all_k1"] - found.dense[name]
        limit = [0.8 * single[single > 0].min(), max(right.get_xlim()[1], right.get_ylim()[1])]
        right.plot(limit, limit, color="black", linewidth=0.8, label="sum = true cost")
        fig.log_scale(right, "x")
        fig.log_scale(right)
        right.xaxis.set_major_locator(LogLocator(subs=(1, 3)))
        right.set_title("sum of single costs v. true cost", **SMALL)
        right.set_ylabel("true cost, nats (log)")
        right.legend(fontsize=7, loc="upper left", markerscale=4)
    sketch.keep(sums, what="sum of single costs against true cost")
    labels = ["Spearman's rank correlation", "sum of single costs, nats (log)"]
    return sketch.done(pick(found.rows, metric="importance"), x=labels, y=found.names, below=f"dots and bars: {found.note()}")


def _correlations(found: Search) -> pd.DataFrame:
    """Rank correlation of every importance with the true cost of each layer: name, method, calibration draw, value."""
    rows, values = pick(found.rows, metric="importance").sort_values("layer"), []
    for (name, method, draw), one in rows.groupby(["name", "method", "calibration_seed"]):
        single = pd.Series(found.truth[name]["all_k1"])
        value = single.corr(one["value"].reset_index(drop=True), method="spearman")
        values.append({"name": name, "method": method, "calibration_seed": draw, "value": value})
    return pd.DataFrame(values)


def _pairs(found: Search, name: str, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Sum of the single costs and true cost of every set of `size` layers."""
    single = found.truth[name]["all_k1"] - found.dense[name]
    sets = np.array(list(itertools.combinations(range(found.layers(name)), size)))
    return single[sets].sum(axis=1), found.truth[name][f"all_k{size}"] - found.dense[name]


def _sums(found: Search) -> pd.DataFrame:
    """How well the sum of single costs predicts the cost of all pairs and triples, where these are known."""
    lines = []
    for name, size in itertools.product(found.names, (3, 2)):
        if f"all_k{size}" in found.truth[name]:
            sums, real = _pairs(found, name, size)
            chosen = real[int(np.argmin(sums))]
            line = {"model": name, "K": size, "sets": len(real)}
            line["spearman"] = pd.Series(sums).corr(pd.Series(real), method="spearman")
            lines.append({**line, "rank_of_best_sum": int((real < chosen).sum()) + 1, "regret": chosen - real.min()})
    return pd.DataFrame(lines, columns=["model", "K", "sets", "spearman", "rank_of_best_sum", "regret"])


@figure("own_sublayers", reads=READS)
def sublayers(chapter: Chapter) -> Drawing:
    """Loss against the share of parameters no longer used, and of those gone from the file, for layers and half layers."""
    found = search(chapter)
    titles = [f"{name} ({found.layers(name)} layers)" for name in found.names]
    sketch = fig.Sketch(found.names, titles=titles, height=3.4, sharey=True)
    for (axes,), name in sketch:
        mine = pick(found.rows, name=name).astype({"layers_removed": float})
        sizes = mine.groupby(["method", "metric", "layers_removed"])["value"].median()
        there = set(pick(found.choices, name=name)["method"])
        for method in ("greedy", "evolutionary", "blockpruner", "evolutionary_sublayers"):
            if method not in there:
                continue
            rows = pick(found.choices, name=name, method=method)
            rows = rows.assign(value=rows["value"] - found.dense[name])
            data, look, half = fig.spread(rows, "layers_removed"), fig.METHODS[method], (method, "idle") in sizes.index
            gone = sizes[method if half else "layers", "removed"].reindex(data["layers_removed"]).to_numpy()
            idle = sizes[method, "idle"].reindex(data["layers_removed"]).to_numpy() if half else 0
            data = sketch.keep(data, rows, silent=100 * (gone + idle), gone=100 * gone, model=name, method=method)
            style = {"linestyle": "-" if len(data) > 2 else "", "markeredgewidth": 1}
            style |= {"markerfacecolor": "white", "label": f"{look.title}: silent"} if half else {}
            fig.curve(axes, data, method, x="silent", **style)
            if half:
                axes.plot(data["gone"], data["value"], look.marker + ":", color=look.color, label=f"{look.title}: really gone")
        fig.dense_line(axes, 0, label="dense (nothing removed)")
    note = fig.error_note(sketch.drawn[0], "calibration draws")
    return sketch.done(x="parameters of the dense model, %", y="nats per token over dense", columns=2, note=note)


@figure("own_laco", reads=READS)
def laco(chapter: Chapter) -> Drawing:
    """Loss after as many merges as LaCo's threshold accepts, beside rules that remove the number of layers asked for."""
    found = search(chapter)
    merged = [name for name in ("laco_published", "laco_released") if name in set(found.choices["method"])]
    size = int(pick(found.choices, method=tuple(merged))["asked"].max())
    beside = [name for name in ("block_influence", "deepest", "leave_one_out_kl", "greedy") if name in found.order]
    sketch = fig.Sketch(found.names, height=2.2, sharey=True)
    for (axes,), name in sketch:
        mine = pick(found.choices, name=name)
        rows = pd.concat([pick(mine, method=tuple(merged)), pick(mine, method=tuple(beside), layers_removed=size)])
        rows = rows.assign(value=rows["value"] - found.dense[name])
        data = sketch.keep(fig.spread(rows, ["method", "layers_removed"]), rows, model=name)
        fig.ranked_dots(axes, data, [*merged, *beside], low=-0.05, high=1.25 * data["value"].max())
        for row in pick(data, method=tuple(merged)).itertuples():
            place = (row.value, merged.index(row.method))
            axes.annotate(f"  {row.layers_removed} of {size} gone", place, va="center", fontsize=8)
        axes.axvline(0, color="black", linestyle=":")
    return sketch.done(x="nats per token over dense", below=f"others: {size} layers removed; {found.note()}")


@figure("own_table_selection", reads=READS)
def table_selection(chapter: Chapter) -> Drawing:
    """Regret of every method by K, rank correlation of its scores, and cost."""
    found = search(chapter)
    k, asked, lines = found.size, set(found.regrets["layers_removed"]), []
    middle = found.regrets.groupby(["name", "method", "layers_removed"])["value"].median()
    correlation = _correlations(found).groupby(["name", "method"])["value"].median()
    tried = found.choices[found.choices["layers_removed"] == k].groupby(["name", "method"])["evaluations"].median()
    for name in found.names:
        costs = _costs(found, name, k)
        for method in found.order:
            line = {"model": name, "method": fig.METHODS[method].title}
            for size in [size for size in (1, 2, 3, 4, 8, 12) if size in asked]:
                line[f"regret K={size}"] = middle.get((name, method, size))
                if size == 3 and "all_k3" in found.truth[name] and (name, method, 3) in middle:
                    losses = found.truth[name]["all_k3"] - found.best[name, 3]
                    line["better sets of 3, %"] = 100 * (losses < middle[name, method, 3] - 1e-6).mean()
            line["rank correlation"] = correlation.get((name, method))
            line[f"cost, forwards (K={k})"] = costs.get(method)
            lines.append({**line, f"sets evaluated (K={k})": tried.get((name, method))})
    numbers = pd.DataFrame(lines).dropna(axis=1, how="all")
    text = markdown(numbers, digits={f"cost, forwards (K={k})": 1, f"sets evaluated (K={k})": 0})
    sums = "; ".join(
        f"{row.model}, {row.K} layers: set {row.rank_of_best_sum:,} of {row.sets:,}, {row.regret:.3f} nats above the best"
        for row in _sums(found).itertuples()
    )
    return Drawing(None, numbers, pick(found.rows, role="choice"), f"{text}\n\nBest sum of the true single costs: {sums}.")
