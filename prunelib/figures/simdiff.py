"""Chapter 01: is SimDiff's choice of layers better than the cosine rule, and than chance?"""

from dataclasses import replace

import numpy as np
import pandas as pd

from prunelib.claims import load
from prunelib.figures import style as fig
from prunelib.figures.save import Chapter, Drawing, figure, markdown, pick
from prunelib.lab.runs import PUBLISHED, published

CHAPTER = "01_cosine_vs_simdiff"
READS = {"selection": ("simdiff",), "statistics": None}
CHOICES = {"selection": ("simdiff", "rules"), "statistics": None}
SIMDIFF = ["simdiff_mssd", "simdiff_masd"]
COMPARED = ["block_influence", *SIMDIFF]
OUR_TITLES = {"block_influence": "ShortGPT", "entropy_gain_attention": "EntroDrop", "greedy": "SLEB (greedy)"}
THEIR_TITLES = {"shortgpt": "ShortGPT", "entrodrop": "EntroDrop", "sleb": "SLEB", "dense_laco": "dense (copied from LaCo)"}
DROPPED = {"w/o BoolQ": {"boolq"}, "w/o WSC": {"wsc"}, "w/o both": {"boolq", "wsc"}}


def _rows(chapter: Chapter, role: str = "choice", **where: object) -> pd.DataFrame:
    """Rows of the runs of SimDiff's protocol."""
    return pick(chapter.table("selection"), run_part="simdiff", role=role, **where).astype({"layers_removed": int})


def _choices(chapter: Chapter, name: str) -> pd.DataFrame:
    """Perplexities of one model: of SimDiff's protocol, or of the runs of all rules where there is none.

    SimDiff with the exact best alpha; random sets without the first and last layer where there are any.
    """
    rows = pick(chapter.table("selection"), run_part=CHOICES["selection"], role="choice", metric="nll", model=name)
    rows = rows[rows["run_part"] == rows["run_part"].max()].astype({"layers_removed": int})
    scored = rows["calibration"].isna() | (rows["calibration"] == chapter["calibration"])
    searched = rows["search"].isna() | (rows["search"] == "exact") & (rows["alpha_corpus"] == chapter["alpha_text"])
    other = "random" if "random_protected" in set(rows["method"]) else "random_protected"
    rows = rows[scored & searched & (rows["method"] != other)].replace({"method": {"random_protected": "random"}})
    return rows.assign(value=np.exp(rows["value"]))


def _sizes(chapter: Chapter) -> list[int]:
    return sorted(set(_rows(chapter)["layers_removed"]) - {0})


def _titles(chapter: Chapter) -> dict[str, str]:
    """Models, the deepest first, and how a panel calls them."""
    layers = chapter.table("statistics").groupby("model")["layer"].max().sort_values(ascending=False) + 1
    return {name: f"{fig.short(name)} ({int(count)} layers)" for name, count in layers.items()}


@figure("simdiff_fig1_cosine_perplexity", reads=CHOICES)
def fig1_cosine_perplexity(chapter: Chapter) -> Drawing:
    """Perplexity of the cosine rule against layers removed: published for Llama-2-7B, ours for all."""
    return _perplexity(chapter, "fig1", "Llama-2-7B", list(_titles(chapter)), ["block_influence", "random", "deepest"])


@figure("simdiff_fig2_importance", reads=READS, models=0)
def fig2_importance(chapter: Chapter) -> Drawing:
    """Importance of every layer: the published schematic, and the two ingredients of SimDiff's score; removed layers pale."""
    name = _rows(chapter)["model"].iloc[0]
    scores = pick(chapter.table("statistics"), model=name, corpus=chapter["calibration"])
    rows = pick(scores, metric=["block_influence", "mssd"], tokens="all")
    theirs = pick(published("simdiff"), item="fig2").reset_index(drop=True).rename_axis("layer").reset_index()
    theirs = theirs.assign(removed=theirs["note"].str.contains("pale"), score="importance")
    count = int(theirs["removed"].sum())
    k = min(_sizes(chapter), key=lambda size: abs(size - count))
    ours = fig.spread(rows, ["metric", "layer"]).rename(columns={"metric": "score"})
    ours["removed"] = ours.groupby("score")["value"].rank(method="first") <= k
    data = pd.concat([theirs[["score", "layer", "value", "removed"]], ours])
    titles = ("published: schematic", "ours: the cosine rule", "ours: the difference")
    looks = (replace(fig.METHODS["simdiff"], hollow=True), fig.METHODS["block_influence"], fig.METHODS["simdiff_mssd"])
    labels = ("importance (unit not stated)", "1 − cosine (log)", "squared difference (log)")
    grid = fig.Panels(data, "score", titles=titles, height=3.0)
    for (axes, part), look, label in zip(grid, looks, labels, strict=True):
        fig.layer_bars(axes, part, look)
        axes.set_ylabel(label)
        if label.endswith("(log)"):
            fig.log_scale(axes)
    note = f"error bars: min–max of {rows['seed'].nunique()} calibration draws; pale: the {k} lowest ({count} published)"
    tokens = pick(scores, metric="mssd").pivot_table("value", "layer", "tokens", "median").eval("all / without_first - 1")
    text = f"The first token of each window matters most in layer {tokens.idxmax()}: "
    text += f"with it the MSSD is {1 + tokens.max():.1f} times as large."
    both = (ours[ours["removed"]].groupby("layer").size() == 2).sum()
    title = f"The cosine rule and the difference share {both} of their {k} lowest layers"
    return grid.done(rows, x="layer", note=note, text=text, title=title, published=[PUBLISHED])


@figure("simdiff_fig4a_alpha_mssd", reads=READS, models=0)
def fig4a_alpha_mssd(chapter: Chapter) -> Drawing:
    """Accuracy for every K and alpha with MSSD: published for 8 tasks, ours for the next token."""
    return _alpha_map(chapter, "fig4a", "simdiff_mssd")


@figure("simdiff_fig4b_alpha_masd", reads=READS, models=0)
def fig4b_alpha_masd(chapter: Chapter) -> Drawing:
    """Accuracy for every K and alpha with MASD: published for 8 tasks, ours for the next token."""
    return _alpha_map(chapter, "fig4b", "simdiff_masd")


def _alpha_map(chapter: Chapter, item: str, method: str) -> Drawing:
    sizes = [size for size in _sizes(chapter) if size >= 8] or _sizes(chapter)
    where = {"calibration": chapter["calibration"], "calibration_seed": 0, "metric": "accuracy", "layers_removed": sizes}
    name = _rows(chapter)["model"].iloc[0]
    rows = _rows(chapter, "path", model=name, method=method, **where)
    parts = [pick(published("simdiff"), item=item)[["layers_removed", "alpha", "value"]].assign(origin="published")]
    for k, path in rows.sort_values("alpha_low").groupby("layers_removed"):
        alphas = np.round(0.1 * np.arange(11), 1)
        steps = np.searchsorted(path["alpha_high"], alphas)  # the first interval that reaches up to each alpha
        values = 100 * path["value"].to_numpy()[steps]
        parts.append(pd.DataFrame({"layers_removed": k, "alpha": alphas, "value": values, "origin": "ours"}))
    data = pd.concat(parts, ignore_index=True).assign(all="")
    titles = (
        "published: Llama-3.1-8B, 8 tasks",
        f"ours: {_titles(chapter)[name]}, next token of {fig.text_title(rows['report_corpus'].iloc[0])}",
    )
    grid = fig.Panels(data, "all", "origin", titles=[""], height=2.15)
    for (axes, part), title, label in zip(grid, titles, ("mean of 8 tasks, %", "next token, %"), strict=True):
        cells = part.pivot(index="layers_removed", columns="alpha", values="value").astype(float)
        fig.heatmap(axes, cells, label=label, annot=True, fmt=".1f")
        for best in zip(*np.nonzero(cells.T.eq(cells.max(axis=1))), strict=True):
            axes.add_patch(fig.Rectangle(best, 1, 1, fill=False, edgecolor="#d55e00", linewidth=1.8, clip_on=False, zorder=3))
        axes.set(title=title, xlabel="alpha (0 = cosine alone, 1 = difference alone)", ylabel="layers removed")
    first = data.loc[data.groupby(["origin", "layers_removed"])["value"].idxmax()].groupby("origin", sort=False)["alpha"]
    found = ", ".join(f"{origin} {alphas.min():g} to {alphas.max():g}" for origin, alphas in first)
    keep = ["layers_removed", "alpha", "value", "origin"]
    return grid.done(rows, keep=keep, title=f"Smallest best alpha of a row: {found}", published=[PUBLISHED])


@figure("simdiff_fig5a_perplexity", reads=READS, models=("mistral-7b", 0))
def fig5a_perplexity(chapter: Chapter) -> Drawing:
    """Perplexity of the cosine rule and SimDiff: published for Mistral-7B, ours for a Mistral or the first model."""
    return _perplexity(chapter, "fig5a", "Mistral-7B-v0.3", list(_titles(chapter))[:1], [*COMPARED, "random"])


@figure("simdiff_fig5b_perplexity", reads=CHOICES, models=("llama-3.1", -1))
def fig5b_perplexity(chapter: Chapter) -> Drawing:
    """Perplexity of the cosine rule and SimDiff: published for Llama-3.1-8B, ours for the same model or the last one."""
    return _perplexity(chapter, "fig5b", "Llama-3.1-8B", list(_titles(chapter))[-1:], [*COMPARED, "random"])


def _perplexity(chapter: Chapter, item: str, model: str, names: list[str], methods: list[str]) -> Drawing:
    """A published curve beside ours: a panel for each model; if one of ours is the published model, it alone."""
    names = [name for name in _titles(chapter) if model.rsplit("-", 1)[0].lower() in name.lower()] or names
    theirs = (
        pick(published("simdiff"), item=item).replace({"method": {"shortgpt": "block_influence"}}).assign(origin="published")
    )
    rows = pd.concat([pick(_choices(chapter, name), method=["dense", *methods]) for name in names])
    ours = fig.spread(rows.assign(origin=pd.Categorical(rows["model"], names)), ["origin", "method", "layers_removed"])
    data = pd.concat([theirs, ours])[["origin", "method", "layers_removed", "value", "low", "high", "n"]]
    grid = fig.Panels(data, "origin", titles=[f"published: {model}", *names], height=3.3, sharey=True)
    for axes, part in grid:
        fig.log_scale(axes)
        kind = {"hollow": True, "line": "--"} if "published" in set(part["origin"]) else {}
        fig.lines(axes, part, {method: replace(look, **kind) for method, look in fig.METHODS.items()}, dodge=0.15)
        axes.set_ylim(top=3 * data.loc[data["method"] != "random", "value"].max())
        fig.log_scale(axes)
    medians = rows.pivot_table("value", ["model", "layers_removed"], "method", "median", sort=False).drop(index=0, level=1)
    asked = [rule for rule in methods[1:] if rule in SIMDIFF] or methods[1:]
    told, total = [], len(set(rows["layers_removed"]) - {0})
    for rule in asked:
        less = (medians[rule] - medians[methods[0]]).groupby("model", sort=False)
        counts = [f"{(one < 0).sum()}{f' (equal at {(one == 0).sum()})' if (one == 0).any() else ''}" for _, one in less]
        told.append(f"{fig.METHODS[rule].title.split('(')[-1].strip(')')} {' and '.join(counts)}")
    title = f"Better than cosine at how many of {total} K? {', '.join(told)}"
    draws = rows.groupby("method")["calibration_seed"].nunique().max()
    text = fig.text_title(rows["report_corpus"].iloc[0])
    note = f"ours on {text}: median and min–max of {draws} calibration draws; hollow: published"
    note += "; alpha: the exact best" if asked != methods[1:] else ""
    return grid.done(rows, x="layers removed", y="perplexity (log scale)", title=title, note=note, published=[PUBLISHED])


@figure("own_fair_test", reads=READS)
def fair_test(chapter: Chapter) -> Drawing:
    """SimDiff's loss minus the cosine rule's for every K, by search of alpha; scores, alpha and report from different texts."""
    scored = pick(chapter.table("selection"), run_part="simdiff", calibration=chapter["fair_calibration"])
    rows = pick(scored, metric="nll_over_cosine", method=SIMDIFF, alpha_corpus=chapter["fair_alpha_text"])
    rows["report"] = rows["model"].map(lambda name: fig.short(name)) + ", " + rows["corpus"].map(fig.text_title)
    rows["line"] = rows["method"].map(lambda name: fig.METHODS[name].title) + ", " + rows["search"]
    data = fig.spread(rows, ["role", "report", "line", "method", "search", "layers_removed"])
    lines, means = sorted(rows["line"].unique(), reverse=True), rows.groupby(["report", "line"])["value"].mean()
    grid = fig.Panels(data, "report", height=0.25 * len(lines) + 1.3, sharey=True)
    for axes, part in grid:
        axes.axvline(0, color=fig.METHODS["block_influence"].color)
        for line, one in part.groupby("line"):
            look, place = fig.METHODS[one["method"].iloc[0]], lines.index(line)
            axes.plot(one["value"], [place] * len(one), look.marker, color=look.color, alpha=0.5)
            axes.plot([means[one["report"].iloc[0], line]], [place], "k|", markersize=16)
        fig.titled_rows(axes, lines)
    first = rows[(rows["report"] == data["report"].iloc[0]) & (rows["method"] == SIMDIFF[0])]
    few = first[first["layers_removed"] < first["layers_removed"].max()]
    mean, below = (one.groupby("search")["value"].mean() for one in (first, few))
    title = f"MSSD minus cosine, mean over K: {mean['exact']:+.2f} nats with exact alpha, {mean['ternary']:+.2f} with ternary"
    keys = ["model", "layers_removed", "method", "calibration_seed"]
    missed = pick(scored, metric="nll", method=SIMDIFF, role="choice", alpha_corpus=chapter["fair_alpha_text"])
    missed = missed.pivot_table("alpha_nll", keys, "search").eval("ternary - exact")
    path = pick(scored, role="path").groupby(keys)["removed_layers"].nunique()
    text = f"Ternary search missed the best alpha in {(missed > 1e-12).sum()} of {len(missed)} searches, by up to "
    text += f"{missed.max():.2f} nats. Between alpha = 0 and 1 a rule chooses {path.min()} to {path.max()} sets of layers, "
    text += f"{path.median():.0f} in the median. "
    text += f"Without the largest K the means of the title are {below['exact']:+.2f} and {below['ternary']:+.2f}."
    note = "dots: median of the calibration draws at one K; bar: mean of all; left of the line: better than cosine"
    return grid.done(rows, x="loss minus the cosine rule's (nats/token)", note=note, text=text, title=title)


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
            kind = {"line": ":", "marker": ""} if side == "committed" else {}
            fig.lines(axes, one, {name: replace(fig.METHODS[name], **kind) for name in COMPARED}, dodge=0.12)
    grid.data = data
    found = [f"{fig.METHODS[one.method].title} {one.value:.2f} [{one.low:.2f}, {one.high:.2f}]" for one in scores.itertuples()]
    text = f"{told} {budget} Rank correlation of the scores, all pairs of draws: {', '.join(found)}."
    note = "median and min–max of all draws, or pairs of them; dotted, without markers: committed"
    title = f"Scores of the layers agree: rank correlation {scores['low'].min():.2f} or more"
    return grid.done(pd.concat([rows, live, committed]), x="layers removed", note=note, text=text, title=title)


TASKS = {"tasks": ("nlu", "tables", "items", "more_sizes", "full")}


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


def _ours(scores: pd.DataFrame) -> pd.DataFrame:
    """Our rows: accuracy of each task in percent, the average, its interval, RP, and p against the cosine rule."""
    titles = {method: look.title for method, look in fig.METHODS.items()} | OUR_TITLES
    scores["order"] = scores["method"].map(list(fig.METHODS).index)
    lines, dense = [], {}
    for (name, size, _, method, limit), rows in scores.groupby(["model", "size", "order", "method", "limit"]):
        value, accuracy = 100 * rows.groupby("metric")["value"].first(), pick(rows, metric="acc").set_index("task")["value"]
        tests = rows.loc[rows["metric"] == "over_cosine", "mcnemar_p"].dropna()
        line = {"model": name, "method": titles[method], "K": size, "items": int(pick(rows, metric="acc")["n"].sum())}
        line |= (100 * accuracy).rename(lambda task: task.removeprefix("pydocs_")).to_dict()
        line |= {"AVG": value["average"], "low": value["average_low"], "high": value["average_high"]}
        line["RP"] = 100 * line["AVG"] / dense.setdefault((name, limit), line["AVG"])
        line["p v. cosine"] = min(1.0, tests.min() * len(tests)) if len(tests) else None
        lines.append(line)
    return pd.DataFrame(lines)


def _table(chapter: Chapter, item: str, count: int | None) -> Drawing:
    """A published table and ours, of the `count` numbers of layers that are nearest to a quarter of the model."""
    part = TASKS["tasks"][:1] if item == "table1" and "nlu" in set(chapter.table("tasks")["run_part"]) else TASKS["tasks"][1:]
    rows = pick(chapter.table("tasks"), run_part=part, method=tuple(fig.METHODS))
    rows = rows.fillna({"limit": np.inf}).drop_duplicates(["model", "method", "size", "task", "metric", "limit"])
    sizes = (rows.drop_duplicates("size").set_index("size")["fraction"].dropna() - 0.25).abs().sort_values().index[:count]
    theirs, ours = _printed(item), _ours(pick(rows, size=(0, *sizes)))
    both = pd.concat([theirs.assign(origin="published"), ours.assign(origin="ours")]).dropna(axis=1, how="all")
    digits = dict.fromkeys(ours.columns, 1) | {"p v. cosine": 3}
    text = f"**Published**\n\n{markdown(theirs)}\n\n**Ours**\n\n{markdown(ours, digits=digits)}"
    guessed = pick(rows, may_be_empty=True, metric="at_chance")
    for (name, limit), tasks in guessed.groupby(["model", "limit"])["task"]:
        items = "all items" if np.isinf(limit) else f"{limit:,.0f} items of each task"
        text += f"\n\n{fig.short(name)} guesses, on {items}, in {', '.join(sorted(tasks))}: not in AVG and RP."
    return Drawing(None, both, rows, text, [PUBLISHED])


@figure("simdiff_table1_quarter", reads=TASKS, models=0)
def table1_quarter(chapter: Chapter) -> Drawing:
    """Tasks with a quarter of the layers removed: the paper's ten where the profile has them (part `nlu`)."""
    return _table(chapter, "table1", 1)


@figure("simdiff_table3_layers_removed", reads=TASKS, models=0)
def table3_layers_removed(chapter: Chapter) -> Drawing:
    """Tasks for every number of layers removed."""
    return _table(chapter, "table3", None)
