"""Run files (JSON) and tables (CSV). A number exists only because a run file holds it; what is missing has no row.

A run is one JSON file, written by the last cell of its notebook:

    {"schema": 1, "experiment": "selection", "parameters": {…}, "rows": [{…, "metric": "ppl", "value": 9.7, "n": 512}],
     "seconds": 12.3, "peak_bytes": 812000000, "provenance": {…}, "extra": {…}}

A table of runs is two files: `<table>.csv` has the rows, with the column `run` (`<folder>/<stem>` of the run file), and
`<table>.runs.csv` has one line for each run: its scalar parameters, `experiment`, `seconds`, `peak_mib`, and `code`, the
hash of the library that made it. `read_table` joins them.
"""

import io
import json
import math
import os
import sys
import time
import warnings
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Integral, Real
from pathlib import Path

import pandas as pd

from prunelib.io import at_root, found, from_root, replacing, write_json
from prunelib.lab.parameters import parameters
from prunelib.lab.provenance import model_description, peak_bytes, record

SCHEMA = 1
VALUES = ("metric", "value", "n", "stderr")  # keys of a row that are not coordinates
COSTS = ("seconds", "peak_mib")  # of a run: only in the table of runs
RESERVED = ("run", "experiment", "code")
PUBLISHED = "data/published/published.csv"
PAPERS = {
    "simdiff": "SimDiff, arXiv 2604.19520",
    "dynamic_slicing": "Dynamic LLM Slicing, arXiv 2411.03513",
    "deeper_layers": "The Unreasonable Ineffectiveness of the Deeper Layers, arXiv 2403.17887",
    "slicegpt": "SliceGPT, arXiv 2401.15024",
}
# Parameters that name files of one machine or one batch; they stay in the run file.
PATHS = ("output", "data_dir", "task_data_dir", "statistics", "choices")
CSV = {"index": False, "lineterminator": "\n", "float_format": "%.10g"}

Source = str | os.PathLike | Iterable[str | os.PathLike]
"""A folder with run files at any depth, or the files."""


class ResultError(ValueError):
    """A run file, a row or a choice that must not become a number in a table."""


@dataclass
class Recorder:
    """A run while its notebook computes, made by `start`."""

    experiment: str
    parameters: dict
    rows: list[dict] = field(default_factory=list)
    started: float = field(default_factory=time.perf_counter)

    def add(self, place: Mapping, **values: float) -> None:
        """A row for each value: the coordinates, its name as the metric, and the value."""
        self.rows.extend({**place, "metric": metric, "value": value} for metric, value in values.items())

    def write(
        self, rows: Sequence[Mapping] = (), *, data: Mapping[str, str] | None = None, extra: Mapping | None = None
    ) -> Path:
        """Write the run file named by the parameter `output`, and print one line about it.

        The run has the rows of `add`, then `rows`; its time runs from `start`. `data` maps each text or file to its sha256.
        Raises ResultError as `write_run`.
        """
        values = {name: value for name, value in self.parameters.items() if name != "output"}
        device, model = values.get("device", "cpu"), values.get("model")
        described = model_description(model) if model is not None else None
        path = write_run(
            self.parameters["output"],
            experiment=self.experiment,
            parameters=values,
            rows=[*self.rows, *rows],
            provenance=record(data=data, model=described, device=device),
            seconds=time.perf_counter() - self.started,
            peak_bytes=peak_bytes(device),
            extra=extra,
        )
        print(summary(path))
        return path


def start(experiment: str, namespace: dict[str, object]) -> Recorder:
    """Begin a run: `namespace` is the `globals()` of the notebook, where so far only the parameters have plain values.

    Those of an experiment are read once more, in place: plain papermill takes `-p stream false` for a text, which is true.
    Raises ParameterError.
    """
    for notebook in (at_root(f"notebooks/experiments/{experiment}.ipynb"), at_root(f"notebooks/{experiment}.ipynb")):
        known = parameters(notebook) if notebook.is_file() else {}
        namespace |= {name: known[name].checked(namespace[name]) for name in known.keys() & namespace}
    ours = {name: value for name, value in namespace.items() if not name.startswith("_") and name not in ("In", "Out")}
    return Recorder(
        experiment, {name: value for name, value in ours.items() if isinstance(value, bool | int | float | str | list | None)}
    )


def write_run(
    path: str | os.PathLike,
    *,
    experiment: str,
    parameters: Mapping,
    rows: Sequence[Mapping],
    provenance: Mapping,
    seconds: float,
    peak_bytes: int | None = None,
    extra: Mapping | None = None,
) -> Path:
    """Validate a run and write it, complete or not at all; an older file stays until the new one is ready.

    rows: coordinates plus `metric`, `value` and optionally `n` (items behind the value) and `stderr`; empty for a run that only
    made arrays. A path inside the clone is recorded relative to it. Raises ResultError naming the row and the key.
    """
    path = at_root(path)
    inside = {name: from_root(at) for name, at in parameters.items() if isinstance(at, str) and os.path.isabs(at)}
    run = {
        "schema": SCHEMA,
        "experiment": experiment,
        "parameters": {**parameters, **inside},
        "rows": [dict(row) for row in rows],
        "seconds": seconds,
        "peak_bytes": peak_bytes,
        "provenance": dict(provenance),
        "extra": dict(extra or {}),
    }
    _validate(run, path)
    return write_json(path, run)


def read_run(path: str | os.PathLike) -> dict:
    """A run file, checked. Raises ResultError when it is not one, FileNotFoundError when it is not there."""
    path = found(path)
    try:
        run = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ResultError(f"{path} is not JSON ({error}): delete it and run its notebook again") from None
    _validate(run, path)
    return run


def _validate(run: object, path: Path) -> None:
    keys = {"experiment", "parameters", "rows", "seconds", "peak_bytes", "provenance"}
    if not isinstance(run, dict) or run.get("schema") != SCHEMA or not keys <= run.keys():
        raise ResultError(f"{path} is not a run file of schema {SCHEMA}: run its notebook again")
    for key, value in (("seconds", run["seconds"]), ("peak_bytes", run["peak_bytes"] or 0)):
        if not _is_number(value, least=0):
            raise ResultError(f"{path}: `{key}` = {value!r} is not a number from 0 on")
    if taken := run["parameters"].keys() & {*VALUES, *COSTS, *RESERVED}:
        raise ResultError(f"{path}: a parameter cannot be called `{min(taken)}`, the table has a column of that name")
    for index, row in enumerate(run["rows"]):
        if fault := _fault(row, run["parameters"]):
            raise ResultError(f"{path}: row {index} ({row.get('metric')}): {fault}")


def _fault(row: Mapping, parameters: Mapping) -> str | None:
    """What keeps a row out of a table."""
    if not isinstance(row.get("metric"), str) or "value" not in row:
        return "it has no `metric` or no `value`"
    for name, kind, least in (("value", Real, -math.inf), ("n", Integral, 1), ("stderr", Real, 0)):
        if (name == "value" or row.get(name) is not None) and not _is_number(row[name], kind, least):
            return f"{name} = {row[name]!r} is not a finite number from {least} on; leave out what there is not"
    for name, value in row.items():
        if name in RESERVED:
            return f"`{name}` is a column that the table fills itself"
        if isinstance(value, list | tuple | dict | set) or (isinstance(value, Real) and not abs(value) < math.inf):
            return f"`{name}` = {value!r}: a cell holds one finite value; leave a missing coordinate out"
        if isinstance(value, str) and "\r" in value:
            return f"`{name}` = {value!r} holds a carriage return, which readers of a table take for the end of its line"
        if name in parameters and name not in PATHS and parameters[name] != value:
            return f"`{name}` = {value!r}, but the parameter of that name is {parameters[name]!r}: rename the column"
    return None


def _is_number(value: object, kind: type = Real, least: float | int = -math.inf) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool) and bool(abs(value) < math.inf and value >= least)


def summary(path: str | os.PathLike) -> str:
    """One line about a run: what, how many rows, seconds, memory."""
    run = read_run(path)
    memory = f", {run['peak_bytes'] / 2**20:.0f} MiB" if run["peak_bytes"] is not None else ""
    return f"{run_id(path)}: {len(run['rows'])} rows, {run['seconds']:.1f} s{memory}"


def run_id(path: str | os.PathLike) -> str:
    """`<folder>/<stem>` of a run file: the value of the column `run`."""
    path = Path(path)
    return f"{path.absolute().parent.name}/{path.stem}"


def read_choices(
    path: str | os.PathLike, *, model: str, methods: Collection[str], sizes: Collection[int]
) -> dict[tuple[str, int], tuple[int, ...]]:
    """The sets of layers that a run of selection or blocks chose: (method, K) → removed layers, ascending.

    Of several calibration draws, those of the first seed. Pairs that the run does not have are left out, as long as every
    method has one. Raises ResultError when the run is of another model, or has no choice of a method.
    """
    run = read_run(path)
    if run["parameters"]["model"] != model:
        raise ResultError(f"{path} holds choices for {run['parameters']['model']}, not for {model}")
    rows = [row for row in run["rows"] if row.get("role") == "choice" and row["metric"] == "nll" and "removed_layers" in row]
    draw = min((row["calibration_seed"] for row in rows if "calibration_seed" in row), default=None)
    found = {}
    for row in rows:
        size = row.get("layers_removed", row.get("size"))
        if row["method"] in methods and size in sizes and row.get("calibration_seed", draw) == draw:
            found[row["method"], size] = tuple(int(layer) for layer in row["removed_layers"].split())
    if missing := [name for name in methods if name not in {method for method, _ in found}]:
        known = ", ".join(sorted({row["method"] for row in rows}))
        raise ResultError(f"{path} has no choice of {missing[0]!r} with K in {sorted(sizes)}; its methods are: {known}")
    return found


def published(paper: str | None = None, item: str | None = None) -> pd.DataFrame:
    """Rows of data/published/published.csv: the numbers that papers printed, never those of runs.

    paper, item: as in that file, for instance "simdiff" and "fig4a". Raises ResultError naming what there is.
    """
    table = pd.read_csv(at_root(PUBLISHED), dtype={"layers_removed": "Int64"})
    for column, name in (("paper", paper), ("item", item)):
        known = table[column].unique()
        if name is not None and name not in known:
            raise ResultError(f"{PUBLISHED} has no {column} {name!r}; there are: {', '.join(known)}")
        table = table[(table[column] == name) | (name is None)]
    return table.reset_index(drop=True)


def collect(source: Source) -> pd.DataFrame:
    """The table of all runs, as `read_table` would read it.

    Columns: `run`, `experiment`, parameters and coordinates of the rows (sorted; those without any value are left out),
    `metric`, `value`, `n`, `stderr` and `code`. Lines are sorted by run. Cells without a value are missing, never 0. Warns when
    runs of different library code meet. Raises ResultError when there is no run, one is invalid, or two have the same id.
    """
    return _joined(*(_read_csv(io.StringIO(table.to_csv(**CSV))) for table in _collected(source)))


def write_runs(source: Source, path: str | os.PathLike) -> pd.DataFrame:
    """Write the table of `collect` as `path` and, beside it, the table of runs. Raises the same errors, and OSError."""
    rows, runs = _collected(source)
    # The rows last: they are what a batch looks for, and without their runs they would say nothing.
    write_table(runs, runs_table(path))
    write_table(rows, path)
    return read_table(path)


def write_table(table: pd.DataFrame, path: str | os.PathLike) -> Path:
    """Write a table as CSV, complete or not at all. Ten significant digits: those behind differ between machines."""
    path = at_root(path)
    with replacing(path) as temporary:
        table.to_csv(temporary, **CSV)
    return path


def read_table(path: str | os.PathLike) -> pd.DataFrame:
    """A table of runs from its two files. Raises ResultError when they do not belong together, and FileNotFoundError."""
    rows, runs = _read_csv(at_root(path)), _read_csv(at_root(runs_table(path)))
    if not runs["run"].is_unique or not rows["run"].isin(runs["run"]).all():
        raise ResultError(f"{path} and {runs_table(path)} name different runs: make both again")
    return _joined(rows, runs)


def runs_table(path: str | os.PathLike) -> Path:
    """`<table>.runs.csv`, the table of runs that belongs to `<table>.csv`."""
    return Path(path).with_suffix(".runs.csv")


def _collected(source: Source) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The rows of all runs, without what their run says for all of them; and the runs."""
    folder = isinstance(source, str | os.PathLike)
    files = at_root(source).rglob("[!.]*.json") if folder else map(at_root, source)
    named = sorted((run_id(path), path) for path in files)
    if not named or len(dict(named)) < len(named):
        what = "two run files of one name" if named else "no run"
        raise ResultError(f"{what} in {source}: a table needs runs of distinct names (`make figures` makes them)")
    rows, runs = [], []
    for name, file in named:
        run = read_run(file)
        scalars = {
            key: value for key, value in run["parameters"].items() if not (key in PATHS or isinstance(value, list | dict))
        }
        code, peak = run["provenance"].get("source_sha256"), run["peak_bytes"]
        costs = {"seconds": round(run["seconds"], 1), "peak_mib": round(peak / 2**20) if peak else None}
        runs.append({"run": name, "experiment": run["experiment"], **scalars, **costs, "code": code[:12] if code else None})
        rows.extend({"run": name, **{key: row[key] for key in row if key not in scalars}} for row in run["rows"])
    codes = {run["code"] for run in runs if run["code"]}
    if len(codes) > 1:
        warnings.warn(f"runs of {len(codes)} versions of the library: `snakemake --forceall` makes all again", stacklevel=3)
    rows, runs = (pd.DataFrame(found).convert_dtypes() for found in (rows, runs))  # integers stay so beside missing cells
    return _ordered(rows, ("run",), VALUES), _ordered(runs, ("run", "experiment"), (*COSTS, "code"))


def _ordered(table: pd.DataFrame, first: Sequence[str], last: Sequence[str]) -> pd.DataFrame:
    """Columns `first`, those with any value (sorted), and `last`."""
    names = table.columns[table.notna().any()].difference([*first, *last])
    return table.reindex(columns=[*first, *names, *last])


def _read_csv(source: object) -> pd.DataFrame:
    return pd.read_csv(source, low_memory=False, dtype={"code": str})


def _joined(rows: pd.DataFrame, runs: pd.DataFrame) -> pd.DataFrame:
    """Every row with its run. A name that both have, a coordinate here and a parameter there, is filled from the run."""
    of_rows = runs.drop(columns=list(COSTS)).set_index("run").loc[rows["run"]].reset_index()
    return _ordered(rows.combine_first(of_rows), ("run", "experiment"), (*VALUES, "code"))


def main(arguments: Sequence[str]) -> int:
    """`python -m prunelib.lab.runs RUNS… OUT.csv` of run files. Exit status 1: no table was written."""
    *sources, out = (Path(argument).absolute() for argument in arguments)
    try:
        table = write_runs(sources, out)
    except (ResultError, OSError) as error:
        print(f"results: {error}", file=sys.stderr)
        return 1
    print(f"{from_root(out)}: {len(table)} rows of {len(sources)} runs")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
