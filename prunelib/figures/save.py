"""One function per figure: from the tables of results to the four files of a stem, with nothing untraceable in between.

A module of this package draws the figures of one chapter. Each of its functions is marked with `figure` and named by its stem:
it takes a `Chapter` (where the tables are, and the chapter's parameters) and returns a `Drawing`: the matplotlib figure, the
plotted numbers, and the rows of results behind them. Calling it writes `<stem>.png`, `.pdf`, `.csv` and `.json`.

The same data gives the same bytes: no dates in any of the files, and files that would not change are left as they are. The json
names the code by hashes instead of the git commit: a file cannot hold the commit that it becomes part of.
"""

import functools
import hashlib
import importlib.metadata
import io
import os
import re
import shutil
import sys
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from PIL import Image

from prunelib.io import at_root, file_sha256, from_root, leftovers, temporary_prefix, write_json
from prunelib.lab.profile import STEM, figure_suffixes
from prunelib.lab.runs import PATHS, collect, read_table, write_table

PICTURES = (".png", ".pdf")
PAPERS = {
    "simdiff": "SimDiff, arXiv 2604.19520",
    "dynamic_slicing": "Dynamic LLM Slicing, arXiv 2411.03513",
    "deeper_layers": "The Unreasonable Ineffectiveness of the Deeper Layers, arXiv 2403.17887",
    "slicegpt": "SliceGPT, arXiv 2401.15024",
}
LIBRARIES = ("matplotlib", "numpy", "pandas", "seaborn")


class FigureError(ValueError):
    """A figure that must not be saved: no numbers, a wrong stem."""


@dataclass
class Chapter:
    """What a chapter draws from: its parameters.

    parameters: all of the chapter's. Those that name tables are read by `table`: the path of a table (CSV), a folder with run
    files, or a list of run files; the others are settings, recorded with each figure. folder: where the figures go.
    """

    folder: str | os.PathLike
    parameters: dict[str, Any] = field(default_factory=dict)
    _tables: dict[str, pd.DataFrame] = field(default_factory=dict, repr=False)

    def __getitem__(self, name: str) -> Any:
        """A parameter. Raises KeyError naming those there are."""
        if name not in self.parameters:
            raise KeyError(f"no parameter {name!r} in this chapter; there are: {', '.join(self.parameters)}")
        return self.parameters[name]

    def table(self, name: str) -> pd.DataFrame:
        """The table behind a parameter, read once, with the column `name`: the last part of the model's name.

        The same digits whether it is read from its CSV or from run files: those of `write_table`.
        """
        if name not in self._tables:
            source = self[name]
            if isinstance(source, str | os.PathLike) and Path(source).suffix == ".csv":
                found = read_table(source)
            else:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # several versions of the library: the record of the figure names them
                    found = collect(source)
                found = pd.read_csv(io.StringIO(found.to_csv(index=False, float_format="%.10g")), low_memory=False)
            self._tables[name] = found.assign(name=found["model"].str.rsplit("/", n=1).str[-1])
        return self._tables[name].copy()


@dataclass(frozen=True)
class Drawing:
    """What a figure function returns. figure: None for a table. data: exactly the plotted numbers. rows: rows of results behind
    them, with the columns `run` and `code`. published: files of published numbers that it read.
    """

    figure: Figure | None
    data: pd.DataFrame
    rows: pd.DataFrame
    published: Sequence[str] = ()


@dataclass(frozen=True)
class Entry:
    """A figure in the registry.

    reads: name of a table (a parameter of the chapter) → the parts of that experiment it needs, None for all.
    models: the index of the only model of the profile that it shows, None for all.
    """

    stem: str
    chapter: str
    draw: Callable[..., Drawing]
    reads: Mapping[str, Sequence[str] | None]
    models: int | None = None


FIGURES: dict[str, Entry] = {}
"""Every figure and table by its stem; a module of this package enters its own when it is imported."""


def figure(stem: str, *, reads: Mapping[str, Sequence[str] | None], models: int | None = None) -> Callable:
    """Decorator of a function `(chapter, **options) -> Drawing`, in a module whose `CHAPTER` is the stem of its notebook.

    The decorated function draws, writes the files of `stem` into `chapter.folder` and returns the `Drawing`.
    """

    def decorate(draw: Callable[..., Drawing]) -> Callable[..., Drawing]:
        @functools.wraps(draw)
        def drawn(chapter: Chapter, **options: Any) -> Drawing:
            drawing = draw(chapter, **options)
            write = save if drawing.figure is not None else save_table
            arguments = () if drawing.figure is None else (drawing.figure,)
            write(*arguments, stem, chapter.folder, data=drawing.data, provenance=origin(draw, chapter, drawing))
            return drawing

        module = sys.modules[draw.__module__]
        FIGURES[stem] = Entry(stem, module.CHAPTER, drawn, reads, models)
        return drawn

    return decorate


def origin(draw: Callable, chapter: Chapter, drawing: Drawing) -> dict:
    """Where the numbers of a figure come from: its function, the settings of its chapter, the runs, published files by hash."""
    missing = {"run", "code"} - set(drawing.rows)
    if missing:
        raise FigureError(f"`rows` has no column {', '.join(sorted(missing))}: give rows of results, published ones apart")
    settings = {name: value for name, value in chapter.parameters.items() if name not in PATHS and not _is_place(value)}
    return {
        "function": f"{draw.__module__}.{draw.__qualname__}",
        "drawing_code_sha256": _drawing_code(draw.__module__),
        "parameters": {name: _portable(value) for name, value in settings.items()},
        "inputs": {_portable(at_root(path)): file_sha256(at_root(path)) for path in sorted(drawing.published)},
        "runs": sorted(drawing.rows["run"].dropna().unique().tolist()),
        "run_code": sorted(drawing.rows["code"].dropna().unique().tolist()),
    }


def _is_place(value: Any) -> bool:
    """Whether a parameter names files: tables are recorded by the runs in them, wherever they lie."""
    return isinstance(value, list) or (isinstance(value, str) and "/" in value)


def save(
    figure: Figure, stem: str, folder: str | os.PathLike, *, data: pd.DataFrame, provenance: Mapping[str, Any]
) -> list[Path]:
    """Write `<stem>.png`, `.pdf`, `.csv` (the plotted numbers, all digits) and `.json` (their origin) into `folder`.

    All four are made before the first of an older set is replaced; if replacing fails, the older set comes back. The json
    holds the sha256 of the other three. The figure stays open: a notebook shows it once, at the end of its cell.

    Raises FigureError, before anything is written, when the stem does not follow `<paper>_fig<n>_<what>` or `own_<what>`, or
    when `data` is empty, has a column without any value, or an infinite number.
    """
    about = _about(stem)
    if figure_suffixes(stem) != (*PICTURES, ".csv", ".json"):
        raise FigureError(f"{stem} is the stem of a table: use save_table, or give the figure another name")
    data = _plain_table(data, stem)

    def draw(staged: Path) -> None:
        for suffix in PICTURES:
            write_picture(figure, staged / f"{stem}{suffix}")

    return _write_set(stem, folder, about, data, provenance, draw)


def save_table(stem: str, folder: str | os.PathLike, *, data: pd.DataFrame, provenance: Mapping[str, Any]) -> list[Path]:
    """Write `<stem>.csv` and `<stem>.json`, as `save` does for a figure. `markdown` renders `data` in a notebook."""
    about = _about(stem)
    if figure_suffixes(stem) != (".csv", ".json"):
        raise FigureError(f"{stem} is the stem of a figure: use save, or a stem with _table in it")
    return _write_set(stem, folder, about, _plain_table(data, stem), provenance, lambda staged: None)


def write_picture(figure: Figure, path: str | os.PathLike) -> Path:
    """One png or pdf without dates or versions in it: the same figure gives the same bytes."""
    path = Path(path)
    # Those of png and of pdf; None leaves the entry out.
    metadata = {".png": {"Software": None}, ".pdf": {"CreationDate": None, "Creator": None, "Producer": None}}
    if path.suffix not in metadata:
        raise FigureError(f"pictures are png or pdf, not {path.suffix or path.name!r}")
    if path.suffix == ".pdf":
        figure.savefig(path, metadata=metadata[path.suffix])
        return path
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png", metadata=metadata[path.suffix])
    with Image.open(drawn) as picture:
        # A palette of 256 colors takes a third of the bytes; what changes are shades at the edges of letters and lines.
        small = picture.convert("RGB").quantize(256, method=Image.Quantize.MEDIANCUT, kmeans=2, dither=Image.Dither.NONE)
        small.save(path, optimize=True, dpi=picture.info["dpi"])
    return path


def markdown(data: pd.DataFrame, *, digits: int | Mapping[str, int] = 2, missing: str = "–") -> str:
    """A table in Markdown: numbers to the right with `digits` decimals (for all, or one per column), whole ones as they are."""
    lines = [[str(name) for name in data.columns]]
    numeric = [pd.api.types.is_numeric_dtype(data[name]) for name in data.columns]
    for row in data.itertuples(index=False):
        places = [digits if isinstance(digits, int) else digits.get(str(name), 2) for name in data.columns]
        lines.append([_cell(value, place, missing) for value, place in zip(row, places, strict=True)])
    rule = ["---:" if number else "---" for number in numeric]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [lines[0], rule, *lines[1:]])


def _cell(value: Any, digits: int, missing: str) -> str:
    if value is None or value is pd.NA or (isinstance(value, float) and np.isnan(value)):
        return missing
    if isinstance(value, float | np.floating):
        return f"{value:,.{digits}f}"
    return str(value).replace("|", "\\|")


def _about(stem: str) -> dict:
    """Paper, number and content that a stem names."""
    rule = "a stem is <paper>_<fig|table><n>_<what> or own_<what>, in lower case"
    if not STEM.fullmatch(stem):
        raise FigureError(f"{stem!r} names no figure: {rule}")
    if stem.startswith("own_"):
        return {"figure": stem, "paper": None, "number": None}
    parts = re.fullmatch(r"(?P<paper>[a-z0-9_]+?)_(?P<number>(?:fig|table)[a-z0-9]+)_[a-z0-9_]+", stem)
    if parts is None or parts["paper"] not in PAPERS:
        raise FigureError(f"{stem!r} names no known paper ({', '.join(PAPERS)}): {rule}")
    return {"figure": stem, "paper": PAPERS[parts["paper"]], "number": parts["number"]}


def _plain_table(data: pd.DataFrame, stem: str) -> pd.DataFrame:
    """The table as it goes into the csv: index levels with names become columns."""
    if data.index.names != [None]:
        data = data.reset_index()
    if data.empty:
        raise FigureError(f"{stem}: the plotted data are empty; nothing is written without numbers")
    if isinstance(data.columns, pd.MultiIndex):
        raise FigureError(f"{stem}: the plotted data have several levels of columns; a csv holds one")
    for name in data.columns:
        if data[name].isna().all():
            raise FigureError(f"{stem}: column {name!r} of the plotted data has no value; leave it out")
        if pd.api.types.is_float_dtype(data[name]) and np.isinf(data[name].dropna().to_numpy(dtype=float)).any():
            raise FigureError(
                f"{stem}: column {name!r} of the plotted data is infinite somewhere; draw its logarithm or leave it out"
            )
    return data


def _write_set(
    stem: str, folder: str | os.PathLike, about: dict, data: pd.DataFrame, provenance: Mapping, draw: Any
) -> list[Path]:
    folder = at_root(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for left in leftovers(folder / stem):
        shutil.rmtree(left, ignore_errors=True)
    staged = Path(tempfile.mkdtemp(dir=folder, prefix=temporary_prefix(stem)))
    try:
        draw(staged)
        write_table(data, staged / f"{stem}.csv")
        drawn = sorted(staged.iterdir())
        record = {
            **about,
            **{name: _portable(value) for name, value in provenance.items()},
            "libraries": {name: importlib.metadata.version(name) for name in LIBRARIES},
            "files": {path.suffix.removeprefix("."): file_sha256(path) for path in drawn},
        }
        write_json(staged / f"{stem}.json", record)
        return _replace(staged, folder, [f"{stem}{suffix}" for suffix in figure_suffixes(stem)])
    finally:
        shutil.rmtree(staged, ignore_errors=True)


def _replace(staged: Path, folder: Path, names: Sequence[str]) -> list[Path]:
    """Move the new files into place, where they differ; if one cannot be moved, put all the old ones back."""
    names = [name for name in names if not _same(staged / name, folder / name)]
    old = staged / "old"
    old.mkdir()
    for name in names:
        if (folder / name).exists():
            shutil.copy2(folder / name, old / name)
    try:
        for name in names:
            os.replace(staged / name, folder / name)
    except OSError:
        for name in names:
            if (old / name).exists():
                os.replace(old / name, folder / name)
            elif not (staged / name).exists():
                (folder / name).unlink(missing_ok=True)
        raise
    return [folder / name for name in names]


def _same(path: Path, other: Path) -> bool:
    return other.is_file() and path.read_bytes() == other.read_bytes()


def _drawing_code(module: str) -> str:
    """sha256 over what draws a figure: its module, the style and this one. An edit elsewhere does not change its record."""
    digest = hashlib.sha256()
    here = Path(__file__).resolve().parent
    for path in sorted({here / "save.py", here / "style.py", Path(sys.modules[module].__file__)}):
        content = hashlib.sha256(path.read_bytes().replace(b"\r\n", b"\n")).hexdigest()
        digest.update(f"{path.name}\0{content}\n".encode())
    return digest.hexdigest()


def _portable(value: Any) -> Any:
    """Paths below the project root relative to it, others by their file name alone; everything else as it is."""
    if isinstance(value, Mapping):
        return {_portable(key): _portable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_portable(item) for item in value]
    if isinstance(value, os.PathLike) or (isinstance(value, str) and os.path.isabs(value)):
        path = from_root(at_root(value))
        return Path(path).name if os.path.isabs(path) else path
    return value
