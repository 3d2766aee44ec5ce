"""Chapter 09: what a setting of the explorer removes and costs. The numbers come from `prunelib.apps.explorer`."""

import numpy as np
import pandas as pd

from prunelib.figures import style as fig
from prunelib.figures.save import Chapter, Drawing, figure, pick

CHAPTER = "09_explorer"
NO_RUNS = pd.DataFrame({"run": [], "code": []})  # the notebook measures what it draws


def _look(data: pd.DataFrame, criterion: str) -> fig.Method:
    """The look of a criterion in all figures, or one for a criterion that was just defined."""
    return fig.METHODS.get(criterion) or fig.Method(data["title"].iloc[0], "#aa4499", "P")


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
    drawn = fig.spread(data, ["method", "title", "layers_removed"])
    grid = fig.Panels(drawn.assign(all="loss over the dense model"), "all", height=3.2)
    for axes, part in grid:
        fig.level(axes, 0.0)
        known = part["method"].isin(fig.METHODS)
        fig.lines(axes, part[known], linewidth=1.3)
        for name, line in part[~known].groupby("method"):
            fig.curve(axes, line, _look(line, name), linewidth=2.6)
    grid.data = data
    return grid.done(NO_RUNS, x="layers removed", y="nats per token over dense")


def _perplexity(data: pd.DataFrame, what: str) -> np.ndarray:
    return np.exp(pick(data, what=what)["value"].clip(upper=300.0).to_numpy())  # larger ones overflow


def layers_drawing(data: pd.DataFrame) -> Drawing:
    """Importance of every layer with the removed ones pale; below it the perplexity along alpha, where there is one."""
    importance, look = pick(data, what="importance"), _look(data, data["criterion"].iloc[0])
    along, rule = "alpha" in data, data["title"].iloc[0]
    dense, measured, predicted = (_perplexity(data, f"{kind} nats")[0] for kind in ("dense", "measured", "predicted"))
    removed = pick(data, what="measured nats")["removed_layers"].iloc[0] or "none"
    cost = f"perplexity {dense:.2f} becomes {measured:.2f} (the single costs add up to {predicted:.2f})"
    panels = pd.DataFrame({"row": ["importance", "cost"][: 1 + along], "all": ""})
    gone = importance["removed"].astype(bool)
    grid = fig.Panels(panels, "all", "row", titles=[f"{rule}: {gone.sum()} of {len(importance)} layers go (pale)"], height=2.4)
    top, bottom = grid.grid[0, 0], grid.grid[-1, 0]
    fig.layer_bars(top, importance.assign(removed=gone), look)
    top.set_xlabel("layer")
    if along:
        alpha = data["alpha"].iloc[0]
        rule = f"{rule}, alpha = {alpha:.2f}"
        steps = [*pick(data, what="measured nats on the path")["alpha_low"], 1.0]
        for kind, name, line in (("measured", "measured", "-"), ("predicted", "sum of single costs", "--")):
            style = {"baseline": None, "color": look.color, "linestyle": line, "linewidth": 1.6, "label": name}
            bottom.stairs(_perplexity(data, f"{kind} nats on the path"), steps, **style)
        bottom.axvline(alpha, color="#333333", linewidth=0.8)
        bottom.plot([alpha], [measured], look.marker, color="#333333", markersize=7, label=f"alpha = {alpha:.2f}")
        fig.log_scale(bottom)
        fig.level(bottom, dense)
        bottom.set(xlim=(0, 1), xlabel=f"alpha ({len(steps) - 1} sets of {gone.sum()} layers on its whole path)")
    grid.data, labels = data, ("importance (higher = keep)", "perplexity (log)")
    return grid.done(NO_RUNS, y=labels[: 1 + along], note="" if along else cost, text=f"{rule}: layers {removed} go; {cost}.")


def slices_drawing(data: pd.DataFrame) -> Drawing:
    """The slice of every layer between base and mean, and what is really gone beside a constant slice."""
    mean, base = data["slice_percentage"].iloc[0], data["slice_base"].iloc[0]
    slices, looks = pick(data, what="slice"), {"dynamic": "dynamic_slicing", "constant": "slicegpt"}
    panels = data.assign(panel=np.where(data["what"] == "slice", "slices", "gone"))
    titles = {"slices": rf"$S_P$ = {mean:.0%}, $S_B$ = {base:.0%}", "gone": "really gone"}
    grid = fig.Panels(panels, "panel", titles=titles, height=2.6, width_ratios=(2.2, 1.4))
    left, right = grid.grid[0]
    fig.layer_bars(left, slices, fig.METHODS["dynamic_slicing"])
    fig.level(left, mean, "$S_P$, the mean", "#333333", "--")
    fig.level(left, base, "$S_B$, the base", "#333333")
    gone = data[data["schedule"].notna() & (data["what"] != "slice")]
    bars = gone.pivot(index="what", columns="schedule", values="value")[list(looks)]
    colors = [fig.METHODS[method].color for method in looks.values()]
    bars.add_suffix(" slices").plot.barh(ax=right, color=colors, legend=False, width=0.75, xlabel="", ylabel="")
    for drawn in right.containers:
        right.bar_label(drawn, fmt="{:.1%}", padding=3, fontsize=8)
    right.margins(x=0.3)
    fig.percent(left.yaxis, right.xaxis)
    left.set_xlabel("layer")
    grid.data, removed = data, bars.loc["parameters removed"]
    low, high, middle = slices["value"].agg(["min", "max", "mean"])
    text = f"Layers lose {low:.1%} to {high:.1%} of their width, {middle:.1%} in the mean; {removed['dynamic']:.1%} of the "
    text += f"parameters are really gone ({removed['constant']:.1%} with a constant slice)."
    return grid.done(NO_RUNS, y="cut from the width, %", text=text)
