"""Chapter 01: is SimDiff's choice of layers better than the cosine rule, and than chance?"""

import itertools
from dataclasses import replace

import numpy as np
import pandas as pd

from prunelib.figures import style as fig
from prunelib.figures.save import Chapter, Drawing, figure, markdown, pick
from prunelib.lab.runs import PUBLISHED, published

CHAPTER = "01_cosine_vs_simdiff"
READS = {"selection": ("simdiff",), "statistics": None}
SIMDIFF = ["simdiff_mssd", "simdiff_masd"]
COMPARED = ["block_influence", *SIMDIFF]
RULES = [*COMPARED, "relative_magnitude", "deepest"]
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
    return {name: f"{name} ({int(count)} layers)" for name, count in layers.items()}


def _report(chapter: Chapter) -> str:
    return _rows(chapter)["report_corpus"].iloc[0]


@figure("simdiff_fig1_cosine_perplexity", reads=READS)
def fig1_cosine_perplexity(chapter: Chapter) -> Drawing:
    """Perplexity of the cosine rule against layers removed: published, and ours with min–max over the calibration draws."""
    sources = {"Llama-2-7B": "fig1", "Mistral-7B-v0.3": "fig5a", "Llama-3.1-8B": "fig5b"}
    theirs = pick(published("simdiff"), method="shortgpt", model=tuple(sources))
    theirs = theirs[theirs["item"] == theirs["model"].map(sources)].assign(origin="published")
    rows = pick(_measured(chapter, metric="ppl"), method=("block_influence", "dense"))
    ours = fig.spread(rows, ["model", "method", "layers_removed"]).assign(origin="ours")
    data = pd.concat([theirs[["origin", "model", "method", "layers_removed", "value"]], ours])
    looks = {}
    for name, line, marker in zip(data["model"].unique(), itertools.cycle(["-", "--", ":", "-."]), itertools.cycle("os^D")):
        color, hollow = fig.METHODS["block_influence"].color, name in sources
        looks[name] = fig.Method(f"{name} (published)" if hollow else _titles(chapter)[name], color, marker, line, hollow)
    titles = ("published: three 7–8B models, WikiText-2", f"ours: {_report(chapter)}")
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
    rows = pick(chapter.table("statistics"), model=name, corpus=chapter["calibration"], tokens="all")
    rows = pick(rows, metric=("block_influence", "mssd"))
    theirs = pick(published("simdiff"), item="fig2").reset_index(drop=True).rename_axis("layer").reset_index()
    theirs = theirs.assign(removed=theirs["note"].str.contains("pale"), score="importance")
    count = int(theirs["removed"].sum())
    k = min(_sizes(chapter), key=lambda size: abs(size - count))
    ours = fig.spread(rows, ["metric", "layer"]).rename(columns={"metric": "score"})
    ours["removed"] = ours.groupby("score")["value"].rank(method="first") <= k
    data = pd.concat([theirs[["score", "layer", "value", "removed"]], ours])
    titles = ("published: schematic", *[f"ours: {name}, K = {k}"] * 2)
    looks = {"importance": replace(fig.METHODS["simdiff"], hollow=True), "mssd": fig.METHODS["simdiff_mssd"], **fig.METHODS}
    grid = fig.Panels(data, "score", titles=titles, height=2.6)
    for axes, part in grid:
        fig.layer_bars(axes, part, looks[part["score"].iloc[0]])
        if "importance" not in set(part["score"]):
            fig.log_scale(axes)
    labels = ("importance (unit not stated)", "1 − cosine (log)", "squared difference (log)")
    for axes, label in zip(grid.grid[0], labels, strict=True):
        axes.set_ylabel(label)
    note = f"error bars: min–max of {rows['seed'].nunique()} calibration draws; pale: the {k} lowest ({count} published)"
    return grid.done(rows, x="layer", note=note, published=[PUBLISHED])


@figure("own_first_token", reads=READS)
def first_token(chapter: Chapter) -> Drawing:
    """Ratio of every score over all tokens to the same score without the first token of each window."""
    rows = pick(chapter.table("statistics"), corpus=chapter["calibration"], metric=["block_influence", "mssd", "masd"])
    pairs = rows.pivot_table(index=["model", "metric", "layer", "seed"], columns="tokens", values="value", sort=False)
    pairs["value"] = pairs["all"] / pairs["without_first"]
    data = fig.spread(pairs.reset_index(), ["model", "metric", "layer"])
    grid = fig.Panels(data, "model", titles=_titles(chapter), height=2.9)
    for axes, part in grid:
        fig.lines(axes, part.replace({"mssd": "simdiff_mssd", "masd": "simdiff_masd"}), x="layer", series="metric")
        axes.axhline(1, color="black", linewidth=0.8)
    return grid.done(rows, x="layer", y="score with / without first token", note=fig.error_note(data))


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
    paths = _rows(chapter, "path", model=name, method=method, **where)
    parts = [pick(published("simdiff"), item=item)[["layers_removed", "alpha", "value"]].assign(origin="published")]
    for k, path in paths.sort_values("alpha_low").groupby("layers_removed"):
        alphas = np.round(0.1 * np.arange(1, 11), 1)
        steps = np.searchsorted(path["alpha_high"], alphas)  # the first interval that reaches up to each alpha
        values = 100 * path["value"].to_numpy()[steps]
        parts.append(pd.DataFrame({"layers_removed": k, "alpha": alphas, "value": values, "origin": "ours"}))
    data = pd.concat(parts).assign(all="")
    titles = ("published: Llama-3.1-8B", f"ours: {_titles(chapter)[name]}, {_report(chapter)}")
    grid = fig.Panels(data, "all", "origin", titles=[""], height=2.15)
    for (axes, part), title, label in zip(grid, titles, ("mean of 8 tasks, %", "next token, %"), strict=True):
        cells = part.pivot(index="layers_removed", columns="alpha", values="value").astype(float)
        fig.heatmap(axes, cells, label=label, annot=True, fmt=".1f")
        for row, best in enumerate(cells.to_numpy().argmax(axis=1)):
            frame = {"fill": False, "edgecolor": "#d55e00", "linewidth": 1.8, "clip_on": False, "zorder": 3}
            axes.add_patch(fig.Rectangle((best, row), 1, 1, **frame))
        axes.set(title=title, xlabel="alpha (0 = cosine alone, 1 = difference alone)", ylabel="layers removed")
    return Drawing(grid.figure, data.drop(columns="all"), paths, published=[PUBLISHED])


@figure("own_alpha_path", reads=READS)
def alpha_path(chapter: Chapter) -> Drawing:
    """The loss as a step function of alpha, with the alpha that ternary search finds and the best one."""
    sizes = _sizes(chapter)
    where = {"metric": "nll", "method": SIMDIFF, "calibration": chapter["calibration"], "calibration_seed": 0}
    where |= {"alpha_corpus": chapter["alpha_text"], "layers_removed": [k for k in (4, 8, 12) if k in sizes] or sizes[:3]}
    paths = _rows(chapter, "path", **where).assign(what="path").sort_values(["model", "layers_removed", "alpha_low"])
    chosen = _rows(chapter, **where).assign(removed_layers=None, what=lambda one: one["search"])
    chosen[["alpha_low", "alpha_high", "value"]] = chosen[["alpha", "alpha", "alpha_nll"]].to_numpy()
    data = pd.concat([paths, chosen.drop_duplicates(["model", "layers_removed", "method", "search"])])
    grid = fig.Panels(data, "layers_removed", "model", titles=[""] * len(where["layers_removed"]), height=2.5, sharex=True)
    for axes, part in grid:
        axes.set_title(f"{part['model'].iloc[0]}, K = {part['layers_removed'].iloc[0]}")
        for (method, what), one in part.groupby(["method", "what"], sort=False):
            look = fig.METHODS[method]
            if what == "path":
                style = {"color": look.color, "linewidth": 1.8, "label": look.title}
                axes.stairs(one["value"], [*one["alpha_low"], 1], baseline=None, **style)
            else:
                marker, size = (look.marker, 7) if what == "ternary" else ("*", 12)
                style = {"color": look.color, "markersize": size, "markeredgecolor": "black", "markeredgewidth": 0.7}
                axes.plot(one["alpha_low"], one["value"], marker, label=f"{look.title}, {what}", **style)
    keep = ["model", "layers_removed", "method", "what", "alpha_low", "alpha_high", "value", "removed_layers"]
    return grid.done(pd.concat([paths, chosen]), x="alpha", y="nats per token", keep=keep)


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
    titles = (f"published: {model}, WikiText-2", f"ours: {_titles(chapter)[name]}, {_report(chapter)}")
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
    used = _rows(chapter, model=name, metric="ppl")
    note = f"{fig.error_note(pick(data, method=COMPARED, origin='ours'))}; dashed, hollow: published"
    return grid.done(used, x="layers removed", y="perplexity (log scale)", note=note, published=[PUBLISHED])


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
    labels = {"x": "layers removed", "y": "nats per token, minus cosine", "note": fig.error_note(data)}
    return grid.done(rows, **labels, keep=list(data.columns.drop("line")))


@figure("own_methods_vs_random", reads=READS)
def methods_vs_random(chapter: Chapter) -> Drawing:
    """Loss over dense of every rule, beside the band of random layers."""
    rows = _measured(chapter, metric="nll", method=("dense", "random", *RULES))
    dense = pick(rows, method="dense").groupby("model")["value"].first()
    rows = rows.assign(value=rows["value"] - rows["model"].map(dense))
    data = fig.spread(rows, ["model", "method", "layers_removed"])
    grid = fig.Panels(data, "model", titles=_titles(chapter), height=2.7)
    for axes, part in grid:
        fig.lines(axes, part, dodge=0.1)
    note = fig.error_note(pick(data, method="block_influence")) + "; SimDiff: alpha by ternary search"
    return grid.done(rows, x="layers removed", y="nats per token over dense", note=note)


TASKS = {"tasks": ("tables", "nlu"), "selection": ("rules",), "statistics": None}


def _printed(item: str) -> pd.DataFrame:
    """A published table, one row per model, method and K, with averages recomputed from the printed tasks."""
    keys, lines = ["model", "method", "layers_removed", "ratio_percent"], []
    rows = pick(published("simdiff"), item=item)
    tasks = [task for task in rows["task"].unique() if not task.startswith("avg")]
    for (model, method, k, ratio), part in rows.groupby(keys, dropna=False, sort=False):
        by_metric = {metric: one.set_index("task")["value"] for metric, one in part.groupby("metric")}
        scores = pd.concat([by_metric.get(metric, pd.Series(dtype=float)) for metric in ("acc", "score")])
        title = THEIR_TITLES.get(method) or (fig.METHODS[method].title if method in fig.METHODS else method)
        line = {"model": model, "method": title, "K": k, "removed %": ratio, **scores.reindex(tasks)}
        for column, metric in {"ppl": "ppl", "AVG": "avg_acc", "RP": "retained_percent"}.items():
            line[column] = by_metric[metric].iloc[0] if metric in by_metric else None
        for column, without in DROPPED.items():
            line[column] = scores.drop(list(without)).mean() if without <= set(scores.index) else None
        lines.append(line)
    return pd.DataFrame(lines).dropna(axis=1, how="all")


def _ours(chapter: Chapter, names: list[str], sizes: list[int], part: str = "tables") -> pd.DataFrame:
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


def _table(chapter: Chapter, item: str, ours: pd.DataFrame) -> Drawing:
    theirs = _printed(item)
    both = pd.concat([theirs.assign(origin="published"), ours.assign(origin="ours")]).dropna(axis=1, how="all")
    digits = dict.fromkeys(ours.columns, 1) | {"p v. cosine": 3, "ppl": 2}
    text = f"**Published**\n\n{markdown(theirs)}\n\n**Ours**\n\n{markdown(ours, digits=digits)}"
    rows = pick(chapter.table("tasks"), run_part=("tables", "nlu"), model=list(ours["model"]))
    return Drawing(None, both, rows, text, [PUBLISHED])


def _task_sizes(chapter: Chapter) -> list[int]:
    return sorted(int(size) for size in set(pick(chapter.table("tasks"), run_part="tables")["size"]) if size)


def _share(chapter: Chapter, size: int) -> float:
    """Fraction of the layers of the first model that K layers are."""
    return size / (pick(chapter.table("statistics"), model=chapter.models("selection")[0])["layer"].max() + 1)


@figure("simdiff_table1_quarter", reads=TASKS, models=0)
def table1_quarter(chapter: Chapter) -> Drawing:
    """Tasks with a quarter of the layers removed: the paper's ten where the profile has them (part `nlu`)."""
    size = min(_task_sizes(chapter), key=lambda size: abs(_share(chapter, size) - 0.25))
    suite = "nlu" if "nlu" in set(chapter.table("tasks")["run_part"]) else "tables"
    return _table(chapter, "table1", _ours(chapter, chapter.models("selection")[:1], [size], suite))


@figure("simdiff_table2_fifth", reads=TASKS, models=0)
def table2_fifth(chapter: Chapter) -> Drawing:
    """Tasks with about a fifth of the layers removed."""
    sizes = _task_sizes(chapter)
    fifth = [size for size in sizes if 0.15 <= _share(chapter, size) <= 0.27] or sizes[:1]
    return _table(chapter, "table2", _ours(chapter, chapter.models("selection")[:1], fifth))


@figure("simdiff_table3_layers_removed", reads=TASKS, models=0)
def table3_layers_removed(chapter: Chapter) -> Drawing:
    """Tasks for every number of layers removed."""
    return _table(chapter, "table3", _ours(chapter, chapter.models("selection")[:1], _task_sizes(chapter)))


@figure("simdiff_table5_other_models", reads=TASKS)
def table5_other_models(chapter: Chapter) -> Drawing:
    """Tasks for the other models of the profile."""
    names, sizes = chapter.models("selection"), _task_sizes(chapter)
    return _table(chapter, "table5", _ours(chapter, names[1:] or names, [size for size in sizes if size >= 8] or sizes))


@figure("own_table_bos", reads={**TASKS, "tasks": ("tables", "tables_without_bos")})
def table_bos(chapter: Chapter) -> Drawing:
    """The same sets, tasks and items with and without a beginning-of-text token."""
    parts = {"tables": "with BOS", "tables_without_bos": "without BOS"}
    rows = pick(chapter.table("tasks"), run_part=tuple(parts))
    size = int(pick(rows, run_part="tables_without_bos")["size"].max())
    ours = [_ours(chapter, chapter.models("tasks"), [size], part).assign(bos=words) for part, words in parts.items()]
    both = pick(pd.concat(ours), method=tuple(ours[1]["method"])).sort_values(["model", "K", "method", "bos"])
    both = both.drop(columns=["ppl", "RP", "p v. cosine", "same layers as"]).reset_index(drop=True)
    return Drawing(None, both, rows, markdown(both, digits=1))


@figure("own_table_what_held", reads=READS)
def table_what_held(chapter: Chapter) -> Drawing:
    """In how many runs SimDiff was better than the cosine rule, per model, method and protocol."""
    lines = []
    for name, method, protocol in itertools.product(chapter.models("selection"), SIMDIFF, PROTOCOLS):
        gaps = _measured(chapter, protocol, metric="nll_over_cosine", model=name, method=method)
        medians = gaps.groupby("layers_removed")["value"].median()
        line = {"model": name, "method": fig.METHODS[method].title, "protocol": protocol}
        line["K better in the median"] = f"{(medians < 0).sum()} of {len(medians)}"
        line["median nats minus cosine"] = gaps["value"].median()
        line["runs significantly better"] = int((gaps["high"] < 0).sum())
        line["significantly worse"] = int((gaps["low"] > 0).sum())
        lines.append({**line, "same layers": int((gaps["value"] == 0).sum()), "runs": len(gaps)})
    held = pd.DataFrame(lines)
    keys = ["model", "layers_removed", "method", "calibration", "calibration_seed", "alpha_corpus"]
    rows = _rows(chapter, metric="nll", method=SIMDIFF)
    gap = rows.pivot_table(index=keys, columns="search", values="alpha_nll").eval("ternary - exact")
    missed = f"{(gap > 1e-12).sum()} of {len(gap)} searches, by up to {gap.max():.2f} nats."
    return Drawing(None, held, _rows(chapter), f"{markdown(held)}\n\nTernary search missed the best alpha in {missed}")
