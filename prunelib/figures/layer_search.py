"""Chapter 02: how far from the best possible choice is each way of choosing layers?"""

import itertools
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
from safetensors.numpy import load_file

from prunelib.figures import style as fig
from prunelib.figures.save import Chapter, Drawing, FigureError, figure, markdown, pick
from prunelib.io import at_root
from prunelib.lab.runs import PUBLISHED, published

CHAPTER = "02_layer_search"
READS = {"selection": ("rules", "searches"), "optimum_runs": None}
APART = ("laco_published", "laco_released", "blockpruner", "evolutionary_sublayers")  # they choose no set of whole layers
HERO = ("block_influence", "simdiff_mssd", "leave_one_out_kl", "greedy_kl", "deepest")
GEMMA, THEIRS = "gemma-3-270m", "rearchitecting_llms"
TASKS = ["arc_easy", "winogrande", "hellaswag", "lambada_openai", "piqa"]
NOTE = "dots and bars: median and min–max of the calibration draws"


@dataclass(frozen=True)
class Search:
    """What the chapter draws from: the rules of the profile, and the committed runs of the optimum profile.

    rows: of all methods. regrets: loss of every chosen set less that of the best set known of its size. optima: these sets.
    truth: model, the deepest first → losses of all sets (`all_k1`, …) or of random ones (`random_k12`). dense: model → loss.
    order: methods that choose sets of layers, by their mean rank. sizes: every K with a `population` of every model. size: 8,
    or the largest of them.
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
        drawn = pick(self.regrets, may_be_empty=True, model=name, layers_removed=k, method="random")["value"].to_numpy()
        return losses.get(f"all_k{k}", losses.get(f"random_k{k}", drawn + best)) - best

    def arranged(self, data: pd.DataFrame) -> pd.DataFrame:
        """Rows by model, in the order of `truth`."""
        return data.sort_values("model", key=lambda names: names.map(list(self.truth).index), kind="stable")

    def basis(self, name: str, k: int) -> str:
        """What the best set of K layers is the best of."""
        losses = self.truth[name]
        if f"all_k{k}" in losses:
            return f"all {len(losses[f'all_k{k}']):,} sets"
        return "a long search" if f"random_k{k}" in losses else "these rules"


def search(chapter: Chapter, parts: tuple[str, ...] = READS["selection"]) -> Search:
    """The tables of a chapter, of `selection` these parts, as `Search`. Raises FigureError for a model without an optimum."""
    table = pick(chapter.table("selection"), run_part=parts)
    names, keys = list(table["model"].unique()), ["model", "layers_removed"]
    known = pick(chapter.table("optimum_runs"), may_be_empty=True, experiment="optimum", model=names)
    if missing := set(names) - set(known["model"]):
        raise FigureError(f"{chapter['optimum_runs']} has no optimum for {min(missing)}: make it with profiles/optimum.yaml")
    truth: dict[str, dict[str, np.ndarray]] = {name: {} for name in names}
    for name, run in known[["model", "run"]].drop_duplicates().itertuples(index=False):
        truth[name] |= load_file(at_root(chapter["optimum_runs"]) / f"{run}.safetensors")
    truth = dict(sorted(truth.items(), key=lambda item: -len(item[1]["all_k1"])))
    choices = pick(table, role="choice", metric="nll").astype({"layers_removed": int})
    best = pd.concat([pick(known, metric="nll"), choices[choices["removed_layers"].notna()]])
    best = best.astype({"layers_removed": int}).sort_values("value").drop_duplicates(keys)
    regrets = choices[choices["method"] != "dense"].merge(best[[*keys, "value"]], on=keys, suffixes=("", "_best"))
    regrets["value"] -= regrets["value_best"]
    ranked = fig.spread(regrets[~regrets["method"].isin(APART)], [*keys, "method"])
    ranks = ranked.assign(rank=ranked.groupby(keys)["value"].rank()).groupby("method")["rank"].mean()
    order = sorted((name for name in fig.METHODS if name in ranks and name != "random"), key=lambda name: ranks[name])
    dense = pick(known, role="dense", metric="nll").groupby("model")["value"].first().to_dict()
    found = Search(table, regrets, best, truth, dense, order, [], 0)
    sizes = [k for k in sorted(set(regrets["layers_removed"])) if all(len(found.population(name, k)) for name in truth)]
    return replace(found, sizes=sizes, size=8 if 8 in sizes else sizes[-1])


@figure("own_hero", reads=READS, models=0)
def hero(chapter: Chapter) -> Drawing:
    """Loss over dense of the main rules, random layers and the best sets known, for every K."""
    found, axis = search(chapter), "layers_removed"
    name = next(iter(found.truth))
    rows = pick(found.rows, model=name, role="choice", metric="nll", method=(*HERO, "random_protected"))
    best = pick(found.optima, model=name, layers_removed={int(key.split("_k")[1]) for key in found.truth[name]})
    best = best[best[axis].isin(rows[axis])].assign(method="best")
    data = pd.concat([rows.replace({"method": {"random_protected": "random"}}), best])
    data = fig.spread(data.astype({axis: int}), ["method", axis])
    data[["value", "low", "high"]] -= found.dense[name]
    table = data.pivot(index=axis, columns="method", values="value")
    regrets = table[[rule for rule in HERO if rule in table]].sub(table["best"], axis=0).max()
    rule, cosine = (fig.METHODS[rule].title.split(" (")[0] for rule in (regrets.idxmin(), HERO[0]))
    title = f"{rule[0].upper()}{rule[1:]} stays within {regrets.min():.2f} nats of the best set known, "
    title += f"{cosine} within {regrets[HERO[0]]:.2f}"
    top = 1.1 * table.drop(columns=["deepest", "random"], errors="ignore").max(axis=None)
    grid = fig.Panels(data.assign(all=""), "all", titles=[""], height=3.9)
    for axes, part in grid:
        band, stars = (part[part["method"] == one] for one in ("random", "best"))
        rules = part.drop(index=[*band.index, *stars.index])
        axes.fill_between(band[axis], band["low"], band["high"], color="#a3a3a3", alpha=0.25, linewidth=0)
        axes.plot(band[axis], band["value"], color="#a3a3a3")
        fig.lines(axes, rules, label="_")
        axes.plot(stars[axis], stars["value"], "k*", markersize=9, zorder=3)
        axes.set(xlim=(0.7, 1.23 * table.index[-1]), ylim=(0, top), xticks=table.index)
        fig.end_labels(axes, table)
    texts = [fig.text_title(rows[column].dropna().iloc[0]) for column in ("report_corpus", "calibration")]
    note = f"loss on {texts[0]}; median and min–max of {rules['n'].max()} draws of {texts[1]}; "
    note += "stars: best of all sets, or of a long search"
    note += f"\ngrey: {band['n'].max()} random sets that keep the first and last layer, median and min–max" * bool(len(band))
    return grid.done(rows, x="layers removed", y="extra loss (nats/token)", note=note, title=title)


@figure("own_regret", reads={**READS, "small_selection": None, "small_optimum": None})
def regret(chapter: Chapter) -> Drawing:
    """Regret of every method at four K, beside the middle 90 % of all sets; in the text that of the small models at one K."""
    found = search(chapter)
    rows = pick(found.regrets, method=found.order, layers_removed=[k for k in (1, 3, 4, 8) if k in found.sizes])
    parts = [fig.spread(rows, ["model", "layers_removed", "method"])]
    for name, k in itertools.product(found.truth, parts[0]["layers_removed"].unique().tolist()):
        losses = found.population(name, k)
        ends = dict(zip(("low", "value", "high"), np.quantile(losses, [0.05, 0.5, 0.95]), strict=True))
        parts.append(pd.DataFrame([{"model": name, "layers_removed": k, "method": "random", **ends, "n": len(losses)}]))
    data = found.arranged(pd.concat(parts, ignore_index=True))
    worst = parts[0].groupby("method")["value"].max()
    title = f"Regret: {fig.METHODS[worst.idxmin()].title} at most {worst.min():.2f} nats, "
    title += f"{fig.METHODS['block_influence'].title} up to {worst['block_influence']:.2f}"
    grid = fig.Panels(data, "layers_removed", "model", height=0.17 * len(found.order) + 0.8, sharey=True)
    for axes, part in grid:
        sets, part = part[part["method"] == "random"].iloc[0], part[part["method"] != "random"]
        axes.axvspan(sets["low"], sets["high"], color="#a3a3a3", alpha=0.25, linewidth=0)
        axes.axvline(sets["value"], color="#a3a3a3")
        axes.axvline(0, color="black", linewidth=1)
        fig.dots(axes, part, order=found.order, high=1.25 * max(sets["value"], part["value"].quantile(0.9)))
        k = int(sets["layers_removed"])
        axes.set_title(f"K = {k}: 0 = best of\n{found.basis(sets['model'], k)}", fontsize=9)
    searches = [found]
    if chapter["small_selection"]:
        small = {"selection": chapter["small_selection"], "optimum_runs": chapter["small_optimum"]}
        searches.append(search(Chapter("", small)))
    text = f"Regret at K = {found.size}, medians:\n\n{markdown(_at_one_size(searches, found.size))}"
    note = f"{NOTE}\ngrey: 5–95 % of the sets (all, or random ones), line: their median"
    return grid.done(rows, x="regret (nats/token)", y=list(found.truth), note=note, title=title, text=text)


def _at_one_size(searches: list[Search], k: int) -> pd.DataFrame:
    """Median regrets of the main rules and of random sets of K layers, one line for each model."""
    lines = []
    for found in searches:
        regrets = pick(found.regrets, layers_removed=k).groupby(["model", "method"])["value"].median()
        for name in found.truth:
            line = {fig.METHODS[rule].title: regrets.get((name, rule)) for rule in (*HERO, "greedy")}
            lines.append({"model": fig.short(name), "random sets": np.median(found.population(name, k)), **line})
    return pd.DataFrame(lines)


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
    for name, losses in found.truth.items():
        single = losses["all_k1"] - found.dense[name]
        for k in [k for k in (3, 2) if f"all_k{k}" in losses] or [1]:
            cost, sets = losses[f"all_k{k}"] - found.dense[name], list(itertools.combinations(range(len(single)), k))
            one = pd.DataFrame({"model": name, "K": k, "sum": single[np.array(sets)].sum(axis=1), "cost": cost})
            chosen, rank = cost[one["sum"].argmin()], one["sum"].corr(one["cost"], method="spearman")
            line = {"model": name, "K": k, "sets": len(one), "spearman": rank, "regret": chosen - cost.min()}
            lines.append({**line, "rank_of_best_sum": int((cost < chosen).sum()) + 1})
            parts.append(one)
    return pd.concat(parts), pd.DataFrame(lines)


@figure("own_rank_correlation", reads=READS)
def rank_correlation(chapter: Chapter) -> Drawing:
    """Sums of the true costs of single layers against the true cost of removing pairs and triples together."""
    found = search(chapter)
    sums, predicted = _sums(found)
    grid = fig.Panels(sums, "model", height=3.3)
    for axes, part in grid:
        here = predicted[predicted["model"].isin(part["model"])]
        for k, one in part.groupby("K", sort=False):
            color = "#cccccc" if k == 3 else "#0072b2"
            axes.plot(one["sum"], one["cost"], ".", markersize=2, color=color, rasterized=True, label=f"{k} layers")
        told = "\n".join(["rank correlation", *(f"{row.K} layers: {row.spearman:.2f}" for row in here.itertuples())])
        axes.annotate(told, (0.98, 0.03), xycoords="axes fraction", fontsize=8, ha="right")
        axes.axline((1, 1), slope=1, color="black", linewidth=0.8, label="sum = true cost")
        fig.log_scale(axes, "x")
        fig.log_scale(axes)
    best = [f"{one.model}, set {one.rank_of_best_sum:,} of {one.sets:,} sets of {one.K}" for one in predicted.itertuples()]
    text = f"The set with the lowest sum of single costs, ranked by its true cost: {'; '.join(best)}."
    title = f"Costs of single layers nearly add up: rank correlation {predicted['spearman'].min():.2f} or more"
    grid.data = predicted
    labels = {"x": "sum of single costs (nats/token, log)", "y": "true cost (nats/token, log)"}
    return grid.done(pick(found.rows, metric="importance"), **labels, text=text, title=title)


@figure("own_table_selection", reads=READS)
def table_selection(chapter: Chapter) -> Drawing:
    """Regret of every method by K, rank correlation of its scores with true costs, its own cost, and what it removes."""
    found, keys = search(chapter), ["model", "method"]
    k = found.size
    sizes = [size for size in (1, 2, 3, 4, 8, 12) if size in set(found.regrets["layers_removed"])]
    rows = pick(found.regrets, method=found.order, layers_removed=sizes)
    numbers = rows.pivot_table(index=keys, columns="layers_removed", values="value", aggfunc="median").add_prefix("regret K=")
    numbers["rank correlation"] = _correlations(found).groupby(keys)["value"].median()
    spent = pick(found.rows, metric="forwards")
    spent = spent[spent["layers_removed"].isna() | (spent["layers_removed"] == k)]
    numbers[f"cost, forwards (K={k})"] = spent.groupby(keys)["value"].median()
    chosen = pick(rows, layers_removed=k).groupby(keys)
    numbers[f"sets evaluated (K={k})"] = chosen["evaluations"].median()
    numbers[f"removed (K={k}, first draw)"] = chosen["removed_layers"].first()
    numbers = numbers.dropna(axis=1, how="all").reset_index()
    numbers = numbers.sort_values(keys, key=lambda column: column.map([*found.truth, *found.order].index))
    numbers["method"] = [fig.METHODS[method].title for method in numbers["method"]]
    text = markdown(numbers, digits={f"cost, forwards (K={k})": 1, f"sets evaluated (K={k})": 0})
    apart = pick(found.regrets, may_be_empty=True, method=APART)
    apart = apart.groupby([*keys, "layers_removed"])["value"].median().rename("regret").reset_index()
    apart["method"] = [fig.METHODS[method].title for method in apart["method"]]
    text += f"\n\nLayers merged, or attention and MLP removed apart:\n\n{markdown(apart)}"
    return Drawing(None, numbers, pick(found.rows, role="choice"), text)


@figure(
    "own_table_gemma_published",
    reads={**READS, "selection": (*READS["selection"], "published_sets"), "tasks": ("published_sets",)},
)
def table_gemma_published(chapter: Chapter) -> Drawing:
    """Layers that others removed from Gemma 3 270M: their numbers, ours, and the place of each set among all of its size."""
    found, theirs, where = search(chapter), published(THEIRS), {"may_be_empty": True, "model": GEMMA}
    given = pick(chapter.table("selection"), run_part="published_sets", metric=("nll", "nll_over_dense"), **where)
    chosen = pick(found.regrets, method=tuple(found.order), layers_removed=(2, 4), **where).sort_values("value")
    chosen = chosen.drop_duplicates(["method", "layers_removed"])  # of each rule its best draw
    used, lines = pd.concat([pick(given, may_be_empty=True, metric="nll"), chosen]), []
    tried = [k for k in range(1, 5) if f"all_k{k}" in found.truth.get(GEMMA, {})]
    used = used[used["layers_removed"].isin(tried)]
    titles = used["method"].map(lambda method: "published" if method.startswith("given") else fig.METHODS[method].title)
    for (k, layers), rows in used.assign(by=titles).groupby(["layers_removed", "removed_layers"]):
        losses, known = found.truth[GEMMA][f"all_k{k:.0f}"], found.truth[GEMMA]["all_k1"]
        loss = losses[list(itertools.combinations(range(len(known)), int(k))).index(tuple(map(int, layers.split())))]
        line = {"removed": layers, "by": ", ".join(rows["by"].unique()), "rank": int((losses < loss).sum()) + 1}
        texts = rows.loc[rows["by"] == "published", "corpus"]
        texts = {f"ppl {text}": _perplexity(given, text, layers) for text in texts}
        lines.append({**line, "sets": len(losses), "regret": loss - losses.min(), **texts})
    printed = theirs[theirs["metric"] != "retained_percent"]
    printed = printed.pivot_table("value", ["item", "method", "healed"], "task", sort=False)
    dense, healed = printed.loc["whole_sets", "dense"].iloc[0], printed.loc["healing"].iloc[0]
    parts = 100 * dense["cosmopedia"] / healed["cosmopedia"], 100 * healed[TASKS].mean() / dense[TASKS].mean()
    text = f"**Published** (perplexity on Cosmopedia, tasks in %)\n\n{markdown(printed.reset_index())}\n\n"
    text += f"The printed retention of {pick(theirs, task='all')['value'].iloc[0]:.2f} % after healing is the mean of "
    text += f"{parts[0]:.2f} % for the perplexity, on the kind of text that healed it, and {parts[1]:.2f} % for the five "
    text += f"tasks; recomputed: {np.mean(parts):.2f} %."
    ours = pd.DataFrame(lines)
    if lines:
        ours = ours.sort_values(["sets", "rank"])
        levels = np.exp(pick(given, method="dense").set_index("corpus")["value"]).rename(fig.text_title)
        levels = ", ".join(f"{value:.2f} on {text}" for text, value in levels.items())
        text += f"\n\n**Ours** (perplexity of the dense model: {levels})\n\n{markdown(ours)}"
        scored = pick(chapter.table("tasks"), run_part="published_sets", metric=("acc", "acc_norm"), task=tuple(TASKS))
        scored = scored.assign(value=100 * scored["value"]).pivot_table("value", ["metric", "method"], "task", sort=False)
        text += f"\n\n**Ours** (tasks in %, whole sets)\n\n{markdown(scored.reset_index())}"
    both = pd.concat([printed.reset_index().assign(origin="published"), ours.assign(origin="ours")])
    return Drawing(None, both, used if lines else found.rows, text, [PUBLISHED])


def _perplexity(given: pd.DataFrame, corpus: str, layers: str) -> str:
    """Perplexity without a published set on a text, with the 95 % interval over windows of its ratio to the dense model's."""
    rows = pick(given, corpus=corpus)
    ratio = pick(rows, metric="nll_over_dense", removed_layers=layers).iloc[0]
    dense = pick(rows, method="dense", metric="nll")["value"].iloc[0]
    value, low, high = np.exp(dense + ratio[["value", "low", "high"]].astype(float))
    return f"{value:,.0f} [{low:,.0f}, {high:,.0f}]"
