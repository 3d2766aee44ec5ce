"""What every run took: run files → data/costs.csv, which stays when the run files of a batch are gone.

    python -m prunelib.lab.costs          of the committed runs and those of the reference profile that are here
    python -m prunelib.lab.costs RUNS…    of other run files and folders instead of the reference profile's

The last step of `make figures`. Lines of runs that are not among them are kept as long as a committed table or figure still
names the run and the code that made it. Nothing here imports torch.
"""

import json
import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

import pandas as pd

from prunelib.io import at_root, from_root
from prunelib.lab import runs as results

COSTS = "data/costs.csv"
REFERENCE = "data/runs/reference"
COMMITTED = ("data/optimum", "data/healing/healing", "data/speed")


def costs(sources: Iterable[str | os.PathLike]) -> pd.DataFrame:
    """One line for every run of the given files and folders, sorted by run.

    Columns: `run`, `code` (as in `results.collect`; two versions of a run have a line each), `seconds`, `peak_mib` (memory: of
    the process on a processor, of the allocator on an accelerator), `device`, `cpu`, `threads`, `python`, `torch`. Raises
    ResultError when two files are the same run by the same code, or there is none.
    """
    found: dict[tuple[str, str], dict] = {}
    for source in sources:
        place = at_root(source)
        for file in sorted(place.rglob("[!.]*.json")) if place.is_dir() else [place]:
            run = results.read_run(file)
            origin = run["provenance"]
            key = results.run_id(file), (origin.get("source_sha256") or "")[:12]
            if key in found:
                raise results.ResultError(f"{from_root(file)} is the run {key[0]} by the code {key[1]}, as another file is")
            peak = run["peak_bytes"]
            found[key] = {
                "run": key[0],
                "code": key[1],
                "seconds": round(float(run["seconds"]), 1),
                "peak_mib": round(peak / 2**20) if peak is not None else None,
                **{name: origin.get(name) for name in ("device", "cpu", "threads", "python")},
                "torch": (origin.get("libraries") or {}).get("torch"),
            }
    if not found:
        raise results.ResultError("there is no run in any of these places: run the batch first (`make figures`)")
    table = pd.DataFrame([found[key] for key in sorted(found)])
    return table.astype({"peak_mib": "Int64", "threads": "Int64"})


def named() -> set[tuple[str, str]]:
    """Run and code of every run that a committed table or the record of a figure names; of a figure, all its pairs."""
    found: set[tuple[str, str]] = set()
    for path in sorted(at_root("data").glob(f"*{results.RUNS}")):
        runs = pd.read_csv(path, usecols=["run", "code"], dtype=str).dropna()
        found |= set(runs[["run", "code"]].itertuples(index=False, name=None))
    for path in sorted(at_root("figures").glob("*.json")):
        record = json.loads(path.read_text(encoding="utf-8"))
        found |= {(run, code) for run in record.get("runs", []) for code in record.get("run_code", [])}
    return found


def merged(now: pd.DataFrame, before: pd.DataFrame | None, names: set[tuple[str, str]]) -> pd.DataFrame:
    """The lines of `now`, and those of `before` that are still named; chapters of now, where they were drawn again."""
    if before is None:
        return now
    key = ["run", "code"]
    there = set(now[key].itertuples(index=False, name=None))
    again = set(now["run"])
    keep = [
        pair not in there and (pair in names or (pair[0].startswith("chapters/") and pair[0] not in again))
        for pair in before[key].itertuples(index=False, name=None)
    ]
    both = pd.concat([now, before[keep]]).sort_values(key, ignore_index=True)
    return both.astype({"peak_mib": "Int64", "threads": "Int64"})


def read(path: str | os.PathLike = COSTS) -> pd.DataFrame | None:
    """The committed table, None where there is none."""
    place = at_root(path)
    return pd.read_csv(place, dtype={"code": str, "python": str, "torch": str}) if place.is_file() else None


def main(arguments: Sequence[str]) -> int:
    """`python -m prunelib.lab.costs [RUNS…]`: data/costs.csv anew."""
    if any(one.startswith("-") for one in arguments):
        print("usage: python -m prunelib.lab.costs [RUNS…]", file=sys.stderr)
        return 2
    others = [one for one in (*([] if arguments else [REFERENCE]), *COMMITTED) if at_root(one).exists()]
    places = [*(Path(one).absolute() for one in arguments), *others]
    try:
        names = named()
        now = costs(places)
        wanted = [
            pair in names or pair[0].startswith("chapters/") for pair in now[["run", "code"]].itertuples(index=False, name=None)
        ]
        table = merged(now[wanted], read(), names)
        results.write_table(table, COSTS)
    except (results.ResultError, OSError) as error:
        print(f"costs: {error}", file=sys.stderr)
        return 1
    print(f"{COSTS}: {len(table)} runs, {table['seconds'].sum() / 60:.0f} min")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
