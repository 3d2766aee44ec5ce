"""Figures and tables by their stem, and their files: png, pdf, the plotted numbers (csv) and where these come from (json).

The same data gives the same bytes: no dates in any of the files, and files that would not change are left as they are. The json
names the code by hashes instead of the git commit: a file cannot hold the commit that it becomes part of.
"""

import functools
import hashlib
import importlib
import importlib.metadata
import io
import json
import os
import re
import sys
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from PIL import Image

from prunelib import claims
from prunelib.claims import markdown
from prunelib.io import at_root, file_sha256, from_root, plain, replacing
from prunelib.lab.provenance import model_title
from prunelib.lab.runs import CSV, PAPERS, ResultError

LIBRARIES = ("matplotlib", "numpy", "pandas", "seaborn")
STEM = re.compile(r"own_[a-z0-9_]+|(?P<paper>[a-z][a-z0-9_]*?)_(?P<number>(?:fig|table)[a-z0-9]+)_[a-z0-9_]+")


class FigureError(ValueError):
    """A figure that cannot be drawn or must not be saved: a group or column is missing, no numbers, a wrong stem."""


@dataclass
class Chapter:
    """What a chapter draws from: its parameters, tables among them, and the folder that its figures go to."""

    folder: str | os.PathLike
    parameters: dict[str, Any] = field(default_factory=dict)
    _tables: dict[str, pd.DataFrame] = field(default_factory=dict, repr=False)

    def __getitem__(self, name: str) -> Any:
        if name not in self.parameters:
            raise FigureError(f"no parameter {name!r} in this chapter; there are: {', '.join(self.parameters)}")
        return self.parameters[name]

    def table(self, name: str) -> pd.DataFrame:
        """The table behind a parameter, read once: the path of a CSV, a folder with run files, or a list of run files."""
        if name not in self._tables:
            try:
                self._tables[name] = claims.load(self[name])
            except (FileNotFoundError, ResultError) as error:
                raise FigureError(f"{name} = {self[name]!r}: {error}; run the experiment or pass its table") from None
        return self._tables[name].copy()

    def models(self, table: str) -> list[str]:
        """Names of the models in a table, in its order."""
        return list(self.table(table)["model"].unique())


@dataclass(frozen=True)
class Drawing:
    """What a figure function returns.

    figure: None for a table. data: exactly the plotted numbers. rows: rows of results behind them, with the columns `run` and
    `code`. text: Markdown shown with it in a notebook; of a table by default the table. published: files of published numbers.
    """

    figure: Figure | None
    data: pd.DataFrame
    rows: pd.DataFrame
    text: str | None = None
    published: Sequence[str] = ()

    def _ipython_display_(self) -> None:
        """Show the text; the notebook's backend shows the figure itself."""
        from IPython.display import Markdown, display

        text = markdown(self.data) if self.text is None and self.figure is None else self.text
        if text:
            display(Markdown(text))


@dataclass(frozen=True)
class Entry:
    """A figure in the registry; the fields are the arguments of `figure`."""

    stem: str
    chapter: str
    draw: Callable[..., Drawing]
    reads: Mapping[str, Sequence[str] | None]
    models: int | tuple[str, int] | None = None


FIGURES: dict[str, Entry] = {}
"""Every figure and table by its stem; a module of this package enters its own when it is imported."""


def registry() -> dict[str, Entry]:
    """`FIGURES` with the entries of every module of this package."""
    for path in sorted(Path(__file__).resolve().parent.glob("[!_]*.py")):
        importlib.import_module(f"prunelib.figures.{path.stem}")
    return FIGURES


def figure_suffixes(stem: str) -> tuple[str, ...]:
    """A figure is png, pdf, the plotted numbers and their provenance; a table has no picture."""
    return (".csv", ".json") if re.match(r"[a-z0-9_]*_table", stem) else (".png", ".pdf", ".csv", ".json")


def figure_stems(notebook: str | os.PathLike) -> list[str]:
    """Stems of the figures and tables that a chapter shows: the names in backticks in its headings."""
    cells = json.loads(at_root(notebook).read_text(encoding="utf-8"))["cells"]
    lines = [line for cell in cells if cell["cell_type"] == "markdown" for line in "".join(cell["source"]).splitlines()]
    names = [name for line in lines if line.startswith("#") for name in re.findall(r"`([^`]+)`", line)]
    return list(dict.fromkeys(name for name in names if STEM.fullmatch(name)))


def figure(stem: str, *, reads: Mapping[str, Sequence[str] | None], models: int | tuple[str, int] | None = None) -> Callable:
    """Decorator of a function `(chapter, **options) -> Drawing`, in a module whose `CHAPTER` is the stem of its notebook.

    The decorated function draws, writes the files of `stem` into `chapter.folder` and returns the `Drawing`.
    reads: name of a table (a parameter of the chapter) → the parts of that experiment it needs, None for all.
    models: index of the only model of the profile that it shows, None for all; ("text", index): the first with that text in its
        name, else that index.
    """

    def decorate(draw: Callable[..., Drawing]) -> Callable[..., Drawing]:
        @functools.wraps(draw)
        def drawn(chapter: Chapter, **options: Any) -> Drawing:
            drawing = draw(chapter, **options)
            about = {"numbers": numbers_of(chapter, reads, drawing.rows), **origin(draw, chapter, drawing)}
            if drawing.figure is None:
                drawing = replace(drawing, text=f"{drawing.text or markdown(drawing.data)}\n\n*{about['numbers']}*")
            else:
                title = " ".join(drawing.figure.get_suptitle().split())
                about = ({"title": title} if title else {}) | about
                _subtitle(drawing.figure, textwrap.fill(about["numbers"], 120))
            save(drawing, stem, chapter.folder, provenance=about)
            return drawing

        FIGURES[stem] = Entry(stem, sys.modules[draw.__module__].CHAPTER, drawn, reads, models)
        return drawn

    return decorate


def _subtitle(figure: Figure, text: str) -> None:
    """A small line at the top of a figure, below its title if it has one."""
    small, left, title = {"fontsize": 7, "color": "#555555"}, {"x": 0.01, "ha": "left"}, figure.get_suptitle()
    if not title:
        figure.suptitle(text, **left, **small)
        return
    whole = figure.suptitle(title + "\n" * (text.count("\n") + 1), **left)  # the empty lines keep room for the text
    figure.axes[0].annotate(text, (0, 0), xycoords=whole, va="bottom", annotation_clip=False, **small).set_in_layout(False)


def pick(table: pd.DataFrame, *, may_be_empty: bool = False, **where: Any) -> pd.DataFrame:
    """Rows of a table where every given column has the given value, one of several (tuple, set), or one of a list.

    Raises FigureError for an unknown column and, unless `may_be_empty`, when no row is left or a value of a list has no row: it
    names the first condition that nothing meets and the values that there are.
    """
    for column, value in where.items():
        if column not in table:
            raise FigureError(f"the table has no column {column!r}; it has {', '.join(map(str, table))}")
        found = claims.pick(table, **{column: value})
        lacking = [one for one in value if not (found[column] == one).any()] if isinstance(value, list) else []
        if (found.empty or lacking) and not may_be_empty:
            there = ", ".join(map(str, table[column].dropna().unique()[:20]))
            wanted = ", ".join(f"{name} = {one!r}" for name, one in (where | {column: lacking or value}).items())
            raise FigureError(f"no rows of results for {wanted}: {column} is one of {there or 'nothing'}")
        table = found
    return table


def numbers_of(chapter: Chapter, reads: Iterable[str], rows: pd.DataFrame) -> str:
    """Whose numbers a figure shows: its models in full, and whether this batch ran them or they are committed results."""
    values, live = [chapter.parameters.get(name) for name in reads], chapter.parameters.get("live")
    folders = {live if isinstance(at, list) else str(Path(at).parent) if at.endswith(".csv") else at for at in values if at}
    committed, names = sorted(folders - {live}), rows.get("model", [chapter.parameters.get("model")])
    models = ", ".join(model_title(name) for name in pd.Series(names, dtype=object).dropna().unique())
    run = "live run" if live in folders or not folders else ""
    return "; ".join(filter(None, [models, run, f"committed results ({', '.join(committed)})" if committed else ""]))


def origin(draw: Callable, chapter: Chapter, drawing: Drawing) -> dict:
    """Where the numbers of a figure come from: its function, the settings of its chapter, the runs, published files by hash."""
    missing = {"run", "code"} - set(drawing.rows)
    if missing:
        raise FigureError(f"`rows` has no column {', '.join(sorted(missing))}: give rows of results, published ones apart")
    settings = {name: value for name, value in sorted(chapter.parameters.items()) if name not in ("output", "figures", "live")}
    if "model" in settings:
        settings["model"] = Path(settings["model"]).name
    # What draws a figure: its module, this one and the style. An edit elsewhere does not change its record.
    sources = [sys.modules[draw.__module__].__file__, *map(Path(__file__).with_name, ("save.py", "style.py", "methods.csv"))]
    return {
        "function": f"{draw.__module__}.{draw.__qualname__}",
        "drawing_code_sha256": hashlib.sha256(b"".join(Path(path).read_bytes() for path in sources)).hexdigest(),
        # Tables are recorded by the runs in them, wherever they lie.
        "parameters": {name: value for name, value in settings.items() if not (isinstance(value, list) or "/" in str(value))},
        "inputs": {from_root(at_root(path)): file_sha256(at_root(path)) for path in sorted(drawing.published)},
        "runs": sorted(drawing.rows["run"].dropna().unique()),
        "run_code": sorted(drawing.rows["code"].dropna().unique()),
    }


def save(drawing: Drawing, stem: str, folder: str | os.PathLike, *, provenance: Mapping[str, Any]) -> list[Path]:
    """Write the files of a stem: the plotted numbers (csv), their origin (json) and, unless it is a table, png and pdf.

    All are made before the first older one is replaced. The json holds the text and the sha256 of the others. The figure stays
    open.

    Raises FigureError, before anything is written, when the stem does not follow `<paper>_fig<n>_<what>`,
    `<paper>_table<n>_<what>` or `own_<what>`, or the data are empty, have a column without any value or an infinite number.
    """
    parts, suffixes = STEM.fullmatch(stem), figure_suffixes(stem)
    if not parts or parts["paper"] not in (None, *PAPERS):
        papers = ", ".join(PAPERS)
        raise FigureError(
            f"{stem!r} names no figure: a stem is <paper>_<fig|table><n>_<what>, with a paper of {papers}, or own_<what>"
        )
    if (".png" in suffixes) != (drawing.figure is not None):
        raise FigureError(f"{stem} is the stem of a {'figure' if '.png' in suffixes else 'table'}, the drawing is not")
    if drawing.data.empty:
        raise FigureError(f"{stem}: the plotted data are empty; nothing is written without numbers")
    for name, column in drawing.data.items():
        if column.isna().all() or (
            pd.api.types.is_float_dtype(column) and np.isinf(column.dropna().to_numpy(dtype=float)).any()
        ):
            raise FigureError(f"{stem}: column {name!r} of the plotted data has no value or an infinite one; leave it out")
    files = {suffix: picture(drawing.figure, suffix) for suffix in suffixes[:-2]}
    files[".csv"] = drawing.data.to_csv(**CSV).encode()
    hashes = {suffix.removeprefix("."): hashlib.sha256(content).hexdigest() for suffix, content in files.items()}
    about = {"figure": stem, "paper": PAPERS.get(parts["paper"]), "number": parts["number"], **provenance}
    libraries = {name: importlib.metadata.version(name) for name in LIBRARIES}
    about |= {"text": drawing.text, "libraries": libraries, "files": hashes}
    files[".json"] = (json.dumps(about, indent=1, ensure_ascii=False, allow_nan=False, default=plain) + "\n").encode()
    paths = []
    for suffix, content in files.items():
        paths.append(at_root(folder) / f"{stem}{suffix}")
        if not paths[-1].is_file() or paths[-1].read_bytes() != content:
            with replacing(paths[-1]) as temporary:
                temporary.write_bytes(content)
    return paths


def picture(figure: Figure, suffix: str) -> bytes:
    """A .png or .pdf without dates or versions in it: the same figure gives the same bytes."""
    drawn, small = io.BytesIO(), io.BytesIO()
    names = ("CreationDate", "Creator", "Producer") if suffix == ".pdf" else ("Software",)
    figure.savefig(drawn, format=suffix.removeprefix("."), metadata=dict.fromkeys(names))
    if suffix == ".pdf":
        return drawn.getvalue()
    with Image.open(drawn) as image:
        # A palette of 64 colors takes a fourth of the bytes; what changes are shades at the edges of letters and lines.
        palette = image.convert("RGB").quantize(64, method=Image.Quantize.MEDIANCUT, kmeans=2, dither=Image.Dither.NONE)
        palette.save(small, format="png", optimize=True, dpi=image.info["dpi"])
    return small.getvalue()
