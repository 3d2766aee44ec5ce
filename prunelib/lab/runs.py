"""Run files (JSON) and tables (CSV). A number exists only because a run file holds it; what is missing has no row.

A run is one JSON file, written by the last cell of its notebook:

    {"schema": 1, "experiment": "selection", "parameters": {…}, "rows": [{…, "metric": "ppl", "value": 9.7, "n": 512}],
     "seconds": 12.3, "peak_bytes": 812000000, "provenance": {…}, "extra": {…}}

A table of runs is two files: `<table>.csv` has the rows, with the column `run` (`<folder>/<stem>` of the run file), and
`<table>.runs.csv` has one line for each run: its scalar parameters, `experiment`, `seconds`, `peak_mib`, and `code`, the
hash of the library that made it. `read_table` joins them.
"""

import json
import math
import os
import sys
import time
import warnings
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Integral, Real
from pathlib import Path

from prunelib.io import at_root, from_root, replacing, write_json
from prunelib.lab.provenance import model_fingerprint, peak_bytes, record

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


class ResultError(ValueError):
    """A run file, a row or a choice that must not become a number in a table."""


@dataclass
class Recorder:
    """A run while its notebook computes: `recorder = start("selection", globals())` in the first cell after the parameters,
    `recorder.write(rows)` in the last one.
    """

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
    plain = bool | int | float | str | list | None
    hidden = ("In", "Out")  # of IPython
    values = {
        name: value
        for name, value in namespace.items()
        if isinstance(value, plain) and not name.startswith("_") and name not in hidden
    }
    return Recorder(experiment, values)


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
        "parameters": {name: from_root(value) if _below_root(value) else value for name, value in parameters.items()},
        "rows": [dict(row) for row in rows],
        "seconds": seconds,
        "peak_bytes": peak_bytes,
        "provenance": dict(provenance),
        "extra": dict(extra or {}),
    }
    _validate(run, str(path))
    return write_json(path, run)


def write_table(table: "pandas.DataFrame", path: str | os.PathLike) -> Path:
    """Write a table as CSV, complete or not at all. Ten significant digits: those behind differ between machines."""
    path = at_root(path)
    with replacing(path) as temporary:
        table.to_csv(temporary, index=False, lineterminator="\n", float_format="%.10g")
    return path


def read_run(path: str | os.PathLike) -> dict:
    """A run file, checked. Raises ResultError when it is not one, FileNotFoundError when it is not there."""
    path = at_root(path)
    try:
        run = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ResultError(f"{path} is not JSON ({error}): delete it and run its notebook again") from None
    _validate(run, str(path))
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


def published(paper: str | None = None, item: str | None = None) -> "pandas.DataFrame":
    """Rows of data/published/published.csv: the numbers that papers printed, never those of runs.

    paper, item: as in that file, for instance "simdiff" and "fig4a"; without them all rows. `layers_removed` holds
    integers; what is not printed is missing. Raises ResultError naming what there is when a name is unknown.
    """
    import pandas

    table = pandas.read_csv(at_root(PUBLISHED), dtype={"layers_removed": "Int64"})
    for column, name in (("paper", paper), ("item", item)):
        if name is not None:
            known = ", ".join(table[column].unique())
            table = table[table[column] == name]
            if table.empty:
                raise ResultError(f"{PUBLISHED} has no {column} {name!r}; there are: {known}")
    return table.reset_index(drop=True)


def collect(source: str | os.PathLike | Iterable[str | os.PathLike]) -> "pandas.DataFrame":
    """The table of all runs in a folder (at any depth) or of the given run files, joined as by `read_table`.

    Columns: `run`, `experiment`, parameters and coordinates of the rows (sorted; those without any value are left out),
    `metric`, `value`, `n`, `stderr` and `code`. Lines are sorted by run. Cells without a value are missing, never 0. Warns when
    runs of different library code meet. Raises ResultError when there is no run, one is invalid, or two have the same id.
    """
    return _joined(*_collected(source))


def write_runs(source: str | os.PathLike | Iterable[str | os.PathLike], path: str | os.PathLike) -> "pandas.DataFrame":
    """`collect`, written as `path` and, beside it, the table of runs. Raises the same errors as `collect`, and OSError."""
    rows, runs = _collected(source)
    # The rows last: they are what a batch looks for, and without their runs they would say nothing.
    write_table(runs, runs_table(path))
    write_table(rows, path)
    return _joined(rows, runs)


def read_table(path: str | os.PathLike) -> "pandas.DataFrame":
    """A table of runs from its two files; any other CSV, which has no second file, as it is.

    Raises ResultError when the two files do not belong together, and FileNotFoundError.
    """
    import pandas

    rows = pandas.read_csv(at_root(path), low_memory=False)
    beside = at_root(runs_table(path))
    if not beside.is_file():
        if "run" in rows and "code" not in rows:
            raise ResultError(f"{from_root(beside)} is missing, which holds the parameters of the runs in {from_root(path)}")
        return rows
    runs = pandas.read_csv(beside, low_memory=False)
    unknown = set(rows["run"]) - set(runs["run"])
    if unknown or not runs["run"].is_unique:
        what = f"lacks the run {min(unknown)}" if unknown else "names a run twice"
        raise ResultError(f"{from_root(beside)} {what}: it belongs to another {from_root(path)}; make both again")
    return _joined(rows, runs)


def runs_table(path: str | os.PathLike) -> Path:
    """`<table>.runs.csv`, the table of runs that belongs to `<table>.csv`."""
    return Path(path).with_suffix(".runs.csv")


def _collected(source: str | os.PathLike | Iterable[str | os.PathLike]) -> "tuple[pandas.DataFrame, pandas.DataFrame]":
    """The rows of all runs, without what their run says for all of them; and the runs."""
    if isinstance(source, str | os.PathLike):
        files = sorted(path for path in at_root(source).rglob("*.json") if not path.name.startswith("."))
    else:
        files = [at_root(path) for path in source]
    if not files:
        raise ResultError(f"no run in {source}: run the batch first (`make figures`)")
    twice = [name for name, count in Counter(map(run_id, files)).items() if count > 1]
    if twice:
        raise ResultError(f"two run files are called {twice[0]}: a table needs distinct names")

    rows, runs = [], []
    for file in sorted(files, key=run_id):
        run, name = read_run(file), run_id(file)
        scalars = {
            key: value for key, value in run["parameters"].items() if key not in PATHS and not isinstance(value, list | dict)
        }
        code, peak = run["provenance"].get("source_sha256"), run["peak_bytes"]
        costs = {"seconds": round(run["seconds"], 1), "peak_mib": round(peak / 2**20) if peak is not None else None}
        runs.append({"run": name, "experiment": run["experiment"], **scalars, **costs, "code": code[:12] if code else None})
        rows.extend({"run": name, **{key: row[key] for key in row if key not in scalars}} for row in run["rows"])
    codes = sorted({run["code"] for run in runs if run["code"]})
    if len(codes) > 1:
        warnings.warn(
            f"this table mixes runs of {len(codes)} versions of the library ({', '.join(codes)}); "
            "make them again with one version (`snakemake --forceall`) before comparing them",
            stacklevel=3,
        )
    return _frame(rows, ("run",), VALUES), _frame(runs, ("run", "experiment"), (*COSTS, "code"))


def _frame(records: Sequence[Mapping], first: Sequence[str], last: Sequence[str]) -> "pandas.DataFrame":
    """Columns `first`, those of the records with any value (sorted), and `last`."""
    import pandas

    names = {name for record in records for name, value in record.items() if value is not None} - {*first, *last}
    columns = [*first, *sorted(names), *last]
    return pandas.DataFrame({name: _column([record.get(name) for record in records]) for name in columns})


def _joined(rows: "pandas.DataFrame", runs: "pandas.DataFrame") -> "pandas.DataFrame":
    """Every row with its run. A name that both have, a coordinate here and a parameter there, is filled from the run."""
    import pandas

    places = pandas.Index(runs["run"]).get_indexer(rows["run"])
    parts = {name: rows[name] for name in rows}
    for name in runs.columns.difference(["run", *COSTS]):
        of_run = runs[name].take(places).set_axis(rows.index)
        parts[name] = parts[name].where(parts[name].notna(), of_run) if name in parts else of_run
    ends = ("run", "experiment", *VALUES, "code")
    names = sorted(name for name in parts if name not in ends and parts[name].notna().any())
    return pandas.DataFrame({name: parts[name] for name in ("run", "experiment", *names, *VALUES, "code")})


def _column(values: list) -> object:
    """One dtype per column, integers kept as integers beside missing cells, text as text."""
    import pandas

    kinds = {type(value) for value in values if value is not None}
    if kinds == {bool}:
        return pandas.array(values, dtype="boolean")
    if kinds == {int} and all(value is None or -(2**63) <= value < 2**63 for value in values):
        return pandas.array(values, dtype="Int64")
    if kinds and kinds <= {int, float} and float in kinds:
        return pandas.array(values, dtype="float64")
    return pandas.Series(values, dtype="object")


def _validate(run: object, where: str) -> None:
    if not isinstance(run, dict) or "schema" not in run:
        raise ResultError(f"{where} is not a run file (it has no `schema`)")
    if run["schema"] != SCHEMA:
        raise ResultError(f"{where} has schema {run['schema']!r}, this version reads {SCHEMA}: run its notebook again")
    for key, kind in (("experiment", str), ("parameters", dict), ("rows", list), ("provenance", dict)):
        if not isinstance(run.get(key), kind):
            raise ResultError(f"{where}: `{key}` must be a {kind.__name__}, not {run.get(key)!r}")
    seconds, peak = run.get("seconds"), run.get("peak_bytes")
    if not _finite(seconds) or seconds < 0:
        raise ResultError(f"{where}: `seconds` must be a time, not {seconds!r}")
    if peak is not None and (not isinstance(peak, Integral) or peak <= 0):
        raise ResultError(f"{where}: `peak_bytes` must be a positive number of bytes or None, not {peak!r}")
    for name, value in run["parameters"].items():
        if name in (*VALUES, *COSTS, *RESERVED):
            raise ResultError(f"{where}: a parameter cannot be called `{name}`, the table has a column of that name")
        _check_line(name, value, where)
    for index, row in enumerate(run["rows"]):
        _validate_row(row, run["parameters"], f"{where}: row {index}")


def _validate_row(row: Mapping, parameters: Mapping, where: str) -> None:
    metric = row.get("metric")
    if not isinstance(metric, str) or not metric:
        raise ResultError(f"{where} has no `metric`: {dict(row)}")
    where = f"{where} ({metric})"
    if row.get("value") is None:
        raise ResultError(f"{where} has no `value`: leave the row out when there is none")
    if not _finite(row["value"]):
        raise ResultError(f"{where} has the value {row['value']!r}: only finite numbers are results")
    count, stderr = row.get("n"), row.get("stderr")
    if count is not None and (not isinstance(count, Integral) or isinstance(count, bool) or count <= 0):
        raise ResultError(f"{where} has n = {count!r}: the number of items behind the value is positive")
    if stderr is not None and (not _finite(stderr) or stderr < 0):
        raise ResultError(f"{where} has stderr = {stderr!r}")
    for name, value in row.items():
        if name in RESERVED:
            raise ResultError(f"{where} uses the column name `{name}`, which the table fills itself")
        if isinstance(value, list | tuple | dict | set):
            raise ResultError(f"{where}: `{name}` is a {type(value).__name__}; a cell holds one value")
        _check_line(name, value, where)
        if isinstance(value, Real) and not isinstance(value, Integral) and not math.isfinite(value):
            raise ResultError(f"{where}: `{name}` is {value!r}; leave a missing coordinate out")
        if name in parameters and name not in PATHS and parameters[name] != value:
            given = parameters[name]
            raise ResultError(f"{where}: `{name}` is {value!r} but the parameter of that name is {given!r}; rename the column")


def _check_line(name: str, value: object, where: str) -> None:
    """Refuse a carriage return: Python's csv does not quote it although readers take it for the end of a line."""
    if any(isinstance(text, str) and "\r" in text for text in (name, value)):
        raise ResultError(f"{where}: {name!r} = {value!r} holds a carriage return, which breaks a table's line")


def _finite(value: object) -> bool:
    try:
        return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:  # a whole number beyond every float
        return False


def _below_root(value: object) -> bool:
    """An absolute path inside the clone, which a record writes relative to it."""
    return isinstance(value, str) and os.path.isabs(value) and not os.path.isabs(from_root(value))


def main(arguments: Sequence[str]) -> int:
    """`python -m prunelib.lab.runs RUNS… OUT.csv`: RUNS is one folder, or run files."""
    if len(arguments) < 2:
        print("usage: python -m prunelib.lab.runs RUNS_FOLDER OUT.csv   (or run files instead of the folder)", file=sys.stderr)
        return 2
    *sources, out = (Path(argument).absolute() for argument in arguments)
    try:
        table = write_runs(sources[0] if len(sources) == 1 and sources[0].is_dir() else sources, out)
    except (ResultError, OSError) as error:
        print(f"results: {error}", file=sys.stderr)
        return 1
    print(f"{from_root(out)}: {len(table)} rows of {table['run'].nunique() if len(table) else 0} runs")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
