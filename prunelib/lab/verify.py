"""Does this machine compute what was published? `make verify`: the smoke profile against `data/verify/smoke_<experiment>.csv`.

Every number that differs by more than its tolerance is named, with what was expected; any makes the command fail. `--update`
makes the new numbers the expected ones.
"""

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
import yaml

from prunelib.io import at_root, project_root
from prunelib.lab.runs import write_table

TABLES = "build/smoke"
EXPECTED = "data/verify"
SMOKE = ("-m", "snakemake", "--configfile", "profiles/smoke.yaml", "--forceall", "--quiet", "all")

TOLERANCES = yaml.safe_load(at_root(f"{EXPECTED}/tolerances.yaml").read_text(encoding="utf-8"))


def read(path: str | Path) -> pd.DataFrame:
    """The rows of a table, times left out. The parameters of a run follow from its name and the profile."""
    table = pd.read_csv(at_root(path), low_memory=False)
    return table[~table["metric"].isin(TOLERANCES["times"])]


def compare(expected: pd.DataFrame, found: pd.DataFrame) -> list[str]:
    """One line for every row that is missing or new and every number that differs by more than its tolerance."""
    if missing := [name for name in expected if name not in found]:
        return [f"the table has no column {', '.join(missing)}"]
    keys = [name for name in expected if name not in TOLERANCES["measures"]]
    old, new = (_by_coordinates(table, keys) for table in (expected, found))
    lines = [f"no such row any more: {_label(place)}" for place in old.index.difference(new.index, sort=False)]
    lines += [f"a row that was not there: {_label(place)}" for place in new.index.difference(old.index, sort=False)]
    both = old.index.intersection(new.index, sort=False)
    old, new = old.loc[both], new.loc[both]
    for name in expected.columns.difference(keys, sort=False):
        kind = old["metric"] if name == "value" else pd.Series(name, index=both)
        allowed = kind.map(TOLERANCES["absolute"]).fillna(TOLERANCES["relative"] * old[name].abs())
        if name not in ("n", "mcnemar_p"):
            allowed = allowed.mask(old["metric"].isin(TOLERANCES["answers"]), TOLERANCES["answer"])
        differs = ~((new[name] - old[name]).abs() <= allowed) & ~(old[name].isna() & new[name].isna())
        for place in both[differs.to_numpy()]:
            was, now = old.at[place, name], new.at[place, name]
            lines.append(f"{_label(place)}: {name} is {now:.6g}, expected {was:.6g} ± {allowed[place]:.2g} ({now - was:+.2g})")
    return lines


def _by_coordinates(table: pd.DataFrame, keys: Sequence[str]) -> pd.DataFrame:
    """Rows by their coordinates as text; their order tells those with the same ones apart (intervals of alpha)."""
    text = table[list(keys)].map(lambda value: f"{value:g}" if isinstance(value, float) else str(value))
    place = text.mask(table[list(keys)].isna(), "")
    place["nth"] = place.groupby(list(keys)).cumcount().astype(str)
    return table.set_index(pd.MultiIndex.from_frame(place))


def _label(place: tuple) -> str:
    return ", ".join(filter(None, place[:-1]))


def main(arguments: Sequence[str]) -> int:
    """Exit status: 0 when all numbers agree, 1 when one does not or a run failed, 2 for other arguments."""
    if list(arguments) not in ([], ["--update"]):
        print(f"usage: python -m prunelib.lab.verify [--update]; got {' '.join(arguments)}", file=sys.stderr)
        return 2
    if subprocess.run([sys.executable, *SMOKE], cwd=project_root()).returncode:
        print("verify: a run of the smoke profile failed, see above", file=sys.stderr)
        return 1
    lines, numbers = [], 0
    for path in sorted(path for path in at_root(TABLES).glob("*.csv") if not path.name.endswith(".runs.csv")):
        expected, found = at_root(f"{EXPECTED}/smoke_{path.name}"), read(path)
        if arguments:
            write_table(found.dropna(axis="columns", how="all"), expected)
        numbers += len(found)
        lines += [f"{expected.stem}: {line}" for line in compare(read(expected), found)]
    print("\n".join(lines) or f"verify: all {numbers} numbers agree", file=sys.stderr if lines else sys.stdout)
    return int(bool(lines))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
