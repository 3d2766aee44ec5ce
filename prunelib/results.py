"""Run JSON ⇄ long table. A number exists only because a run file holds it; what is missing has no row.

One run is one JSON file, written by the last cell of its notebook:

    {"schema": 1, "experiment": "depth", "parameters": {…}, "rows": [{…, "metric": "ppl", "value": 9.7, "n": 512}],
     "seconds": 12.3, "peak_bytes": 812000000, "provenance": {…}, "extra": {…}}

The table has one line per row of every run, the scalar parameters of the run beside it, and the column `run`
(`<folder>/<stem>` of the run file), so that every number can be traced. Lists and paths stay in the run file.
"""

import json
import math
import os
import sys
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from numbers import Integral, Real
from pathlib import Path

from prunelib.provenance import at_root, from_root, replacing, write_json

SCHEMA = 1
VALUES = ("metric", "value", "n", "stderr")  # keys of a row that are not coordinates
RESERVED = ("run", "experiment", "code")
PUBLISHED = "data/published/published.csv"
# Parameters that name files of one machine or one batch.
PATHS = ("output", "data_dir", "task_data_dir", "statistics", "choices")


class ResultError(ValueError):
    """A run file or a row that must not become a number in a table."""


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

    `rows` are dicts of coordinates plus `metric`, `value` and optionally `n` (items behind the value) and `stderr`. `rows` may
    be empty: a run that only made arrays. `seconds` is the compute time, `peak_bytes` the peak memory. Relative paths
    are below the project root. Raises ResultError naming the row and the key.
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


def collect(source: str | os.PathLike | Iterable[str | os.PathLike]) -> "pandas.DataFrame":
    """The long table of all runs in a folder (at any depth) or of the given run files.

    Columns: `run`, `experiment`, parameters and coordinates of the rows (sorted; those without any value are left out),
    `metric`, `value`, `n`, `stderr`, and `code`, the first 12 digits of the hash of the library that made it. Lines are sorted
    by run; within a run they keep their order. Cells without a value are missing, never 0. Warns when runs of
    different library code meet in one table.

    Raises ResultError when there is no run, when one is invalid, or when two have the same id.
    """
    import pandas

    if isinstance(source, str | os.PathLike):
        files = sorted(path for path in at_root(source).rglob("*.json") if not path.name.startswith("."))
    else:
        files = [at_root(path) for path in source]
    if not files:
        raise ResultError(f"no run in {source}: run the batch first (`make figures`)")
    twice = [name for name, count in Counter(map(run_id, files)).items() if count > 1]
    if twice:
        raise ResultError(f"two run files are called {twice[0]}: a table needs distinct names")

    records, parameters, coordinates = [], set(), set()
    for file in sorted(files, key=run_id):
        run = read_run(file)
        scalars = {
            name: value for name, value in run["parameters"].items() if name not in PATHS and not isinstance(value, list | dict)
        }
        parameters |= scalars.keys()
        code = run["provenance"].get("source_sha256")
        for row in run["rows"]:
            coordinates |= row.keys() - set(VALUES)
            code_column = code[:12] if code else None
            records.append({"run": run_id(file), "experiment": run["experiment"], **scalars, **row, "code": code_column})
    codes = sorted({record["code"] for record in records if record["code"]})
    if len(codes) > 1:
        warnings.warn(
            f"this table mixes runs of {len(codes)} versions of the library ({', '.join(codes)}); "
            "make them again with one version (`snakemake --forceall`) before comparing them",
            stacklevel=2,
        )
    used = sorted(name for name in parameters | coordinates if any(record.get(name) is not None for record in records))
    columns = ["run", "experiment", *used, *VALUES, "code"]
    return pandas.DataFrame({name: _column([record.get(name) for record in records]) for name in columns})


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


def write_table(table: "pandas.DataFrame", path: str | os.PathLike) -> Path:
    """Write a table as CSV: by temporary file and rename. Ten significant digits: those behind differ between machines."""
    path = at_root(path)
    with replacing(path) as temporary:
        table.to_csv(temporary, index=False, lineterminator="\n", float_format="%.10g")
    return path


def _column(values: list) -> object:
    """One dtype per column, integers kept as integers beside missing cells, text as text."""
    import pandas

    present = [value for value in values if value is not None]
    if present and all(isinstance(value, bool) for value in present):
        return pandas.array(values, dtype="boolean")
    if present and all(isinstance(value, int) and not isinstance(value, bool) for value in present):
        small = all(-(2**63) <= value < 2**63 for value in present)  # a larger one, such as a seed, stays Python's own
        return pandas.array(values, dtype="Int64") if small else pandas.Series(values, dtype="object")
    if present and all(isinstance(value, int | float) and not isinstance(value, bool) for value in present):
        return pandas.array(values, dtype="float64")
    return pandas.Series([None if value is None else value for value in values], dtype="object")


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
    for name in (*VALUES, *RESERVED):
        if name in run["parameters"]:
            raise ResultError(f"{where}: a parameter cannot be called `{name}`, the table has a column of that name")
    for name, value in run["parameters"].items():
        if _breaks_line(name) or _breaks_line(value):
            raise ResultError(
                f"{where}: the parameter {name!r} = {value!r} holds a carriage return, which breaks a table's line"
            )
    for index, row in enumerate(run["rows"]):
        _validate_row(row, run["parameters"], f"{where}: row {index}")


def _validate_row(row: Mapping, parameters: Mapping, where: str) -> None:
    metric = row.get("metric")
    if not isinstance(metric, str) or not metric:
        raise ResultError(f"{where} has no `metric`: {dict(row)}")
    if "value" not in row or row["value"] is None:
        raise ResultError(f"{where} ({metric}) has no `value`: leave the row out when there is none")
    if not _finite(row["value"]):
        raise ResultError(f"{where} ({metric}) has the value {row['value']!r}: only finite numbers are results")
    count, stderr = row.get("n"), row.get("stderr")
    if count is not None and (not isinstance(count, Integral) or isinstance(count, bool) or count <= 0):
        raise ResultError(f"{where} ({metric}) has n = {count!r}: the number of items behind the value is positive")
    if stderr is not None and (not _finite(stderr) or stderr < 0):
        raise ResultError(f"{where} ({metric}) has stderr = {stderr!r}")
    for name, value in row.items():
        if name in RESERVED:
            raise ResultError(f"{where} ({metric}) uses the column name `{name}`, which the table fills itself")
        if isinstance(value, list | tuple | dict | set):
            raise ResultError(f"{where} ({metric}): `{name}` is a {type(value).__name__}; a cell holds one value")
        if _breaks_line(name) or _breaks_line(value):
            raise ResultError(f"{where} ({metric}): {name!r} = {value!r} holds a carriage return, which breaks a table's line")
        if isinstance(value, Real) and not isinstance(value, Integral) and not math.isfinite(value):
            raise ResultError(f"{where} ({metric}): `{name}` is {value!r}; leave a missing coordinate out")
        if name in parameters and name not in PATHS and parameters[name] != value:
            raise ResultError(
                f"{where} ({metric}): `{name}` is {value!r} but the parameter of that name is {parameters[name]!r}; "
                "give the column another name"
            )


def _breaks_line(value: object) -> bool:
    """A text that Python's csv does not put in quotes although readers take it for two lines."""
    return isinstance(value, str) and "\r" in value


def _finite(value: object) -> bool:
    try:
        return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:  # a whole number beyond every float
        return False


def _below_root(value: object) -> bool:
    """An absolute path inside the clone, which a record writes relative to it."""
    return isinstance(value, str) and os.path.isabs(value) and not os.path.isabs(from_root(value))


def main(arguments: Sequence[str]) -> int:
    """`python -m prunelib.results RUNS… OUT.csv`: RUNS is one folder, or run files."""
    if len(arguments) < 2:
        print("usage: python -m prunelib.results RUNS_FOLDER OUT.csv   (or run files instead of the folder)", file=sys.stderr)
        return 2
    *sources, out = (Path(argument).absolute() for argument in arguments)
    try:
        table = collect(sources[0] if len(sources) == 1 and sources[0].is_dir() else sources)
        write_table(table, out)
    except (ResultError, OSError) as error:
        print(f"results: {error}", file=sys.stderr)
        return 1
    print(f"{from_root(out)}: {len(table)} rows of {table['run'].nunique() if len(table) else 0} runs")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
