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

from prunelib.io import at_root, from_root, replacing, write_json
from prunelib.lab.provenance import model_fingerprint, peak_bytes, record

SCHEMA = 1
VALUES = ("metric", "value", "n", "stderr")  # keys of a row that are not coordinates
COSTS = ("seconds", "peak_mib")  # of a run: only in the table of runs
RESERVED = ("run", "experiment", "code")
SCALAR = bool | int | float | str | None
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


class ResultError(ValueError):
    """A run file, a row or a choice that must not become a number in a table."""


@dataclass
class Recorder:
    """A run while its notebook computes, made by `start`."""

    experiment: str
    parameters: dict
    started: float = field(default_factory=time.perf_counter)

    def write(self, rows: Sequence[Mapping], *, data: Mapping[str, str] | None = None, extra: Mapping | None = None) -> Path:
        """Write the run file named by the parameter `output`, and print one line about it.

        The time runs from `start`; parameters, model and device are those of the notebook. `data` maps each text or file to its
        sha256. Raises the same errors as `write_run`.
        """
        values = {name: value for name, value in self.parameters.items() if name != "output"}
        device, model = values.get("device", "cpu"), values.get("model")
        described = {"name": model, "fingerprint": model_fingerprint(model)} if model is not None else None
        path = write_run(
            self.parameters["output"],
            experiment=self.experiment,
            parameters=values,
            rows=rows,
            provenance=record(data=data, model=described, device=device),
            seconds=time.perf_counter() - self.started,
            peak_bytes=peak_bytes(device),
            extra=extra,
        )
        print(summary(path))
        return path


def start(experiment: str, namespace: Mapping[str, object]) -> Recorder:
    """Begin a run: `namespace` is the `globals()` of the notebook, where so far only the parameters have plain values."""
    ours = {name: value for name, value in namespace.items() if not name.startswith("_") and name not in ("In", "Out")}
    return Recorder(experiment, {name: value for name, value in ours.items() if isinstance(value, SCALAR | list)})


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
    made arrays. Relative paths are below the project root. Raises ResultError naming the row and the key.
    """
    path = at_root(path)
    run = {
        "schema": SCHEMA,
        "experiment": experiment,
        # A path inside the clone is recorded relative to it.
        "parameters": {
            name: from_root(value) if isinstance(value, str) and os.path.isabs(value) else value
            for name, value in parameters.items()
        },
        "rows": [dict(row) for row in rows],
        "seconds": seconds,
        "peak_bytes": peak_bytes,
        "provenance": dict(provenance),
        "extra": dict(extra or {}),
    }
    _validate(run, path)
    return write_json(path, run)


def write_table(table: pd.DataFrame, path: str | os.PathLike) -> Path:
    """Write a table as CSV, complete or not at all. Ten significant digits: those behind differ between machines."""
    path = at_root(path)
    with replacing(path) as temporary:
        table.to_csv(temporary, **CSV)
    return path


def read_run(path: str | os.PathLike) -> dict:
    """A run file, checked. Raises ResultError when it is not one, FileNotFoundError when it is not there."""
    path = at_root(path)
    try:
        run = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ResultError(f"{path} is not JSON ({error}): delete it and run its notebook again") from None
    _validate(run, path)
    return run


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

    Of several calibration draws in the run, those of the first seed. Pairs that the run does not have are left out, as long as
    every method has one. Raises ResultError when the run is of another model, or has no choice of a method.
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
    missing = [name for name in methods if not any(method == name for method, _ in found)]
    if missing:
        known = ", ".join(sorted({row["method"] for row in rows}))
        raise ResultError(f"{path} has no choice of {missing[0]!r} with K in {sorted(sizes)}; its methods are: {known}")
    return found


def published(paper: str | None = None, item: str | None = None) -> pd.DataFrame:
    """Rows of data/published/published.csv: the numbers that papers printed, never those of runs.

    paper, item: as in that file, for instance "simdiff" and "fig4a"; without them all rows. `layers_removed` holds
    integers; what is not printed is missing. Raises ResultError naming what there is when a name is unknown.
    """
    table = pd.read_csv(at_root(PUBLISHED), dtype={"layers_removed": "Int64"})
    for column, name in (("paper", paper), ("item", item)):
        if name is not None:
            known = ", ".join(table[column].unique())
            table = table[table[column] == name]
            if table.empty:
                raise ResultError(f"{PUBLISHED} has no {column} {name!r}; there are: {known}")
    return table.reset_index(drop=True)


def collect(source: str | os.PathLike | Iterable[str | os.PathLike]) -> pd.DataFrame:
    """The table of all runs in a folder (at any depth) or of the given run files, as `read_table` would read it.

    Columns: `run`, `experiment`, parameters and coordinates of the rows (sorted; those without any value are left out),
    `metric`, `value`, `n`, `stderr` and `code`. Lines are sorted by run. Cells without a value are missing, never 0. Warns when
    runs of different library code meet. Raises ResultError when there is no run, one is invalid, or two have the same id.
    """
    return _joined(*(_read_csv(io.StringIO(table.to_csv(**CSV))) for table in _collected(source)))


def write_runs(source: str | os.PathLike | Iterable[str | os.PathLike], path: str | os.PathLike) -> pd.DataFrame:
    """Write the table of `collect` as `path` and, beside it, the table of runs. Raises the same errors, and OSError."""
    rows, runs = _collected(source)
    # The rows last: they are what a batch looks for, and without their runs they would say nothing.
    write_table(runs, runs_table(path))
    write_table(rows, path)
    return read_table(path)


def read_table(path: str | os.PathLike) -> pd.DataFrame:
    """A table of runs from its two files. Raises ResultError when they do not belong together, and FileNotFoundError."""
    rows, runs = _read_csv(at_root(path)), _read_csv(at_root(runs_table(path)))
    if not runs["run"].is_unique or not rows["run"].isin(runs["run"]).all():
        raise ResultError(f"{path} and {runs_table(path)} name different runs: make both again")
    return _joined(rows, runs)


def runs_table(path: str | os.PathLike) -> Path:
    """`<table>.runs.csv`, the table of runs that belongs to `<table>.csv`."""
    return Path(path).with_suffix(".runs.csv")


def _collected(source: str | os.PathLike | Iterable[str | os.PathLike]) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The rows of all runs, without what their run says for all of them; and the runs."""
    if isinstance(source, str | os.PathLike):
        files = [path for path in at_root(source).rglob("*.json") if not path.name.startswith(".")]
    else:
        files = [at_root(path) for path in source]
    files = sorted(files, key=run_id)
    names = [run_id(path) for path in files]
    if not names or len(set(names)) < len(names):
        what = "two run files of one name" if names else "no run"
        raise ResultError(f"{what} in {source}: a table needs runs of distinct names (`make figures` makes them)")
    rows, runs = [], []
    for name, file in zip(names, files, strict=True):
        run = read_run(file)
        scalars = {
            key: value for key, value in run["parameters"].items() if key not in PATHS and not isinstance(value, list | dict)
        }
        code, peak = run["provenance"].get("source_sha256"), run["peak_bytes"]
        costs = {"seconds": round(run["seconds"], 1), "peak_mib": round(peak / 2**20) if peak else None}
        runs.append({"run": name, "experiment": run["experiment"], **scalars, **costs, "code": code[:12] if code else None})
        rows.extend({"run": name, **{key: row[key] for key in row if key not in scalars}} for row in run["rows"])
    codes = {run["code"] for run in runs if run["code"]}
    if len(codes) > 1:
        warnings.warn(f"runs of {len(codes)} versions of the library: `snakemake --forceall` makes all again", stacklevel=3)
    return _frame(rows, ("run",), VALUES), _frame(runs, ("run", "experiment"), (*COSTS, "code"))


def _frame(records: Sequence[Mapping], first: Sequence[str], last: Sequence[str]) -> pd.DataFrame:
    """Columns `first`, those of the records with any value (sorted), and `last`. Integers stay so beside missing cells."""
    table = pd.DataFrame(records).convert_dtypes()
    names = table.columns[table.notna().any()].difference([*first, *last])
    return table.reindex(columns=[*first, *names, *last])


def _read_csv(source: object) -> pd.DataFrame:
    return pd.read_csv(source, low_memory=False, dtype={"code": str})


def _joined(rows: pd.DataFrame, runs: pd.DataFrame) -> pd.DataFrame:
    """Every row with its run. A name that both have, a coordinate here and a parameter there, is filled from the run."""
    of_rows = runs.drop(columns=list(COSTS)).set_index("run").loc[rows["run"]].reset_index()
    for name in of_rows.columns.intersection(rows.columns):
        of_rows[name] = rows[name].where(rows[name].notna(), of_rows[name])
    table = of_rows.assign(**{name: rows[name] for name in rows.columns.difference(of_rows.columns)})
    ends = ["run", "experiment", *VALUES, "code"]
    names = table.columns[table.notna().any()].difference(ends)
    return table[[*ends[:2], *names, *ends[2:]]]


def _validate(run: object, path: Path) -> None:
    if not isinstance(run, dict) or run.get("schema") != SCHEMA:
        raise ResultError(f"{path} is not a run file of schema {SCHEMA}: run its notebook again")
    for key, kind in (("experiment", str), ("parameters", dict), ("rows", list), ("provenance", dict)):
        if not isinstance(run.get(key), kind):
            raise ResultError(f"{path}: `{key}` must be a {kind.__name__}, not {run.get(key)!r}")
    for key, value in (("seconds", run.get("seconds")), ("peak_bytes", run.get("peak_bytes") or 0)):
        if not _is_number(value) or value < 0:
            raise ResultError(f"{path}: `{key}` = {value!r} is not a number from 0 on")
    if taken := run["parameters"].keys() & {*VALUES, *COSTS, *RESERVED}:
        raise ResultError(f"{path}: a parameter cannot be called `{min(taken)}`, the table has a column of that name")
    for index, row in enumerate(run["rows"]):
        if fault := _fault(row, run["parameters"]):
            raise ResultError(f"{path}: row {index} ({row.get('metric')}): {fault}")


def _fault(row: Mapping, parameters: Mapping) -> str | None:
    """What keeps a row out of a table."""
    if not isinstance(row.get("metric"), str):
        return "it has no `metric`"
    if not _is_number(row.get("value")):
        return f"the value {row.get('value')!r} is not a finite number; leave the row out when there is none"
    count, stderr = row.get("n"), row.get("stderr")
    if count is not None and not (isinstance(count, Integral) and count > 0):
        return f"n = {count!r} is not a positive number of items"
    if stderr is not None and not (_is_number(stderr) and stderr >= 0):
        return f"stderr = {stderr!r} is not a number from 0 on"
    for name, value in row.items():
        if name in RESERVED:
            return f"`{name}` is a column that the table fills itself"
        if isinstance(value, list | tuple | dict | set):
            return f"`{name}` = {value!r}: a cell holds one value"
        if isinstance(value, Real) and not isinstance(value, bool | Integral) and not _is_number(value):
            return f"`{name}` = {value!r} is not finite; leave a missing coordinate out"
        if isinstance(value, str) and "\r" in value:
            return f"`{name}` = {value!r} holds a carriage return, which readers of a table take for the end of its line"
        if name in parameters and name not in PATHS and parameters[name] != value:
            return f"`{name}` = {value!r}, but the parameter of that name is {parameters[name]!r}: rename the column"
    return None


def _is_number(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and bool(abs(value) < math.inf)


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
