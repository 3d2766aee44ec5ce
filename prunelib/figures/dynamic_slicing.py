"""Chapter 04: should redundant layers be cut more than others?"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from prunelib.figures import style as fig
from prunelib.figures.save import Chapter, Drawing, figure, markdown, pick
from prunelib.io import at_root
from prunelib.lab.runs import published

CHAPTER = "04_dynamic_slicing"
READS = {"slicing": None}
PUBLISHED_LR = "data/published/dynamic_slicing_mistral7b_lr.csv"
LOOKS = {
    "constant": fig.Method("constant", "constant (SliceGPT)", "#cc3311", "s"),
    "dynamic": fig.Method("dynamic", "dynamic (LR)", fig.METHODS["dynamic_slicing"].color, "o"),
    "keep_first_full": fig.Method("keep_first_full", "layer 0 as by LR, all others alike", "#777777", "D", ""),
    "greedy": fig.Method("greedy", "whole layers, greedy NLL", fig.METHODS["greedy"].color, fig.METHODS["greedy"].marker),
    "simdiff_masd": fig.Method("simdiff_masd", "whole layers, SimDiff (MASD)", fig.METHODS["simdiff_masd"].color, "^"),
}
KEYS = ["name", "run", "code", "part", "method", "slice_percentage", "slice_base", "shortcuts"]
KEYS += ["control_seed", "window_seed", "calibration", "calibration_seed"]
SCORES = {  # title → metric, color
    "block influence (raw)": ("block_influence", "#a3a3a3"),
    "LR": ("layer_redundancy", "#0072b2"),
    "SLR": ("redundancy_slice", "#e69f00"),
    "FS": ("final_slice", LOOKS["dynamic"].color),
}
CONTROLS = {
    "constant": "constant (SliceGPT)",
    "keep_first_whole": "layer 0 whole, all others alike",
    "keep_first_full": "layer 0 as by LR, all others alike",
    "dynamic": "LR (published)",
    "other_text": "LR from another text",
    "released": "LR as released",
    "clipped": "LR, clipped",
    "rank": "LR, ranks",
    "random_order": "LR in random order",
    "inverted": "LR inverted",
    "random_axes": "constant, random axes",
}
SHORTCUTS = {  # kind → title, color
    "full": ("a matrix at every connection (SliceGPT)", "#882255"),
    "folded": ("folded where possible", "#0072b2"),
    "shared_basis": ("one basis, no shortcuts", "#e69f00"),
}
TEXTS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7")
EQUAL = ["slice_percentage", "slice_base", "mean_slice", "over_constant", "removed"]
VARIANTS = {"minmax": ("min-max (published)", "#000000"), "released": ("as released", "#cc3311")}
VARIANTS |= {"clipped": ("clipped", "#aa4499"), "rank": ("ranks", "#e6b800")}


@dataclass(frozen=True)
class Slicing:
    """What the chapter draws from.

    rows: of the slicing runs. plans: one line per sliced model, with its loss `over_dense`, `ppl`, next-token `accuracy`, the
    parameters `removed`, and `tasks` where they were asked. percentage, base: S_P and S_B of the controls.
    """

    rows: pd.DataFrame
    plans: pd.DataFrame
    percentage: float
    base: float

    @property
    def names(self) -> list[str]:
        return list(dict.fromkeys(self.rows["name"]))

    @property
    def percentages(self) -> list[float]:
        return sorted(pick(self.plans, part="sweep")["slice_percentage"].unique())

    def of(self, name: str, part: str | Sequence[str], *, may_be_empty: bool = False, **where: object) -> pd.DataFrame:
        """Plans of one model and part, ordered by S_P and S_B."""
        found = pick(self.plans, may_be_empty=may_be_empty, name=name, part=part, **where)
        return found.sort_values(["slice_percentage", "slice_base"])

    def draws(self, name: str, method: str) -> pd.DataFrame:
        """The constant or dynamic plan of the controls over all draws of calibration windows; the first that of the sweep."""
        base = self.percentage if method == "constant" else self.base
        first = self.of(name, "sweep", method=method, slice_percentage=self.percentage, slice_base=base)
        return pd.concat([first, self.of(name, "windows", may_be_empty=True, method=method)])

    def layers(self, name: str, metric: str) -> pd.DataFrame:
        """One number per layer, text, draw and variant, the text that the plans use first."""
        rows = pick(self.rows, role="layer", name=name, metric=metric)
        rows = rows.assign(other=rows["calibration"] != rows["redundancy_corpus"])
        return rows.astype({"layer": int}).sort_values(["other", "calibration", "calibration_seed", "layer"])


def slicing(chapter: Chapter) -> Slicing:
    """The table `slicing` of a chapter as `Slicing`."""
    rows = chapter.table("slicing")
    absent = {"control_seed": -1, "window_seed": -1, "calibration_seed": -1, "calibration": "", "task": ""}
    rows = rows.assign(**{name: rows[name].fillna(value) if name in rows else value for name, value in absent.items()})
    plans = pick(rows, role="plan").pivot_table(index=KEYS, columns="metric", values="value").reset_index()
    dense = pick(rows, role="dense", metric="nll").set_index("name")["value"]
    plans = plans.assign(over_dense=plans["nll"] - plans["name"].map(dense), ppl=np.exp(plans["nll"]))
    means = pick(rows, may_be_empty=True, role="task", task="all")  # over the tasks, for the plans of the sweep
    over = {"value": "tasks_over", "low": "tasks_over_low", "high": "tasks_over_high"}
    for metric, columns in {"average": {"value": "tasks", "n": "items"}, "over_constant": over}.items():
        part = means[means["metric"] == metric]
        if len(part):
            plans = plans.merge(part[[*KEYS, *columns]].rename(columns=columns), on=KEYS, how="left")
    first = rows.iloc[0]
    plans = plans.round({"slice_percentage": 9, "slice_base": 9})  # so that fractions can be compared
    return Slicing(rows, plans, float(first["control_percentage"]), float(first["control_base"]))


@figure("dynamic_slicing_fig1_lr", reads=READS)
def fig1_lr(chapter: Chapter) -> Drawing:
    """Layer redundancy LR, the share it gives (SLR) and the final slice (FS) of every layer: published, and ours."""
    found = slicing(chapter)
    lr = pd.read_csv(at_root(PUBLISHED_LR)).sort_values("layer")["lr"].to_numpy()
    scaled = (lr - lr.min()) / (lr.max() - lr.min())
    shares = scaled * (found.percentage - found.base) / scaled.mean()
    models = {"Mistral-7B (published)": {"LR": lr, "SLR": shares, "FS": shares + found.base}}
    for name in found.names:
        models[name] = {}
        for what, (metric, _) in SCORES.items():
            rows = found.layers(name, metric)
            rows = rows if metric == "block_influence" else pick(rows, normalize="minmax")
            models[name][what] = rows["value"].to_numpy()[: rows["layer"].max() + 1]
    titles = ["published: Mistral-7B", *(f"ours: {name}" for name in found.names)]
    sketch = fig.Sketch(list(models), titles=titles, height=2.9, sharey=True)
    for (axes,), name in sketch:
        hollow = {} if name in found.names else {"markerfacecolor": "white", "linestyle": "--"}
        for what, values in models[name].items():
            axes.plot(values, marker="o", markersize=2.6, linewidth=1.1, color=SCORES[what][1], label=what, **hollow)
            sketch.keep(pd.Series(values, name="value").rename_axis("layer").reset_index(), model=name, what=what)
        label = f"constant, S_P = {found.percentage:g}"
        axes.axhline(found.percentage, color=LOOKS["constant"].color, linewidth=1, label=label)
        fig.whole_numbers(axes)
    note = f"S_P = {found.percentage:g}, S_B = {found.base:g}; hollow: published LR, its slices by the same formula"
    rows = pick(found.rows, role="layer")
    return sketch.done(rows, x="layer", y="score or slice", columns=5, note=note, published=[PUBLISHED_LR])


@figure("dynamic_slicing_fig2to4_slice_base", reads=READS, models=0)
def fig2to4_slice_base(chapter: Chapter) -> Drawing:
    """Tasks, perplexity and next-token accuracy against the slice base, for the first model."""
    return _sweep(slicing(chapter), 0, {0.4: 2, 0.3: 3, 0.35: 4})


@figure("dynamic_slicing_fig5to7_slice_base", reads=READS, models=-1)
def fig5to7_slice_base(chapter: Chapter) -> Drawing:
    """Tasks, perplexity and next-token accuracy against the slice base, for the last model."""
    return _sweep(slicing(chapter), -1, {0.3: 5, 0.35: 6, 0.4: 7})


def _sweep(found: Slicing, index: int, numbers: dict[float, int]) -> Drawing:
    """numbers: S_P → figure of the paper."""
    name = found.names[index]
    metrics = {"tasks": "tasks, %", "ppl": "perplexity", "accuracy": "next token, %"}
    metrics = {metric: title for metric, title in metrics.items() if metric in found.plans}
    titles = [
        f"S_P = {percentage:g}{next((f' (Figure {one})' for key, one in numbers.items() if np.isclose(key, percentage)), '')}"
        for percentage in found.percentages
    ]
    sketch = fig.Sketch(found.percentages, len(metrics), titles=titles, height=1.75, sharex="col")
    several = found.draws(name, "constant")
    for column, percentage in sketch:
        swept = found.of(name, "sweep", slice_percentage=percentage)
        spared = found.of(name, "control", method="keep_first_full", slice_percentage=percentage, slice_base=0)
        sketch.keep(swept, swept)
        sketch.keep(spared, spared)
        for axes, metric in zip(column, metrics, strict=True):
            scale, look = 1 if metric == "ppl" else 100, LOOKS["constant"]
            axes.axhline(scale * pick(swept, method="constant")[metric].iloc[0], color=look.color, label=look.title)
            spans = scale * several[metric].dropna()
            if percentage == found.percentage and len(spans) > 1:
                axes.axhspan(spans.min(), spans.max(), color=look.color, alpha=0.15, linewidth=0)
            for line, method, shift in ((swept, "dynamic", 0), (spared, "keep_first_full", 0.006)):
                data = line.assign(value=scale * line[metric])[["slice_base", "value"]]
                if metric == "tasks":
                    ends = scale * line[["tasks_over_low", "tasks_over_high"]].sub(line["tasks_over"], axis=0)
                    data["low"], data["high"] = (data["value"] + ends[end] for end in ends)
                fig.curve(axes, data, LOOKS[method], x="slice_base", offset=shift, markeredgewidth=1, **HOLLOW[method])
    sketch.figure.suptitle(name, fontsize=10)
    measured = (*KEYS, *metrics, "tasks_over", "tasks_over_low", "tasks_over_high", "items", "nll", "removed")
    sketch.drawn = [part[[column for column in measured if column in part]] for part in sketch.drawn]
    return sketch.done(x="slice base S_B", y=list(metrics.values()), note=_sweep_note(found, name))


HOLLOW = {"dynamic": {}, "keep_first_full": {"markerfacecolor": "white"}}


def _sweep_note(found: Slicing, name: str) -> str | None:
    notes, draws = [], len(found.draws(name, "constant"))
    if "tasks" in found.plans:
        means = pick(found.rows, role="task", task="all", metric="average", name=name).groupby("method")["value"].first()
        ends = ", ".join(f"{method} {100 * means[method]:.0f} %" for method in ("dense", "chance") if method in means)
        notes.append(f"tasks: {ends}; bars: 95 % of the difference to constant, {int(found.plans['items'].max())} items")
    if draws > 1:
        notes.append(f"band: min–max of {draws} draws of calibration windows")
    return "\n".join(notes) or None


@figure("dynamic_slicing_table1_constant_vs_dynamic", reads=READS)
def table1_constant_vs_dynamic(chapter: Chapter) -> Drawing:
    """Constant slicing against the dynamic plan of the lowest perplexity, at each mean slice."""
    found, lines = slicing(chapter), []
    for name in found.names:
        for percentage in found.percentages:
            where = {"slice_percentage": percentage}
            flat = found.of(name, "sweep", method="constant", **where).iloc[0]
            moving = found.of(name, "sweep", method="dynamic", **where)
            best, worst = moving.loc[moving["nll"].idxmin()], moving.loc[moving["nll"].idxmax()]
            spared = found.of(name, "control", method="keep_first_full", slice_base=0, **where).iloc[0]
            line = {"model": name, "S_P": percentage, "constant: ppl": flat["ppl"], "best dynamic: ppl": best["ppl"]}
            line |= {"its S_B": best["slice_base"], "change of ppl, %": 100 * (best["ppl"] / flat["ppl"] - 1)}
            line |= {"worst dynamic: ppl": worst["ppl"], "layer 0 spared: ppl": spared["ppl"]}
            line["constant: next token, %"] = 100 * flat["accuracy"]
            line["best dynamic: next token, %"] = 100 * best["accuracy"]
            if "tasks" in found.plans:
                line["constant: tasks, %"] = 100 * flat["tasks"]
                line["best dynamic: tasks, %"] = 100 * best["tasks"]
                line["difference, points"] = 100 * best["tasks_over"]
                line["95 % from"], line["95 % to"] = 100 * best["tasks_over_low"], 100 * best["tasks_over_high"]
                line["layer 0 spared: tasks, %"] = 100 * spared["tasks"]
            line["constant: parameters removed, %"] = 100 * flat["removed"]
            lines.append({**line, "best dynamic: parameters removed, %": 100 * best["removed"]})
    numbers = pd.DataFrame(lines)
    digits = {name: 2 if name.endswith("ppl") or name in ("S_P", "its S_B") else 1 for name in numbers}
    splits = {True: [name for name in numbers if "ppl" in name]}
    splits[False] = [name for name in numbers if name not in (*splits[True], "model", "S_P", "its S_B")]
    text = "\n\n".join(markdown(numbers[["model", "S_P", "its S_B", *part]], digits=digits) for part in splits.values())
    return Drawing(None, numbers, pick(found.plans, part=("sweep", "control")), f"{text}\n\n{_published_trial()}")


def _published_trial() -> str:
    variable = published("slicegpt", "table6").pivot_table(index="model", columns="method", values="value")
    trials = "; ".join(f"{row.Index} {row.slicegpt:.2f} → {row.slicegpt_variable:.2f}" for row in variable.itertuples())
    return f"SliceGPT's own trial of levels per layer (published WikiText-2 perplexity, constant → by variance): {trials}."


@figure("own_equal_parameters", reads=READS)
def equal_parameters(chapter: Chapter) -> Drawing:
    """Dynamic over constant slicing at equal mean slice and at equal parameters, and what each removes."""
    found = slicing(chapter)
    bases = sorted(pick(found.plans, part="equal_parameters")["slice_base"].unique())
    colors = [("#99ccee", "#0072b2"), ("#99ccaa", LOOKS["dynamic"].color)][-len(bases) :]
    sketch = fig.Sketch(found.names, 2, height=2.0, sharex="col", sharey="row")
    for (above, below), name in sketch:
        ticks = []
        for place, percentage in enumerate(found.percentages):
            flat = found.of(name, "sweep", method="constant", slice_percentage=percentage).iloc[0]
            ticks.append(f"{percentage:g}\n({100 * flat['removed']:.0f} %)")
            for number, (base, pair) in enumerate(zip(bases, colors, strict=False)):
                where = {"slice_percentage": percentage, "slice_base": base}
                left = place + (number - (len(bases) - 1) / 2) * 0.42
                kinds = (("sweep", "equal mean slice", -0.1), ("equal_parameters", "equal parameters", 0.1))
                for (part, what, shift), color in zip(kinds, pair, strict=True):
                    plan = found.of(name, part, method="dynamic", **where).head(1)
                    plan = plan.assign(over_constant=plan["nll"] - flat["nll"], **where)
                    sketch.keep(plan[["run", "code", *EQUAL]], plan, model=name, comparison=what)
                    above.bar(left + shift, plan["over_constant"], 0.19, color=color, label=f"S_B = {base:g}, {what}")
                    if part == "sweep":
                        below.bar(left, 100 * (plan["removed"] - flat["removed"]), 0.38, color=color)
        for axes in (above, below):
            axes.axhline(0, color="black", linewidth=0.8)
            axes.grid(visible=False, axis="x")
        below.set_xticks(range(len(ticks)), ticks)
    labels = ["nats over constant", "parameters gone\nbeyond constant\n(points)"]
    note = "in brackets: what constant slicing removes, shortcuts included"
    sketch.drawn = [pd.concat(sketch.drawn)[["model", *EQUAL[:2], "comparison", *EQUAL[2:]]]]
    return sketch.done(x="mean slice S_P (parameters gone)", y=labels, columns=2, note=note)


@figure("own_lr_calibration", reads=READS)
def lr_calibration(chapter: Chapter) -> Drawing:
    """LR from every text and draw of windows (above), and brought to 0–1 in other ways (below)."""
    found = slicing(chapter)
    sketch = fig.Sketch(found.names, 2, height=2.2, sharex="col")
    for (above, below), name in sketch:
        rows = found.layers(name, "layer_redundancy")
        texts = list(dict.fromkeys(rows["calibration"]))
        draws = pick(rows, normalize="minmax").groupby(["calibration", "calibration_seed"], sort=False)["value"]
        for (text, _), values in draws:
            above.plot(values.to_numpy(), color=TEXTS[texts.index(text) % 4], linewidth=0.9, label=f"LR from {text}")
        low = min(values.iloc[1:].min() for _, values in draws)
        above.set_ylim(low - 0.08 * (1 - low), 1 + 0.08 * (1 - low))
        correlation = pd.DataFrame({draw: values.to_numpy() for draw, values in draws}).corr(method="spearman").min().min()
        lowest = f"lowest rank correlation {correlation:.2f}" if len(draws) > 1 else "one draw"
        above.set_title(f"{name}: {len(draws)} draws, {lowest}", fontsize=9)
        first = pick(rows, calibration=texts[0], calibration_seed=rows["calibration_seed"].iloc[0])
        for variant, (title, color) in VARIANTS.items():
            values = pick(first, may_be_empty=True, normalize=variant)["value"].to_numpy()
            line = ":" if variant == "released" else "-"
            below.plot(values, line, color=color, linewidth=1.2, label=title if len(values) else None)
        shown = pd.concat([pick(rows, normalize="minmax"), first[first["normalize"].isin(set(VARIANTS) - {"minmax"})]])
        shown = shown.rename(columns={"normalize": "variant", "calibration_seed": "draw"})
        sketch.keep(shown[["variant", "calibration", "draw", "layer", "value"]].rename(columns={"draw": "seed"}), model=name)
        fig.whole_numbers(below)
    sketch.drawn = [pd.concat(sketch.drawn)[["model", "variant", "calibration", "seed", "layer", "value"]]]
    note = "upper: a line per draw of calibration windows; layer 0, where LR is 0, lies below the picture"
    return sketch.done(pick(found.rows, role="layer"), x="layer", y="LR", note=note)


@figure("own_slicing_controls", reads=READS)
def slicing_controls(chapter: Chapter) -> Drawing:
    """Loss of all plans with the same mean slice: constant, LR in its variants, random order, inverted, random axes."""
    found = slicing(chapter)
    sketch = fig.Sketch(found.names, height=3.6, sharey=True)
    for (axes,), name in sketch:
        data = _controls(found, name)
        sketch.keep(data.drop(columns="method"))
        tame = data[~data["method"].isin(("inverted", "random_axes"))]
        low = data["low"].min()
        high = tame["high"].max() + 0.15 * (tame["high"].max() - low)
        for place, row in enumerate(data.itertuples()):
            color = LOOKS[row.method].color if row.method in LOOKS else "#333333"
            if row.value <= high:
                axes.plot([row.low, row.high], [place, place], color=color, linewidth=1.4)
                axes.plot([row.value], [place], "o", color=color)
            else:
                axes.plot([high], [place], ">", color=color, clip_on=False)
                beside = {"ha": "right", "va": "center", "xytext": (-5, 0), "textcoords": "offset points"}
                axes.annotate(f"{row.value:.1f} ", (high, place), **beside)
        axes.axvline(data["value"].iloc[0], color=LOOKS["constant"].color, linewidth=0.9, linestyle=":")
        fig.rows_as(axes, list(data["plan"]))
        axes.set_xlim(low - 0.1 * (high - low), high)
    draws = len(found.draws(found.names[0], "constant"))
    orders = int(pick(pd.concat(sketch.drawn), plan=CONTROLS["random_order"])["n"].max())
    below = (
        f"S_P = {found.percentage:g}, S_B = {found.base:g}; dots: the same windows for all; bars: min–max of {draws} draws of "
    )
    below += f"windows\n(constant, LR) or of {orders} random orders"
    rows = pick(found.plans, part="control", slice_percentage=found.percentage)
    return sketch.done(rows, x="nats per token over dense", below=below)


def _controls(found: Slicing, name: str) -> pd.DataFrame:
    """One line per control: the plan of the first draw of windows (median of the random orders), with the range of all."""
    rows = found.of(name, "control", slice_percentage=found.percentage)
    spared = rows["method"] == "keep_first_full"
    whole = rows[spared & (rows["slice_base"] == 0)].assign(method="keep_first_whole")
    rows = rows[~spared | (rows["slice_base"] == found.base)]
    rows = pd.concat([found.draws(name, "constant"), found.draws(name, "dynamic"), rows, whole])
    groups = rows.groupby("method")["over_dense"]
    data = groups.agg(value="first", low="min", high="max", n="count")
    if "random_order" in data.index:
        data.loc["random_order", "value"] = groups.median()["random_order"]
    data = data.reindex([method for method in CONTROLS if method in data.index]).reset_index()
    return data.assign(model=name, plan=data["method"].map(CONTROLS))


@figure("own_depth_vs_slicing", reads={"selection": ("rules",), **READS})
def depth_vs_slicing(chapter: Chapter) -> Drawing:
    """Removing whole layers against slicing: loss over parameters, FLOPs and measured time."""
    found = slicing(chapter)
    depth = pick(chapter.table("selection"), run_part="rules", name=tuple(found.names), metric="nll", role="choice")
    sketch = fig.Sketch(found.names, 3, titles=[""] * len(found.names), down=True, height=2.7, sharey="row")
    for line, name in sketch:
        series = sketch.keep(_depth_series(found, pick(depth, name=name), name), model=name)
        for method, data in series.groupby("method", sort=False):
            look = LOOKS[method]
            for axes, x in zip(line, ("removed", "flops_gone"), strict=False):
                axes.plot(data[x], data["value"], marker=look.marker, markersize=4, color=look.color, label=look.title)
        times, size = _times(found, series, name)
        for row in sketch.keep(times, model=name).itertuples():
            line[2].plot([row.time], [row.value], LOOKS[row.method].marker, color=LOOKS[row.method].color)
        for axes, place in zip(line, (0, 0, 1), strict=True):
            axes.plot([place], [0], "*", color="black", label="dense")
        line[2].set_title(f"slices of {found.percentage:g}, or {size} layers", fontsize=8.5)
    titles = ("parameters removed, %", "FLOPs per token removed, %", "time of a forward pass,\nas a multiple of dense")
    rows = pd.concat([found.plans, pick(depth, method=("greedy", "simdiff_masd"))])
    note = f"whole layers: median of {depth['calibration_seed'].nunique()} calibration draws; slices: one draw"
    return sketch.done(rows, x=titles, y=[f"{name}\nnats over dense" for name in found.names], note=note)


def _depth_series(found: Slicing, depth: pd.DataFrame, name: str) -> pd.DataFrame:
    """Both kinds of slices and both kinds of whole layers: `method`, `removed`, `flops_gone` (percent) and loss `value`."""
    plans = found.of(name, ("sweep", "size"))
    # As the further sizes: never a base above half of the slice.
    small = np.isclose(plans["slice_base"], np.minimum(found.base, plans["slice_percentage"] / 2))
    plans = plans[(plans["method"] == "constant") | ((plans["method"] == "dynamic") & small)]
    plans = plans.assign(value=plans["over_dense"]).sort_values(["method", "removed"])
    counted = pick(found.rows, role="count", method="layers", name=name).astype({"layers_removed": int})
    share = counted.pivot_table(index="layers_removed", columns="metric", values="value").reset_index()
    rows = pick(depth, method=("greedy", "simdiff_masd"), layers_removed=tuple(share["layers_removed"]))
    rows = rows.assign(value=rows["value"] - pick(depth, method="dense")["value"].median())
    layers = fig.spread(rows, ["method", "layers_removed"]).merge(share, on="layers_removed")
    both = pd.concat([plans[["method", "removed", "flops_left", "value", "slice_percentage"]], layers], ignore_index=True)
    both = both.assign(removed=100 * both["removed"], flops_gone=100 * (1 - both["flops_left"]))
    columns = ["removed", "flops_gone", "value", "slice_percentage", "layers_removed", "low", "high", "n", "interval", "method"]
    return both[columns]


def _times(found: Slicing, series: pd.DataFrame, name: str) -> tuple[pd.DataFrame, int]:
    """Measured time of a forward pass, as a multiple of dense, and the loss; and how many layers the timed model lacks."""
    timed = pick(found.rows, role="latency", metric="latency_over_dense", name=name).set_index("method")
    size = int(timed["layers_removed"]["layers"])
    lines = [
        {"method": method, "time": timed["value"][method], "value": found.draws(name, method)["over_dense"].iloc[0]}
        for method in ("constant", "dynamic")
    ]
    for row in series[series["layers_removed"] == size].itertuples():
        time = timed["value"]["layers"]
        lines.append({"method": row.method, "time": time, "value": row.value, "layers_removed": size})
    return pd.DataFrame(lines), size


@figure("own_shortcuts", reads=READS)
def shortcuts(chapter: Chapter) -> Drawing:
    """Mean slice minus the parameters that are really gone, by kind of shortcut; and what one basis for all layers costs."""
    found = slicing(chapter)
    counted = pick(found.rows, role="count", metric="removed", shortcuts=tuple(SHORTCUTS), method=("constant", "dynamic"))
    sketch = fig.Sketch(found.names, 2, height=2.4, sharey="row")
    columns = ["name", "method", "shortcuts", "slice_percentage", "value", "what", "removed"]
    for (above, below), name in sketch:
        for kind, (title, color) in SHORTCUTS.items():
            for method, line in (("constant", "o-"), ("dynamic", "--")):
                part = pick(counted, name=name, shortcuts=kind, method=method).sort_values("slice_percentage")
                x, gap = 100 * part["slice_percentage"], 100 * (part["slice_percentage"] - part["value"])
                above.plot(x, gap, line, markersize=3.5, color=color, label=title if method == "constant" else None)
                sketch.keep(part.assign(what="removed", removed=np.nan)[columns], part)
        top = above.get_ylim()[1]
        above.fill_between([0, top], [0, top], [top, top], color="#bbbbbb", alpha=0.35, linewidth=0, label="the model grows")
        above.set(xlabel="mean slice, %", ylim=(0, top), xlim=(0, None))
        flat = {"folded": found.of(name, ("sweep", "size"), method="constant"), "shared_basis": found.of(name, "bare")}
        for kind, part in flat.items():
            part = part.sort_values("removed").assign(what="over dense", value=part["over_dense"])
            below.plot(100 * part["removed"], part["value"], "o-", markersize=3.5, color=SHORTCUTS[kind][1])
            sketch.keep(part[columns], part)
    labels = ["nominal slice minus what\nis really gone (points)", "nats per token over dense"]
    return sketch.done(x="parameters removed, %", y=labels, columns=2, note="constant slices; dashed: dynamic ones")
