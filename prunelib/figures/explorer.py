"""Chapter 09: what a setting of the explorer removes and costs. The numbers come from `prunelib.apps.explorer`."""

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from prunelib.figures.save import Chapter, Drawing, figure, pick
from prunelib.figures.style import (
    METHODS,
    Method,
    curve,
    dense_line,
    legend,
    log_scale,
    panels,
    random_band,
    spread,
    whole_numbers,
)

CHAPTER = "09_explorer"
NO_RUNS = pd.DataFrame({"run": [], "code": []})  # the notebook measures what it draws


def look_of(criterion: str, title: str) -> Method:
    """The look of a criterion in all figures, or one for a criterion that was just defined."""
    return METHODS.get(criterion) or Method(criterion, title, "#aa4499", "P")


@figure("own_explorer_layers", reads={})
def explorer_layers(chapter: Chapter, *, data: pd.DataFrame) -> Drawing:
    """The layers that a criterion removes, and what that costs: a table of `apps.explorer.choose_layers`."""
    return Drawing(draw_layers(data), data, NO_RUNS, layers_sentence(data))


@figure("own_explorer_slices", reads={})
def explorer_slices(chapter: Chapter, *, data: pd.DataFrame) -> Drawing:
    """The width that every layer keeps: a table of `apps.explorer.choose_slices`."""
    return Drawing(draw_slices(data), data, NO_RUNS, slices_sentence(data))


@figure("own_new_criterion", reads={})
def new_criterion(chapter: Chapter, *, data: pd.DataFrame) -> Drawing:
    """Loss over dense against the layers removed: a table of `apps.explorer.compare`; a new criterion in a bold line."""
    drawn, axes = panels(height=3.2)
    if "random" in set(data["method"]):
        random_band(axes, spread(pick(data, method="random"), "layers_removed"))
    chosen = data[data["method"] != "random"]
    for (name, title), line in chosen.groupby(["method", "title"], sort=False):
        curve(axes, line, look_of(name, title), linewidth=1.3 if name in METHODS else 2.6)
    dense_line(axes, 0.0)
    whole_numbers(axes, data["layers_removed"])
    axes.set(xlabel="layers removed", ylabel="nats per token over dense")
    axes.set_ylim(top=1.15 * max(chosen["value"].max(), 1e-3))
    legend(drawn)
    return Drawing(drawn, data, NO_RUNS)


def layers_sentence(data: pd.DataFrame) -> str:
    """What goes and what it costs, in one sentence."""
    dense, measured, predicted = (_perplexity(pick(data, what=f"{kind} nats")["value"]).iloc[0] for kind in KINDS)
    removed = pick(data, what="measured nats")["removed_layers"].iloc[0] or "none"
    cost = f"perplexity {dense:.2f} becomes {measured:.2f} (the single costs add up to {predicted:.2f})"
    return f"{_rule(data)}: layers {removed} go; {cost}."


def slices_sentence(data: pd.DataFrame) -> str:
    """The range of the slices, and what is really gone, in one sentence."""
    slices, gone = pick(data, what="slice")["value"], pick(data, what="parameters removed").set_index("schedule")["value"]
    return (
        f"Layers lose {slices.min():.1%} to {slices.max():.1%} of their width, {slices.mean():.1%} in the mean; "
        f"{gone['dynamic']:.1%} of the parameters are really gone ({gone['constant']:.1%} with a constant slice)."
    )


KINDS = ("dense", "measured", "predicted")


def _perplexity(nats: pd.Series) -> pd.Series:
    return np.exp(nats.clip(upper=300.0))  # larger ones overflow


def _rule(data: pd.DataFrame) -> str:
    return data["title"].iloc[0] + (f", alpha = {data['alpha'].iloc[0]:.2f}" if "alpha" in data else "")


def draw_layers(data: pd.DataFrame) -> Figure:
    """Importance of every layer with the removed ones pale; below it the perplexity along alpha, or of the one choice."""
    importance, look = pick(data, what="importance"), look_of(data["criterion"].iloc[0], data["title"].iloc[0])
    drawn, (top, bottom) = panels(2, 1, height=2.4)
    _layer_bars(top, importance["value"], look.color)
    for layer in importance.loc[importance["removed"].astype(bool), "layer"]:
        top.patches[layer].set_alpha(0.3)
    title = f"{_rule(data)}: {importance['removed'].sum()} of {len(importance)} layers go (pale)"
    top.set(title=title, ylabel="importance (higher = keep)")
    ends = pd.Series({kind: _perplexity(pick(data, what=f"{kind} nats")["value"]).iloc[0] for kind in KINDS})
    if "alpha" not in data:
        titles = ["dense", "measured", "sum of single costs"]
        bars = bottom.barh(titles, ends, color=["#000000", look.color, "white"], edgecolor=["#000000", look.color, look.color])
        bottom.bar_label(bars, fmt="%.4g", padding=3)
        bottom.invert_yaxis()
        bottom.grid(False, axis="y")
        bottom.set_xscale("log")
        log_scale(bottom, "x")
        bottom.set(xlim=(0.9 * ends.min(), 1.3 * ends.max()), xlabel="perplexity (log)")
        return drawn
    for kind, name, line in (("measured", "measured", "-"), ("predicted", "sum of single costs", "--")):
        path = pick(data, what=f"{kind} nats on the path")
        edges = [*path["alpha_low"], 1.0]
        bottom.stairs(
            _perplexity(path["value"]), edges, baseline=None, color=look.color, linestyle=line, linewidth=1.6, label=name
        )
    alpha = data["alpha"].iloc[0]
    bottom.axvline(alpha, color="#333333", linewidth=0.8)
    bottom.plot([alpha], [ends["measured"]], look.marker, color="#333333", markersize=7, label="here")
    log_scale(bottom)
    dense_line(bottom, ends["dense"])
    steps = f"alpha ({len(path)} sets of {importance['removed'].sum()} layers on its whole path)"
    bottom.set(xlim=(0, 1), xlabel=steps, ylabel="perplexity (log)")
    legend(drawn, [bottom], columns=4)
    return drawn


def draw_slices(data: pd.DataFrame) -> Figure:
    """The slice of every layer between base and mean, and what is really gone beside a constant slice."""
    mean, base = data["slice_percentage"].iloc[0], data["slice_base"].iloc[0]
    drawn, (left, right) = panels(1, 2, height=2.6, gridspec_kw={"width_ratios": [2.2, 1]})
    _layer_bars(left, pick(data, what="slice")["value"], METHODS["dynamic_slicing"].color)
    left.axhline(mean, color="#333333", linestyle="--", linewidth=1, label="S_P, the mean")
    left.axhline(base, color="#333333", linestyle=":", linewidth=1, label="S_B, the base")
    left.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    left.set(ylabel="of the width cut away", title=f"S_P = {mean:.0%}, S_B = {base:.0%}")
    looks = {"dynamic": (METHODS["dynamic_slicing"].color, -0.2), "constant": (METHODS["slicegpt"].color, 0.2)}
    for schedule, (color, shift) in looks.items():
        gone = pick(data, schedule=schedule)["value"]
        bars = right.barh(np.arange(2) + shift, gone, 0.36, color=color, label=f"{schedule} slices")
        right.bar_label(bars, labels=[f"{value:.1%}" for value in gone], padding=3, fontsize=8)
    right.set_yticks(range(2), ["parameters", "FLOPs per token"])
    right.invert_yaxis()
    right.axvline(0, color="black", linewidth=0.8)
    right.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    low, high = right.get_xlim()
    right.set(xlim=(low, high + 0.35 * (high - low)), title="really gone")
    right.grid(False, axis="y")
    legend(drawn, columns=4)
    return drawn


def _layer_bars(axes: Axes, values: pd.Series, color: str) -> None:
    axes.bar(range(len(values)), values, 0.8, color=color)
    axes.set(xlim=(-0.7, len(values) - 0.3), xlabel="layer")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=16))
    axes.grid(False, axis="x")
