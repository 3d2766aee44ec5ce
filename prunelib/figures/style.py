"""The look of every figure: one color, marker and title per method, and what several figures draw.

A figure function brings its numbers into one long table, makes `Panels` of it, draws into them with `lines`, `dots`,
`layer_bars` or `heatmap`, and ends with `Panels.done`. Hollow, dashed or hatched is what a paper published, and nothing else.
"""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import seaborn
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullFormatter, PercentFormatter
from seaborn.utils import relative_luminance

from prunelib.figures.save import Drawing, FigureError
from prunelib.lab.provenance import TITLES

WIDTH = 7.2  # inches; at the width of a README 9 pt are then 9 pt on the screen
Looks = Mapping[Any, "Method"]
Texts = str | Sequence[str]


@dataclass(frozen=True)
class Method:
    """How one method, model or other series looks."""

    title: str
    color: str
    marker: str = "o"
    line: str = "-"
    hollow: bool = False


class _Methods(dict[str, Method]):
    def __missing__(self, name: str) -> Method:
        raise FigureError(f"no color for method {name!r}; there are: {', '.join(self)} (add it to figures/methods.csv)")


_LOOKS = pd.read_csv(Path(__file__).with_name("methods.csv"), index_col="name", keep_default_na=False)
METHODS = _Methods({name: Method(**look) for name, look in _LOOKS.to_dict("index").items()})
"""The look of every method by name, from methods.csv; an unknown name raises FigureError listing the known ones.

Colors of Okabe and Ito, then of Tol, told apart under the common color-vision deficiencies (tested); never the only cue. One
color for one idea: ShortGPT is block influence; where ideas share a color (chapter 02), a name stands beside every point."""


def text_title(name: str) -> str:
    """A text as its authors write it; one that has no such name by its own."""
    return {"wikitext2": "WikiText-2", "c4": "C4", "alpaca": "Alpaca"}.get(name, name)


def short(name: str) -> str:
    """The title of a model without its size; any other text as it is."""
    return TITLES[name].split(" (")[0] if name in TITLES else name


def use_style() -> None:
    """The style of all figures, for the rest of the session: matplotlib's defaults with `figures.mplstyle` on top."""
    plt.style.use(["default", Path(__file__).with_name("figures.mplstyle")])


def spread(table: pd.DataFrame, by: str | Sequence[str], *, value: str = "value") -> pd.DataFrame:
    """Median, smallest and largest `value` for every combination of the columns `by`, as `value`, `low`, `high`; `n` counts.

    Raises FigureError when there is nothing to summarize.
    """
    present = table.dropna(subset=[value]).astype({value: float})
    if present.empty:
        raise FigureError(f"no values of {value} to draw: the table is empty or all of them are missing")
    groups = present.groupby(by, dropna=False, observed=True)[value]
    return groups.agg(value="median", low="min", high="max", n="count").reset_index()


class Panels:
    """Small multiples of a table: one panel for each value of the column `column` and, if given, of `row`.

    titles: above the columns. height: inches per row. options: of `plt.subplots`. Iterating gives each panel, row by row, with
    its rows of the table.
    """

    def __init__(
        self,
        data: pd.DataFrame,
        column: str,
        row: str | None = None,
        *,
        titles: Sequence[str] | Mapping[Any, str] = (),
        height: float | int = 3.0,
        **options: Any,
    ) -> None:
        self.data, self.names = data, (column, row)
        self.columns, self.rows = list(data[column].unique()), list(data[row].unique()) if row else [None]
        shape, size = (len(self.rows), len(self.columns)), (WIDTH, height * len(self.rows))
        self.figure, self.grid = plt.subplots(*shape, figsize=size, squeeze=False, **options)
        titles = [titles.get(name, name) for name in self.columns] if isinstance(titles, Mapping) else titles or self.columns
        for axes, title in zip(self.grid[0], titles, strict=True):
            axes.set_title(short(str(title)))

    def __iter__(self) -> Iterator[tuple[Axes, pd.DataFrame]]:
        column, row = self.names
        for axes, (below, beside) in zip(self.grid.flat, itertools.product(self.rows, self.columns), strict=True):
            here = self.data[column] == beside
            yield axes, self.data[here & (self.data[row] == below) if row else here]

    def done(
        self,
        rows: pd.DataFrame,
        *,
        x: Texts = "",
        y: Texts = "",
        note: str = "",
        keep: Sequence[str] = (),
        title: str = "",
        **more: Any,
    ) -> Drawing:
        """Label the outer axes (one text, or one per column or row), put the legend under all, and hand over.

        rows: of results behind the numbers. note: a line above the legend that says what error bars are. keep: columns of the
        table that go into the csv, all by default. title: of the whole figure. more: of `Drawing`.
        """
        if title:
            self.figure.suptitle(title, fontsize=10, x=0.01, ha="left")
        for line, texts, name in ((self.grid[-1], x, "xlabel"), (self.grid[:, 0], y, "ylabel")):
            for axes, label in zip(line, itertools.repeat(texts, len(line)) if isinstance(texts, str) else texts, strict=True):
                axes.set(**{name: short(label)} if label else {})
        legend(self.figure, note)
        data = self.data[list(keep)] if len(keep) else self.data.drop(columns=["run", "code"], errors="ignore")
        return Drawing(self.figure, data.dropna(axis=1, how="all"), rows, **more)


def legend(figure: Figure, note: str = "") -> None:
    """One legend below all panels, every label once, in as many columns as fit; the note above it."""
    entries: dict[str, Any] = {}
    for axes in figure.axes:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            entries.setdefault(label, handle)
    if not entries:
        figure.supxlabel(note, fontsize=9)
    for fitting in range(min(4, len(entries)), 0, -1):
        below = {"loc": "outside lower center", "ncols": fitting, "title": note or None, "title_fontsize": "medium"}
        drawn = figure.legend(list(entries.values()), list(entries), handlelength=2.2, **below)
        if fitting == 1 or drawn.get_window_extent().width < figure.bbox.width:
            break
        drawn.remove()


def log_scale(axes: Axes, axis: str = "y") -> None:
    """Logarithmic axis with plain numbers on its ticks (20, 5,000), as perplexity is read."""
    axes.set(**{f"{axis}scale": "log"})
    one = axes.yaxis if axis == "y" else axes.xaxis
    low, high = sorted(one.get_view_interval())
    decades = np.log10(high / low) if low > 0 else 1
    one.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7) if decades < 0.7 else (1, 2, 5) if decades < 2.5 else (1,)))
    one.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}" if value >= 10 else f"{value:g}"))
    one.set_minor_formatter(NullFormatter())


def percent(*axes: Any) -> None:
    """Ticks of these matplotlib axes (`axes.xaxis`, …) in per cent of their fractions, the sign being in the label."""
    for one in axes:
        one.set_major_formatter(PercentFormatter(1.0, decimals=0, symbol=""))


def lines(
    axes: Axes,
    data: pd.DataFrame,
    looks: Looks = METHODS,
    *,
    x: str = "layers_removed",
    y: str = "value",
    series: str = "method",
    dodge: float | int = 0.0,
    **style: Any,
) -> None:
    """One line with markers for each value of the column `series`, with error bars where there are `low` and `high`.

    Randomly removed layers (`random`) are a band that the axis does not follow, the unpruned model (`dense`) is a level. dodge:
    shift along x from line to line that keeps error bars apart. style: of matplotlib, goes before the look.
    """
    others = [name for name in data[series].dropna().unique() if name not in ("random", "dense")]
    for place, name in enumerate(others):
        one = data[data[series] == name]
        curve(axes, one.assign(**{x: one[x] + dodge * (place - (len(others) - 1) / 2)}), looks[name], x=x, y=y, **style)
    if "dense" in set(data[series]):
        level(axes, data.loc[data[series] == "dense", y].iloc[0])
    if "random" in set(data[series]):
        random_band(axes, data[data[series] == "random"], x=x, below=data.loc[data[series].isin(others), y].max())
    ticks = data.loc[data[series].isin(others), x].dropna().unique()
    if x == "fraction":
        percent(axes.xaxis)
    elif len(ticks) and not np.mod(ticks, 1).any():
        axes.xaxis.set_major_locator(FixedLocator(ticks) if len(ticks) <= 8 else MaxNLocator(integer=True))


def curve(axes: Axes, data: pd.DataFrame, look: Method, *, x: str = "layers_removed", y: str = "value", **style: Any) -> None:
    """One series as markers and lines, with error bars where `low` and `high` differ from the value; one row per x."""
    data = data.dropna(subset=[x, y]).sort_values(x)
    if data.empty:
        raise FigureError(f"nothing to draw: all values of {y} are missing")
    if len(twice := data[x][data[x].duplicated()].unique().tolist()):
        raise FigureError(f"several values of {y} at {x} = {twice}: summarize them with `spread` first")
    face = "white" if look.hollow else look.color
    look_of = {"color": look.color, "marker": look.marker, "linestyle": look.line, "markerfacecolor": face, "label": look.title}
    error = np.zeros((2, 1))
    if {"low", "high"} <= set(data):
        error = np.nan_to_num([data[y] - data["low"], data["high"] - data[y]]).clip(min=0)
    place, value = data[x].to_numpy(dtype=float), data[y].to_numpy(dtype=float)
    axes.errorbar(place, value, yerr=error if error.any() else None, elinewidth=1.0, **look_of | style)


def end_labels(axes: Axes, table: pd.DataFrame, looks: Looks = METHODS) -> None:
    """The title of every line (a column of `table`; the index is x) at its right end, or at the top if it leaves the axes."""
    top, place = axes.get_ylim()[1], -np.inf
    for name, line in table.ffill().sort_values(table.index[-1], axis=1).items():
        title, inside = looks[name].title.split(" (")[0], line[line <= top]
        style = {
            "color": "#666666" if name == "random" else looks[name].color,
            "fontsize": 10,
            "textcoords": "offset points",
            "va": "center",
        }
        if len(inside) == len(line.dropna()):
            place = max(line.iloc[-1], place + 0.055 * top)
            axes.annotate(title, (line.index[-1], place), xytext=(9, 0), **style)
        else:
            text = f"{title}: {line.iloc[-1]:.1f} at {line.index[-1]}"
            axes.annotate(text, (line.index[len(inside)], 0.97 * top), xytext=(5, 0), **style)


def random_band(axes: Axes, data: pd.DataFrame, *, x: str = "layers_removed", below: float | int, label: str = "") -> None:
    """Randomly removed layers as a line (`value`) and a band (`low` to `high`); the axis ends a little above `below`."""
    look, data = METHODS["random"], data.sort_values(x)
    label = label or f"{look.title} (median and min–max of {data['n'].max():.0f} draws)"
    bottom = axes.get_ylim()[0]
    axes.fill_between(data[x], data["low"], data["high"], color=look.color, alpha=0.25, linewidth=0, zorder=0.9)
    axes.plot(data[x], data["value"], color=look.color, zorder=0.95)
    # One entry in the legend for line and band: an empty area with the colors of both.
    axes.add_patch(Rectangle((0, 0), 0, 0, facecolor=to_rgba(look.color, 0.25), edgecolor=look.color, label=label))
    if data["high"].max() > 1.15 * below:
        axes.set_ylim(bottom, 1.15 * below)
        place = {"xycoords": "axes fraction", "va": "top", "color": "#666666", "fontsize": 8}
        axes.annotate(f"band goes up to {data['high'].max():,.4g}", (0.03, 0.97), **place)


def level(axes: Axes, value: float | int, label: str = "dense", color: str = "black", line: str = ":") -> None:
    """A horizontal line: the unpruned model, chance, a limit."""
    axes.axhline(value, color=color, linestyle=line, linewidth=1.2, zorder=1, label=label)


def dots(
    axes: Axes, data: pd.DataFrame, looks: Looks = METHODS, *, order: Sequence[str], high: float | int, low: float | int = 0.0
) -> None:
    """One line per method, in the given order from top to bottom: a dot at `value` and a bar from `low` to `high`.

    low, high: ends of the axis; a dot beyond `high` stands at the edge with its number beside it.
    """
    for row in data.itertuples():
        look, place = looks[row.method], list(order).index(row.method)
        if row.value <= high:
            axes.plot([row.low, min(row.high, high)], [place, place], color=look.color, linewidth=1.4)
            axes.plot([row.value], [place], look.marker, color=look.color, clip_on=False)
        else:
            axes.plot([high], [place], ">", color=look.color, clip_on=False)
            beside = {"ha": "right", "va": "center", "xytext": (-5, 0), "textcoords": "offset points"}
            axes.annotate(f"{row.value:.1f} ", (high, place), **beside)
    titled_rows(axes, [looks[method].title for method in order])
    axes.set_xlim(low - 0.03 * (high - low), high)


def titled_rows(axes: Axes, titles: Sequence[str]) -> None:
    """One line per title on the y axis, the first on top."""
    axes.set_yticks(range(len(titles)), titles)
    axes.set_ylim(len(titles) - 0.5, -0.5)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="y", visible=False)


def layer_bars(axes: Axes, data: pd.DataFrame, look: Method) -> None:
    """A bar per `layer`, pale where it is `removed`, with error bars from `low` and `high`; hollow ones are hatched."""
    error = None
    if "low" in data and data["low"].notna().all():
        error = [data["value"] - data["low"], data["high"] - data["value"]]
    filled = {"color": "white", "hatch": "////"} if look.hollow else {"color": look.color}
    style = {"edgecolor": look.color, "error_kw": {"elinewidth": 0.8, "capsize": 1.5, "ecolor": "#333333"}}
    bars = axes.bar(data["layer"], data["value"], 0.8, yerr=error, **filled, **style)
    for bar, gone in zip(bars, data.get("removed", itertools.repeat(False)), strict=False):
        bar.set_alpha(0.3 if gone else None)
    axes.set_xlim(data["layer"].min() - 0.7, data["layer"].max() + 0.7)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=9))
    axes.grid(visible=False, axis="x")


def heatmap(axes: Axes, table: pd.DataFrame, *, label: str, colormap: str = "cividis", **options: Any) -> None:
    """A table (index = y, columns = x) as colored cells; missing cells stay white, numbers (`annot`) can be read on each.

    label: what the colors mean. options: of `seaborn.heatmap`. cividis reads the same with and without color vision.
    """
    options = {"annot_kws": {"fontsize": 8}, "linewidths": 0.6, "linecolor": "white", **options}
    seaborn.heatmap(table.astype(float), ax=axes, cmap=colormap, cbar_kws={"label": label, "pad": 0.02}, **options)
    colors = axes.collections[0].get_facecolors()[table.notna().to_numpy().ravel()]
    for text, color in zip(axes.texts, colors, strict=False):
        text.set_color("black" if relative_luminance(color) > 0.179 else "white")  # whichever has more contrast (WCAG 2)
    axes.grid(visible=False)
    axes.tick_params(length=0, rotation=0)
