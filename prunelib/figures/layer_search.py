"""Chapter 02: how far from the best possible choice is each way of choosing layers?"""

import itertools
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
from safetensors.numpy import load_file

from prunelib.figures import style as fig
from prunelib.figures.save import Chapter, Drawing, FigureError, figure, markdown, pick
from prunelib.io import at_root

CHAPTER = "02_layer_search"
READS = {"selection": ("rules",), "optimum_runs": None}
LACO = ("laco_published", "laco_released")
SUBLAYERS = ("blockpruner", "evolutionary_sublayers")
NOTE = "dots and bars: median and min–max of the calibration draws"


@dataclass(frozen=True)
class Search:
    """What the chapter draws from: the rules of the profile, and the committed runs of the optimum profile.

    rows: of all methods. choices: loss of every chosen set. regrets: `choices` less the loss of the best set known of that
    size. optima: these sets. truth: model → losses of all sets (`all_k1`, …) or of random ones (`random_k12`). dense: model
    → loss. order: methods that choose sets of layers, by their mean rank.
    """

    rows: pd.DataFrame
    choices: pd.DataFrame
    regrets: pd.DataFrame
    optima: pd.DataFrame
    truth: dict[str, dict[str, np.ndarray]]
    dense: dict[str, float]
    order: list[str]

    @property
    def sizes(self) -> list[int]:
        """Every K asked for where the distribution of the losses is known."""
        known = [{key.split("_k")[1] for key in losses} for losses in self.truth.values()]
        return [k for k in sorted(set(self.regrets["layers_removed"])) if all(str(k) in one for one in known)]

    @property
    def size(self) -> int:
        """The K of the figures that show one: 8, or the largest."""
        return 8 if 8 in self.sizes else self.sizes[-1]

    def population(self, name: str, k: int) -> np.ndarray:
        """Regrets of all sets of K layers, or of random ones where there are too many."""
        losses, best = self.truth[name], pick(self.optima, model=name, layers_removed=k)["value"].min()
        return losses.get(f"all_k{k}", losses.get(f"random_k{k}")) - best

    def costs(self) -> pd.DataFrame:
        """Median cost of every method at `size`, in dense forward passes over the calibration windows: model, method, value."""
        spent = pick(self.rows, metric="forwards")
        spent = spent[spent["layers_removed"].isna() | (spent["layers_removed"] == self.size)]
        return spent.groupby(["model", "method"])["value"].median().rename("forwards").reset_index()


def search(chapter: Chapter) -> Search:
    """The tables of a chapter as `Search`. Raises FigureError for a model without committed optimum."""
    table, committed = pick(chapter.table("selection"), run_part="rules"), chapter.table("optimum_runs")
    # The rows that say which share of the parameters K layers hold; older runs call that a method.
    table["method"] = table["method"].mask(table["role"].eq("size"), "layers")
    names = list(table["model"].unique())
    known = pick(committed, may_be_empty=True, experiment="optimum", model=names)
    if missing := set(names) - set(known["model"]):
        raise FigureError(f"{chapter['optimum_runs']} has no optimum for {min(missing)}: make it with profiles/optimum.yaml")
    # What only a GPU ran; the rules themselves come from the profile's own table.
    extra = pick(committed, may_be_empty=True, experiment="selection", model=names)
    extra = extra[~extra["method"].isin(table["method"])]
    # A run of all draws says the draw in its rows, a run of one draw in its parameter `seed`.
    draw, alone = (extra.get(column, pd.Series(index=extra.index, dtype=float)) for column in ("calibration_seed", "seed"))
    rows = pd.concat([table, extra.assign(calibration_seed=draw.fillna(alone))], ignore_index=True)
    choices = pick(rows, role="choice", metric="nll").astype({"layers_removed": int})
    best = pd.concat([pick(known, metric="nll"), choices[choices["removed_layers"].notna()]])
    best = best.astype({"layers_removed": int}).sort_values("value").drop_duplicates(["model", "layers_removed"])
    keys = ["model", "layers_removed"]
    regrets = choices[choices["method"] != "dense"].merge(best[[*keys, "value"]], on=keys, suffixes=("", "_best"))
    regrets["value"] -= regrets["value_best"]
    ranked = fig.spread(regrets[~regrets["method"].isin([*LACO, *SUBLAYERS])], [*keys, "method"])
    ranks = ranked.assign(rank=ranked.groupby(keys)["value"].rank()).groupby("method")["rank"].mean()
    runs = known.groupby("model")["run"].first()
    truth = {name: load_file(at_root(chapter["optimum_runs"]) / f"{runs[name]}.safetensors") for name in names}
    dense = pick(known, role="dense", metric="nll").groupby("model")["value"].first().to_dict()
    order = sorted((name for name in fig.METHODS if name in ranks), key=lambda name: ranks[name])
    return Search(rows, choices, regrets, best, truth, dense, order)


@figure("own_regret", reads=READS)
def regret(chapter: Chapter) -> Drawing:
    """Regret of every method at three K, beside the middle 90 % of all sets."""
    found = search(chapter)
    rows = pick(found.regrets, method=found.order, layers_removed=[k for k in (1, 3, 8) if k in found.sizes] or found.sizes[:3])
    data = fig.spread(rows, ["model", "layers_removed", "method"])
    parts = [data]
    for name, k in itertools.product(found.truth, data["layers_removed"].unique().tolist()):
        losses = found.population(name, k)
        ends = dict(zip(("low", "value", "high"), np.quantile(losses, [0.05, 0.5, 0.95]), strict=True))
        parts.append(pd.DataFrame([{"model": name, "layers_removed": k, "method": "random", **ends, "n": len(losses)}]))
    data = pd.concat(parts, ignore_index=True)
    grid = fig.Panels(data, "layers_removed", "model", height=0.19 * len(found.order) + 0.8, sharey=True)
    for axes, part in grid:
        sets, part = part[part["method"] == "random"].iloc[0], part[part["method"] != "random"]
        axes.axvspan(sets["low"], sets["high"], color="#a3a3a3", alpha=0.25, linewidth=0)
        axes.axvline(sets["value"], color="#a3a3a3")
        axes.axvline(0, color="black", linewidth=1)
        fig.dots(axes, part, order=found.order, high=1.25 * max(sets["value"], part["value"].quantile(0.9)))
        axes.set_title(f"K = {sets['layers_removed']}, {sets['n']:,} sets", fontsize=9)
    note = f"{NOTE}\ngrey: 5–95 % of the sets (all, or random ones), line: their median"
    return grid.done(rows, x="regret, nats per token", y=list(found.truth), note=note)


@figure("own_cost_quality", reads=READS)
def cost_quality(chapter: Chapter) -> Drawing:
    """Regret at one K against measured cost in dense forward passes."""
    found = search(chapter)
    rows = pick(found.regrets, layers_removed=found.size, method=found.order)
    data = fig.spread(rows, ["model", "method"]).merge(found.costs(), on=["model", "method"])
    data = data.rename(columns={"value": "regret"}).drop(columns=["low", "high", "n"]).assign(layers_removed=found.size)
    grid = fig.Panels(data, "model", titles=[f"{name}, K = {found.size}" for name in found.truth], height=4.2, sharey=True)
    for axes, part in grid:
        losses = found.population(part["model"].iloc[0], found.size)
        for row in part.sort_values("regret").itertuples():
            look = fig.METHODS[row.method]
            axes.plot([max(row.forwards, 0.5)], [row.regret], look.marker, color=look.color, linestyle="", label=look.title)
        axes.axhspan(*np.quantile(losses, [0.05, 0.95]), color="#a3a3a3", alpha=0.25, linewidth=0, zorder=0.5)
        axes.axhline(np.median(losses), color="#a3a3a3", label="random sets: median and 5–95 %")
        axes.set_ylim(-0.05, 1.15 * max(data["regret"].max(), np.median(losses)))
        fig.log_scale(axes, "x")
    note = "costs below one half are drawn at one half; evolution, beam and greedy KL: timed on a GPU"
    return grid.done(rows, x="cost, dense forward passes (log)", y="regret, nats per token", note=note)


@figure("own_zoo", reads=READS)
def zoo(chapter: Chapter) -> Drawing:
    """Which layers every method removes at one K; the best set known on top."""
    found = search(chapter)
    k = found.size
    best = pick(found.optima, layers_removed=k).assign(method="best", value=0.0)
    rows = pd.concat([best, pick(found.regrets, layers_removed=k, method=found.order)])
    sets = rows.assign(layer=rows["removed_layers"].str.split()).explode("layer").astype({"layer": int})
    grid = fig.Panels(rows.assign(all=""), "all", "model", titles=[""], height=0.19 * len(found.order) + 0.9)
    drawn = []
    for axes, part in grid:
        name, draws = part["model"].iloc[0], part.groupby("method").size()
        shares = pick(sets, model=name).groupby(["method", "layer"]).size().div(draws, level="method").unstack(fill_value=0.0)
        cells = shares.reindex([one for one in ("best", *found.order) if one in draws])
        cells = cells.reindex(columns=range(len(found.truth[name]["all_k1"])), fill_value=0.0)
        drawn.append(cells.stack().rename("share_of_draws").reset_index().assign(model=name, layers_removed=k))
        regrets = part.groupby("method")["value"].median()
        cells.index = [f"{fig.METHODS[method].title}  +{regrets[method]:.2f}" for method in cells.index]
        fig.heatmap(axes, cells, label="share of draws", colormap="Greys", vmin=0, vmax=1, xticklabels=2)
        axes.set(title=f"{name}, K = {k}", xlabel="layer (beside each method: regret, nats per token)")
    return Drawing(grid.figure, pd.concat(drawn), rows)


def _correlations(found: Search) -> pd.DataFrame:
    """Rank correlation of every importance with the true cost of each layer: model, method, calibration draw, value."""
    rows, values = pick(found.rows, metric="importance").sort_values("layer"), []
    for (name, method, draw), one in rows.groupby(["model", "method", "calibration_seed"]):
        value = pd.Series(found.truth[name]["all_k1"]).corr(one["value"].reset_index(drop=True), method="spearman")
        values.append({"model": name, "method": method, "calibration_seed": draw, "value": value})
    return pd.DataFrame(values)


def _sums(found: Search) -> pd.DataFrame:
    """Sum of the single costs and the true cost of all pairs and triples, where these are known."""
    parts = []
    for name, k in itertools.product(found.truth, (3, 2)):
        if f"all_k{k}" in found.truth[name]:
            single = found.truth[name]["all_k1"] - found.dense[name]
            sets = np.array(list(itertools.combinations(range(len(single)), k)))
            cost = found.truth[name][f"all_k{k}"] - found.dense[name]
            parts.append(pd.DataFrame({"model": name, "K": k, "sum": single[sets].sum(axis=1), "cost": cost}))
    return pd.concat(parts) if parts else pd.DataFrame({"model": [], "K": [], "sum": [], "cost": []})


def _predicted(sums: pd.DataFrame) -> pd.DataFrame:
    """How well the sum of single costs predicts the cost: a line per model and K."""
    lines = []
    for (name, k), one in sums.groupby(["model", "K"], sort=False):
        chosen, cost = one["cost"].iloc[one["sum"].argmin()], one["cost"]
        line = {"model": name, "K": k, "sets": len(one), "spearman": one["sum"].corr(cost, method="spearman")}
        lines.append({**line, "rank_of_best_sum": int((cost < chosen).sum()) + 1, "regret": chosen - cost.min()})
    return pd.DataFrame(lines)


@figure("own_rank_correlation", reads=READS)
def rank_correlation(chapter: Chapter) -> Drawing:
    """Importance against the true cost of one layer, and sums of single costs against the true cost of pairs and triples."""
    found = search(chapter)
    correlations, sums = fig.spread(_correlations(found), ["model", "method"]), _sums(found)
    methods = [name for name in found.order if name in set(correlations["method"])]
    both = [correlations.assign(what="importance vs true cost of one layer"), sums.assign(what="sum of costs vs true cost")]
    grid = fig.Panels(pd.concat(both), "what", "model", height=0.19 * len(methods) + 1.3)
    predicted = _predicted(sums)
    for axes, part in grid:
        if part["method"].notna().any():
            fig.dots(axes, part[part["method"].isin(methods)], order=methods, low=-1, high=1)
            axes.axvline(0, color="black", linewidth=0.8)
            continue
        for row in predicted[predicted["model"].isin(part["model"])].itertuples():
            one, color = part[part["K"] == row.K], "#cccccc" if row.K == 3 else "#0072b2"
            label = f"{row.model}, {row.K} layers: rank correlation {row.spearman:.2f}"
            axes.plot(one["sum"], one["cost"], ".", markersize=2, color=color, rasterized=True, label=label)
        axes.axline((1, 1), slope=1, color="black", linewidth=0.8, label="sum = true cost")
        fig.log_scale(axes, "x")
        fig.log_scale(axes)
        axes.set_ylabel("true cost, nats (log)")
    grid.data = pd.concat([correlations, predicted])
    labels = ["Spearman's rank correlation", "sum of single costs, nats (log)"]
    return grid.done(pick(found.rows, metric="importance"), x=labels, y=list(found.truth), note=NOTE)


@figure("own_sublayers", reads=READS)
def sublayers(chapter: Chapter) -> Drawing:
    """Loss against the share of parameters no longer used, and of those gone from the file: layers, half layers, merges."""
    found = search(chapter)
    rows = pick(found.choices, method=("greedy", "evolutionary", *SUBLAYERS, *LACO))
    rows = rows.assign(value=rows["value"] - rows["model"].map(found.dense))
    keys = ["model", "method", "layers_removed"]
    shares = found.rows[found.rows["metric"].isin(("removed", "idle"))].groupby([*keys, "metric"])["value"].median()
    shares = shares.unstack().reindex(columns=["removed", "idle"]).mul(100).reset_index()
    data = fig.spread(rows, keys).merge(shares, on=keys, how="left")
    whole = data.merge(shares[shares["method"] == "layers"].drop(columns="method"), on=keys[::2], how="left")["removed_y"]
    data["gone"] = data.pop("removed").fillna(whole).mask(data["layers_removed"] == 0, 0)
    data["unused"] = data["gone"] + data.pop("idle").fillna(0)
    data = data.dropna(subset="unused")
    grid = fig.Panels(data, "model", height=4.0, sharey=True)
    looks = {}
    for method in data["method"].unique():
        line, title = "" if method == "evolutionary" else "-", fig.METHODS[method].title
        hollow = {"hollow": True, "title": f"{title}: not used"} if method in SUBLAYERS else {}
        looks[method] = replace(fig.METHODS[method], line=line, **hollow)
    for axes, part in grid:
        fig.lines(axes, part, looks, x="unused")
        for method in SUBLAYERS:
            half, look = part[part["method"] == method], fig.METHODS[method]
            axes.plot(half["gone"], half["value"], look.marker + ":", color=look.color, label=f"{look.title}: removed")
        fig.level(axes, 0, "dense (nothing removed)")
    merged = pick(rows, method=LACO).groupby("method", sort=False)[["layers_removed", "asked"]].max().astype(int)
    counts = [f"{fig.METHODS[one.Index].title}: {one.layers_removed} of {one.asked} layers" for one in merged.itertuples()]
    text = f"Layers merged at the published threshold: {'; '.join(counts)}."
    labels = {"x": "parameters of the dense model, %", "y": "nats per token over dense", "note": fig.error_note(data)}
    return grid.done(rows, **labels, text=text)


@figure("own_table_selection", reads=READS)
def table_selection(chapter: Chapter) -> Drawing:
    """Regret of every method by K, rank correlation of its scores, and cost."""
    found, keys = search(chapter), ["model", "method"]
    k = found.size
    sizes = [size for size in (1, 2, 3, 4, 8, 12) if size in set(found.regrets["layers_removed"])]
    rows = pick(found.regrets, method=found.order, layers_removed=sizes)
    numbers = rows.pivot_table(index=keys, columns="layers_removed", values="value", aggfunc="median").add_prefix("regret K=")
    if "regret K=3" in numbers and all("all_k3" in losses for losses in found.truth.values()):
        three = numbers["regret K=3"].dropna()
        better = [(found.population(name, 3) < value - 1e-6).mean() for (name, _), value in three.items()]
        numbers["better sets of 3, %"] = 100 * pd.Series(better, index=three.index)
    numbers["rank correlation"] = _correlations(found).groupby(keys)["value"].median()
    numbers[f"cost, forwards (K={k})"] = found.costs().set_index(keys)["forwards"]
    numbers[f"sets evaluated (K={k})"] = pick(found.choices, layers_removed=k).groupby(keys)["evaluations"].median()
    numbers = numbers.dropna(axis=1, how="all").reset_index()
    numbers = numbers.sort_values(keys, key=lambda column: column.map([*found.truth, *found.order].index))
    numbers["method"] = [fig.METHODS[method].title for method in numbers["method"]]
    text = markdown(numbers, digits={f"cost, forwards (K={k})": 1, f"sets evaluated (K={k})": 0})
    sums = "; ".join(
        f"{row.model}, {row.K} layers: set {row.rank_of_best_sum:,} of {row.sets:,}, {row.regret:.3f} nats above the best"
        for row in _predicted(_sums(found)).itertuples()
    )
    return Drawing(None, numbers, pick(found.rows, role="choice"), f"{text}\n\nBest sum of the true single costs: {sums}.")
