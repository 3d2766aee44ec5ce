"""Chapter 01: is SimDiff's choice of layers better than the cosine rule, and than chance?"""

import itertools
from dataclasses import replace

import numpy as np
import pandas as pd

from prunelib.claims import load
from prunelib.figures import style as fig
from prunelib.figures.save import Chapter, Drawing, figure, markdown, pick
from prunelib.lab.runs import PUBLISHED, published

CHAPTER = "01_cosine_vs_simdiff"
READS = {"selection": ("simdiff",), "statistics": None}
SIMDIFF = ["simdiff_mssd", "simdiff_masd"]
COMPARED = ["block_influence", *SIMDIFF]
PAPER = "paper's protocol"
PROTOCOLS = {  # scores from, alpha searched on (parameters of the chapter), search, line
    PAPER: ("calibration", "alpha_text", "ternary", "-"),
    "fair test": ("fair_calibration", "fair_alpha_text", "ternary", "--"),
    "fair test, exact alpha": ("fair_calibration", "fair_alpha_text", "exact", ":"),
}
OUR_TITLES = {"block_influence": "ShortGPT", "entropy_gain_attention": "EntroDrop", "greedy": "SLEB (greedy)"}
THEIR_TITLES = {"shortgpt": "ShortGPT", "entrodrop": "EntroDrop", "sleb": "SLEB", "dense_laco": "dense (copied from LaCo)"}
DROPPED = {"w/o BoolQ": {"boolq"}, "w/o WSC": {"wsc"}, "w/o both": {"boolq", "wsc"}}


def _rows(chapter: Chapter, role: str = "choice", **where: object) -> pd.DataFrame:
    """Rows of the runs of SimDiff's protocol."""
    return pick(chapter.table("selection"), run_part="simdiff", role=role, **where).astype({"layers_removed": int})


def _measured(chapter: Chapter, protocol: str = PAPER, *, search: str | None = None, **where: object) -> pd.DataFrame:
    """Rows of every method: SimDiff under one protocol, the others from the same scores. search: instead of its own."""
    scores, alpha_text, found_by, _ = PROTOCOLS[protocol]
    rows = _rows(chapter, **where)
    alike = (rows["alpha_corpus"] == chapter[alpha_text]) & (rows["search"] == (search or found_by))
    rows = rows[~rows["method"].isin(SIMDIFF) | alike]
    return rows[rows["calibration"].isna() | (rows["calibration"] == chapter[scores])]


def _sizes(chapter: Chapter) -> list[int]:
    return sorted(set(_rows(chapter)["layers_removed"]) - {0})


def _titles(chapter: Chapter) -> dict[str, str]:
    layers = chapter.table("statistics").groupby("model")["layer"].max() + 1
    return {name: f"{fig.SHORT.get(name, name)} ({int(count)} layers)" for name, count in layers.items()}


@figure("simdiff_fig1_cosine_perplexity", reads=READS)
def fig1_cosine_perplexity(chapter: Chapter) -> Drawing:
    """Perplexity of the cosine rule against layers removed: published, and ours with min–max over the calibration draws."""
    sources = {"Llama-2-7B": "fig1", "Mistral-7B-v0.3": "fig5a", "Llama-3.1-8B": "fig5b"}
    theirs = pick(published("simdiff"), method="shortgpt", model=tuple(sources))
    theirs = theirs[theirs["item"] == theirs["model"].map(sources)].assign(origin="published")
    rows = pick(_measured(chapter, metric="ppl"), method=("block_influence", "dense"))
    ours = fig.spread(rows, ["model", "method", "layers_removed"]).assign(origin="ours")
    data = pd.concat([theirs[["origin", "model", "method", "layers_removed", "value"]], ours])
    names = {name: f"{name} (published)" for name in sources} | _titles(chapter)
    styles = zip(names.items(), itertools.cycle("os^D"), itertools.cycle(["-", "--", ":", "-."]))
    cosine = fig.METHODS["block_influence"].color
    looks = {name: fig.Method(title, cosine, marker, line, name in sources) for (name, title), marker, line in styles}
    titles = ("published: three 7–8B models, WikiText-2", f"ours: {rows['report_corpus'].iloc[0]}")
    grid = fig.Panels(data, "origin", titles=titles, height=3.4)
    for axes, part in grid:
        fig.lines(axes, part[part["method"] != "dense"], looks, series="model")
        for value in part.loc[part["method"] == "dense", "value"]:
            fig.level(axes, value, label="dense, each model")
        fig.log_scale(axes)
    note = fig.error_note(ours[ours["method"] != "dense"])
    return grid.done(rows, x="layers removed", y="perplexity (log scale)", note=note, published=[PUBLISHED])


@figure("simdiff_fig2_importance", reads=READS, models=0)
def fig2_importance(chapter: Chapter) -> Drawing:
    """Importance of every layer: the published schematic, and the two ingredients of SimDiff's score; removed layers pale."""
    name = chapter.models("selection")[0]
    scores = pick(chapter.table("statistics"), model=name, corpus=chapter["calibration"])
    rows = pick(scores, metric=["block_influence", "mssd"], tokens="all")
    theirs = pick(published("simdiff"), item="fig2").reset_index(drop=True).rename_axis("layer").reset_index()
    theirs = theirs.assign(removed=theirs["note"].str.contains("pale"), score="importance")
    count = int(theirs["removed"].sum())
    k = min(_sizes(chapter), key=lambda size: abs(size - count))
    ours = fig.spread(rows, ["metric", "layer"]).rename(columns={"metric": "score"})
    ours["removed"] = ours.groupby("score")["value"].rank(method="first") <= k
    data = pd.concat([theirs[["score", "layer", "value", "removed"]], ours])
    titles = ("published: schematic", *[f"ours: {fig.SHORT.get(name, name)}, K = {k}"] * 2)
    looks = (replace(fig.METHODS["simdiff"], hollow=True), fig.METHODS["block_influence"], fig.METHODS["simdiff_mssd"])
    labels = ("importance (unit not stated)", "1 − cosine (log)", "squared difference (log)")
    grid = fig.Panels(data, "score", titles=titles, height=2.6)
    for (axes, part), look, label in zip(grid, looks, labels, strict=True):
        fig.layer_bars(axes, part, look)
        axes.set_ylabel(label)
        if label.endswith("(log)"):
            fig.log_scale(axes)
    note = f"error bars: min–max of {rows['seed'].nunique()} calibration draws; pale: the {k} lowest ({count} published)"
    tokens = pick(scores, metric="mssd").pivot_table("value", "layer", "tokens", "median").eval("all / without_first - 1")
    text = f"The first token of each window matters most in layer {tokens.idxmax()}: it raises the MSSD by {tokens.max():.0%}."
    return grid.done(rows, x="layer", note=note, text=text, published=[PUBLISHED])


@figure("simdiff_fig4a_alpha_mssd", reads=READS, models=0)
def fig4a_alpha_mssd(chapter: Chapter) -> Drawing:
    """Accuracy for every K and alpha with MSSD: published for 8 tasks, ours for the next token."""
    return _alpha_map(chapter, "fig4a", "simdiff_mssd")


@figure("simdiff_fig4b_alpha_masd", reads=READS, models=0)
def fig4b_alpha_masd(chapter: Chapter) -> Drawing:
    """Accuracy for every K and alpha with MASD: published for 8 tasks, ours for the next token."""
    return _alpha_map(chapter, "fig4b", "simdiff_masd")


def _alpha_map(chapter: Chapter, item: str, method: str) -> Drawing:
    name, sizes = chapter.models("selection")[0], _sizes(chapter)
    where = {"calibration": chapter["calibration"], "calibration_seed": 0, "metric": "accuracy"}
    where["layers_removed"] = [size for size in sizes if size >= 8] or sizes
    rows = _rows(chapter, "path", model=name, method=method, **where)
    parts = [pick(published("simdiff"), item=item)[["layers_removed", "alpha", "value"]].assign(origin="published")]
    for k, path in rows.sort_values("alpha_low").groupby("layers_removed"):
        alphas = np.round(0.1 * np.arange(1, 11), 1)
        steps = np.searchsorted(path["alpha_high"], alphas)  # the first interval that reaches up to each alpha
        values = 100 * path["value"].to_numpy()[steps]
        parts.append(pd.DataFrame({"layers_removed": k, "alpha": alphas, "value": values, "origin": "ours"}))
    data = pd.concat(parts).assign(all="")
    titles = ("published: Llama-3.1-8B", f"ours: {_titles(chapter)[name]}, {rows['report_corpus'].iloc[0]}")
    grid = fig.Panels(data, "all", "origin", titles=[""], height=2.15)
    for (axes, part), title, label in zip(grid, titles, ("mean of 8 tasks, %", "next token, %"), strict=True):
        cells = part.pivot(index="layers_removed", columns="alpha", values="value").astype(float)
        fig.heatmap(axes, cells, label=label, annot=True, fmt=".1f")
        for best in zip(*np.nonzero(cells.T.eq(cells.max(axis=1))), strict=True):
            axes.add_patch(fig.Rectangle(best, 1, 1, fill=False, edgecolor="#d55e00", linewidth=1.8, clip_on=False, zorder=3))
        axes.set(title=title, xlabel="alpha (0 = cosine alone, 1 = difference alone)", ylabel="layers removed")
    return Drawing(grid.figure, data.drop(columns="all"), rows, published=[PUBLISHED])


@figure("simdiff_fig5a_perplexity", reads=READS, models=("mistral-7b", 0))
def fig5a_perplexity(chapter: Chapter) -> Drawing:
    """Perplexity of the cosine rule and SimDiff: published for Mistral-7B, ours for a Mistral or the first model."""
    return _perplexity(chapter, "fig5a", "Mistral-7B-v0.3", 0)


@figure("simdiff_fig5b_perplexity", reads=READS, models=("llama-3.1", -1))
def fig5b_perplexity(chapter: Chapter) -> Drawing:
    """Perplexity of the cosine rule and SimDiff: published for Llama-3.1-8B, ours for the same model or the last one."""
    return _perplexity(chapter, "fig5b", "Llama-3.1-8B", -1)


def _perplexity(chapter: Chapter, item: str, model: str, otherwise: int) -> Drawing:
    names = chapter.models("selection")
    name = next((name for name in names if model.rsplit("-", 1)[0].lower() in name.lower()), names[otherwise])
    theirs = pick(published("simdiff"), item=item).replace({"method": {"shortgpt": "block_influence"}})
    exact = _measured(chapter, search="exact", metric="ppl", model=name, method=SIMDIFF)
    rows = _measured(chapter, metric="ppl", model=name, method=["dense", "random", *COMPARED])
    ours = [fig.spread(part, ["search", "method", "layers_removed"]) for part in (rows, exact)]
    data = pd.concat([theirs.assign(origin="published"), *ours]).fillna({"origin": "ours"})
    data = data[["origin", "search", "method", "layers_removed", "value", "low", "high", "n"]]
    titles = (f"published: {model}, WikiText-2", f"ours: {_titles(chapter)[name]}, {rows['report_corpus'].iloc[0]}")
    grid = fig.Panels(data, "origin", titles=titles, height=3.6)
    for axes, part in grid:
        fig.log_scale(axes)
        kind = {"hollow": True, "line": "--"} if "published" in set(part["origin"]) else {}
        looks = {method: replace(fig.METHODS[method], **kind) for method in ("dense", "random", *COMPARED)}
        fig.lines(axes, part[part["search"] != "exact"], looks, dodge=0.15)
        best = part[part["search"] == "exact"]
        if len(best):
            axes.plot(best["layers_removed"], best["value"], "k*", markersize=6, zorder=3, label="exact alpha")
        fig.log_scale(axes)
    note = f"{fig.error_note(pick(data, method=COMPARED, origin='ours'))}; dashed, hollow: published"
    used = _rows(chapter, model=name, metric="ppl")
    medians = _measured(chapter, metric="ppl", model=name).pivot_table("value", "layers_removed", "method", "median")
    random = medians.index[medians["random"] < medians["block_influence"]].tolist()
    deepest = medians.index[medians["deepest"] < medians[COMPARED].min(axis=1)].tolist()
    text = f"{name}, medians: random layers have a lower perplexity than the cosine rule at K in {random}, "
    text += f"the deepest layers a lower one than all rules here at K in {deepest}."
    labels = {"x": "layers removed", "y": "perplexity (log scale)", "note": note, "text": text}
    return grid.done(used, **labels, published=[PUBLISHED])


@figure("own_fair_test", reads=READS)
def fair_test(chapter: Chapter) -> Drawing:
    """SimDiff's loss minus the cosine rule's: the paper's protocol, and scores, alpha and report from three texts."""
    parts, looks = [], {}
    for method, (protocol, (scores, text, search, line)) in itertools.product(SIMDIFF, PROTOCOLS.items()):
        rows = _measured(chapter, protocol, metric="nll_over_cosine", method=method)
        title = f"{fig.METHODS[method].title}, {protocol}"
        looks[title] = replace(fig.METHODS[method], title=title, line=line, hollow=line != "-")
        told = {"calibration": chapter[scores], "alpha_text": chapter[text], "search": search, "protocol": protocol}
        parts.append(rows.assign(line=title, **told))
    rows = pd.concat(parts)
    data = fig.spread(rows, ["model", "line", "method", "protocol", "calibration", "alpha_text", "search", "layers_removed"])
    grid = fig.Panels(data, "model", titles=_titles(chapter), height=3.4, sharey=True)
    for axes, part in grid:
        fig.level(axes, 0, "cosine (block influence)", fig.METHODS["block_influence"].color, "-")
        fig.lines(axes, part, looks, series="line", dodge=0.06)
    better = pick(data, protocol="fair test").assign(better=lambda one: one["value"] < 0)
    better = better.groupby(["model", "method"], sort=False)["better"].agg(["sum", "size"])
    counts = [f"{model}, {fig.METHODS[method].title}: {k} of {n}" for (model, method), k, n in better.itertuples()]
    keys = ["model", "layers_removed", "method", "calibration", "calibration_seed", "alpha_corpus"]
    searches = _rows(chapter, metric="nll", method=SIMDIFF).pivot_table("alpha_nll", keys, "search").eval("ternary - exact")
    text = f"K better than cosine in the fair test (medians): {'; '.join(counts)}. Ternary search missed the best alpha in "
    text += f"{(searches > 1e-12).sum()} of {len(searches)} searches, by up to {searches.max():.2f} nats."
    labels = {"x": "layers removed", "y": "nats per token, minus cosine", "note": fig.error_note(data), "text": text}
    return grid.done(rows, **labels, keep=list(data.columns.drop("line")))


BOTH = dict.fromkeys(("committed", "live"), ("statistics", "selection"))
SCORED = {"block_influence": "block_influence", "mssd": "simdiff_mssd", "masd": "simdiff_masd"}
BUDGET = "The {side} run: scores from {texts} ({tokens:,} tokens a draw), alpha on {alpha_corpus} ({alpha_samples} windows of "
BUDGET += "{alpha_seq_len}), losses on {report_corpus} ({report_windows} windows of {report_seq_len})."


def _side(chapter: Chapter, side: str, model: str) -> tuple[pd.DataFrame, pd.DataFrame, str]:
    """A run of one model: the scores and the sets of every draw as lists (`item`), the rows of the choices, and the budget."""
    scores, rows = (load(f"{chapter[side]}/{table}.csv") for table in BOTH[side])
    scores = pick(scores, model=model, tokens="all", metric=list(SCORED)).assign(layers_removed=0, what="scores")
    scores["method"], keys = scores["metric"].replace(SCORED), ["what", "method", "layers_removed"]
    rows = pick(rows, run_part="simdiff", model=model, role="choice", metric="nll").assign(side=side, what="sets")
    rows = rows.assign(value=rows["value"] - pick(rows, method="dense")["value"].iloc[0])
    rows = pick(rows[rows["search"] != "ternary"], method=COMPARED).astype({"layers_removed": int})
    items = scores.sort_values("layer").groupby([*keys, "run"])["value"].agg(list).rename("item").reset_index()
    items = pd.concat([items, rows[[*keys, "run"]].assign(item=rows["removed_layers"].str.split())])
    told = {"texts": " and ".join(scores["corpus"].unique()), "tokens": int(scores["n"].max())}
    return items, rows, BUDGET.format(**told, **rows.dropna(subset="alpha_corpus").iloc[0])


@figure("own_live_vs_committed", reads=BOTH)
def live_vs_committed(chapter: Chapter) -> Drawing:
    """The live run against a committed run of the same model: rank correlation of scores, layers in common, losses."""
    name, keys = load(f"{chapter['live']}/selection.csv")["model"].iloc[0], ["what", "method", "layers_removed"]
    (live, rows, told), (committed, others, budget) = (_side(chapter, side, name) for side in ("live", "committed"))
    pairs = live.merge(committed, on=keys, suffixes=("", "_committed"))  # every draw of the one with every draw of the other
    both = zip(pairs["layers_removed"], pairs["item"], pairs["item_committed"], strict=True)
    pairs["value"] = [len({*a} & {*b}) / k if k else pd.Series(a).corr(pd.Series(b), "spearman") for k, a, b in both]
    rows = pd.concat([rows, others[others["layers_removed"].isin(rows["layers_removed"])]])
    losses = fig.spread(rows.assign(what="losses"), ["side", *keys])
    data = pd.concat([fig.spread(pairs, keys), losses]).fillna({"side": "live"})
    scores, shown = data[data["what"] == "scores"], data[data["what"] != "scores"]
    grid = fig.Panels(shown, "what", titles=("share of the set in common", "loss over dense, nats per token"), height=3.0)
    for axes, part in grid:
        for side, one in part.groupby("side", sort=False):
            kind = {"hollow": True, "line": "--"} if side == "committed" else {}
            fig.lines(axes, one, {name: replace(fig.METHODS[name], **kind) for name in COMPARED}, dodge=0.12)
    grid.data = data
    found = [f"{fig.METHODS[one.method].title} {one.value:.2f} [{one.low:.2f}, {one.high:.2f}]" for one in scores.itertuples()]
    text = f"{told} {budget} Rank correlation of the scores, all pairs of draws: {', '.join(found)}."
    note = "median and min–max of all draws, or pairs of them; dashed, hollow: committed"
    return grid.done(pd.concat([rows, live, committed]), x="layers removed", note=note, text=text)


TASKS = {"tasks": ("tables", "nlu"), "selection": ("rules",), "statistics": None}


def _printed(item: str) -> pd.DataFrame:
    """A published table, one row per model, method and K, with averages recomputed from the printed tasks."""
    rows = pick(published("simdiff"), item=item).rename(columns={"layers_removed": "K", "ratio_percent": "removed %"})
    tasks = [task for task in rows["task"].unique() if task not in ("avg8", "avg10", "wikitext2")]
    rows["method"] = rows["method"].replace({name: look.title for name, look in fig.METHODS.items()} | THEIR_TITLES)
    rows["task"] = rows["metric"].map({"ppl": "ppl", "avg_acc": "AVG", "retained_percent": "RP"}).fillna(rows["task"])
    keys = ["model", "method", "K", "removed %"]
    table = rows.groupby([*keys, "task"], dropna=False, sort=False)["value"].first().unstack(sort=False)
    table = table.reindex(columns=[*tasks, "ppl", "AVG", "RP"])
    for column, without in DROPPED.items():
        if without <= set(tasks):
            table[column] = table[[task for task in tasks if task not in without]].mean(axis=1)
    return table.reset_index().dropna(axis=1, how="all")


def _ours(chapter: Chapter, names: list[str], sizes: list[int], part: str) -> pd.DataFrame:
    """Our rows: accuracy of each task in percent, the average, its interval, RP, perplexity, and p against the cosine rule."""
    scores = pick(chapter.table("tasks"), run_part=part, model=names, size=(0, *sizes), method=tuple(fig.METHODS))
    losses = pick(chapter.table("selection"), run_part="rules", metric="nll", role="choice")
    losses = pick(losses, calibration_seed=losses["calibration_seed"].min())
    losses = losses.groupby(["model", "method", "layers_removed"])["value"].first()
    titles = {method: OUR_TITLES.get(method, look.title) for method, look in fig.METHODS.items()}
    scores["order"] = scores["method"].map(list(fig.METHODS).index)
    lines, dense = [], {}
    for (name, size, _, method), rows in scores.groupby(["model", "size", "order", "method"]):
        value, accuracy = 100 * rows.groupby("metric")["value"].first(), pick(rows, metric="acc").set_index("task")["value"]
        tests = rows.loc[rows["metric"] == "over_cosine", "mcnemar_p"].dropna()
        sets = pick(scores, model=name, size=size, metric="average").set_index("method")["removed_layers"].sort_index()
        alike = [titles[other] for other in sets.index if size and other != method and sets[other] == sets[method]]
        line = {"model": name, "method": titles[method], "K": size, "ppl": np.exp(losses.get((name, method, size), np.nan))}
        line |= (100 * accuracy).rename(lambda task: task.removeprefix("pydocs_")).to_dict()
        line |= {"AVG": value["average"], "low": value["average_low"], "high": value["average_high"]}
        line["RP"] = 100 * line["AVG"] / dense.setdefault(name, line["AVG"])
        line["p v. cosine"] = min(1.0, tests.min() * len(tests)) if len(tests) else None
        lines.append({**line, "same layers as": ", ".join(alike) or None})
    return pd.DataFrame(lines)


def _table(chapter: Chapter, item: str, names: list[str], sizes: list[int], part: str = "tables") -> Drawing:
    theirs, ours = _printed(item), _ours(chapter, names, sizes, part)
    both = pd.concat([theirs.assign(origin="published"), ours.assign(origin="ours")]).dropna(axis=1, how="all")
    digits = dict.fromkeys(ours.columns, 1) | {"p v. cosine": 3, "ppl": 2}
    text = f"**Published**\n\n{markdown(theirs)}\n\n**Ours**\n\n{markdown(ours, digits=digits)}"
    return Drawing(None, both, pick(chapter.table("tasks"), run_part=part, model=names), text, [PUBLISHED])


def _task_sizes(chapter: Chapter, fraction: float | int = 0) -> list[int]:
    """Every K of the tasks, those nearest to this fraction of the first model's layers first."""
    layers = pick(chapter.table("statistics"), model=chapter.models("selection")[0])["layer"].max() + 1
    sizes = pick(chapter.table("tasks"), run_part="tables")["size"].astype(int).unique()
    return sorted(sizes[sizes > 0].tolist(), key=lambda size: abs(size - fraction * layers))


@figure("simdiff_table1_quarter", reads=TASKS, models=0)
def table1_quarter(chapter: Chapter) -> Drawing:
    """Tasks with a quarter of the layers removed: the paper's ten where the profile has them (part `nlu`)."""
    part = "nlu" if "nlu" in set(chapter.table("tasks")["run_part"]) else "tables"
    return _table(chapter, "table1", chapter.models("selection")[:1], _task_sizes(chapter, 0.25)[:1], part)


@figure("simdiff_table2_fifth", reads=TASKS, models=0)
def table2_fifth(chapter: Chapter) -> Drawing:
    """Tasks with about a fifth of the layers removed."""
    return _table(chapter, "table2", chapter.models("selection")[:1], _task_sizes(chapter, 0.2)[:3])


@figure("simdiff_table3_layers_removed", reads=TASKS, models=0)
def table3_layers_removed(chapter: Chapter) -> Drawing:
    """Tasks for every number of layers removed."""
    return _table(chapter, "table3", chapter.models("selection")[:1], _task_sizes(chapter))


@figure("simdiff_table5_other_models", reads=TASKS)
def table5_other_models(chapter: Chapter) -> Drawing:
    """Tasks for the other models of the profile."""
    names, sizes = chapter.models("selection"), _task_sizes(chapter)
    return _table(chapter, "table5", names[1:] or names, [size for size in sizes if size >= 8] or sizes)
