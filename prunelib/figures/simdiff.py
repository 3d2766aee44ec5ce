"""Chapter 01: is SimDiff's choice of layers better than the cosine rule, and than chance?"""

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
    chapter: Chapter, metric: str, *, protocol: str = "paper's protocol", search: str | None = None, text: str | None = None,
) -> pd.DataFrame:  # fmt: skip
    """One metric of every method: SimDiff under one protocol, the others from the same scores. text: instead of its scores."""
    scores, alpha_text, found_by, _ = PROTOCOLS[protocol]
    rows = _rows(chapter, metric=metric)
    alike = (rows["alpha_corpus"] == chapter[alpha_text]) & (rows["search"] == (search or found_by))
    rows = rows[~rows["method"].isin(SIMDIFF) | alike]
    return rows[rows["calibration"].isna() | (rows["calibration"] == (text or chapter[scores]))]


def _dense(chapter: Chapter, name: str, metric: str) -> float:
    return float(_rows(chapter, metric=metric, name=name, method="dense")["value"].iloc[0])


def _sizes(chapter: Chapter) -> list[int]:
    return sorted(set(_rows(chapter)["layers_removed"]) - {0})


def _layers(chapter: Chapter, name: str) -> int:
    return int(pick(chapter.table("statistics"), name=name)["layer"].max()) + 1


def _title(chapter: Chapter, name: str) -> str:
    return f"{name} ({_layers(chapter, name)} layers)"


def _report(chapter: Chapter) -> str:
    return _rows(chapter)["report_corpus"].iloc[0]


def _model_panels(chapter: Chapter, rows: int = 1, **options: object) -> tuple:
    """A figure with a column for each model, named above it."""
    names = chapter.models("selection")
    figure, grid = fig.panels(rows, len(names), squeeze=False, **options)
    for axes, name in zip(grid[0], names, strict=True):
        axes.set_title(_title(chapter, name))
    return figure, grid, names


@figure("simdiff_fig1_cosine_perplexity", reads=READS)
def fig1_cosine_perplexity(chapter: Chapter) -> Drawing:
    """Perplexity of the cosine rule against layers removed: published, and ours with min–max over the calibration draws."""
    figure, (left, right) = fig.published_and_ours("three 7–8B models, WikiText-2", _report(chapter), height=3.4)
    printed, drawn = published("simdiff").astype({"layers_removed": float}), []
    sources = [("Llama-2-7B", "fig1"), ("Mistral-7B-v0.3", "fig5a"), ("Llama-3.1-8B", "fig5b")]
    for look, (model, item) in zip(LOOKS, sources, strict=False):
        data = pick(printed, item=item, model=model, method="shortgpt")[["model", "method", "layers_removed", "value"]]
        fig.curve(left, data, "shortgpt", published=True, label=f"{model} (published)", **look)
        drawn.append(data.assign(origin="published"))
    measured = _measured(chapter, "ppl")
    for look, name in zip(LOOKS, chapter.models("selection"), strict=False):
        data = fig.spread(pick(measured, name=name, method="block_influence"), "layers_removed")
        dense = {"origin": "ours", "model": name, "method": "dense", "layers_removed": 0, "value": _dense(chapter, name, "ppl")}
        fig.curve(right, data, "block_influence", label=_title(chapter, name), **look)
        fig.dense_line(right, dense["value"], label="dense, each model")
        drawn += [data.assign(origin="ours", model=name, method="block_influence"), pd.DataFrame([dense])]
    for axes in (left, right):
        fig.log_scale(axes)
        axes.set(xlabel="layers removed", ylabel="perplexity (log scale)")
        fig.whole_numbers(axes, _sizes(chapter))
    fig.legend(figure, note=fig.error_note(data, DRAWS))
    return Drawing(figure, pd.concat(drawn), pick(measured, method=("block_influence", "dense")), published=[PUBLISHED])


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
    figure, axes = fig.panels(1, 3, height=4.4)
    _layer_bars(axes[0], theirs, "simdiff", published=True)
    axes[0].set(title="published: schematic", xlabel="importance (unit not stated)")
    drawn = [theirs.assign(origin="published", score="importance")]
    terms = {"block_influence": "1 − cosine (log)", "mssd": "mean squared difference (log)"}
    for panel, (metric, label) in zip(axes[1:], terms.items(), strict=True):
        data = fig.spread(pick(stats, metric=metric), "layer")
        data["removed"] = data["value"].rank(method="first") <= k
        _layer_bars(panel, data, "simdiff_mssd" if metric == "mssd" else metric)
        fig.log_scale(panel, "x")
        panel.set(title=f"ours: {name}, K = {k}", xlabel=label)
        drawn.append(data.assign(origin="ours", score=metric))
    note = f"min–max of {stats['seed'].nunique()} {DRAWS}; pale: the {k} lowest ({count} in the published panel)"
    figure.supxlabel(f"error bars: {note}", fontsize=9)
    return Drawing(figure, pd.concat(drawn), pick(stats, metric=tuple(terms)), published=[PUBLISHED])


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
    axes.set(ylim=(-0.7, len(data) - 0.3), ylabel="layer")


@figure("own_first_token", reads=READS)
def first_token(chapter: Chapter) -> Drawing:
    """Ratio of every score over all tokens to the same score without the first token of each window."""
    figure, grid, names = _model_panels(chapter, height=2.9)
    rows = pick(chapter.table("statistics"), corpus=chapter["calibration"])
    drawn = []
    for axes, name in zip(grid[0], names, strict=True):
        for metric in ("block_influence", "mssd", "masd"):
            found = pick(rows, name=name, metric=metric)
            found = found.pivot_table(index=["layer", "seed"], columns="tokens", values="value")
            data = fig.spread((found["all"] / found["without_first"]).rename("value").reset_index(), "layer")
            fig.curve(axes, data, metric if metric in fig.METHODS else f"simdiff_{metric}", x="layer")
            drawn.append(data.assign(model=name, score=metric))
        axes.axhline(1, color="black", linewidth=0.8)
    fig.label_axes(grid, x="layer", y="score with / without first token")
    fig.legend(figure, note=fig.error_note(drawn[0], DRAWS))
    return Drawing(figure, pd.concat(drawn), rows)


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
    maps = {
        "published": pick(published("simdiff"), item=item).pivot(index="layers_removed", columns="alpha", values="value"),
        "ours": pd.DataFrame(cells).T,
    }
    titles = {"published": "Llama-3.1-8B", "ours": f"{_title(chapter, name)}, {_report(chapter)}"}
    labels = {"published": "mean of 8 tasks, %", "ours": "next token, %"}
    figure, axes = fig.panels(2, 1, height=2.15)
    for panel, (origin, cells) in zip(axes, maps.items(), strict=True):
        fig.heatmap(panel, cells, label=labels[origin], numbers=".1f", outlined=list(cells.idxmax(axis=1).items()))
        panel.set(title=f"{origin}: {titles[origin]}", xlabel="alpha (0 = cosine alone, 1 = difference alone)")
        panel.set_ylabel("layers removed")
    data = [
        cells.rename_axis(index="layers_removed", columns="alpha").stack().rename("value").reset_index().assign(origin=origin)
        for origin, cells in maps.items()
    ]
    return Drawing(figure, pd.concat(data), paths, published=[PUBLISHED])


@figure("own_alpha_path", reads=READS)
def alpha_path(chapter: Chapter) -> Drawing:
    """The loss as a step function of alpha, with the alpha that ternary search finds and the best one."""
    sizes = _sizes(chapter)
    shown = [k for k in (4, 8, 12) if k in sizes] or sizes[:3]
    names, drawn = chapter.models("selection"), []
    figure, grid = fig.panels(len(names), len(shown), height=2.5, sharex=True, squeeze=False)
    where = {"metric": "nll", "method": tuple(SIMDIFF), "calibration": chapter["calibration"], "calibration_seed": 0}
    where |= {"alpha_corpus": chapter["alpha_text"], "layers_removed": tuple(shown)}
    paths, chosen = _rows(chapter, role="path", **where), _rows(chapter, **where)
    chosen = chosen.assign(alpha_low=chosen["alpha"], alpha_high=chosen["alpha"], value=chosen["alpha_nll"])
    for line, name in zip(grid, names, strict=True):
        for axes, k in zip(line, shown, strict=True):
            axes.set_title(f"{name}, K = {k}")
            for method in SIMDIFF:
                look, one = fig.METHODS[method], {"name": name, "layers_removed": k, "method": method}
                path = pick(paths, **one).sort_values("alpha_low")
                axes.stairs(
                    path["value"], [*path["alpha_low"], 1], baseline=None, color=look.color, linewidth=1.8, label=look.title
                )
                drawn.append(path.assign(what="path"))
                for search, marker, size in (("ternary", look.marker, 7), ("exact", "*", 12)):
                    point = pick(chosen, search=search, **one).head(1)
                    style = {"color": look.color, "markersize": size, "markeredgecolor": "black", "markeredgewidth": 0.7}
                    axes.plot(point["alpha"], point["value"], marker, label=f"{look.title}, {search}", **style)
                    drawn.append(point.assign(what=search, removed_layers=None))
    fig.label_axes(grid, x="alpha", y="nats per token")
    fig.legend(figure)
    columns = ["name", "layers_removed", "method", "what", "alpha_low", "alpha_high", "value", "removed_layers"]
    return Drawing(figure, pd.concat(drawn)[columns].rename(columns={"name": "model"}), pd.concat([paths, chosen]))


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
    figure, (left, right) = fig.published_and_ours(
        f"{model}, WikiText-2", f"{_title(chapter, name)}, {_report(chapter)}", height=4
    )
    fig.grouped_bars(left, theirs, COMPARED, published=True)
    fig.random_band(right, random.assign(place=random["layers_removed"].map(place)), x="place")
    fig.grouped_bars(right, ours, COMPARED, same=_same_sets(chapter, name))
    fig.dense_line(right, _dense(chapter, name, "ppl"))
    for offset, method in zip((0.0, 0.8 / 3), SIMDIFF, strict=True):
        points = pick(exact, method=method)
        style = {"color": "white", "markersize": 4, "markeredgecolor": "black", "label": "exact alpha"}
        right.plot(points["layers_removed"].map(place) + offset, points["value"], "D", **style)
    fig.log_scale(right)
    for axes in (left, right):
        axes.set(xlabel="layers removed", ylabel="perplexity (log scale)")
    fig.legend(figure, note=fig.error_note(ours, DRAWS))
    measured = [ours.assign(search="ternary"), exact.assign(search="exact"), random.assign(method="random")]
    measured.append(pd.DataFrame([{"method": "dense", "layers_removed": 0, "value": _dense(chapter, name, "ppl")}]))
    theirs = theirs[["method", "layers_removed", "value"]].assign(origin="published")
    data = pd.concat([theirs, *(part.assign(origin="ours") for part in measured)])
    return Drawing(figure, data, _rows(chapter, name=name, metric="ppl"), published=[PUBLISHED])


def _same_sets(chapter: Chapter, name: str) -> dict[int, list[tuple[str, ...]]]:
    """For each K the methods whose removed layers agree in every calibration draw."""
    rows = pick(_measured(chapter, "nll"), name=name, method=tuple(COMPARED)).sort_values("calibration_seed")
    sets = rows.groupby(["layers_removed", "method"])["removed_layers"].agg(tuple)
    return {
        k: [group for group in fig.coinciding(sets[k].reindex(COMPARED).to_dict()) if len(group) > 1] for k in _sizes(chapter)
    }


@figure("own_removed_layers", reads=READS)
def removed_layers(chapter: Chapter) -> Drawing:
    """Which layers each method removes, as the share of calibration draws that remove it."""
    sizes, names = _sizes(chapter), chapter.models("selection")
    k = 8 if 8 in sizes else sizes[-1]
    figure, grid = fig.panels(len(names), 1, height=2.6, squeeze=False)
    found = {"ternary": _measured(chapter, "nll"), "exact": _measured(chapter, "nll", search="exact")}
    drawn, used = [], []
    for axes, name in zip(grid[:, 0], names, strict=True):
        lines = {}
        for method in [method for method in RULES if method in set(found["exact"]["method"])]:
            for search in ("ternary", "exact") if method in SIMDIFF else ("",):
                rows = pick(found[search or "ternary"], name=name, method=method, layers_removed=k)
                over = rows["value"].median() - _dense(chapter, name, "nll")
                lines[f"{fig.METHODS[method].title}{', ' * bool(search)}{search}  +{over:.2f}"] = rows["removed_layers"]
                used.append(rows)
        step = 2 if _layers(chapter, name) > 24 else 1
        drawn.append(fig.layer_shares(axes, lines, _layers(chapter, name), step).assign(model=name, layers_removed=k))
        axes.set(title=f"{name}, K = {k}", xlabel="layer (beside each method: loss over dense, nats per token)")
    return Drawing(figure, pd.concat(drawn), pd.concat(used))


@figure("own_fair_test", reads=READS)
def fair_test(chapter: Chapter) -> Drawing:
    """SimDiff's loss minus the cosine rule's: the paper's protocol, and scores, alpha and report from three texts."""
    figure, grid, names = _model_panels(chapter, height=3.4, sharey=True)
    drawn, used = [], []
    for axes, name in zip(grid[0], names, strict=True):
        axes.axhline(0, color=fig.METHODS["block_influence"].color, linewidth=1.2, label="cosine (block influence)")
        for method, shift in zip(SIMDIFF, (-0.12, 0.12), strict=True):
            for protocol, (scores, text, search, line) in PROTOCOLS.items():
                rows = pick(_measured(chapter, "nll_over_cosine", protocol=protocol), name=name, method=method)
                data, hollow = fig.spread(rows, "layers_removed"), {} if line == "-" else {"markerfacecolor": "white"}
                label = f"{fig.METHODS[method].title}, {protocol}"
                fig.curve(axes, data, method, offset=shift, linestyle=line, label=label, markeredgewidth=1, **hollow)
                told = {"calibration": chapter[scores], "alpha_text": chapter[text], "search": search}
                drawn.append(data.assign(model=name, method=method, protocol=protocol, **told))
                used.append(rows)
        fig.whole_numbers(axes, _sizes(chapter))
    fig.label_axes(grid, x="layers removed", y="nats per token, minus cosine")
    fig.legend(figure, columns=2, note=fig.error_note(drawn[0], DRAWS))
    return Drawing(figure, pd.concat(drawn), pd.concat(used))


@figure("own_methods_vs_random", reads=READS)
def methods_vs_random(chapter: Chapter) -> Drawing:
    """Loss over dense of every rule for both calibration texts, beside the band of random layers."""
    texts = _rows(chapter)["calibration"].dropna().unique()
    texts = sorted(texts, key=lambda text: (text != chapter["calibration"], text))
    figure, grid, names = _model_panels(chapter, len(texts), height=2.7, sharex=True)
    drawn, used = [], []
    for line, text in zip(grid, texts, strict=True):
        measured = pick(_measured(chapter, "nll", text=text), method=("random", *RULES))
        for axes, name in zip(line, names, strict=True):
            rows = pick(measured, name=name)
            data = fig.spread(rows.assign(value=rows["value"] - _dense(chapter, name, "nll")), ["method", "layers_removed"])
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
            axes.set_title(f"{_title(chapter, name)}, scores from {text}")
            fig.whole_numbers(axes, _sizes(chapter))
            drawn.append(data.assign(model=name, calibration=text))
            used.append(rows)
    fig.label_axes(grid, x="layers removed", y="nats per token over dense")
    fig.legend(
        figure, note=fig.error_note(pick(drawn[0], method="block_influence"), DRAWS) + "; SimDiff: alpha by ternary search"
    )
    return Drawing(figure, pd.concat(drawn), pd.concat(used))


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
            line = {
                "model": name,
                "method": title[method],
                "K": size,
                "ppl": np.exp(losses.get((name, method, size)) or np.nan),
            }
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
    for name in chapter.models("selection"):
        for method in SIMDIFF:
            for protocol in PROTOCOLS:
                gaps = pick(_measured(chapter, "nll_over_cosine", protocol=protocol), name=name, method=method)
                medians = gaps.groupby("layers_removed")["value"].median()
                lines.append(
                    {
                        "model": name,
                        "method": fig.METHODS[method].title,
                        "protocol": protocol,
                        "K better in the median": f"{(medians < 0).sum()} of {len(medians)}",
                        "median nats minus cosine": gaps["value"].median(),
                        "runs significantly better": int((gaps["high"] < 0).sum()),
                        "significantly worse": int((gaps["low"] > 0).sum()),
                        "same layers": int((gaps["value"] == 0).sum()),
                        "runs": len(gaps),
                    }
                )
    held = pd.DataFrame(lines)
    return Drawing(None, held, _rows(chapter), f"{markdown(held)}\n\n{_ternary_misses(chapter)}")


def _ternary_misses(chapter: Chapter) -> str:
    rows = _rows(chapter, metric="nll", method=tuple(SIMDIFF))
    keys = ["name", "layers_removed", "method", "calibration", "calibration_seed", "alpha_corpus"]
    gap = rows.pivot_table(index=keys, columns="search", values="alpha_nll").eval("ternary - exact")
    return (
        f"Ternary search missed the best alpha in {(gap > 1e-12).sum()} of {len(gap)} searches, by up to {gap.max():.2f} nats."
    )
