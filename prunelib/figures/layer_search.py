"""Chapter 02: how far from the best possible choice is each way of choosing layers?"""

import itertools
from dataclasses import dataclass

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

    rows: of all methods. regrets: loss of every chosen set less that of the best set known of its size. optima: these sets.
    truth: model → losses of all sets (`all_k1`, …) or of random ones (`random_k12`). dense: model → loss. order: methods that
    choose sets of layers, by their mean rank. sizes: every K whose losses are in `truth`. size: 8, or the largest of them.
    """

    rows: pd.DataFrame
    regrets: pd.DataFrame
    optima: pd.DataFrame
    truth: dict[str, dict[str, np.ndarray]]
    dense: dict[str, float]
    order: list[str]
    sizes: list[int]
    size: int

    def population(self, name: str, k: int) -> np.ndarray:
        """Regrets of all sets of K layers, or of random ones where there are too many."""
        losses, best = self.truth[name], pick(self.optima, model=name, layers_removed=k)["value"].min()
        return losses.get(f"all_k{k}", losses.get(f"random_k{k}")) - best


def search(chapter: Chapter) -> Search:
    """The tables of a chapter as `Search`. Raises FigureError for a model without committed optimum."""
    table, committed = pick(chapter.table("selection"), run_part="rules"), chapter.table("optimum_runs")
    names, keys = list(table["model"].unique()), ["model", "layers_removed"]
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
    best = best.astype({"layers_removed": int}).sort_values("value").drop_duplicates(keys)
    regrets = choices[choices["method"] != "dense"].merge(best[[*keys, "value"]], on=keys, suffixes=("", "_best"))
    regrets["value"] -= regrets["value_best"]
    ranked = fig.spread(regrets[~regrets["method"].isin([*LACO, *SUBLAYERS])], [*keys, "method"])
    ranks = ranked.assign(rank=ranked.groupby(keys)["value"].rank()).groupby("method")["rank"].mean()
    order = sorted((name for name in fig.METHODS if name in ranks), key=lambda name: ranks[name])
    runs = known.groupby("model")["run"].first()
    truth = {name: load_file(at_root(chapter["optimum_runs"]) / f"{runs[name]}.safetensors") for name in names}
    dense = pick(known, role="dense", metric="nll").groupby("model")["value"].first().to_dict()
    tried = [{int(key.split("_k")[1]) for key in losses} for losses in truth.values()]
    sizes = sorted(set(regrets["layers_removed"]).intersection(*tried))
    return Search(rows, regrets, best, truth, dense, order, sizes, 8 if 8 in sizes else sizes[-1])


@figure("own_regret", reads=READS)
def regret(chapter: Chapter) -> Drawing:
    """Regret of every method at three K, beside the middle 90 % of all sets."""
    found = search(chapter)
    rows = pick(found.regrets, method=found.order, layers_removed=[k for k in (1, 3, 8) if k in found.sizes] or found.sizes[:3])
    parts = [fig.spread(rows, ["model", "layers_removed", "method"])]
    for name, k in itertools.product(found.truth, parts[0]["layers_removed"].unique().tolist()):
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


def _sums(found: Search) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Sum of the single costs and true cost of all pairs and triples, and how well one predicts the other by model and K."""
    parts, lines = [], []
    for name, k in itertools.product(found.truth, (3, 2)):
        losses = found.truth[name]
        if f"all_k{k}" in losses:
            single, cost = losses["all_k1"] - found.dense[name], losses[f"all_k{k}"] - found.dense[name]
            sums = single[np.array(list(itertools.combinations(range(len(single)), k)))].sum(axis=1)
            one, chosen = pd.DataFrame({"model": name, "K": k, "sum": sums, "cost": cost}), cost[sums.argmin()]
            line = {"model": name, "K": k, "sets": len(one), "spearman": one["sum"].corr(one["cost"], method="spearman")}
            lines.append({**line, "rank_of_best_sum": int((cost < chosen).sum()) + 1, "regret": chosen - cost.min()})
            parts.append(one)
    if not parts:  # only single layers were tried
        return pd.DataFrame(columns=["model", "K", "sum", "cost"]), pd.DataFrame(columns=["model", "K", "sets"])
    return pd.concat(parts), pd.DataFrame(lines)


@figure("own_rank_correlation", reads=READS)
def rank_correlation(chapter: Chapter) -> Drawing:
    """Importance against the true cost of one layer, and sums of single costs against the true cost of pairs and triples."""
    found = search(chapter)
    correlations, (sums, predicted) = fig.spread(_correlations(found), ["model", "method"]), _sums(found)
    methods = [name for name in found.order if name in set(correlations["method"])]
    both = [correlations.assign(what="importance vs true cost of one layer"), sums.assign(what="sum of costs vs true cost")]
    grid = fig.Panels(pd.concat(both), "what", "model", height=0.19 * len(methods) + 1.3)
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
    best = [f"{one.model}, set {one.rank_of_best_sum:,} of {one.sets:,} sets of {one.K}" for one in predicted.itertuples()]
    text = f"The set with the lowest sum of single costs, ranked by its true cost: {'; '.join(best)}."
    grid.data = pd.concat([correlations, predicted])
    below = ["Spearman's rank correlation", "sum of single costs, nats (log)"][: grid.grid.shape[1]]
    labels = {"x": below, "y": list(found.truth), "note": NOTE}
    return grid.done(pick(found.rows, metric="importance"), **labels, text=text)


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
    spent = pick(found.rows, metric="forwards")
    spent = spent[spent["layers_removed"].isna() | (spent["layers_removed"] == k)]
    numbers[f"cost, forwards (K={k})"] = spent.groupby(keys)["value"].median()
    numbers[f"sets evaluated (K={k})"] = pick(found.regrets, layers_removed=k).groupby(keys)["evaluations"].median()
    numbers = numbers.dropna(axis=1, how="all").reset_index()
    numbers = numbers.sort_values(keys, key=lambda column: column.map([*found.truth, *found.order].index))
    numbers["method"] = [fig.METHODS[method].title for method in numbers["method"]]
    text = markdown(numbers, digits={f"cost, forwards (K={k})": 1, f"sets evaluated (K={k})": 0})
    kinds, keys = {"removed": "parameters removed, %", "idle": "unused but kept, %"}, [*keys, "layers_removed"]
    shares = 100 * pick(found.rows, metric=tuple(kinds)).pivot_table("value", keys, "metric", "median").rename(columns=kinds)
    others = pick(found.regrets, may_be_empty=True, method=(*SUBLAYERS, *LACO), layers_removed=(0, k))
    apart = others.groupby(keys)["value"].median().rename("regret").to_frame().join(shares).reset_index()
    apart["method"] = [fig.METHODS[method].title for method in apart["method"]]
    text += f"\n\nAttention and MLP apart, and layers merged at the published threshold:\n\n{markdown(apart)}"
    return Drawing(None, numbers, pick(found.rows, role="choice"), text)
