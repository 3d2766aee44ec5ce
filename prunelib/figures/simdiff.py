"""Chapter 01: is SimDiff's choice of layers better than the cosine rule, and than chance?"""

import itertools

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from prunelib.figures import style as fig
from prunelib.figures.save import Chapter, Drawing, figure, markdown, pick
from prunelib.lab.runs import PUBLISHED, published

CHAPTER = "01_cosine_vs_simdiff"
READS = {"selection": ("simdiff",), "statistics": None}
SIMDIFF = ["simdiff_mssd", "simdiff_masd"]
COMPARED = ["block_influence", *SIMDIFF]
RULES = [*COMPARED, "relative_magnitude", "deepest"]
LOOKS = [{"linestyle": line, "marker": marker} for line, marker in zip(("-", "--", ":", "-.", "-"), "os^Dv", strict=True)]
PROTOCOLS = {  # scores from, alpha searched on (parameters of the chapter), search, line
    "paper's protocol": ("calibration", "alpha_text", "ternary", "-"),
    "fair test": ("fair_calibration", "fair_alpha_text", "ternary", "--"),
    "fair test, exact alpha": ("fair_calibration", "fair_alpha_text", "exact", ":"),
}
OUR_TITLES = {"block_influence": "ShortGPT", "entropy_gain_attention": "EntroDrop", "greedy": "SLEB (greedy)"}
THEIR_TITLES = {"shortgpt": "ShortGPT", "entrodrop": "EntroDrop", "sleb": "SLEB", "dense_laco": "dense (copied from LaCo)"}
DROPPED = {"w/o BoolQ": {"boolq"}, "w/o WSC": {"wsc"}, "w/o both": {"boolq", "wsc"}}
DRAWS = "calibration draws"


def _rows(chapter: Chapter, **where: object) -> pd.DataFrame:
    """Rows of the runs of SimDiff's protocol: their `choice` rows unless `role` says otherwise."""
    rows = pick(chapter.table("selection"), run_part="simdiff").astype({"layers_removed": int})
    return pick(rows, **{"role": "choice", **where})


def _measured(
    chapter: Chapter, metric: str, *, protocol: str = "paper's protocol", search: str | None = None
) -> pd.DataFrame:  # fmt: skip
    """One metric of every method: SimDiff under one protocol, the others from the same scores. search: instead of its own."""
    scores, alpha_text, found_by, _ = PROTOCOLS[protocol]
    rows = _rows(chapter, metric=metric)
    alike = (rows["alpha_corpus"] == chapter[alpha_text]) & (rows["search"] == (search or found_by))
    rows = rows[~rows["method"].isin(SIMDIFF) | alike]
    return rows[rows["calibration"].isna() | (rows["calibration"] == chapter[scores])]


def _dense(chapter: Chapter, name: str, metric: str) -> float:
    return float(_rows(chapter, metric=metric, name=name, method="dense")["value"].iloc[0])


def _sizes(chapter: Chapter) -> list[int]:
    return sorted(set(_rows(chapter)["layers_removed"]) - {0})


def _layers(chapter: Chapter, name: str) -> int:
    return int(pick(chapter.table("statistics"), name=name)["layer"].max()) + 1


def _title(chapter: Chapter, name: str) -> str:
    layers = pick(chapter.table("statistics"), name=name)["layer"]
    return f"{name} ({int(layers.max()) + 1} layers)"


def _report(chapter: Chapter) -> str:
    return _rows(chapter)["report_corpus"].iloc[0]


def _sketch(chapter: Chapter, **options: object) -> fig.Sketch:
    """A panel for each model, named above it."""
    names = chapter.models("selection")
    return fig.Sketch(names, titles=[_title(chapter, name) for name in names], **options)


@figure("simdiff_fig1_cosine_perplexity", reads=READS)
def fig1_cosine_perplexity(chapter: Chapter) -> Drawing:
    """Perplexity of the cosine rule against layers removed: published, and ours with min–max over the calibration draws."""
    sketch = fig.Sketch.pair("three 7–8B models, WikiText-2", _report(chapter), height=3.4)
    left, right = sketch.grid[0]
    printed = published("simdiff").astype({"layers_removed": float})
    sources = [("Llama-2-7B", "fig1"), ("Mistral-7B-v0.3", "fig5a"), ("Llama-3.1-8B", "fig5b")]
    for look, (model, item) in zip(LOOKS, sources, strict=False):
        data = pick(printed, item=item, model=model, method="shortgpt")[["model", "method", "layers_removed", "value"]]
        sketch.keep(data, origin="published")
        fig.curve(left, data, "shortgpt", published=True, label=f"{model} (published)", **look)
    measured = _measured(chapter, "ppl")
    for look, name in zip(LOOKS, chapter.models("selection"), strict=False):
        data = fig.spread(pick(measured, name=name, method="block_influence"), "layers_removed")
        dense = {"model": name, "method": "dense", "layers_removed": 0, "value": _dense(chapter, name, "ppl")}
        sketch.keep(data, origin="ours", model=name, method="block_influence")
        sketch.keep(pd.DataFrame([dense]), origin="ours")
        fig.curve(right, data, "block_influence", label=_title(chapter, name), **look)
        fig.dense_line(right, dense["value"], label="dense, each model")
    for axes in (left, right):
        fig.log_scale(axes)
        fig.whole_numbers(axes, _sizes(chapter))
    rows, note = pick(measured, method=("block_influence", "dense")), fig.error_note(data, DRAWS)
    return sketch.done(rows, x="layers removed", y="perplexity (log scale)", note=note, published=[PUBLISHED])


@figure("simdiff_fig2_importance", reads=READS, models=0)
def fig2_importance(chapter: Chapter) -> Drawing:
    """Importance of every layer: the published schematic, and the two ingredients of SimDiff's score; removed layers pale."""
    name = chapter.models("selection")[0]
    stats = pick(chapter.table("statistics"), name=name, corpus=chapter["calibration"], tokens="all")
    schematic = pick(published("simdiff"), item="fig2")
    theirs = pd.DataFrame({"value": schematic["value"], "removed": schematic["note"].str.contains("pale")})
    theirs = theirs.reset_index(drop=True).rename_axis("layer").reset_index()
    count = int(theirs["removed"].sum())
    k = min(_sizes(chapter), key=lambda size: abs(size - count))
    titles = ("published: schematic", *[f"ours: {name}, K = {k}"] * 2)
    sketch = fig.Sketch(["published", "block_influence", "mssd"], titles=titles, height=4.4)
    left, *ours = sketch.grid[0]
    _layer_bars(left, sketch.keep(theirs, origin="published", score="importance"), "simdiff", published=True)
    for axes, metric in zip(ours, sketch.names[1:], strict=True):
        data = fig.spread(pick(stats, metric=metric), "layer")
        data["removed"] = data["value"].rank(method="first") <= k
        sketch.keep(data, origin="ours", score=metric)
        _layer_bars(axes, data, "simdiff_mssd" if metric == "mssd" else metric)
        fig.log_scale(axes, "x")
    note = f"min–max of {stats['seed'].nunique()} {DRAWS}; pale: the {k} lowest ({count} in the published panel)"
    labels = ["importance (unit not stated)", "1 − cosine (log)", "mean squared difference (log)"]
    rows = pick(stats, metric=("block_influence", "mssd"))
    return sketch.done(rows, x=labels, y="layer", below=f"error bars: {note}", published=[PUBLISHED])


def _layer_bars(axes: Axes, data: pd.DataFrame, method: str, *, published: bool = False) -> None:
    """Importance of every layer as bars from bottom to top, the removed ones pale."""
    color = fig.METHODS[method].color
    error = None if published else abs(data[["low", "high"]].sub(data["value"], axis=0)).to_numpy().T
    bars = axes.barh(
        data["layer"], data["value"], 0.8, color="white" if published else color, edgecolor=color, linewidth=0.8, xerr=error,
        hatch="////" if published else None, error_kw={"elinewidth": 0.8, "capsize": 1.5, "ecolor": "#333333"},
    )  # fmt: skip
    for bar, gone in zip(bars, data["removed"], strict=True):
        bar.set_alpha(0.3 if gone else None)
    axes.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=9))
    axes.grid(visible=False, axis="y")
    axes.set_ylim(-0.7, len(data) - 0.3)


@figure("own_first_token", reads=READS)
def first_token(chapter: Chapter) -> Drawing:
    """Ratio of every score over all tokens to the same score without the first token of each window."""
    sketch, rows = _sketch(chapter, height=2.9), pick(chapter.table("statistics"), corpus=chapter["calibration"])
    for (axes,), name in sketch:
        for metric in ("block_influence", "mssd", "masd"):
            found = pick(rows, name=name, metric=metric)
            found = found.pivot_table(index=["layer", "seed"], columns="tokens", values="value")
            data = fig.spread((found["all"] / found["without_first"]).rename("value").reset_index(), "layer")
            sketch.keep(data, model=name, score=metric)
            fig.curve(axes, data, metric if metric in fig.METHODS else f"simdiff_{metric}", x="layer")
        axes.axhline(1, color="black", linewidth=0.8)
    note = fig.error_note(sketch.drawn[0], DRAWS)
    return sketch.done(rows, x="layer", y="score with / without first token", note=note)


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
    large = tuple(size for size in sizes if size >= 8) or tuple(sizes)
    where = {"calibration": chapter["calibration"], "calibration_seed": 0, "layers_removed": large}
    paths = _rows(chapter, role="path", name=name, method=method, metric="accuracy", **where)
    alphas = np.round(0.1 * np.arange(1, 11), 1)
    cells = {}
    for k, path in paths.sort_values("alpha_low").groupby("layers_removed"):
        steps = np.searchsorted(path["alpha_high"], alphas)  # the first interval that reaches up to each alpha
        cells[k] = pd.Series(100 * path["value"].to_numpy()[steps], index=alphas)
    theirs = pick(published("simdiff"), item=item).pivot(index="layers_removed", columns="alpha", values="value")
    maps = {"published": theirs, "ours": pd.DataFrame(cells).T}
    titles = ("published: Llama-3.1-8B", f"ours: {_title(chapter, name)}, {_report(chapter)}")
    sketch = fig.Sketch(list(maps), titles=titles, down=True, height=2.15)
    for ((axes,), origin), label in zip(sketch, ("mean of 8 tasks, %", "next token, %"), strict=True):
        cells = maps[origin].rename_axis(index="layers_removed", columns="alpha")
        fig.heatmap(axes, cells, label=label, numbers=".1f", outlined=list(cells.idxmax(axis=1).items()))
        axes.set(xlabel="alpha (0 = cosine alone, 1 = difference alone)", ylabel="layers removed")
        sketch.keep(cells.stack().rename("value").reset_index(), origin=origin)
    return Drawing(sketch.figure, pd.concat(sketch.drawn), paths, published=[PUBLISHED])


@figure("own_alpha_path", reads=READS)
def alpha_path(chapter: Chapter) -> Drawing:
    """The loss as a step function of alpha, with the alpha that ternary search finds and the best one."""
    names, sizes = chapter.models("selection"), _sizes(chapter)
    shown = [k for k in (4, 8, 12) if k in sizes] or sizes[:3]
    where = {"metric": "nll", "method": tuple(SIMDIFF), "calibration": chapter["calibration"], "calibration_seed": 0}
    where |= {"alpha_corpus": chapter["alpha_text"], "layers_removed": tuple(shown)}
    paths, chosen = _rows(chapter, role="path", **where), _rows(chapter, **where)
    chosen = chosen.assign(
        alpha_low=chosen["alpha"], alpha_high=chosen["alpha"], value=chosen["alpha_nll"], removed_layers=None
    )
    sketch = fig.Sketch(names, len(shown), down=True, height=2.5, sharex=True)
    for line, name in sketch:
        for axes, k in zip(line, shown, strict=True):
            axes.set_title(f"{name}, K = {k}")
            for method in SIMDIFF:
                look, one = fig.METHODS[method], {"name": name, "layers_removed": k, "method": method}
                path = sketch.keep(pick(paths, **one).sort_values("alpha_low"), what="path")
                style = {"color": look.color, "linewidth": 1.8, "label": look.title}
                axes.stairs(path["value"], [*path["alpha_low"], 1], baseline=None, **style)
                for search, marker, size in (("ternary", look.marker, 7), ("exact", "*", 12)):
                    point = sketch.keep(pick(chosen, search=search, **one).head(1), what=search)
                    style = {"color": look.color, "markersize": size, "markeredgecolor": "black", "markeredgewidth": 0.7}
                    axes.plot(point["alpha"], point["value"], marker, label=f"{look.title}, {search}", **style)
    columns = ["name", "layers_removed", "method", "what", "alpha_low", "alpha_high", "value", "removed_layers"]
    sketch.drawn = [pd.concat(sketch.drawn)[columns].rename(columns={"name": "model"})]
    return sketch.done(pd.concat([paths, chosen]), x="alpha", y="nats per token")


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
    rows = pick(_measured(chapter, "ppl"), name=name)
    ours = fig.spread(pick(rows, method=tuple(COMPARED)), ["method", "layers_removed"])
    exact = pick(_measured(chapter, "ppl", search="exact"), name=name, method=tuple(SIMDIFF))
    exact, random = fig.spread(exact, ["method", "layers_removed"]), fig.spread(pick(rows, method="random"), "layers_removed")
    place = {k: index for index, k in enumerate(_sizes(chapter))}
    dense = pd.DataFrame([{"method": "dense", "layers_removed": 0, "value": _dense(chapter, name, "ppl")}])
    ours_title = f"{_title(chapter, name)}, {_report(chapter)}"
    sketch = fig.Sketch.pair(f"{model}, WikiText-2", ours_title, height=4)
    left, right = sketch.grid[0]
    fig.grouped_bars(left, theirs, COMPARED, published=True)
    fig.random_band(right, random.assign(place=random["layers_removed"].map(place)), x="place")
    fig.grouped_bars(right, ours, COMPARED, same=_same_sets(chapter, name))
    fig.dense_line(right, dense["value"].iloc[0])
    for offset, method in zip((0.0, 0.8 / 3), SIMDIFF, strict=True):
        points = pick(exact, method=method)
        style = {"color": "white", "markersize": 4, "markeredgecolor": "black", "label": "exact alpha"}
        right.plot(points["layers_removed"].map(place) + offset, points["value"], "D", **style)
    fig.log_scale(right)
    sketch.keep(theirs[["method", "layers_removed", "value"]], origin="published")
    for part in (ours.assign(search="ternary"), exact.assign(search="exact"), random.assign(method="random"), dense):
        sketch.keep(part, origin="ours")
    rows, note = _rows(chapter, name=name, metric="ppl"), fig.error_note(ours, DRAWS)
    return sketch.done(rows, x="layers removed", y="perplexity (log scale)", note=note, published=[PUBLISHED])


def _same_sets(chapter: Chapter, name: str) -> dict[int, list[tuple[str, ...]]]:
    """For each K the methods whose removed layers agree in every calibration draw."""
    rows = pick(_measured(chapter, "nll"), name=name, method=tuple(COMPARED)).sort_values("calibration_seed")
    sets = rows.groupby(["layers_removed", "method"])["removed_layers"].agg(tuple)
    return {
        k: [group for group in fig.coinciding(sets[k].reindex(COMPARED).to_dict()) if len(group) > 1] for k in _sizes(chapter)
    }


@figure("own_fair_test", reads=READS)
def fair_test(chapter: Chapter) -> Drawing:
    """SimDiff's loss minus the cosine rule's: the paper's protocol, and scores, alpha and report from three texts."""
    sketch = _sketch(chapter, height=3.4, sharey=True)
    for (axes,), name in sketch:
        axes.axhline(0, color=fig.METHODS["block_influence"].color, linewidth=1.2, label="cosine (block influence)")
        for method, shift in zip(SIMDIFF, (-0.12, 0.12), strict=True):
            for protocol, (scores, text, search, line) in PROTOCOLS.items():
                rows = pick(_measured(chapter, "nll_over_cosine", protocol=protocol), name=name, method=method)
                told = {"calibration": chapter[scores], "alpha_text": chapter[text], "search": search}
                data = sketch.keep(
                    fig.spread(rows, "layers_removed"), rows, model=name, method=method, protocol=protocol, **told
                )
                style = {"linestyle": line, "label": f"{fig.METHODS[method].title}, {protocol}", "markeredgewidth": 1}
                style |= {} if line == "-" else {"markerfacecolor": "white"}
                fig.curve(axes, data, method, offset=shift, **style)
        fig.whole_numbers(axes, _sizes(chapter))
    note = fig.error_note(sketch.drawn[0], DRAWS)
    return sketch.done(x="layers removed", y="nats per token, minus cosine", columns=2, note=note)


@figure("own_methods_vs_random", reads=READS)
def methods_vs_random(chapter: Chapter) -> Drawing:
    """Loss over dense of every rule, beside the band of random layers."""
    sketch = _sketch(chapter, height=2.7)
    measured = pick(_measured(chapter, "nll"), method=("random", *RULES))
    for (axes,), name in sketch:
        rows = pick(measured, name=name)
        data = fig.spread(rows.assign(value=rows["value"] - _dense(chapter, name, "nll")), ["method", "layers_removed"])
        sketch.keep(data, rows, model=name, calibration=chapter["calibration"])
        random = pick(data, method="random")
        fig.random_band(axes, random)
        fig.dense_line(axes, 0.0)
        for shift, method in zip((-0.2, -0.1, 0, 0.1, 0.2), RULES, strict=True):
            if method in set(data["method"]):
                fig.curve(axes, pick(data, method=method), method, offset=shift)
        highest = data["value"].max()
        axes.set_ylim(-0.03 * highest, 1.15 * highest)
        place = {"xycoords": "axes fraction", "va": "top", "color": "#666666", "fontsize": 8}
        axes.annotate(f"band goes up to {random['high'].max():.1f}", (0.03, 0.97), **place)
        fig.whole_numbers(axes, _sizes(chapter))
    note = fig.error_note(pick(sketch.drawn[0], method="block_influence"), DRAWS) + "; SimDiff: alpha by ternary search"
    return sketch.done(x="layers removed", y="nats per token over dense", note=note)


TASKS = {"tasks": ("tables", "nlu"), "selection": ("rules",), "statistics": None}


def _printed(item: str) -> pd.DataFrame:
    """A published table, one row per model, method and K, with averages recomputed from the printed tasks."""
    rows = pick(published("simdiff"), item=item)
    lines = []
    for (model, method, k, ratio), part in rows.groupby(
        ["model", "method", "layers_removed", "ratio_percent"], dropna=False, sort=False
    ):
        one = dict(zip(part["task"] + " " + part["metric"], part["value"], strict=True))
        scores = {task: one.get(f"{task} acc", one.get(f"{task} score")) for task in dict.fromkeys(rows["task"])}
        scores = {task: value for task, value in scores.items() if value is not None and not task.startswith("avg")}
        title = THEIR_TITLES.get(method) or (fig.METHODS[method].title if method in fig.METHODS else method)
        averages = {
            "AVG": next((value for name, value in one.items() if name.endswith("avg_acc")), None),
            "RP": next((value for name, value in one.items() if name.endswith("retained_percent")), None),
        }
        for name, without in DROPPED.items():
            if without <= set(scores):
                averages[name] = np.mean([value for task, value in scores.items() if task not in without])
        place = {"model": model, "method": title, "K": k, "removed %": ratio}
        lines.append({**place, "ppl": one.get("wikitext2 ppl"), **scores, **averages})
    return pd.DataFrame(lines).dropna(axis=1, how="all")


def _ours(chapter: Chapter, names: list[str], sizes: list[int], part: str = "tables") -> pd.DataFrame:
    """Our rows: accuracy of each task in percent, the average, its interval, RP, perplexity, and p against the cosine rule."""
    scores = pick(chapter.table("tasks"), run_part=part, name=tuple(names), size=(0, *sizes))
    losses = pick(chapter.table("selection"), run_part="rules", metric="nll", role="choice")
    losses = pick(losses, calibration_seed=losses["calibration_seed"].min())
    losses = losses.groupby(["name", "method", "layers_removed"])["value"].first()
    title = {method: OUR_TITLES.get(method, look.title) for method, look in fig.METHODS.items()}
    order = {method: place for place, method in enumerate(fig.METHODS)}
    lines = []
    for (name, size), group in scores.groupby(["name", "size"], sort=False):
        sets = group[group["metric"] == "average"].set_index("method")["removed_layers"].sort_index()
        for method, rows in sorted(group.groupby("method"), key=lambda pair: order.get(pair[0], -1)):
            if method not in fig.METHODS:
                continue
            value = 100 * rows.groupby("metric")["value"].first()
            accuracy, tests = pick(rows, metric="acc"), rows[rows["metric"] == "over_cosine"]["mcnemar_p"].dropna()
            alike = [title[other] for other in sets.index if size and other != method and sets[other] == sets[method]]
            ppl = np.exp(losses.get((name, method, size)) or np.nan)
            line = {"model": name, "method": title[method], "K": size, "ppl": ppl}
            line |= dict(zip(accuracy["task"].str.removeprefix("pydocs_"), 100 * accuracy["value"], strict=True))
            line |= {"AVG": value["average"], "low": value["average_low"], "high": value["average_high"]}
            line["RP"] = 100 * line["AVG"] / next((one["AVG"] for one in lines if one["model"] == name), line["AVG"])
            line["p v. cosine"] = min(1.0, tests.min() * len(tests)) if len(tests) else None
            lines.append({**line, "same layers as": ", ".join(alike)})
    return pd.DataFrame(lines)


def _table(chapter: Chapter, item: str, ours: pd.DataFrame) -> Drawing:
    theirs, ours = _printed(item), ours.replace("", None)
    both = pd.concat([theirs.assign(origin="published"), ours.assign(origin="ours")]).dropna(axis=1, how="all")
    digits = dict.fromkeys(ours.columns, 1) | {"p v. cosine": 3, "ppl": 2}
    text = f"**Published**\n\n{markdown(theirs)}\n\n**Ours**\n\n{markdown(ours, digits=digits)}"
    rows = pick(chapter.table("tasks"), run_part=("tables", "nlu"), name=tuple(ours["model"]))
    return Drawing(None, both, rows, text, [PUBLISHED])


def _task_sizes(chapter: Chapter) -> list[int]:
    return sorted(int(size) for size in set(pick(chapter.table("tasks"), run_part="tables")["size"]) if size)


@figure("simdiff_table1_quarter", reads=TASKS, models=0)
def table1_quarter(chapter: Chapter) -> Drawing:
    """Tasks with a quarter of the layers removed: the paper's ten where the profile has them (part `nlu`)."""
    name = chapter.models("selection")[0]
    size = min(_task_sizes(chapter), key=lambda size: abs(size / _layers(chapter, name) - 0.25))
    suite = "nlu" if "nlu" in set(chapter.table("tasks")["run_part"]) else "tables"
    return _table(chapter, "table1", _ours(chapter, [name], [size], suite))


@figure("simdiff_table2_fifth", reads=TASKS, models=0)
def table2_fifth(chapter: Chapter) -> Drawing:
    """Tasks with about a fifth of the layers removed."""
    name, sizes = chapter.models("selection")[0], _task_sizes(chapter)
    fifth = [size for size in sizes if 0.15 <= size / _layers(chapter, name) <= 0.27] or sizes[:1]
    return _table(chapter, "table2", _ours(chapter, [name], fifth))


@figure("simdiff_table3_layers_removed", reads=TASKS, models=0)
def table3_layers_removed(chapter: Chapter) -> Drawing:
    """Tasks for every number of layers removed."""
    return _table(chapter, "table3", _ours(chapter, chapter.models("selection")[:1], _task_sizes(chapter)))


@figure("simdiff_table5_other_models", reads=TASKS)
def table5_other_models(chapter: Chapter) -> Drawing:
    """Tasks for the other models of the profile."""
    names, sizes = chapter.models("selection"), _task_sizes(chapter)
    large = [size for size in sizes if size >= 8] or sizes
    return _table(chapter, "table5", _ours(chapter, names[1:] or names, large))


@figure("own_table_bos", reads={**TASKS, "tasks": ("tables", "tables_without_bos")})
def table_bos(chapter: Chapter) -> Drawing:
    """The same sets, tasks and items with and without a beginning-of-text token."""
    parts = {"tables": "with BOS", "tables_without_bos": "without BOS"}
    rows = pick(chapter.table("tasks"), run_part=tuple(parts))
    size = int(pick(rows, run_part="tables_without_bos")["size"].max())
    ours = [_ours(chapter, chapter.models("tasks"), [size], part).assign(bos=words) for part, words in parts.items()]
    both = pick(pd.concat(ours), method=tuple(ours[1]["method"]))
    kept = ["model", "method", "K", "bos", *both.columns[4 : both.columns.get_loc("AVG")], "AVG", "low", "high"]
    both = both[kept].sort_values(["model", "K", "method", "bos"]).reset_index(drop=True)
    return Drawing(None, both, rows, markdown(both, digits=1))


@figure("own_table_what_held", reads=READS)
def table_what_held(chapter: Chapter) -> Drawing:
    """In how many runs SimDiff was better than the cosine rule, per model, method and protocol."""
    lines = []
    for name, method, protocol in itertools.product(chapter.models("selection"), SIMDIFF, PROTOCOLS):
        gaps = pick(_measured(chapter, "nll_over_cosine", protocol=protocol), name=name, method=method)
        medians = gaps.groupby("layers_removed")["value"].median()
        line = {"model": name, "method": fig.METHODS[method].title, "protocol": protocol}
        line["K better in the median"] = f"{(medians < 0).sum()} of {len(medians)}"
        line["median nats minus cosine"] = gaps["value"].median()
        line["runs significantly better"] = int((gaps["high"] < 0).sum())
        line["significantly worse"] = int((gaps["low"] > 0).sum())
        lines.append({**line, "same layers": int((gaps["value"] == 0).sum()), "runs": len(gaps)})
    held = pd.DataFrame(lines)
    return Drawing(None, held, _rows(chapter), f"{markdown(held)}\n\n{_ternary_misses(chapter)}")


def _ternary_misses(chapter: Chapter) -> str:
    rows = _rows(chapter, metric="nll", method=tuple(SIMDIFF))
    keys = ["name", "layers_removed", "method", "calibration", "calibration_seed", "alpha_corpus"]
    gap = rows.pivot_table(index=keys, columns="search", values="alpha_nll").eval("ternary - exact")
    missed = f"{(gap > 1e-12).sum()} of {len(gap)} searches"
    return f"Ternary search missed the best alpha in {missed}, by up to {gap.max():.2f} nats."
