"""What an explorer shows: the layers that go and what it costs, and the width that every layer keeps; pictures, or sliders.

Everything but the sliders is a plain function: `choose_layers` and `choose_slices` say what follows from a setting,
`draw_layers`, `draw_slices` and `draw_comparison` draw it. `layer_sliders` and `slice_sliders` put ipywidgets over the same
functions, for JupyterLab; `attended` tells whether anybody is there to move them.
"""

import hashlib
import html
import io
import json
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float64
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter
from transformers import PreTrainedConfig

from prunelib.criteria.similarity import CRITERIA, difference_term, layer_redundancy, similarity_term
from prunelib.criteria.statistics import LayerStats
from prunelib.depth.search import AlphaInterval, Evaluate, LayerSet, alpha_path, lowest
from prunelib.figures import style as figures
from prunelib.io import write_json
from prunelib.slicing.rotate import Account, account
from prunelib.slicing.schedules import SlicePlan, constant, dynamic

PATHS = {"simdiff_mssd": "mssd", "simdiff_masd": "masd"}
"""Criteria that have an alpha → their difference term: the whole path of sets that any alpha chooses is known."""

_LARGEST = 300.0  # nats whose exponential is still a number, and can be drawn
_SPARE_COLORS = ("#aa4499", "#117733", "#cc6677", "#661100")  # for criteria that prunelib.figures.style has no look for
_SPARE_MARKERS = ("P", "X", "h", "p")


# -------------------------------------------------------------------------------------------------------------- losses


class Losses:
    """Nats per token without sets of layers, measured once each, so that a slider answers at once.

    evaluate: gives the losses of many sets, as `ablations.LayerSetLoss` does. n_layers: of the dense model. folder, key: keep
    what was measured in a file of this folder; the key is whatever else the losses depend on (model, windows), and each key has
    its own file. A file that holds no losses of this key counts as none.
    """

    def __init__(self, evaluate: Evaluate, n_layers: int, *, folder: str | os.PathLike | None = None, key: str = ""):
        self.evaluate, self.n_layers, self.key = evaluate, n_layers, key
        self.known: dict[LayerSet, float] = {}
        self.file = None
        if folder is not None:
            self.file = Path(folder) / f"losses_{hashlib.sha256(key.encode()).hexdigest()[:12]}.json"
            self.known.update(_read_losses(self.file, key))

    def __call__(self, layer_sets: Iterable[LayerSet]) -> list[float]:
        """The losses of these sets, in their order; those that are not known yet are measured together."""
        sets = list(layer_sets)
        missing = sorted({removed for removed in sets if removed not in self.known})
        if missing:
            self.known.update(zip(missing, map(float, self.evaluate(missing)), strict=True))
            if self.file is not None:
                pairs = [[list(removed), nats] for removed, nats in sorted(self.known.items()) if math.isfinite(nats)]
                write_json(self.file, {"key": self.key, "losses": pairs})
        return [self.known[removed] for removed in sets]

    @property
    def dense(self) -> float:
        """The loss of the dense model."""
        return self([()])[0]

    def predicted(self, removed: LayerSet) -> float:
        """What the loss would be if the costs of single layers added up: dense + sum over `removed` of (without it - dense).

        Exact for no layer and for one. Chapter 02 shows how nearly it holds for more.
        """
        dense, *without = self([(), *((layer,) for layer in removed)])
        return dense + math.fsum(one - dense for one in without)

    def measure_ahead(self, stats: LayerStats, sizes: Iterable[int], criteria: Iterable[str]) -> None:
        """Everything that `choose_layers` will ask for at these sizes, in one go: single layers, choices and whole paths."""
        sets: list[LayerSet] = [(), *((layer,) for layer in range(self.n_layers))]
        for size in sizes:
            for name in criteria:
                found = path_of(stats, name, size)
                sets += [interval.removed for interval in found] or [chosen(stats, name, size)]
        self(sets)


def _read_losses(file: Path, key: str) -> dict[LayerSet, float]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        return {tuple(removed): nats for removed, nats in content["losses"]} if content["key"] == key else {}
    except (FileNotFoundError, ValueError, TypeError, KeyError):
        return {}


def perplexity_of(nats: float) -> float:
    """exp(nats), of a number so large that it would overflow the largest that does not."""
    return math.exp(min(nats, _LARGEST))


# -------------------------------------------------------------------------------------------------------------- layers


@dataclass(frozen=True, eq=False)
class LayerChoice:
    """A criterion at one alpha and one K: the layers that go, and what that costs in nats per token.

    alpha: None where the criterion has none. path: the sets that any alpha would choose, in order; empty without an alpha.
    predicted, measured: of this choice; path_predicted, path_measured: of every set of the path. `Losses.predicted` says how.
    """

    criterion: str
    alpha: float | None
    importance: Float64[np.ndarray, "layer"]
    removed: LayerSet
    dense: float
    predicted: float
    measured: float
    path: tuple[AlphaInterval, ...]
    path_predicted: tuple[float, ...]
    path_measured: tuple[float, ...]

    def summary(self) -> str:
        """One sentence."""
        rule = f"{look_of(self.criterion).title}" + ("" if self.alpha is None else f", alpha = {self.alpha:.2f}")
        layers = " ".join(map(str, self.removed)) or "none"
        cost = f"perplexity {perplexity_of(self.dense):.2f} becomes {perplexity_of(self.measured):.2f}"
        return f"{rule}: layers {layers} go; {cost} (the single costs add up to {perplexity_of(self.predicted):.2f})"

    def table(self) -> pd.DataFrame:
        """What `draw_layers` draws: importance by layer, then the loss of the choice, of the dense model and along the path."""
        rows: list[dict[str, Any]] = [
            {"what": "importance", "layer": layer, "removed": layer in self.removed, "value": float(value)}
            for layer, value in enumerate(self.importance)
        ]
        layers = " ".join(map(str, self.removed))
        rows += [
            {"what": "dense nats", "value": self.dense},
            {"what": "measured nats", "removed_layers": layers, "value": self.measured},
            {"what": "predicted nats", "removed_layers": layers, "value": self.predicted},
        ]
        for interval, predicted, measured in zip(self.path, self.path_predicted, self.path_measured, strict=True):
            place = {"alpha_low": interval.low, "alpha_high": interval.high}
            place["removed_layers"] = " ".join(map(str, interval.removed))
            rows.append({"what": "measured nats on the path", **place, "value": measured})
            rows.append({"what": "predicted nats on the path", **place, "value": predicted})
        table = pd.DataFrame(rows).dropna(axis="columns", how="all")
        return table.astype({"layer": "Int64", "removed": "boolean"}).assign(
            criterion=self.criterion, **({} if self.alpha is None else {"alpha": self.alpha})
        )


def importance_of(stats: LayerStats, criterion: str, alpha: float | int = 0.5) -> Float64[np.ndarray, "layer"]:
    """Importance of every layer; alpha counts where the criterion has one. Raises ValueError for an unknown criterion."""
    rule = CRITERIA[criterion]
    return rule(stats, alpha=alpha) if "alpha" in rule.options else rule(stats)


def chosen(stats: LayerStats, criterion: str, layers_removed: int, alpha: float | int = 0.5) -> LayerSet:
    """The layers that a criterion removes, as its paper protects them. Raises ValueError when so many cannot go."""
    rule = CRITERIA[criterion]
    return lowest(importance_of(stats, criterion, alpha), layers_removed, rule.protect_first, rule.protect_last)


def path_of(stats: LayerStats, criterion: str, layers_removed: int) -> list[AlphaInterval]:
    """The sets that any alpha chooses, in order of alpha; none for a criterion without alpha (`PATHS`)."""
    if criterion not in PATHS:
        return []
    rule = CRITERIA[criterion]
    terms = similarity_term(stats), difference_term(stats, PATHS[criterion])
    return alpha_path(*terms, layers_removed, rule.protect_first, rule.protect_last)


def choose_layers(
    stats: LayerStats, losses: Losses, criterion: str, layers_removed: int, alpha: float | int = 0.5
) -> LayerChoice:
    """What a criterion removes, and what that costs. Raises ValueError for an unknown criterion, alpha or K out of range."""
    importance = importance_of(stats, criterion, alpha)
    removed = chosen(stats, criterion, layers_removed, alpha)
    path = tuple(path_of(stats, criterion, layers_removed))
    sets = [interval.removed for interval in path]
    measured, *on_path = losses([removed, *sets])
    return LayerChoice(
        criterion=criterion,
        alpha=float(alpha) if "alpha" in CRITERIA[criterion].options else None,
        importance=importance,
        removed=removed,
        dense=losses.dense,
        predicted=losses.predicted(removed),
        measured=measured,
        path=path,
        path_predicted=tuple(losses.predicted(one) for one in sets),
        path_measured=tuple(on_path),
    )


def look_of(criterion: str) -> figures.Method:
    """Color, marker and title of a criterion: those of all figures, or spare ones for a criterion that was just made."""
    known = figures.METHODS.get(criterion)
    if known is not None:
        return known
    new = [name for name in CRITERIA if name not in figures.METHODS]
    place = new.index(criterion) if criterion in new else 0
    spare = place % len(_SPARE_COLORS)
    return figures.Method(criterion, CRITERIA[criterion].title, _SPARE_COLORS[spare], _SPARE_MARKERS[spare])


def draw_layers(choice: LayerChoice) -> Figure:
    """Importance of every layer with the removed ones pale, and below it the perplexity: along alpha, or of the one choice."""
    look = look_of(choice.criterion)
    figure, (top, bottom) = figures.panels(2, 1, height=2.4)
    rule = look.title + ("" if choice.alpha is None else f", alpha = {choice.alpha:.2f}")
    _layer_bars(top, choice.importance, look.color, choice.removed)
    top.set_title(f"{rule}: {len(choice.removed)} of {len(choice.importance)} layers go (pale)")
    top.set_ylabel("importance (higher = keep)")
    if choice.path:
        edges = [interval.low for interval in choice.path] + [1.0]
        for nats, name, line in ((choice.path_measured, "measured", "-"), (choice.path_predicted, "sum of single costs", "--")):
            values = [perplexity_of(one) for one in nats]
            bottom.stairs(values, edges, baseline=None, color=look.color, linestyle=line, linewidth=1.6, label=name)
        bottom.axvline(choice.alpha, color="#333333", linewidth=0.8)
        bottom.plot([choice.alpha], [perplexity_of(choice.measured)], look.marker, color="#333333", markersize=7, label="here")
        bottom.set_xlim(0, 1)
        bottom.set_xlabel(f"alpha ({len(choice.path)} sets of {len(choice.removed)} layers on its whole path)")
        figures.log_scale(bottom)
        bottom.set_ylabel("perplexity (log)")
        figures.dense_line(bottom, perplexity_of(choice.dense))
    else:
        values = [perplexity_of(one) for one in (choice.dense, choice.predicted, choice.measured)]
        bars = bottom.barh(["dense", "sum of single costs", "measured"], values, color=["#000000", "white", look.color])
        bars[1].set(edgecolor=look.color, linestyle="--")
        bottom.bar_label(bars, fmt="%.4g", padding=3)
        bottom.invert_yaxis()
        bottom.grid(False, axis="y")
        bottom.set_xscale("log")
        figures.log_scale(bottom, "x")
        bottom.set_xlim(0.9 * min(values), 1.3 * max(values))
        bottom.set_xlabel("perplexity (log)")
    if choice.path:
        figures.legend(figure, [bottom], columns=4)
    return figure


def _layer_bars(axes: Axes, values: Sequence[float] | np.ndarray, color: str, pale: Iterable[int] = ()) -> None:
    bars = axes.bar(range(len(values)), values, 0.8, color=color, edgecolor=color, linewidth=0.8)
    for layer in pale:
        bars[layer].set(alpha=0.3)
    axes.set_xlim(-0.7, len(values) - 0.3)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=16))
    axes.grid(False, axis="x")
    axes.set_xlabel("layer")


# -------------------------------------------------------------------------------------------------------------- slices


@dataclass(frozen=True, eq=False)
class SliceChoice:
    """Slice percentage and base, and what follows: the plan, and what it removes beside a constant slice of the same mean."""

    slice_percentage: float
    slice_base: float
    plan: SlicePlan
    counted: Account
    constant: Account

    def summary(self) -> str:
        """One sentence."""
        least, most = min(self.plan.slices), max(self.plan.slices)
        gone = f"{self.counted.removed:.1%} of the parameters are really gone"
        return (
            f"layers lose {least:.1%} to {most:.1%} of their width, {self.plan.mean_slice:.1%} in the mean; {gone} "
            f"({self.constant.removed:.1%} with a constant slice)"
        )

    def table(self) -> pd.DataFrame:
        """What `draw_slices` draws."""
        rows: list[dict[str, Any]] = [
            {"what": "slice", "layer": layer, "width": width, "value": loss}
            for layer, (width, loss) in enumerate(zip(self.plan.widths, self.plan.slices, strict=True))
        ]
        for schedule, one in (("dynamic", self.counted), ("constant", self.constant)):
            rows.append({"what": "parameters removed", "schedule": schedule, "value": one.removed})
            rows.append({"what": "FLOPs removed", "schedule": schedule, "value": one.flops_removed})
        settings = {"slice_percentage": self.slice_percentage, "slice_base": self.slice_base}
        return pd.DataFrame(rows).astype({"layer": "Int64", "width": "Int64"}).assign(**settings)


def choose_slices(
    stats: LayerStats, config: PreTrainedConfig, slice_percentage: float | int, slice_base: float | int, *, multiple: int = 1
) -> SliceChoice:
    """Final slices of every layer by its redundancy, and the parameters that slicing so would really remove; nothing is sliced.

    Raises ValueError as `schedules.dynamic`, and UnsupportedModel for a family that cannot be sliced.
    """
    plan = dynamic(layer_redundancy(stats), config.hidden_size, slice_percentage, slice_base, multiple=multiple)
    even = constant(stats.n_layers, config.hidden_size, slice_percentage, multiple=multiple)
    return SliceChoice(float(slice_percentage), float(slice_base), plan, account(config, plan), account(config, even))


def draw_slices(choice: SliceChoice) -> Figure:
    """The slice of every layer between base and mean, and what is really gone beside a constant slice."""
    look = figures.METHODS["dynamic_slicing"]
    figure, (left, right) = figures.panels(1, 2, height=2.6, gridspec_kw={"width_ratios": [2.2, 1]})
    _layer_bars(left, choice.plan.slices, look.color)
    left.axhline(choice.slice_percentage, color="#333333", linestyle="--", linewidth=1, label="S_P, the mean")
    left.axhline(choice.slice_base, color="#333333", linestyle=":", linewidth=1, label="S_B, the base")
    left.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    left.set_ylabel("of the width cut away")
    left.set_title(f"S_P = {choice.slice_percentage:.0%}, S_B = {choice.slice_base:.0%}")
    kinds = ("parameters", "FLOPs a token")
    slicegpt = figures.METHODS["slicegpt"]
    drawn = (("dynamic", choice.counted, look.color), ("constant", choice.constant, slicegpt.color))
    for shift, (name, one, color) in zip((-0.2, 0.2), drawn, strict=True):
        places = np.arange(len(kinds)) + shift
        bars = right.barh(places, [one.removed, one.flops_removed], 0.36, color=color, label=f"{name} slices")
        right.bar_label(bars, labels=[f"{one.removed:.1%}", f"{one.flops_removed:.1%}"], padding=3, fontsize=8)
    right.set_yticks(range(len(kinds)), kinds)
    right.invert_yaxis()
    right.axvline(0, color="black", linewidth=0.8)
    right.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    low, high = right.get_xlim()
    right.set_xlim(low, high + 0.35 * (high - low))
    right.grid(False, axis="y")
    right.set_title("really gone")
    figures.legend(figure, columns=4)
    return figure


# ---------------------------------------------------------------------------------------------------------- comparison


def compare(
    stats: LayerStats, losses: Losses, criteria: Sequence[str], sizes: Sequence[int], *, random_seeds: Sequence[int] = (0, 1, 2)
) -> pd.DataFrame:
    """Nats over the dense model of what criteria choose at every K, in the column `value`, with the `removed_layers`.

    Rows of random layers, one for every seed, come with them: the band that a criterion has to beat. Where a criterion has an
    alpha, it is the default one. Raises ValueError for an unknown criterion or a K out of range.
    """
    rows = []
    for size in sizes:
        for name in criteria:
            rows.append({"method": name, "layers_removed": size, "set": chosen(stats, name, size)})
        for seed in random_seeds:
            removed = lowest(CRITERIA["random"](stats, seed=seed), size)
            rows.append({"method": "random", "layers_removed": size, "seed": seed, "set": removed})
    nats = losses([row["set"] for row in rows])
    for row, one in zip(rows, nats, strict=True):
        row["removed_layers"] = " ".join(map(str, row.pop("set")))
        row["value"] = one - losses.dense
    return pd.DataFrame(rows).astype({"seed": "Int64"})


def draw_comparison(table: pd.DataFrame) -> Figure:
    """The losses of `compare` over K, random layers as a band; new criteria in bold lines. The criteria set the scale."""
    figure, axes = figures.panels(height=3.2)
    random = table[table["method"] == "random"]
    if len(random):
        figures.random_band(axes, figures.spread(random, "layers_removed"))
    for name in dict.fromkeys(table["method"]):
        part = table[table["method"] == name].sort_values("layers_removed")
        if name == "random":
            continue
        look, new = look_of(name), name not in figures.METHODS
        width = 2.6 if new else 1.3
        style = {"color": look.color, "marker": look.marker, "linestyle": look.line, "linewidth": width}
        axes.plot(part["layers_removed"], part["value"], label=look.title, zorder=3 if new else 2, **style)
    axes.axhline(0, color="black", linestyle=":", linewidth=1.2, label="dense (no layer removed)")
    figures.whole_numbers(axes, table["layers_removed"])
    axes.set_xlabel("layers removed")
    axes.set_ylabel("nats per token over dense")
    axes.set_ylim(top=1.15 * max(table[table["method"] != "random"]["value"].max(), 1e-3))
    figures.legend(figure)
    return figure


# ------------------------------------------------------------------------------------------------------------- sliders


def attended() -> bool:
    """Whether somebody can move sliders: JupyterLab lets a cell ask for input; papermill and nbconvert do not."""
    try:
        from IPython import get_ipython
    except ImportError:
        return False
    shell = get_ipython()
    kernel = getattr(shell, "kernel", None)
    if kernel is None:
        return False
    return bool(kernel.get_parent("shell").get("content", {}).get("allow_stdin", False))


def layer_sliders(
    stats: LayerStats,
    losses: Losses,
    *,
    criterion: str = "simdiff_mssd",
    alpha: float | int = 0.5,
    layers_removed: int = 8,
    criteria: Sequence[str] | None = None,
) -> Any:
    """A widget over `choose_layers` and `draw_layers`. What was not measured before is measured when it is asked for.

    criteria: those offered, all unless given.
    """
    import ipywidgets

    names = list(criteria if criteria is not None else CRITERIA)
    rule = ipywidgets.Dropdown(
        options=[(look_of(name).title, name) for name in names], value=criterion, description="criterion"
    )
    controls = {
        "criterion": rule,
        "layers_removed": _slider(ipywidgets.IntSlider, "K", layers_removed, 0, stats.n_layers - 1, 1),
        "alpha": _slider(ipywidgets.FloatSlider, "alpha", alpha, 0.0, 1.0, 0.01),
    }

    def alpha_counts(_: object = None) -> None:
        controls["alpha"].disabled = "alpha" not in CRITERIA[rule.value].options

    rule.observe(alpha_counts, "value")
    alpha_counts()
    return _explorer(
        "Which layers go, and what it costs",
        controls,
        lambda **setting: choose_layers(stats, losses, **setting),
        draw_layers,
    )


def slice_sliders(
    stats: LayerStats, config: PreTrainedConfig, *, slice_percentage: float | int = 0.3, slice_base: float | int = 0.1
) -> Any:
    """A widget over `choose_slices` and `draw_slices`."""
    import ipywidgets

    controls = {
        "slice_percentage": _slider(ipywidgets.FloatSlider, "S_P", slice_percentage, 0.0, 0.8, 0.01),
        "slice_base": _slider(ipywidgets.FloatSlider, "S_B", slice_base, 0.0, 0.8, 0.01),
    }
    return _explorer(
        "The width that every layer keeps", controls, lambda **setting: choose_slices(stats, config, **setting), draw_slices
    )


def _slider(kind: type, name: str, value: float | int, low: float | int, high: float | int, step: float | int) -> Any:
    return kind(value=value, min=low, max=high, step=step, description=name, continuous_update=False)


def _explorer(title: str, controls: Mapping[str, Any], choose: Callable[..., Any], draw: Callable[[Any], Figure]) -> Any:
    """Controls above a sentence and a picture that follow them; a setting that cannot be is said in the sentence."""
    import ipywidgets

    sentence, picture = ipywidgets.HTML(), ipywidgets.Image(format="png")
    picture.layout.max_width = "100%"

    def update(_: object = None) -> None:
        try:
            choice = choose(**{name: control.value for name, control in controls.items()})
        except ValueError as error:
            sentence.value = f"<b>{html.escape(str(error))}</b>"
            picture.layout.visibility = "hidden"
            return
        sentence.value = html.escape(choice.summary())
        picture.value = _png(draw(choice))
        picture.layout.visibility = "visible"

    for control in controls.values():
        control.observe(update, "value")
    update()
    return ipywidgets.VBox([ipywidgets.HTML(f"<h3>{title}</h3>"), *controls.values(), sentence, picture])


def _png(figure: Figure) -> bytes:
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png", dpi=110)
    plt.close(figure)
    return drawn.getvalue()
