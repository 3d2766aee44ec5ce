"""The look of every figure: one color, marker and title per method, and what several figures draw.

A figure function starts a `Sketch`, reduces its rows with `spread`, draws with `curve`, `random_band`, `ranked_dots`,
`grouped_bars` or `heatmap`, and ends with `Sketch.done`. Published values are hollow, dashed or hatched and the legend says so.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
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

from prunelib.figures.save import Drawing, FigureError, pick

WIDTH = 7.2  # inches; at the width of a README 9 pt are then 9 pt on the screen

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


def spread(table: pd.DataFrame, by: str | Sequence[str], *, value: str = "value") -> pd.DataFrame:
    """Median, smallest and largest `value` for every combination of the columns `by`, as `value`, `low`, `high`; `n` counts.

    The column `interval` says in words what they are, for `error_note`. Raises FigureError for an unknown column, and
    when there is nothing to summarize.
    """
    by = [by] if isinstance(by, str) else list(by)
    unknown = [name for name in [*by, value] if name not in table]
    if unknown:
        raise FigureError(f"the table has no column {', '.join(unknown)}; it has {', '.join(map(str, table))}")
    present = table.dropna(subset=[value]).astype({value: float})
    if present.empty:
        raise FigureError(f"no values of {value} to draw: the table is empty or all of them are missing")
    groups = present.groupby(by, dropna=False, observed=True)[value]
    found = groups.agg(value="median", low="min", high="max", n="count").reset_index()
    return found.assign(interval="median and min–max")


def coinciding(choices: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Names grouped by equal (hashable) value, in order: {a: x, b: y, c: x} gives [(a, c), (b,)]."""
    groups: dict[Any, list[str]] = {}
    for name, choice in choices.items():
        groups.setdefault(choice, []).append(name)
    return [tuple(names) for names in groups.values()]


# ------------------------------------------------------------------------------------------------------------------ layout


def panels(
    rows: int = 1, columns: int = 1, *, height: float | int = 3.0, width: float | int = WIDTH, **options: Any
) -> tuple[Figure, Any]:
    """`plt.subplots` at the width of a README; `height` in inches per row. One panel comes as an Axes, more as an array."""
    return plt.subplots(rows, columns, figsize=(width, height * rows), layout="constrained", **options)


def published_and_ours(published: str, ours: str, *, height: float | int = 3.2) -> tuple[Figure, tuple[Axes, Axes]]:
    """Two panels, `published: …` on the left and `ours: …` on the right; the arguments name model and text."""
    figure, axes = panels(1, 2, height=height)
    axes[0].set_title(f"published: {published}")
    axes[1].set_title(f"ours: {ours}")
    return figure, (axes[0], axes[1])


class Sketch:
    """A figure in the making: its panels, and the plotted numbers and rows of results kept while it is drawn.

    names: what the panels show, usually models: one column each, or one row each if `down`. parts: panels of each name. titles:
    above the first panel of each name. pair: of names, `published` and `ours`.
    """

    def __init__(
        self, names: Sequence[Any], parts: int = 1, *, titles: Sequence[str] | None = None, down: bool = False, **options: Any,
    ) -> None:  # fmt: skip
        shape = (len(names), parts) if down else (parts, len(names))
        self.names, self.drawn, self.used = names, [], []
        self.figure, self.grid = panels(*shape, squeeze=False, **options)
        self._lines = self.grid if down else self.grid.T
        for line, title in zip(self._lines, names if titles is None else titles, strict=True):
            line[0].set_title(title)

    @classmethod
    def pair(cls, published: str, ours: str, **options: Any) -> "Sketch":
        """Two panels, `published: …` on the left and `ours: …` on the right; the arguments name model and text."""
        return cls(("published", "ours"), titles=(f"published: {published}", f"ours: {ours}"), **options)

    def __iter__(self) -> Iterator[tuple[np.ndarray, str]]:
        """The panels of every name, and the name."""
        return zip(self._lines, self.names, strict=True)

    def keep(self, data: pd.DataFrame, rows: pd.DataFrame | None = None, **columns: Any) -> pd.DataFrame:
        """Note plotted numbers with further columns, and the rows of results behind them; returns the numbers."""
        self.drawn.append(data.assign(**columns))
        self.used += [] if rows is None else [rows]
        return self.drawn[-1]

    def done(
        self, rows: pd.DataFrame | None = None, *, x: str | Sequence[str] = "", y: str | Sequence[str] = "",
        columns: int = 3, note: str | None = None, below: str | None = None, text: str | None = None,
        published: Sequence[str] = (),
    ) -> Drawing:  # fmt: skip
        """Label the outer axes, put a legend (where something has a label) or the line `below` under all, and hand over."""
        label_axes(self.grid, x=x, y=y)
        if below:
            self.figure.supxlabel(below, fontsize=8.5)
        else:
            legend(self.figure, columns=columns, note=note)
        rows = pd.concat([part[["run", "code"]] for part in self.used]) if rows is None else rows
        data = pd.concat(self.drawn).drop(columns=["run", "code"], errors="ignore").dropna(axis=1, how="all")
        return Drawing(self.figure, data, rows, text, published)


def label_axes(grid: np.ndarray, *, x: str | Sequence[str] = "", y: str | Sequence[str] = "") -> None:
    """Label the lowest row and the left column of an array of panels; several texts are one per column or row."""
    for line, texts, label in ((grid[-1], x, "set_xlabel"), (grid[:, 0], y, "set_ylabel")):
        for index, axes in enumerate(line if texts else ()):
            getattr(axes, label)(texts if isinstance(texts, str) else texts[index])


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
    counts = sorted(data["n"].unique())
    many = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]}–{counts[-1]}"
    return f"points and error bars: {data['interval'].iloc[0]} of {many} {draws}"


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
    axes: Axes, data: pd.DataFrame, method: str | Method, *, x: str = "layers_removed", y: str = "value",
    published: bool = False, offset: float | int = 0.0, **style: Any,
) -> None:  # fmt: skip
    """One method as markers and lines, with error bars where `data` has `low` and `high` that differ from the value.

    data: the rows of this method alone, one per x. method: a name in `METHODS`, or a look of its own. offset: shift along x, in
    data units, that keeps error bars apart. Published curves are dashed with hollow markers. style: of matplotlib, goes first.
    """
    look = method if isinstance(method, Method) else METHODS[method]
    data = _ordered(data, x, y)
    position, value = data[x].to_numpy(dtype=float) + offset, data[y].to_numpy(dtype=float)
    style = {
        "color": look.color,
        "marker": look.marker or "o",
        "linestyle": "--" if published else look.line,
        "markeredgewidth": 1.3,
        "label": look.title + (" (published)" if published else ""),
        **({"markerfacecolor": "white"} if published else {}),
        **style,
    }
    error = _error(data, value)
    if error is None:
        axes.plot(position, value, **style)
    else:
        axes.errorbar(position, value, yerr=error, **{"elinewidth": 1.0, **style})


def random_band(axes: Axes, data: pd.DataFrame, *, x: str = "layers_removed", label: str | None = None) -> None:
    """Randomly removed layers as a line (`value`) and a band (`low` to `high`); the label says what they are."""
    data, look = _ordered(data, x, "value"), METHODS["random"]
    if label is None:
        label = f"{look.title} ({data['interval'].iloc[0]} of {data['n'].max()} draws)"
    axes.fill_between(data[x], data["low"], data["high"], color=look.color, alpha=0.25, linewidth=0, zorder=0.9)
    axes.plot(data[x], data["value"], color=look.color, linestyle=look.line, zorder=0.95)
    # One entry in the legend for line and band: an empty area with the colors of both.
    axes.add_patch(Rectangle((0, 0), 0, 0, facecolor=to_rgba(look.color, 0.25), edgecolor=look.color, label=label))


def dense_line(axes: Axes, value: float | int, *, label: str = "dense (no layer removed)") -> None:
    """The unpruned model as a horizontal line."""
    look = METHODS["dense"]
    axes.axhline(value, color=look.color, linestyle=look.line, linewidth=1.2, zorder=1, label=label)


def grouped_bars(
    axes: Axes, data: pd.DataFrame, methods: Sequence[str], *, x: str = "layers_removed", published: bool = False,
    same: Mapping[Any, Sequence[tuple[str, ...]]] | None = None,
) -> None:  # fmt: skip
    """Bars of several methods (column `method`) side by side at every x, on a log axis; a missing bar stays missing.

    Error bars from `low` and `high`. Published bars are hollow and hatched. same: for an x, the groups of methods that chose
    the same layers there (from `coinciding`); `=` is then written at the foot of every bar after the first of its group.
    """
    places = sorted(data[x].dropna().unique())
    width = 0.8 / len(methods)
    for index, name in enumerate(methods):
        look, rows = METHODS[name], pick(data, method=name)
        rows = _ordered(rows, x, "value")
        value = rows["value"].to_numpy(dtype=float)
        position = np.array([places.index(place) for place in rows[x]]) + (index - (len(methods) - 1) / 2) * width
        axes.bar(
            position, value, width=0.92 * width, color="white" if published else look.color, edgecolor=look.color,
            hatch="////" if published else None, yerr=_error(rows, value),
            error_kw={"elinewidth": 1.0, "capsize": 2, "ecolor": "#333333"},
            label=look.title + (" (published)" if published else ""),
        )  # fmt: skip
        for place, center in zip(rows[x], position, strict=True):
            if any(name in group[1:] for group in (same or {}).get(place, ())):
                axes.annotate(
                    "=", (center, 0), xycoords=("data", "axes fraction"), xytext=(0, 2), textcoords="offset points",
                    ha="center", va="bottom", color=look.color if published else "white", fontweight="bold",
                )  # fmt: skip
    log_scale(axes)
    axes.set_xticks(range(len(places)), [f"{place:g}" for place in places])
    axes.grid(False, axis="x")


def ranked_dots(axes: Axes, data: pd.DataFrame, order: Sequence[str], *, low: float | int, high: float | int) -> None:
    """One line per method, in the given order from top to bottom: a dot at `value` and a bar from `low` to `high`.

    data: rows with `method`, `value`, `low`, `high`; a method without a row leaves its line empty. low, high: ends of the axis;
    a dot beyond `high` stands at the edge with its number beside it.
    """
    for row in data.itertuples():
        look, place = METHODS[row.method], list(order).index(row.method)
        inside = row.value <= high
        if inside:
            axes.plot([row.low, min(row.high, high)], [place, place], color=look.color, linewidth=1.4)
        marker = look.marker if inside else ">"
        axes.plot([min(row.value, high)], [place], linestyle="", color=look.color, marker=marker, clip_on=False)
        if not inside:
            beside = {"ha": "right", "va": "center", "xytext": (-5, 0), "textcoords": "offset points"}
            axes.annotate(f"{row.value:.1f} ", (high, place), **beside)
    rows_as(axes, [METHODS[method].title for method in order])
    axes.set_xlim(low, high)


def rows_as(axes: Axes, titles: Sequence[str]) -> None:
    """One line per title on the y axis, the first on top."""
    axes.set_yticks(range(len(titles)), titles)
    axes.set_ylim(len(titles) - 0.5, -0.5)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="y", visible=False)


def heatmap(
    axes: Axes, table: pd.DataFrame, *, label: str, numbers: str | None = None, low: float | int | None = None,
    high: float | int | None = None, outlined: Iterable[tuple[Any, Any]] = (), colormap: str = "cividis",
) -> None:  # fmt: skip
    """A table (index = y, columns = x) as colored cells; missing cells stay white.

    label: what the colors mean. numbers: a format such as `.1f` to write each into its cell. low, high: ends of the color
    scale. outlined: (row, column) labels of cells to frame. cividis reads the same with and without color vision.
    """
    if not np.isfinite(table.to_numpy(dtype=float)).any():
        raise FigureError("the heat map has no numbers: the table is empty or all missing")
    seaborn.heatmap(
        table.astype(float), ax=axes, annot=numbers is not None, fmt=numbers or "", annot_kws={"fontsize": 8}, cmap=colormap,
        vmin=low, vmax=high, linewidths=0.6, linecolor="white", cbar_kws={"label": label, "pad": 0.02},
    )  # fmt: skip
    cells = axes.collections[0]
    shown = ~np.ma.getmaskarray(cells.get_array()).ravel()
    for text, color in zip(axes.texts, cells.get_facecolors()[shown] if numbers else (), strict=True):
        text.set_color("black" if luminance(color) > 0.179 else "white")  # whichever has more contrast (WCAG 2)
    for row, column in outlined:
        corner = (list(table.columns).index(column), list(table.index).index(row))
        axes.add_patch(Rectangle(corner, 1, 1, fill=False, edgecolor="#d55e00", linewidth=1.8, clip_on=False, zorder=3))
    axes.grid(False)
    axes.tick_params(length=0, rotation=0)


def layer_shares(axes: Axes, lines: Mapping[str, pd.Series], n_layers: int) -> pd.DataFrame:
    """A grey map of which layers go: per title the removed sets of all draws; returns the share of draws per title and layer.

    lines: title → sets as texts of layer numbers such as `3 5 8`.
    """
    shares = {}
    for title, sets in lines.items():
        counts = np.zeros(n_layers)
        for removed in sets:
            counts[[int(layer) for layer in removed.split()]] += 1 / len(sets)
        shares[title] = counts
    grid = pd.DataFrame(shares).T.rename_axis(index="method", columns="layer")
    heatmap(axes, grid, label="share of draws", low=0, high=1, colormap="Greys")
    axes.set_xticks(np.arange(0, n_layers, 2) + 0.5, [str(layer) for layer in range(0, n_layers, 2)])
    axes.set_ylabel("")
    return grid.stack().rename("share_of_draws").reset_index()


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
