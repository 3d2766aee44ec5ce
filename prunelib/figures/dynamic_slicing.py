"""Chapter 04: should redundant layers be cut more than others?"""

from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
from matplotlib import colormaps
from matplotlib.colors import to_hex

from prunelib.claims import load
from prunelib.figures import style as fig
from prunelib.figures.save import Chapter, Drawing, figure, markdown, pick
from prunelib.io import at_root
from prunelib.lab.runs import published

CHAPTER = "04_dynamic_slicing"
READS = {"slicing": None}
REFERENCE = {"reference": ("slicing",)}
PUBLISHED_LR = "data/published/dynamic_slicing_mistral7b_lr.csv"
DYNAMIC = fig.Method("dynamic (LR)", fig.METHODS["dynamic_slicing"].color)
CONSTANT = fig.Method("constant (SliceGPT)", "#000000", "s")
LOOKS = {**fig.METHODS, "constant": CONSTANT, "dynamic": DYNAMIC}
KEYS = ["model", "run", "code", "part", "method", "slice_percentage", "slice_base", "shortcuts"]
KEYS += ["control_seed", "window_seed", "calibration", "calibration_seed"]
CONTROLS = {
    "keep_first_full": fig.Method("only layer 0 as by LR", "#777777", "D"),
    "dynamic": replace(DYNAMIC, title="LR, as in the paper"),
    "other_text": fig.Method("LR from another text", "#777777"),
    "released": fig.Method("LR as released", "#777777"),
    "clipped": fig.Method("LR, clipped", "#777777"),
    "rank": fig.Method("LR, ranks", "#777777"),
    "random_order": fig.Method("LR in random order", "#777777"),
    "inverted": fig.Method("LR inverted", "#777777"),
    "random_axes": fig.Method("constant, random axes", "#777777"),
}
SHORTCUTS = {"full": "a matrix at every connection", "folded": "half of them folded", "shared_basis": "one basis, none"}


@dataclass(frozen=True)
class Slicing:
    """What the chapter draws from.

    rows: of the slicing runs. plans: one line per sliced model, with its loss `over_dense` and `over_constant` slicing of the
    same mean and windows, the change of perplexity that this is (`ppl_change`, %), next-token `accuracy`, the parameters
    `removed`, and `tasks` where they were asked. percentage, base: S_P and S_B of the controls.
    """

    rows: pd.DataFrame
    plans: pd.DataFrame
    percentage: float
    base: float


def slicing(chapter: Chapter, reference: bool = False) -> Slicing:
    """The table `slicing` of a chapter as `Slicing`, on demand with that of the small reference models behind it."""
    rows = chapter.table("slicing")
    if reference and chapter["reference"]:
        rows = pd.concat([rows, load(f"{chapter['reference']}/slicing.csv")], ignore_index=True)
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
    alike = ["model", "slice_percentage", "window_seed"]
    flat = pick(plans, method="constant", part=("sweep", "size", "windows"))[[*alike, "nll"]].rename(columns={"nll": "flat"})
    plans = plans.merge(flat, on=alike, how="left")
    plans = plans.assign(over_constant=plans["nll"] - plans["flat"], place=plans["model"].map(list(dense.index).index))
    plans = plans.assign(ppl_change=100 * np.expm1(plans["over_constant"]))
    plans = plans.sort_values(["place", "slice_percentage", "slice_base"], kind="stable").drop(columns=["place", "flat"])
    return Slicing(rows, plans, *map(float, rows[["control_percentage", "control_base"]].iloc[0]))


@figure("dynamic_slicing_fig1_lr", reads={"statistics": None, **READS})
def fig1_lr(chapter: Chapter) -> Drawing:
    """Layer redundancy LR and the final slice FS of every layer: published, and ours."""
    found, authors = slicing(chapter), "published: Mistral-7B"
    rows = pick(chapter.table("statistics"), metric="block_influence", tokens="all")
    draws = rows.groupby(["model", "corpus", "seed"], sort=False)["value"]
    low, high = draws.transform("min"), draws.transform("max")
    ours = rows.assign(lr=1 - (rows["value"] - low) / (high - low))
    theirs = pd.read_csv(at_root(PUBLISHED_LR)).assign(model=authors, corpus="", seed=0)
    data = pd.concat([theirs, ours])
    shares = data["lr"] / data.groupby(["model", "corpus", "seed"])["lr"].transform("mean")
    data = data.assign(fs=found.base + shares * (found.percentage - found.base))
    data = data.drop(columns="value").melt(["model", "layer"], ["lr", "fs"], var_name="score")
    data = fig.spread(data, ["model", "score", "layer"])
    order = list(dict.fromkeys([authors, *chapter.models("slicing"), *rows["model"].unique()]))
    data = data.sort_values(["score", "model"], key=lambda column: column.map([*order, "lr", "fs"].index), kind="stable")
    grid = fig.Panels(data, "model", "score", height=2.2, sharey="row", sharex="col")
    for axes, part in grid:
        look = replace(DYNAMIC, title="ours")
        if authors in set(part["model"]):
            look = replace(DYNAMIC, title="published", line="--", hollow=True)
        fig.curve(axes, part, look, x="layer", markersize=3, linewidth=1.1)
        if "fs" in set(part["score"]):
            fig.level(axes, found.percentage, "constant slicing", CONSTANT.color, "-")
            axes.set_ylim(bottom=0)
    note = f"$S_P$ = {found.percentage:g}, $S_B$ = {found.base:g}; ours: median and min–max of {data['n'].max()} draws"
    lines = []
    for name in order[1:]:
        wide = ours[ours["model"] == name].pivot(index="layer", columns=["corpus", "seed"], values="lr")
        each, agreed = wide.median(axis=1).sort_values(), wide.corr(method="spearman").min().min()
        line = {"model": name, "lowest LR": each.iloc[0], "in layer": each.index[0], "next LR": each.iloc[1]}
        lines.append(line | {"median": each.median(), "lowest rank correlation of two draws or texts": agreed})
    one = lines[0]
    title = f"{fig.short(one['model'])}: LR {one['lowest LR']:.2f} in layer {one['in layer']}"
    title += f", {one['next LR']:.2f} or more in all others"
    labels = {"x": "layer", "y": ["redundancy (LR)", "final slice (FS)"], "note": note, "title": title}
    text = markdown(pd.DataFrame(lines))
    return grid.done(pd.concat([rows, found.rows]), **labels, text=text, published=[PUBLISHED_LR])


@figure("dynamic_slicing_fig2to7_slice_base", reads=READS)
def fig2to7_slice_base(chapter: Chapter) -> Drawing:
    """Perplexity, and accuracy in tasks where they were asked, against the slice base, each over constant slicing."""
    found = slicing(chapter)
    spared = pick(found.plans, part="control", method="keep_first_full")
    plans = pd.concat([pick(found.plans, part="sweep", method=["constant", "dynamic"]), spared], ignore_index=True)
    metrics = {"ppl_change": "change of perplexity\nvs constant slicing, %", "tasks_over": "difference in tasks, points"}
    metrics = {metric: title for metric, title in metrics.items() if metric in plans}
    parts = [plans.assign(metric=metric, value=plans[metric] * (1 if metric == "ppl_change" else 100)) for metric in metrics]
    if "tasks_over" in metrics:
        parts[1] = parts[1].assign(**{end: 100 * plans[f"tasks_over_{end}"] for end in ("low", "high")})
    sizes = sorted(plans["slice_percentage"].unique())
    shades = [to_hex(colormaps["cividis"](place)) for place in np.linspace(0, 0.85, len(sizes))]
    looks = {one: fig.Method(f"$S_P$ = {one:g}", *look) for one, *look in zip(sizes, shades, "osv^P", strict=False)}
    grid = fig.Panels(pd.concat(parts).dropna(subset="value"), "model", "metric", height=3.3, sharey="row", sharex=True)
    for axes, part in grid:
        dynamic, marks = part["method"] == "dynamic", part[part["method"] == "keep_first_full"]
        constant = part[part["method"] == "constant"].fillna({"value": 0.0})
        fig.lines(axes, pd.concat([part[dynamic], constant]), looks, x="slice_base", series="slice_percentage", dodge=0.002)
        for one in marks.itertuples():
            style = {"color": looks[one.slice_percentage].color, "markeredgecolor": "#cc3311", "markersize": 9, "zorder": 0.8}
            axes.plot(one.slice_base, one.value, "D", **style)
        axes.plot([], [], "D", color="#bbbbbb", markeredgecolor="#cc3311", label="only layer 0 as by LR")
        fig.level(axes, 0, "constant slicing")
    keep = [*KEYS[4:7], "model", "ppl", *metrics, "tasks", "items", "nll", "accuracy", "removed"]
    grid.data = plans
    note = "bars: 95 % interval over the items; " if "tasks_over" in metrics else ""
    note += "one draw of calibration windows; right end of every line: constant slicing"
    ends = pick(plans, method="dynamic")["ppl_change"].agg(["min", "max"])
    title = "Dynamic slicing changes perplexity by {:+.0f} to {:+.0f} % against constant slicing".format(*ends)
    labels = {"x": "slice base $S_B$", "y": list(metrics.values()), "note": note, "title": title}
    return grid.done(plans, **labels, keep=[name for name in keep if name in plans])


@figure("dynamic_slicing_table1_constant_vs_dynamic", reads=READS)
def table1_constant_vs_dynamic(chapter: Chapter) -> Drawing:
    """Constant slicing against the dynamic plan of the lowest perplexity, at each mean slice."""
    plans = slicing(chapter).plans
    keys, swept = ["model", "slice_percentage"], pick(plans, part="sweep")
    moving = pick(swept, method="dynamic").sort_values("nll").groupby(keys)
    flat = pick(swept, method="constant").set_index(keys)
    best, worst = moving.first(), moving.last()
    data = {"constant: ppl": flat["ppl"], "best dynamic: ppl": best["ppl"], "its S_B": best["slice_base"]}
    data |= {"change of ppl, %": 100 * (best["ppl"] / flat["ppl"] - 1), "worst dynamic: ppl": worst["ppl"]}
    data |= {"constant: next token, %": 100 * flat["accuracy"], "best dynamic: next token, %": 100 * best["accuracy"]}
    if "tasks" in plans:
        data |= {"constant: tasks, %": 100 * flat["tasks"], "best dynamic: tasks, %": 100 * best["tasks"]}
        data |= {"difference, points": 100 * best["tasks_over"], "95 % from": 100 * best["tasks_over_low"]}
        data["95 % to"] = 100 * best["tasks_over_high"]
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
    return Drawing(None, numbers, swept, f"{text}\n\n{trials}")


@figure("own_slicing_controls", reads={**READS, **REFERENCE})
def slicing_controls(chapter: Chapter) -> Drawing:
    """Loss of plans with the same mean slice over constant slicing: LR in its variants, random order, inverted, random axes."""
    found = slicing(chapter, reference=True)
    rows = pick(found.plans, part=("sweep", "control", "windows"), slice_percentage=found.percentage, method=(*CONTROLS,))
    rows = rows[(rows["slice_base"] == found.base) | (rows["method"] == "random_axes")]
    data = fig.spread(rows, ["model", "method"], value="over_constant")
    models = list(found.plans["model"].unique())
    data = data.sort_values("model", key=lambda column: column.map(models.index), kind="stable")
    order = list(data[data["model"] == models[0]].sort_values("value")["method"])
    data = data[data["method"].isin(order)]
    grid = fig.Panels(data, "model", height=3.6, sharey=True)
    for axes, part in grid:
        tame = part[~part["method"].isin(("inverted", "random_axes"))]
        low, high = min(0, tame["low"].min()), max(0, tame["high"].max())
        fig.dots(axes, part, CONTROLS, order=order, low=low, high=high + 0.3 * (high - low))
        axes.axvline(0, color=CONSTANT.color, linewidth=0.9, linestyle=":")
    one = data[data["model"] == models[0]].set_index("method")["value"]
    title = f"LR {one['dynamic']:+.2f} nats against constant slicing, only layer 0 as by LR {one['keep_first_full']:+.2f} "
    title += f"({fig.short(models[0])})"
    draws, orders = (data.loc[data["method"] == method, "n"].max() for method in ("dynamic", "random_order"))
    note = f"$S_P$ = {found.percentage:g}, $S_B$ = {found.base:g}; dotted: constant on the same windows, left is better\n"
    note += f"median and min–max of {draws} draws of windows (LR) or of {orders} random orders; all others one draw"
    return grid.done(rows, x="nats/token vs constant", note=note, title=title)


@figure("own_depth_vs_slicing", reads={"selection": ("rules",), **READS, **REFERENCE})
def depth_vs_slicing(chapter: Chapter) -> Drawing:
    """Removing whole layers against slicing: loss over parameters and over FLOPs."""
    found, keys = slicing(chapter), ["model", "layers_removed"]
    plans = pick(found.plans, part=("sweep", "size"), method=("constant", "dynamic"))
    # As the further sizes: never a base above half of the slice.
    small = np.isclose(plans["slice_base"], np.minimum(found.base, plans["slice_percentage"] / 2))
    plans = plans[(plans["method"] == "constant") | small].assign(value=lambda one: one["over_dense"])
    counted = pick(found.rows, role="count", method="layers")
    counted = counted.pivot_table(index=keys, columns="metric", values="value").reset_index()
    depth = pick(chapter.table("selection"), run_part="rules", model=chapter.models("slicing"), metric="nll", role="choice")
    dense = pick(depth, method="dense").groupby("model")["value"].median()
    methods = ("greedy", "simdiff_mssd", "random_protected")
    depth = pick(depth, method=methods, layers_removed=tuple(counted["layers_removed"]))
    depth = depth.assign(value=depth["value"] - depth["model"].map(dense))
    layers = fig.spread(depth, [*keys, "method"]).merge(counted, on=keys)
    data = pd.concat([plans, layers]).replace({"method": {"random_protected": "random"}})
    data = data.assign(removed=100 * data["removed"], flops_gone=100 * (1 - data["flops_left"]))
    titles = {"removed": "parameters removed, %", "flops_gone": "FLOPs per token removed, %"}
    points = pd.concat([data.assign(what=what, x=data[what]) for what in titles])
    grid = fig.Panels(points, "what", "model", titles=[""] * 2, height=3.6, sharey=True)
    for axes, part in grid:
        fig.lines(axes, part.drop(columns=["low", "high"])[part["method"] != "random"], LOOKS, x="x", markersize=4)
        if len(random := part[part["method"] == "random"]):
            label = f"random layers, first and last kept ({random['n'].max():.0f} draws)"
            fig.random_band(axes, random, x="x", below=part.loc[part["method"] != "random", "value"].max(), label=label)
        axes.plot([0], [0], "*", color="black", label="dense")
    grid.data = data
    draws = pick(layers, method="greedy")["n"].max()
    note = f"whole layers: median of {draws} calibration draws; slices: one draw; each over dense on the windows of its run"
    y = [f"{fig.short(name)}\nextra loss (nats/token)" for name in data["model"].unique()]
    labels = {"x": list(titles.values()), "y": y, "note": note, "text": _sizes(slicing(chapter, reference=True))}
    ours = data[data["model"] == data["model"].iloc[0]].sort_values("removed")
    most, sets = pick(ours, method="dynamic").iloc[-1], pick(ours, method="greedy")
    layers = np.interp(most["removed"], sets["removed"], sets["value"])
    labels["title"] = f"Without {most['removed']:.0f}% of the parameters: slices {most['value']:.2f}, layers {layers:.2f} nats"
    keep = ["model", "method", *titles, "value", "slice_percentage", "layers_removed", "low", "high", "n"]
    return grid.done(pd.concat([found.plans, depth]), **labels, keep=keep)


def _sizes(found: Slicing) -> str:
    """In Markdown: how many parameters a slice removes, and dynamic over constant slicing where as many are gone.

    Where constant slices add parameters, by their shortcuts, no dynamic plan has as many: these are left out.
    """
    counted = pick(found.rows, role="count", metric="removed", method="constant")
    counted = counted[np.isclose(counted["slice_percentage"], found.percentage)]
    gone = 100 * counted.pivot_table(index="model", columns="shortcuts", values="value", aggfunc="first")
    lines = gone.reindex(columns=list(SHORTCUTS)).rename(columns=SHORTCUTS).to_dict("index")
    bases = pick(found.plans, part="equal_parameters")["slice_base"]
    for name, plans in found.plans.groupby("model", sort=False):
        flat = pick(plans, part="sweep", method="constant").set_index("slice_percentage")
        bare = pick(plans, part="bare", slice_percentage=found.percentage, may_be_empty=True)["nll"]
        lines[name]["one basis: nats"] = (bare - flat["nll"][found.percentage]).mean()
        for part, words in {"sweep": "equal mean slice", "equal_parameters": "equal parameters"}.items():
            moving = pick(plans, part=part, method="dynamic", slice_base=tuple(bases))
            alike = (moving["removed"] - moving["slice_percentage"].map(flat["removed"])).abs() < 0.005
            moving = moving[alike | (part == "sweep")]
            over = moving["nll"] - moving["slice_percentage"].map(flat["nll"])
            lines[name][f"{words}: nats over constant"] = f"{over.min():+.2f} to {over.max():+.2f} ({len(over)} plans)"
    table = pd.DataFrame.from_dict({name: lines[name] for name in found.plans["model"].unique()}, "index")
    told = f"A slice of {found.percentage:.0%} removes so much of the parameters, in %, and dynamic slicing costs so much:"
    return f"{told}\n\n{markdown(table.rename_axis('model').reset_index())}"
