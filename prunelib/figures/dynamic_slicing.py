"""Chapter 04: should redundant layers be cut more than others?"""

from dataclasses import dataclass, replace

import numpy as np
import pandas as pd

from prunelib.figures import style as fig
from prunelib.figures.save import Chapter, Drawing, figure, markdown, pick
from prunelib.io import at_root
from prunelib.lab.runs import published

CHAPTER = "04_dynamic_slicing"
READS = {"slicing": None}
PUBLISHED_LR = "data/published/dynamic_slicing_mistral7b_lr.csv"
GREEN, RED, BLUE = fig.METHODS["dynamic_slicing"].color, "#cc3311", "#0072b2"
LOOKS = {
    "constant": fig.Method("constant (SliceGPT)", RED, "s"),
    "dynamic": fig.Method("dynamic (LR)", GREEN),
    "keep_first_full": fig.Method("layer 0 as by LR, all others alike", "#777777", "D", "", hollow=True),
    "greedy": replace(fig.METHODS["greedy"], title="whole layers, greedy NLL"),
    "simdiff_masd": replace(fig.METHODS["simdiff_masd"], title="whole layers, SimDiff (MASD)"),
}
KEYS = ["model", "run", "code", "part", "method", "slice_percentage", "slice_base", "shortcuts"]
KEYS += ["control_seed", "window_seed", "calibration", "calibration_seed"]
PLAN = [name for name in KEYS if name not in ("run", "code")]
SCORES = {  # metric → look; LR, the share it gives above the slice base, the final slice
    "block_influence": fig.Method("block influence (raw)", "#a3a3a3"),
    "layer_redundancy": fig.Method("redundancy (LR)", BLUE),
    "redundancy_slice": fig.Method("share above base (SLR)", "#e69f00"),
    "final_slice": fig.Method("final slice (FS)", GREEN),
}
CONTROLS = {
    "constant": LOOKS["constant"],
    "keep_first_whole": fig.Method("layer 0 whole, all others alike", "#333333"),
    "keep_first_full": fig.Method("layer 0 as by LR, all others alike", "#777777"),
    "dynamic": fig.Method("LR (published)", GREEN),
    "other_text": fig.Method("LR from another text", "#333333"),
    "released": fig.Method("LR as released", "#333333"),
    "clipped": fig.Method("LR, clipped", "#333333"),
    "rank": fig.Method("LR, ranks", "#333333"),
    "random_order": fig.Method("LR in random order", "#333333"),
    "inverted": fig.Method("LR inverted", "#333333"),
    "random_axes": fig.Method("constant, random axes", "#333333"),
}
SHORTCUTS = {"full": "(a matrix at every connection)", "folded": "(half of them folded)", "shared_basis": "(one basis, none)"}


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

    def draws(self, method: str) -> pd.DataFrame:
        """The constant or dynamic plan of the controls over all draws of calibration windows; the first that of the sweep."""
        base = self.percentage if method == "constant" else self.base
        first = pick(self.plans, part="sweep", method=method, slice_percentage=self.percentage, slice_base=base)
        return pd.concat([first, pick(self.plans, may_be_empty=True, part="windows", method=method)])


def slicing(chapter: Chapter) -> Slicing:
    """The table `slicing` of a chapter as `Slicing`."""
    rows = chapter.table("slicing")
    absent = {"control_seed": -1, "window_seed": -1, "calibration_seed": -1, "calibration": "", "task": ""}
    rows = rows.assign(**{name: rows[name].fillna(value) if name in rows else value for name, value in absent.items()})
    plans = pick(rows, role="plan").pivot_table(index=KEYS, columns="metric", values="value").reset_index()
    dense = pick(rows, role="dense", metric="nll").set_index("model")["value"]
    plans = plans.assign(over_dense=plans["nll"] - plans["model"].map(dense), ppl=np.exp(plans["nll"]))
    means = pick(rows, may_be_empty=True, role="task", task="all")  # over the tasks, for the plans of the sweep
    over = {"value": "tasks_over", "low": "tasks_over_low", "high": "tasks_over_high"}
    for metric, columns in {"average": {"value": "tasks", "n": "items"}, "over_constant": over}.items():
        part = means[means["metric"] == metric]
        if len(part):
            plans = plans.merge(part[[*KEYS, *columns]].rename(columns=columns), on=KEYS, how="left")
    plans = plans.round({"slice_percentage": 9, "slice_base": 9})  # so that fractions can be compared
    plans = plans.sort_values(["model", "slice_percentage", "slice_base"], kind="stable")
    return Slicing(rows, plans, *map(float, rows[["control_percentage", "control_base"]].iloc[0]))


@figure("dynamic_slicing_fig1_lr", reads=READS)
def fig1_lr(chapter: Chapter) -> Drawing:
    """Layer redundancy LR, the share it gives (SLR) and the final slice (FS) of every layer: published, and ours."""
    found, authors = slicing(chapter), "Mistral-7B (published)"
    lr = pd.read_csv(at_root(PUBLISHED_LR)).sort_values("layer")["lr"].to_numpy()
    shares = (lr - lr.min()) / (lr - lr.min()).mean() * (found.percentage - found.base)
    theirs = pd.DataFrame({"layer_redundancy": lr, "redundancy_slice": shares, "final_slice": shares + found.base})
    theirs = theirs.rename_axis("layer").reset_index().melt("layer", var_name="metric").assign(model=authors)
    rows = pick(found.rows, role="layer", metric=list(SCORES)).astype({"layer": int})
    rows["other"] = rows["calibration"] != rows["redundancy_corpus"]  # the text that the plans use first
    rows = rows.sort_values(["model", "other", "calibration", "calibration_seed", "layer"], kind="stable")
    ours = rows[(rows["metric"] == "block_influence") | (rows["normalize"] == "minmax")]
    data = pd.concat([theirs, ours.drop_duplicates(["model", "metric", "layer"])[list(theirs)]])
    titles = {authors: "published: Mistral-7B"} | {name: f"ours: {name}" for name in rows["model"].unique()}
    grid = fig.Panels(data, "model", titles=titles, height=2.9, sharey=True)
    for axes, part in grid:
        hollow = {"markerfacecolor": "white", "linestyle": "--"} if authors in set(part["model"]) else {}
        fig.lines(axes, part, SCORES, x="layer", series="metric", markersize=2.6, linewidth=1.1, **hollow)
        fig.level(axes, found.percentage, f"constant, S_P = {found.percentage:g}", RED, "-")
    note = f"S_P = {found.percentage:g}, S_B = {found.base:g}; hollow: published LR, its slices by the same formula"
    draws, lowest = pick(rows, metric="layer_redundancy", normalize="minmax"), []
    for name, part in draws.groupby("model", sort=False):
        wide = part.pivot(index="layer", columns=["calibration", "calibration_seed"], values="value")
        lowest.append(f"{name} {wide.corr(method='spearman').min().min():.2f} ({wide.shape[1]} draws)")
    text = f"Lowest rank correlation of LR between two draws of windows, of all texts: {', '.join(lowest)}."
    labels = {"x": "layer", "y": "score or slice", "note": note, "text": text}
    return grid.done(pick(found.rows, role="layer"), **labels, published=[PUBLISHED_LR])


@figure("dynamic_slicing_fig2to4_slice_base", reads=READS, models=0)
def fig2to4_slice_base(chapter: Chapter) -> Drawing:
    """Tasks, perplexity and next-token accuracy against the slice base, for the first model."""
    return _sweep(slicing(chapter), chapter.models("slicing")[0], {0.4: 2, 0.3: 3, 0.35: 4})


@figure("dynamic_slicing_fig5to7_slice_base", reads=READS, models=-1)
def fig5to7_slice_base(chapter: Chapter) -> Drawing:
    """Tasks, perplexity and next-token accuracy against the slice base, for the last model."""
    return _sweep(slicing(chapter), chapter.models("slicing")[-1], {0.3: 5, 0.35: 6, 0.4: 7})


def _sweep(found: Slicing, name: str, numbers: dict[float, int]) -> Drawing:
    """numbers: S_P → figure of the paper."""
    metrics = {"tasks": "tasks, %", "ppl": "perplexity", "accuracy": "next token, %"}
    metrics = {metric: title for metric, title in metrics.items() if metric in found.plans}
    plans = pick(found.plans, model=name)
    spared = pick(plans, part="control", method="keep_first_full", slice_base=0)
    plans = pd.concat([pick(plans, part="sweep"), spared]).sort_values("slice_percentage", kind="stable")
    parts = [plans.assign(metric=metric, value=plans[metric] * (1 if metric == "ppl" else 100)) for metric in metrics]
    if "tasks" in metrics:
        for end in ("low", "high"):
            parts[0][end] = parts[0]["value"] + 100 * (plans[f"tasks_over_{end}"] - plans["tasks_over"])
    titles = {one: f"$S_P$ = {one:g}" for one in plans["slice_percentage"]}
    titles |= {one: f"{titles[one]} (Figure {number})" for one, number in numbers.items() if one in titles}
    several = pick(found.draws("constant"), model=name)
    grid = fig.Panels(pd.concat(parts), "slice_percentage", "metric", titles=titles, height=1.75, sharex="col")
    for axes, part in grid:
        metric, flat = part["metric"].iloc[0], part.loc[part["method"] == "constant", "value"].iloc[0]
        fig.level(axes, flat, LOOKS["constant"].title, RED, "-")
        if part["slice_percentage"].iloc[0] == found.percentage and several[metric].count() > 1:
            ends = several[metric].agg(["min", "max"]) * (1 if metric == "ppl" else 100)
            axes.axhspan(*ends, color=RED, alpha=0.15, linewidth=0)
        # The right end of the dynamic plans is constant slicing.
        fig.lines(axes, part.replace({"method": {"constant": "dynamic"}}), LOOKS, x="slice_base", dodge=0.006)
    grid.data = plans
    measured = [*metrics, "tasks_over", "tasks_over_low", "tasks_over_high", "items", "nll", "removed"]
    keep = [name for name in [*PLAN, *measured] if name in plans]
    notes = [f"band: min–max of {len(several)} draws of calibration windows"] if len(several) > 1 else []
    if "tasks" in metrics:
        means = pick(found.rows, role="task", task="all", metric="average", model=name).groupby("method")["value"].first()
        ends = ", ".join(f"{method} {100 * means[method]:.0f} %" for method in ("dense", "chance") if method in means)
        items = int(found.plans["items"].max())
        notes.append(f"tasks: {ends}; bars: 95 % interval of the difference to constant, {items} items")
    return grid.done(plans, x="slice base $S_B$", y=list(metrics.values()), keep=keep, note="\n".join(notes))


@figure("dynamic_slicing_table1_constant_vs_dynamic", reads=READS)
def table1_constant_vs_dynamic(chapter: Chapter) -> Drawing:
    """Constant slicing against the dynamic plan of the lowest perplexity, at each mean slice."""
    plans = slicing(chapter).plans
    keys, swept = ["model", "slice_percentage"], pick(plans, part="sweep")
    moving = pick(swept, method="dynamic").sort_values("nll").groupby(keys)
    spared = pick(plans, part="control", method="keep_first_full", slice_base=0)
    flat, spared = (rows.set_index(keys) for rows in (pick(swept, method="constant"), spared))
    best, worst = moving.first(), moving.last()
    data = {"constant: ppl": flat["ppl"], "best dynamic: ppl": best["ppl"], "its S_B": best["slice_base"]}
    data |= {"change of ppl, %": 100 * (best["ppl"] / flat["ppl"] - 1), "worst dynamic: ppl": worst["ppl"]}
    data |= {"layer 0 spared: ppl": spared["ppl"], "constant: next token, %": 100 * flat["accuracy"]}
    data["best dynamic: next token, %"] = 100 * best["accuracy"]
    if "tasks" in plans:
        data |= {"constant: tasks, %": 100 * flat["tasks"], "best dynamic: tasks, %": 100 * best["tasks"]}
        data |= {"difference, points": 100 * best["tasks_over"], "95 % from": 100 * best["tasks_over_low"]}
        data |= {"95 % to": 100 * best["tasks_over_high"], "layer 0 spared: tasks, %": 100 * spared["tasks"]}
    data["constant: parameters removed, %"] = 100 * flat["removed"]
    data["best dynamic: parameters removed, %"] = 100 * best["removed"]
    numbers = pd.DataFrame(data).loc[flat.index].reset_index().rename(columns={"slice_percentage": "S_P"})
    digits = {name: 2 if name.endswith("ppl") or name in ("S_P", "its S_B") else 1 for name in numbers}
    keys, losses = ["model", "S_P", "its S_B"], [name for name in numbers if "ppl" in name]
    split = (losses, [name for name in numbers if name not in (*losses, *keys)])
    text = "\n\n".join(markdown(numbers[[*keys, *part]], digits=digits) for part in split)
    variable = published("slicegpt", "table6").pivot_table(index="model", columns="method", values="value")
    trials = "; ".join(f"{row.Index} {row.slicegpt:.2f} → {row.slicegpt_variable:.2f}" for row in variable.itertuples())
    trials = f"SliceGPT's own trial of levels per layer (published WikiText-2 perplexity, constant → by variance): {trials}."
    return Drawing(None, numbers, pick(plans, part=("sweep", "control")), f"{text}\n\n{trials}")


@figure("own_slicing_controls", reads=READS)
def slicing_controls(chapter: Chapter) -> Drawing:
    """Loss of all plans with the same mean slice: constant, LR in its variants, random order, inverted, random axes."""
    found = slicing(chapter)
    rows = pick(found.plans, part="control", slice_percentage=found.percentage)
    spared = rows["method"] == "keep_first_full"
    whole = rows[spared & (rows["slice_base"] == 0)].assign(method="keep_first_whole")
    rows = rows[~spared | (rows["slice_base"] == found.base)]
    rows = pd.concat([found.draws("constant"), found.draws("dynamic"), rows, whole])
    # The plan of the first draw of windows, median of the random orders, with the range of all.
    data = rows.groupby(["model", "method"])["over_dense"].agg(value="first", low="min", high="max", middle="median", n="count")
    data = data.reset_index()
    data["value"] = data.pop("middle").where(data["method"] == "random_order", data["value"])
    data = data[data["method"].isin(CONTROLS)]
    grid = fig.Panels(data, "model", height=3.6, sharey=True)
    for axes, part in grid:
        part = part.sort_values("method", key=lambda column: column.map(list(CONTROLS).index))
        tame, low = part.loc[~part["method"].isin(("inverted", "random_axes")), "high"].max(), part["low"].min()
        ends = {"low": low, "high": tame + 0.15 * (tame - low)}
        fig.dots(axes, part, CONTROLS, order=list(part["method"]), **ends)
        axes.axvline(part["value"].iloc[0], color=RED, linewidth=0.9, linestyle=":")
    orders, draws = data.loc[data["method"] == "random_order", "n"].max(), data.loc[data["method"] == "constant", "n"].max()
    note = f"S_P = {found.percentage:g}, S_B = {found.base:g}; dots: the same windows for all;\n"
    note += f"bars: min–max of {draws} draws of windows (constant, LR) or of {orders} random orders"
    return grid.done(rows, x="nats per token over dense", note=note)


@figure("own_depth_vs_slicing", reads={"selection": ("rules",), **READS})
def depth_vs_slicing(chapter: Chapter) -> Drawing:
    """Removing whole layers against slicing: loss over parameters, FLOPs and measured time."""
    found, keys = slicing(chapter), ["model", "layers_removed"]
    plans = pick(found.plans, part=("sweep", "size"), method=("constant", "dynamic"))
    # As the further sizes: never a base above half of the slice.
    small = np.isclose(plans["slice_base"], np.minimum(found.base, plans["slice_percentage"] / 2))
    plans = plans[(plans["method"] == "constant") | small]
    counted = pick(found.rows, role="count", method="layers").astype({"layers_removed": int})
    share = counted.pivot_table(index=keys, columns="metric", values="value").reset_index()
    depth = pick(chapter.table("selection"), run_part="rules", model=chapter.models("slicing"), metric="nll", role="choice")
    dense = pick(depth, method="dense").groupby("model")["value"].median()
    depth = pick(depth, method=("greedy", "simdiff_masd"), layers_removed=tuple(share["layers_removed"]))
    layers = fig.spread(depth.assign(value=depth["value"] - depth["model"].map(dense)), [*keys, "method"]).merge(share, on=keys)
    first = [found.draws(method).drop_duplicates("model") for method in ("constant", "dynamic")]
    alike = plans.index.isin(pd.concat(first).index)  # the sliced models that were timed
    data = pd.concat([plans.assign(value=plans["over_dense"], alike=alike), layers])
    timed = pick(found.rows, role="latency", metric="latency_over_dense").set_index(["model", "method"])
    size = timed.xs("layers", level="method")["layers_removed"]
    sliced = data["method"].isin(("constant", "dynamic"))
    kind = data["method"].where(sliced, "layers")
    time = timed["value"].reindex(pd.MultiIndex.from_arrays([data["model"], kind])).to_numpy()
    timed_layers = ~sliced & (data["layers_removed"] == data["model"].map(size))
    data["time"] = np.where(data["alike"].eq(True) | timed_layers, 100 * (1 - time), np.nan)
    data = data.assign(removed=100 * data["removed"], flops_gone=100 * (1 - data["flops_left"]))
    titles = {"removed": "parameters removed, %", "flops_gone": "FLOPs per token removed, %", "time": "time saved, %"}
    points = pd.concat([data.assign(what=what, x=data[what]) for what in titles]).dropna(subset="x")
    points = points.drop(columns=["low", "high"])
    grid = fig.Panels(points, "what", "model", titles=[""] * 3, height=2.7, sharey="row")
    for axes, part in grid:
        fig.lines(axes, part.sort_values("method", kind="stable"), LOOKS, x="x", markersize=4)
        axes.plot([0], [0], "*", color="black", label="dense")
    grid.data = data
    note = f"whole layers: median of {depth['calibration_seed'].nunique()} calibration draws; slices: one draw"
    labels = {"x": list(titles.values()), "y": [f"{name}\nnats over dense" for name in data["model"].unique()], "note": note}
    labels["text"] = _sizes(found)
    keep = ["model", "method", *titles, "value", "slice_percentage", "layers_removed", "low", "high", "n"]
    return grid.done(pd.concat([found.plans, depth]), **labels, keep=keep)


def _sizes(found: Slicing) -> str:
    """In Markdown: how many parameters a slice removes, and dynamic over constant slicing where as many are gone."""
    counted = pick(found.rows, role="count", metric="removed", method="constant")
    counted = counted[np.isclose(counted["slice_percentage"], found.percentage)]
    bases, lines = pick(found.plans, part="equal_parameters")["slice_base"], []
    for name, plans in found.plans.groupby("model"):
        gone = pick(counted, model=name).groupby("shortcuts")["value"].first()
        flat = pick(plans, part="sweep", method="constant").set_index("slice_percentage")["nll"]
        parts = [f"{gone[kind]:.1%} {words}" for kind, words in SHORTCUTS.items() if kind in gone]
        bare = pick(plans, part="bare", slice_percentage=found.percentage, may_be_empty=True)["nll"] - flat[found.percentage]
        line = f"- {name}: a slice of {found.percentage:.0%} removes {', '.join(parts)} of the parameters"
        line += f"; one basis costs {bare.iloc[0]:+.2f} nats." if len(bare) else "."
        for part, words in {"sweep": "at equal mean slice", "equal_parameters": "at equal parameters"}.items():
            moving = pick(plans, part=part, method="dynamic", slice_base=tuple(bases))
            over = moving["nll"] - moving["slice_percentage"].map(flat)
            line += f" Dynamic over constant slicing {words}: {over.min():+.2f} to {over.max():+.2f} nats."
        lines.append(line)
    return "\n".join(lines)
