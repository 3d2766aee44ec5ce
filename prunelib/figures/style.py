"""One look for every figure, and one `save` that leaves nothing of a figure untraceable.

A chapter calls `use_style`, reduces its rows with `spread`, draws with `curve`, `random_band`, `grouped_bars` or `heatmap`, and
ends with `save`: the picture (png, pdf), exactly the plotted numbers (csv), and where they come from (json). Every method has
one color, marker and title in `METHODS`. Published values are hollow, dashed or hatched and say so in the legend.

The same data gives the same bytes: no dates in any of the files. The json names the code by hashes instead of the git
commit: a file cannot hold the commit that it becomes part of, and with the one before it every rerun would differ from
what is committed. Nothing here imports torch.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
import seaborn
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb, to_rgba
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter
from numpy.typing import ArrayLike

from prunelib.figures.save import FigureError

WIDTH = 7.2  # inches; at the width of a README 9 pt are then 9 pt on the screen
SPREADS = {"min-max": "min–max", "sd": "standard deviation", "sem": "standard error"}

STYLE = {
    "font.family": "DejaVu Sans",  # comes with matplotlib: the same letters on every machine
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.labelsize": 9.5,
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
    "legend.fontsize": 9,
    "figure.figsize": (WIDTH, 3.2),
    "figure.constrained_layout.use": True,
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
    "savefig.bbox": None,
    "savefig.dpi": 200,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.titlelocation": "left",
    "grid.color": "#e4e4e4",
    "grid.linewidth": 0.7,
    "axes.edgecolor": "#555555",
    "xtick.color": "#333333",
    "ytick.color": "#333333",
    "lines.linewidth": 1.6,
    "lines.markersize": 5.5,
    "errorbar.capsize": 2.5,
    "legend.frameon": False,
    "hatch.linewidth": 0.8,
    "pdf.fonttype": 42,  # text stays text in the pdf
}


@dataclass(frozen=True)
class Method:
    """How one method looks in every figure."""

    name: str
    title: str
    color: str
    marker: str
    line: str = "-"


class _Methods(dict[str, Method]):
    def __missing__(self, name: str) -> Method:
        raise FigureError(
            f"no color for method {name!r}; there are: {', '.join(self)} (add it to prunelib.figures.style.METHODS)"
        )


# Colors of Okabe and Ito, then of Tol, told apart under the common color-vision deficiencies (tested); never the only cue.
METHODS: dict[str, Method] = _Methods(
    {
        method.name: method
        for method in (
            Method("dense", "dense", "#000000", "", ":"),
            Method("random", "random layers", "#a3a3a3", "", "-"),
            Method("block_influence", "cosine (block influence)", "#0072b2", "o"),
            Method("simdiff_mssd", "SimDiff (MSSD)", "#d55e00", "s"),
            Method("simdiff_masd", "SimDiff (MASD)", "#009e73", "^"),
            Method("deepest", "deepest layers", "#882255", "v"),
            Method("angular", "angular (contiguous block)", "#56b4e9", "D"),
            Method("relative_magnitude", "relative magnitude", "#e6b800", "P"),
            Method("simdiff", "SimDiff", "#d55e00", "s"),
            # ShortGPT is block influence under another name: the same color.
            Method("shortgpt", "ShortGPT = cosine", "#0072b2", "o"),
            Method("entrodrop", "EntroDrop", "#cc79a7", "X"),
            Method("sleb", "SLEB", "#999933", "p"),
            Method("shortened_llm", "Shortened LLaMA", "#332288", "h"),
            Method("laco", "LaCo", "#44aa99", "<"),
            Method("llm_pruner", "LLM-Pruner", "#aa4499", ">"),
            Method("slicegpt", "SliceGPT", "#661100", "*"),
            Method("dynamic_slicing", "dynamic slicing", "#117733", "d"),
            # The zoo of chapter 02, where a name stands beside every point: one color for one idea.
            Method("block_cosine", "block cosine (LLM-Streamline)", "#56b4e9", "d"),
            Method("leave_one_out_nll", "leave-one-out NLL (PPL+)", "#332288", "h"),
            Method("leave_one_out_kl", "leave-one-out KL", "#332288", "H"),
            Method("taylor", "Taylor+", "#cc6677", "8"),
            Method("magnitude", "Mag+", "#cc6677", "P"),
            Method("entropy_gain", "EntroDrop (as published)", "#cc79a7", "X"),
            Method("entropy_gain_attention", "EntroDrop (as released)", "#cc79a7", "x"),
            Method("laco_published", "LaCo (as published)", "#44aa99", "<"),
            Method("laco_released", "LaCo (as released)", "#44aa99", ">"),
            Method("greedy", "greedy NLL (SLEB)", "#999933", "p"),
            Method("greedy_kl", "greedy KL", "#999933", "d"),
            Method("beam", "beam search", "#117733", "d"),
            Method("evolutionary", "evolution (EvoPress)", "#117733", "*"),
            Method("blockpruner", "greedy over sublayers (BlockPruner)", "#aa4499", "s"),
            Method("evolutionary_sublayers", "evolution over sublayers (EvoPress)", "#aa4499", "*"),
            Method("best", "best set", "#000000", "*"),
        )
    }
)
"""The look of every method by name; an unknown name raises FigureError listing the known ones."""


def use_style() -> None:
    """The style of all figures, for the rest of the session: matplotlib's defaults with `STYLE` on top."""
    backend = matplotlib.get_backend()
    matplotlib.rcdefaults()
    matplotlib.rcParams["backend"] = backend  # `rcdefaults` keeps it, but not on every version
    matplotlib.rcParams.update(STYLE)


# -------------------------------------------------------------------------------------------------------- plotted numbers


def spread(
    table: pd.DataFrame,
    by: str | Sequence[str],
    *,
    value: str = "value",
    center: str = "median",
    interval: str | tuple[float | int, float | int] = "min-max",
) -> pd.DataFrame:
    """Centre and interval of `value` for every combination of the columns `by`: what `curve` and `random_band` draw.

    center: `median` or `mean`. interval: `min-max`, `sd` (centre ± one standard deviation, n - 1), `sem` (centre ± standard
    error of the mean), or two quantiles such as (0.1, 0.9). Columns of the result: `by`, `value`, `low`, `high`, `n`, and
    `interval`, which says in words what low and high are. `sd` and `sem` of one value have no low and high.

    Raises FigureError for an unknown column, centre or interval, and when there is nothing to summarize.
    """
    by = [by] if isinstance(by, str) else list(by)
    unknown = [name for name in [*by, value] if name not in table]
    if unknown:
        raise FigureError(f"the table has no column {', '.join(unknown)}; it has {', '.join(map(str, table))}")
    if center not in ("median", "mean"):
        raise FigureError(f"the centre is `median` or `mean`, not {center!r}")
    words = interval_words(interval)
    present = table.dropna(subset=[value])
    if present.empty:
        raise FigureError(f"no values of {value} to draw: the table is empty or all of them are missing")
    rows = []
    for key, group in present.groupby(by, sort=True, dropna=False, observed=True):
        numbers = group[value].to_numpy(dtype=float)
        middle = float(np.median(numbers) if center == "median" else np.mean(numbers))
        rows.append([*key, middle, *_bounds(numbers, middle, interval), len(numbers), f"{center} and {words}"])
    return pd.DataFrame(rows, columns=[*by, "value", "low", "high", "n", "interval"])


def interval_words(interval: str | tuple[float | int, float | int]) -> str:
    """An interval of `spread` in words, for captions and legends."""
    if isinstance(interval, str):
        if interval not in SPREADS:
            raise FigureError(f"unknown interval {interval!r}; there are {', '.join(SPREADS)} and two quantiles")
        return SPREADS[interval]
    if len(interval) != 2 or not 0 <= interval[0] < interval[1] <= 1:
        raise FigureError(f"quantiles are two growing numbers between 0 and 1, not {interval}")
    return f"{100 * interval[0]:g}–{100 * interval[1]:g} % quantiles"


def _bounds(numbers: np.ndarray, middle: float, interval: str | tuple[float | int, float | int]) -> tuple[float, float]:
    if interval == "min-max":
        return float(numbers.min()), float(numbers.max())
    if isinstance(interval, str):
        if len(numbers) < 2:
            return float("nan"), float("nan")
        half = float(np.std(numbers, ddof=1)) / (np.sqrt(len(numbers)) if interval == "sem" else 1)
        return middle - half, middle + half
    low, high = np.quantile(numbers, interval)
    return float(low), float(high)


def coinciding(choices: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Names grouped by equal value, in order: methods that chose the same layers, to be drawn once as `joint_title`.

    `choices` maps a method to what it chose (tuples of layers, numbers, …); {a: x, b: y, c: x} gives [(a, c), (b,)].
    """
    groups: list[tuple[Any, list[str]]] = []
    for name, choice in choices.items():
        for other, names in groups:
            if choice == other:
                names.append(name)
                break
        else:
            groups.append((choice, [name]))
    return [tuple(names) for _, names in groups]


def joint_title(methods: Sequence[str]) -> str:
    """Titles of methods that coincide, as `cosine (block influence) = SimDiff (MSSD)`."""
    return " = ".join(METHODS[name].title for name in methods)


# ------------------------------------------------------------------------------------------------------------------ layout


def panels(
    rows: int = 1, columns: int = 1, *, height: float | int = 3.0, width: float | int = WIDTH, **options: Any
) -> tuple[Figure, Any]:
    """`plt.subplots` at the width of a README; `height` in inches per row. One panel comes as an Axes, more as an array."""
    return plt.subplots(rows, columns, figsize=(width, height * rows), layout="constrained", **options)


def published_and_ours(
    published: str, ours: str, *, height: float | int = 3.2, share_y: bool = False, share_x: bool = False
) -> tuple[Figure, tuple[Axes, Axes]]:
    """Two panels, `published: …` on the left and `ours: …` on the right; the arguments name model and text.

    The models differ, so the scales do too: axes are shared only on request.
    """
    figure, axes = panels(1, 2, height=height, sharey=share_y, sharex=share_x)
    axes[0].set_title(f"published: {published}")
    axes[1].set_title(f"ours: {ours}")
    return figure, (axes[0], axes[1])


def legend(figure: Figure, axes: Iterable[Axes] | None = None, *, columns: int = 3, note: str | None = None) -> None:
    """One legend below all panels, every label once, in at most `columns` columns: fewer when they would be too wide.

    note: a line above it, the place to say what error bars are (`error_note`).
    """
    entries: dict[str, Any] = {}
    for one in axes if axes is not None else figure.axes:
        for handle, label in zip(*one.get_legend_handles_labels(), strict=True):
            entries.setdefault(label, handle)
    if not entries:
        raise FigureError("nothing in this figure has a label: draw before calling legend")
    for fitting in range(min(columns, len(entries)), 0, -1):
        below = {"loc": "outside lower center", "ncols": fitting, "title": note, "title_fontsize": "medium"}
        drawn = figure.legend(list(entries.values()), list(entries), handlelength=2.2, **below)
        if fitting == 1 or drawn.get_window_extent().width < figure.bbox.width:
            break
        drawn.remove()


def error_note(data: pd.DataFrame, draws: str = "draws") -> str:
    """What the error bars of a result of `spread` are: `points and error bars: median and min–max of 3 seeds`."""
    words, counts = data["interval"].unique(), sorted(data["n"].unique())
    if len(words) != 1:
        raise FigureError(f"the table mixes intervals ({', '.join(words)}): draw one kind in a figure")
    many = str(counts[0]) if len(counts) == 1 else f"{counts[0]}–{counts[-1]}"
    return f"points and error bars: {words[0]} of {many} {draws}"


def log_scale(axes: Axes, axis: str = "y") -> None:
    """Logarithmic axis with plain numbers on its ticks (20, 5,000), as perplexity is read."""
    (axes.set_yscale if axis == "y" else axes.set_xscale)("log")
    one = axes.yaxis if axis == "y" else axes.xaxis
    low, high = sorted(one.get_view_interval())
    decades = np.log10(high / low) if low > 0 else 1
    one.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7) if decades < 0.7 else (1, 2, 5) if decades < 2.5 else (1,)))
    one.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}" if value >= 10 else f"{value:g}"))
    one.set_minor_formatter(NullFormatter())


def whole_numbers(axes: Axes, values: Iterable[int] | None = None) -> None:
    """Integer ticks on x: exactly `values` (layers removed), or where matplotlib finds them fitting."""
    if values is None:
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    else:
        axes.set_xticks(sorted(set(values)))


# ----------------------------------------------------------------------------------------------------------------- drawing


def curve(
    axes: Axes,
    data: pd.DataFrame,
    method: str | Sequence[str],
    *,
    x: str = "layers_removed",
    y: str = "value",
    published: bool = False,
    label: str | None = None,
    offset: float | int = 0.0,
) -> None:
    """One method as markers and lines, with error bars where `data` has `low` and `high` that differ from the value.

    data: the rows of this method alone, one per x. method: a name, or several that coincide, drawn once under their joint title
    in the look of the first. offset: shift along x, in data units, that keeps neighboring error bars apart. Published curves
    have hollow markers, a dashed line and `(published)` in the label.
    """
    names = [method] if isinstance(method, str) else list(method)
    look = METHODS[names[0]]
    data = _ordered(data, x, y)
    position = data[x].to_numpy(dtype=float) + offset
    value = data[y].to_numpy(dtype=float)
    if label is None:
        label = joint_title(names) + (" (published)" if published else "")
    style = {
        "color": look.color,
        "marker": look.marker or "o",
        "linestyle": "--" if published else look.line,
        "markerfacecolor": "white" if published else look.color,
        "markeredgewidth": 1.3,
        "label": label,
    }
    error = _error(data, value)
    if error is None:
        axes.plot(position, value, **style)
    else:
        axes.errorbar(position, value, yerr=error, elinewidth=1.0, **style)


def random_band(
    axes: Axes, data: pd.DataFrame, *, x: str = "layers_removed", y: str = "value", label: str | None = None
) -> None:
    """Randomly removed layers as a line (the centre) and a band (low to high) of what `spread` gave; the label says which."""
    data = _ordered(data, x, y)
    look = METHODS["random"]
    if label is None:
        (words,) = data["interval"].unique() if data["interval"].nunique() == 1 else ("",)
        few, many = int(data["n"].min()), int(data["n"].max())
        # Without any layer removed there is one model, whatever the seed.
        label = f"{look.title} ({words} of {many} draws)" if few in (1, many) else f"{look.title} ({words})"
    position = data[x].to_numpy(dtype=float)
    low, high = (data[name].fillna(data[y]).to_numpy(dtype=float) for name in ("low", "high"))
    axes.fill_between(position, low, high, color=look.color, alpha=0.25, linewidth=0, zorder=0.9)
    axes.plot(position, data[y].to_numpy(dtype=float), color=look.color, linestyle=look.line, zorder=0.95)
    # One entry in the legend for line and band: an empty area with the colors of both.
    axes.add_patch(Rectangle((0, 0), 0, 0, facecolor=to_rgba(look.color, 0.25), edgecolor=look.color, label=label))


def dense_line(axes: Axes, value: float | int, *, label: str = "dense (no layer removed)", published: bool = False) -> None:
    """The unpruned model as a horizontal line."""
    look = METHODS["dense"]
    label = label + (" (published)" if published else "")
    axes.axhline(value, color=look.color, linestyle=look.line, linewidth=1.2, zorder=1, label=label)


def grouped_bars(
    axes: Axes,
    data: pd.DataFrame,
    methods: Sequence[str],
    *,
    x: str = "layers_removed",
    y: str = "value",
    published: bool = False,
    numbers: str | None = None,
    log: bool = False,
    same: Mapping[Any, Sequence[tuple[str, ...]]] | None = None,
) -> None:
    """Bars of several methods (column `method`) side by side at every x; a missing bar stays missing.

    Error bars from `low` and `high`. Published bars are hollow and hatched. numbers: a format such as `.1f` to write every
    value upright above its bar. log: logarithmic y axis (`log_scale`). same: for an x, the groups of methods that chose the
    same layers there (from `coinciding`); `=` is then written at the foot of every bar after the first of its group.
    """
    places = sorted(data[x].dropna().unique())
    width = 0.8 / len(methods)
    for index, name in enumerate(methods):
        look = METHODS[name]
        rows = data[data["method"] == name]
        if rows.empty:
            raise FigureError(
                f"no rows of method {name!r} to draw; the table has {', '.join(map(str, data['method'].unique()))}"
            )
        rows = _ordered(rows, x, y)
        value = rows[y].to_numpy(dtype=float)
        position = np.array([places.index(place) for place in rows[x]]) + (index - (len(methods) - 1) / 2) * width
        axes.bar(
            position,
            value,
            width=0.92 * width,
            color="white" if published else look.color,
            edgecolor=look.color,
            hatch="////" if published else None,
            yerr=_error(rows, value),
            error_kw={"elinewidth": 1.0, "capsize": 2, "ecolor": "#333333"},
            label=look.title + (" (published)" if published else ""),
        )
        if numbers is not None:
            top = rows["high"].fillna(rows[y]).to_numpy(dtype=float) if "high" in rows else value
            for place, height, number in zip(position, top, value, strict=True):
                axes.annotate(
                    format(number, numbers),
                    (place, height),
                    xytext=(0, 3),
                    textcoords="offset points",
                    ha="center",
                    va="bottom",
                    rotation=90,
                    fontsize=7.5,
                )
        for place, center in zip(rows[x], position, strict=True):
            if any(name in group[1:] for group in (same or {}).get(place, ())):
                axes.annotate(
                    "=", (center, 0), xycoords=("data", "axes fraction"), xytext=(0, 2), textcoords="offset points",
                    ha="center", va="bottom", fontsize=9, color=look.color if published else "white", fontweight="bold",
                )  # fmt: skip
    if log:
        log_scale(axes)
    if numbers is not None:
        _headroom(axes, 0.25 if max(len(format(number, numbers)) for number in data[y].dropna()) > 6 else 0.16)
    axes.set_xticks(range(len(places)), [f"{place:g}" if isinstance(place, float) else str(place) for place in places])
    axes.grid(False, axis="x")


def _headroom(axes: Axes, share: float) -> None:
    """Room for upright numbers above the bars: `share` of the height of the axes, on a linear or logarithmic scale."""
    transform = axes.yaxis.get_transform()
    low, high = transform.transform(np.array(axes.get_ylim()))
    axes.set_ylim(top=float(transform.inverted().transform(np.array([high + (high - low) * share / (1 - share)]))[0]))


def mark_same(axes: Axes, x: ArrayLike, y: ArrayLike, *, label: str) -> None:
    """Rings around the points where methods chose the same layers, so that a hidden curve is not taken for a missing one."""
    axes.plot(x, y, linestyle="", marker="o", markersize=11, fillstyle="none", color="#333333", zorder=3, label=label)


def layer_bars(
    axes: Axes,
    importance: ArrayLike,
    removed: Iterable[int] = (),
    *,
    method: str,
    low: ArrayLike | None = None,
    high: ArrayLike | None = None,
    published: bool = False,
    upright: bool = False,
) -> None:
    """Importance of every layer as bars, the removed ones pale; layer 0 at the bottom (`upright`: at the left).

    low, high: ends of the error bars.
    """
    value = np.asarray(importance, dtype=float)
    layer = np.arange(len(value))
    removed = set(removed)
    wrong = sorted(index for index in removed if not 0 <= index < len(value))
    if wrong:
        raise FigureError(f"removed layers {wrong} do not exist in {len(value)} layers")
    color = METHODS[method].color
    error = None if low is None or high is None else np.clip([value - np.asarray(low), np.asarray(high) - value], 0, None)
    bars = (axes.bar if upright else axes.barh)(
        layer,
        value,
        0.8,
        color="white" if published else color,
        edgecolor=color,
        linewidth=0.8,
        hatch="////" if published else None,
        **{("yerr" if upright else "xerr"): error},
        error_kw={"elinewidth": 0.8, "capsize": 1.5, "ecolor": "#333333"},
    )
    for index, bar in enumerate(bars):
        if index in removed:
            bar.set_alpha(0.3)
    axis = axes.xaxis if upright else axes.yaxis
    axis.set_major_locator(MaxNLocator(integer=True, nbins=9))
    axes.grid(False, axis="x" if upright else "y")
    (axes.set_xlim if upright else axes.set_ylim)(-0.7, len(value) - 0.3)
    (axes.set_xlabel if upright else axes.set_ylabel)("layer")
    (axes.set_ylabel if upright else axes.set_xlabel)("importance (higher = keep)")


def ranked_dots(
    axes: Axes, data: pd.DataFrame, order: Sequence[str], *, low: float | int | None = None, high: float | int | None = None
) -> None:
    """One line per method, in the given order from top to bottom: a dot at `value` and a bar from `low` to `high`.

    data: rows with `method`, `value` and, where there are several draws, `low` and `high`; a method without a row leaves its
    line empty. low, high: ends of the axis; a dot beyond `high` stands at the edge with its number beside it.
    """
    places = {method: place for place, method in enumerate(order)}
    edge = np.inf if high is None else high
    for row in data.itertuples():
        look, place = METHODS[row.method], places[row.method]
        inside = row.value <= edge
        if inside and getattr(row, "high", row.value) > getattr(row, "low", row.value):
            axes.plot([row.low, min(row.high, edge)], [place, place], color=look.color, linewidth=1.4)
        axes.plot(
            [min(row.value, edge)],
            [place],
            linestyle="",
            color=look.color,
            marker=look.marker if inside else ">",
            clip_on=False,
        )
        if not inside:
            axes.annotate(
                f"{row.value:.1f} ", (edge, place), ha="right", va="center", xytext=(-5, 0), textcoords="offset points"
            )
    axes.set_yticks(range(len(order)), [METHODS[method].title for method in order])
    axes.set_ylim(len(order) - 0.5, -0.5)
    axes.set_xlim(low, high)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="y", visible=False)


def heatmap(
    axes: Axes,
    table: pd.DataFrame,
    *,
    label: str,
    fmt: str = ".2f",
    numbers: bool = True,
    low: float | int | None = None,
    high: float | int | None = None,
    outlined: Iterable[tuple[Any, Any]] = (),
    colormap: str = "cividis",
    bar: bool = True,
) -> None:
    """A table (index = y, columns = x) as colored cells with their numbers; missing cells stay white.

    label: what the colors mean. low, high: ends of the color scale, to share one between panels. outlined: (row, column)
    labels of cells to frame, such as the best of each row. cividis reads the same with and without color vision.
    """
    values = table.to_numpy(dtype=float)
    if not np.isfinite(values).any():
        raise FigureError("the heat map has no numbers: the table is empty or all missing")
    seaborn.heatmap(
        table.astype(float),
        ax=axes,
        annot=numbers,
        fmt=fmt,
        annot_kws={"fontsize": 8},
        cmap=colormap,
        vmin=low,
        vmax=high,
        linewidths=0.6,
        linecolor="white",
        cbar=bar,
        cbar_kws={"label": label, "pad": 0.02} if bar else None,
    )
    if numbers:
        _readable_numbers(axes)
    for row, column in outlined:
        corner = (list(table.columns).index(column), list(table.index).index(row))
        axes.add_patch(Rectangle(corner, 1, 1, fill=False, edgecolor="#d55e00", linewidth=1.8, clip_on=False, zorder=3))
    axes.grid(False)
    axes.tick_params(length=0)
    axes.set_xticklabels(axes.get_xticklabels(), rotation=0)
    axes.set_yticklabels(axes.get_yticklabels(), rotation=0)


def _readable_numbers(axes: Axes) -> None:
    """Black or white numbers, whichever stands out more from its cell (contrast as in WCAG 2)."""
    cells = axes.collections[0]
    shown = ~np.ma.getmaskarray(cells.get_array()).ravel()
    for text, color in zip(axes.texts, cells.get_facecolors()[shown], strict=True):
        text.set_color("black" if luminance(color) > 0.179 else "white")


def luminance(color: Any) -> float:
    """Relative luminance of a color as WCAG 2 defines it, 0 (black) to 1 (white)."""
    channels = np.array(to_rgb(color))
    linear = np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)
    return float(linear @ [0.2126, 0.7152, 0.0722])


def _ordered(data: pd.DataFrame, x: str, y: str) -> pd.DataFrame:
    missing = [name for name in (x, y) if name not in data]
    if missing:
        raise FigureError(f"the plotted table has no column {', '.join(missing)}; it has {', '.join(map(str, data))}")
    data = data.dropna(subset=[x, y]).sort_values(x)
    if data.empty:
        raise FigureError(f"nothing to draw: all values of {y} are missing")
    twice = data[x][data[x].duplicated()].unique().tolist()
    if twice:
        raise FigureError(f"several values of {y} at {x} = {twice}: summarize them with `spread` first")
    return data


def _error(data: pd.DataFrame, value: np.ndarray) -> np.ndarray | None:
    """Lengths of the error bars below and above, or None when there are none to see."""
    if not {"low", "high"} <= set(data):
        return None
    ends = [value - data["low"].to_numpy(dtype=float), data["high"].to_numpy(dtype=float) - value]
    error = np.nan_to_num(np.clip(ends, 0, None))
    return error if error.any() else None


# ------------------------------------------------------------------------------------------------------------------ saving
