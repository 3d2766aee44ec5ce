"""Chapter 09: what a setting of the explorer removes and costs. The numbers come from `prunelib.apps.explorer`."""

import html
import itertools

import matplotlib
import numpy as np
import pandas as pd

from prunelib.figures import style as fig
from prunelib.figures.save import Chapter, Drawing, figure, pick

CHAPTER = "09_explorer"
COLORS = {"loss over dense": ("PuOr_r", -3.0, 3.0), "entropy": ("Blues", 0.0, 12.0)}  # color map, and nats at its two ends
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
    """Loss over dense against the layers removed: a table of `apps.explorer.compare`."""
    drawn = fig.spread(data, ["method", "title", "layers_removed"])
    grid = fig.Panels(drawn.assign(all="loss over the dense model"), "all", height=3.5)
    looks = {name: _look(rows, name) for name, rows in drawn.groupby("method")}
    for axes, part in grid:
        fig.level(axes, 0.0)
        fig.lines(axes, part, looks)
    grid.data = data
    size = data["layers_removed"].max()
    ends = drawn[drawn["layers_removed"] == size].sort_values("value")
    title = f"{size} layers cost " + ", ".join(f"{row.value:.1f} ({row.title.split(' (')[0]})" for row in ends.itertuples())
    return grid.done(NO_RUNS, x="layers removed", y="nats per token over dense", title=f"{title} nats")


@figure("own_table_explorer_tokens", reads={})
def explorer_tokens(chapter: Chapter, *, data: pd.DataFrame, prompt: str) -> Drawing:
    """What every model adds to a prompt, and how well it reads a sentence: a table of `apps.explorer.read`, as colored text."""
    losses = pick(data, what="loss").assign(nth=lambda rows: rows.groupby("model").cumcount())
    dense = losses["nth"].map(losses[losses["model"] == losses["model"].iloc[0]].set_index("nth")["value"])
    colored = {"loss over dense": losses.assign(value=losses["value"] - dense), "entropy": pick(data, what="entropy")}
    means = losses.groupby("model", sort=False)["value"].mean()
    text = "Loss of the sentence, nats per token: " + ", ".join(f"{name} {value:.2f}" for name, value in means.items()) + "."
    rows = [("what", "model", html.escape(prompt) + " …")]
    said = pick(data, what="continuation").groupby("model", sort=False)["token"].agg("".join)
    rows += [("continuation", name, " ".join(html.escape(words).split())) for name, words in said.items()]
    for what, table in colored.items():
        rows += [(what, name, _colored(part, what)) for name, part in table.groupby("model", sort=False) if part["value"].any()]
    lines = (f"<tr><td>{what}</td><td>{name}</td><td style='text-align: left'>{words}</td></tr>" for what, name, words in rows)
    return Drawing(None, data, NO_RUNS, text=f"{text}\n\n<table>{''.join(lines).replace('$', '&#36;')}</table>")


def _colored(table: pd.DataFrame, what: str) -> str:
    """Tokens on a background of seven shades of the color map, neighbors of one shade together."""
    name, low, high = COLORS[what]
    shades = ((table["value"] - low) / (high - low) * 6).round().clip(0, 6) / 6
    spans = []
    for shade, group in itertools.groupby(zip(shades, table["token"], strict=True), key=lambda pair: pair[0]):
        color = matplotlib.colors.to_hex(matplotlib.colormaps[name](0.15 + 0.7 * shade))
        words = html.escape("".join(token for _, token in group)).replace("\n", "↵")
        spans.append(f'<span style="color: black; background: {color}">{words}</span>')
    return "".join(spans)


def _perplexity(data: pd.DataFrame, what: str) -> np.ndarray:
    return np.exp(pick(data, what=what)["value"].clip(upper=300.0).to_numpy())  # larger ones overflow


def layers_drawing(data: pd.DataFrame) -> Drawing:
    """Importance of every layer with the removed ones pale; below it the perplexity along alpha, where there is one."""
    importance, look, rule = pick(data, what="importance"), _look(data, data["criterion"].iloc[0]), data["title"].iloc[0]
    dense, measured, predicted = (_perplexity(data, f"{kind} nats")[0] for kind in ("dense", "measured", "predicted"))
    gone, labels = importance["removed"].astype(bool), ["importance (higher = keep)", "perplexity (log)"]
    panels = pd.DataFrame({"row": labels if "alpha" in data else labels[:1], "all": ""})
    titles = [f"{rule}: {gone.sum()} of {len(gone)} layers go (pale)"]
    grid = fig.Panels(panels, "all", "row", titles=titles, height=2.4)
    fig.layer_bars(grid.grid[0, 0], importance.assign(removed=gone), look)
    grid.grid[0, 0].set_xlabel("layer")
    if "alpha" in data:
        axes, alpha = grid.grid[1, 0], data["alpha"].iloc[0]
        steps = [*pick(data, what="measured nats on the path")["alpha_low"], 1.0]
        for kind, name, line in (("measured", "measured", "-"), ("predicted", "sum of single costs", ":")):
            style = {"baseline": None, "color": look.color, "linestyle": line, "linewidth": 1.6, "label": name}
            axes.stairs(_perplexity(data, f"{kind} nats on the path"), steps, **style)
        axes.plot([alpha], [measured], look.marker, color="#333333", markersize=7, label=f"alpha = {alpha:.2f}")
        fig.log_scale(axes)
        fig.level(axes, dense)
        axes.set(xlim=(0, 1), xlabel=f"alpha ({len(steps) - 1} sets of {gone.sum()} layers on its whole path)")
    removed = pick(data, what="measured nats")["removed_layers"].iloc[0] or "none"
    text = f"{rule}: layers {removed} go; perplexity {dense:.2f} becomes {measured:.2f} (the single costs add up to "
    grid.data = data
    title = f"Without {gone.sum()} of {len(gone)} layers the perplexity of {dense:.1f} becomes {measured:.1f}"
    return grid.done(NO_RUNS, y=list(panels["row"]), text=f"{text}{predicted:.2f}).", title=title)


def slices_drawing(data: pd.DataFrame) -> Drawing:
    """The slice of every layer between base and mean; in words what is really gone, beside a constant slice."""
    mean, base = data["slice_percentage"].iloc[0], data["slice_base"].iloc[0]
    slices, gone = pick(data, what="slice"), data.pivot_table("value", "what", "schedule")
    grid = fig.Panels(slices.assign(all=rf"$S_P$ = {mean:.0%}, $S_B$ = {base:.0%}"), "all", height=2.9)
    axes = grid.grid[0, 0]
    fig.layer_bars(axes, slices, fig.METHODS["dynamic_slicing"])
    fig.level(axes, mean, "$S_P$, the mean", "#333333", "-")
    fig.level(axes, base, "$S_B$, the base", "#333333")
    fig.percent(axes.yaxis)
    low, high, middle = slices["value"].agg(["min", "max", "mean"])
    text = f"Layers lose {low:.1%} to {high:.1%} of their width, {middle:.1%} in the mean. Really gone: "
    text += "; ".join(f"{what} {row.dynamic:.1%} ({row.constant:.1%} with a constant slice)" for what, row in gone.iterrows())
    grid.data = data
    title = f"A mean slice of {mean:.0%} removes {gone.loc['parameters removed', 'dynamic']:.1%} of the parameters"
    return grid.done(NO_RUNS, x="layer", y="cut from the width, %", text=f"{text}.", title=title)
