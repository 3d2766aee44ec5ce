"""Chapter 09: what a setting of the explorer removes and costs. The numbers come from `prunelib.apps.explorer`."""

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator, PercentFormatter

from prunelib.figures.save import Chapter, Drawing, figure, pick
from prunelib.figures.style import METHODS, Method, Sketch, curve, dense_line, log_scale, random_band, spread, whole_numbers

CHAPTER = "09_explorer"
NO_RUNS = pd.DataFrame({"run": [], "code": []})  # the notebook measures what it draws


def look_of(criterion: str, title: str) -> Method:
    """The look of a criterion in all figures, or one for a criterion that was just defined."""
    return METHODS.get(criterion) or Method(criterion, title, "#aa4499", "P")


@figure("own_explorer_layers", reads={})
def explorer_layers(chapter: Chapter, *, data: pd.DataFrame) -> Drawing:
    """The layers that a criterion removes, and what that costs: a table of `apps.explorer.choose_layers`."""
    return layers_drawing(data)


@figure("own_explorer_slices", reads={})
def explorer_slices(chapter: Chapter, *, data: pd.DataFrame) -> Drawing:
    """The width that every layer keeps: a table of `apps.explorer.choose_slices`."""
    return slices_drawing(data)


@figure("own_new_criterion", reads={})
def new_criterion(chapter: Chapter, *, data: pd.DataFrame) -> Drawing:
    """Loss over dense against the layers removed: a table of `apps.explorer.compare`; a new criterion in a bold line."""
    sketch = Sketch(["loss over the dense model"], height=3.2)
    axes = sketch.grid[0, 0]
    if "random" in set(data["method"]):
        random_band(axes, spread(pick(data, method="random"), "layers_removed"))
    chosen = data[data["method"] != "random"]
    for (name, title), line in chosen.groupby(["method", "title"], sort=False):
        curve(axes, line, look_of(name, title), linewidth=1.3 if name in METHODS else 2.6)
    dense_line(axes, 0.0)
    whole_numbers(axes, data["layers_removed"])
    axes.set_ylim(top=1.15 * max(chosen["value"].max(), 1e-3))
    sketch.keep(data)
    return sketch.done(NO_RUNS, x="layers removed", y="nats per token over dense")


def _perplexity(data: pd.DataFrame, what: str) -> np.ndarray:
    return np.exp(pick(data, what=what)["value"].clip(upper=300.0).to_numpy())  # larger ones overflow


def layers_drawing(data: pd.DataFrame) -> Drawing:
    """Importance of every layer with the removed ones pale; below it the perplexity along alpha, where there is one."""
    importance, look = pick(data, what="importance"), look_of(data["criterion"].iloc[0], data["title"].iloc[0])
    along = "alpha" in data
    rule = data["title"].iloc[0] + (f", alpha = {data['alpha'].iloc[0]:.2f}" if along else "")
    dense, measured, predicted = (_perplexity(data, f"{kind} nats")[0] for kind in ("dense", "measured", "predicted"))
    removed = pick(data, what="measured nats")["removed_layers"].iloc[0] or "none"
    cost = f"perplexity {dense:.2f} becomes {measured:.2f} (the single costs add up to {predicted:.2f})"
    title = f"{rule}: {importance['removed'].sum()} of {len(importance)} layers go (pale)"
    sketch = Sketch([rule], 1 + along, titles=[title], height=2.4)
    top, bottom = sketch.grid[0, 0], sketch.grid[-1, 0]
    _layer_bars(top, importance["value"], look.color)
    for layer in importance.loc[importance["removed"].astype(bool), "layer"]:
        top.patches[layer].set_alpha(0.3)
    if along:
        steps = [*pick(data, what="measured nats on the path")["alpha_low"], 1.0]
        for kind, name, line in (("measured", "measured", "-"), ("predicted", "sum of single costs", "--")):
            style = {"baseline": None, "color": look.color, "linestyle": line, "linewidth": 1.6, "label": name}
            bottom.stairs(_perplexity(data, f"{kind} nats on the path"), steps, **style)
        alpha = data["alpha"].iloc[0]
        bottom.axvline(alpha, color="#333333", linewidth=0.8)
        bottom.plot([alpha], [measured], look.marker, color="#333333", markersize=7, label=f"alpha = {alpha:.2f}")
        log_scale(bottom)
        dense_line(bottom, dense)
        xlabel = f"alpha ({len(steps) - 1} sets of {importance['removed'].sum()} layers on its whole path)"
        bottom.set(xlim=(0, 1), xlabel=xlabel)
    sketch.keep(data)
    labels = ("importance (higher = keep)", "perplexity (log)")[: 1 + along]
    return sketch.done(
        NO_RUNS, y=labels, columns=4, below=None if along else cost, text=f"{rule}: layers {removed} go; {cost}."
    )


def slices_drawing(data: pd.DataFrame) -> Drawing:
    """The slice of every layer between base and mean, and what is really gone beside a constant slice."""
    mean, base = data["slice_percentage"].iloc[0], data["slice_base"].iloc[0]
    slices = pick(data, what="slice")["value"]
    titles = (rf"$S_P$ = {mean:.0%}, $S_B$ = {base:.0%}", "really gone")
    sketch = Sketch(("slices", "gone"), titles=titles, height=2.6, width_ratios=(2.2, 1))
    left, right = sketch.grid[0]
    _layer_bars(left, slices, METHODS["dynamic_slicing"].color)
    left.axhline(mean, color="#333333", linestyle="--", linewidth=1, label="$S_P$, the mean")
    left.axhline(base, color="#333333", linestyle=":", linewidth=1, label="$S_B$, the base")
    left.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    for schedule, method, shift in (("dynamic", "dynamic_slicing", -0.2), ("constant", "slicegpt", 0.2)):
        gone = pick(data, schedule=schedule)["value"]
        bars = right.barh(np.arange(2) + shift, gone, 0.36, color=METHODS[method].color, label=f"{schedule} slices")
        right.bar_label(bars, labels=[f"{value:.1%}" for value in gone], padding=3, fontsize=8)
    right.set_yticks(range(2), ["parameters", "FLOPs per token"])
    right.invert_yaxis()
    right.axvline(0, color="black", linewidth=0.8)
    right.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    right.margins(x=0.3)
    right.grid(False, axis="y")
    sketch.keep(data)
    removed = pick(data, what="parameters removed").set_index("schedule")["value"]
    text = (
        f"Layers lose {slices.min():.1%} to {slices.max():.1%} of their width, {slices.mean():.1%} in the mean; "
        f"{removed['dynamic']:.1%} of the parameters are really gone ({removed['constant']:.1%} with a constant slice)."
    )
    return sketch.done(NO_RUNS, y="of the width cut away", columns=4, text=text)


def _layer_bars(axes: Axes, values: pd.Series, color: str) -> None:
    axes.bar(range(len(values)), values, 0.8, color=color)
    axes.set(xlim=(-0.7, len(values) - 0.3), xlabel="layer")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=16))
    axes.grid(False, axis="x")
