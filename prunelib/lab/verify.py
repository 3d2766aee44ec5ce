"""Does this machine compute what was published? Every number that differs by more than its tolerance is named and fails.

`make verify` (no argument): the smoke profile against `data/verify/smoke_<experiment>.csv`; `--update` makes the new numbers
the expected ones. `make figures` ends with `python -m prunelib.lab.verify PROFILE…`: tables and plotted numbers against the
last commit.
"""

import io
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pandas as pd
import yaml

from prunelib.io import at_root, first_line, from_root, project_root
from prunelib.lab.runs import write_table

TABLES = "build/smoke"
EXPECTED = "data/verify"
SMOKE = ("-m", "snakemake", "--configfile", "profiles/smoke.yaml", "--forceall", "--quiet", "all")

TOLERANCES = yaml.safe_load(at_root(f"{EXPECTED}/tolerances.yaml").read_text(encoding="utf-8"))


def read(path: str | Path) -> pd.DataFrame:
    """The rows of a table, times left out. The parameters of a run follow from its name and the profile."""
    return _timeless(pd.read_csv(at_root(path), low_memory=False))


def _timeless(table: pd.DataFrame) -> pd.DataFrame:
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


def _git(*arguments: str) -> bytes:
    return subprocess.run(["git", *arguments], cwd=project_root(), check=True, capture_output=True).stdout


def against_commit(tables: str, figures: str) -> Iterator[tuple[str, list[str]]]:
    """Every table and figure of two folders that the last commit holds in another form, and the numbers that differ.

    Where none does, its files are put back: times, memory and code of a rerun stay in its run files, so an unchanged result is
    no change to commit. A figure that other code drew is left as it is. Raises CalledProcessError without git.
    """
    changed = _git("diff", "--name-only", "--relative", "HEAD", "--", tables, figures).decode().split()
    for path in sorted({name.replace(".runs.csv", ".csv") for name in changed if name.startswith(f"{tables}/")}):
        new, old = at_root(path), pd.read_csv(io.BytesIO(_git("show", f"HEAD:./{path}")), low_memory=False)
        lines = compare(_timeless(old), read(new)) if new.exists() else ["is gone"]
        if not lines:
            _put_back(path, path.replace(".csv", ".runs.csv"))
        yield path, lines
    for stem in sorted({name.rpartition(".")[0] for name in changed if name.startswith(f"{figures}/")}):
        files = _git("ls-files", f"{stem}.*").decode().split()
        records = [json.loads(text) for text in (_git("show", f"HEAD:./{stem}.json"), at_root(f"{stem}.json").read_bytes())]
        old, new = (pd.read_csv(file) for file in (io.BytesIO(_git("show", f"HEAD:./{stem}.csv")), at_root(f"{stem}.csv")))
        try:
            pd.testing.assert_frame_equal(old, new, rtol=TOLERANCES["relative"], atol=TOLERANCES["relative"])
        except AssertionError as error:
            yield stem, [" ".join(str(error).split())]
            continue
        if records[0]["drawing_code_sha256"] == records[1]["drawing_code_sha256"]:
            _put_back(*files)
        yield stem, []


def _put_back(*paths: str) -> None:
    """The files as committed, with the time of those they replace: nothing is newer than what is made of it."""
    for path in map(at_root, paths):
        made = path.stat()
        path.write_bytes(_git("show", f"HEAD:./{from_root(path)}"))
        os.utime(path, ns=(made.st_atime_ns, made.st_mtime_ns))


def finished(profiles: Sequence[str]) -> int:
    """The last line of `make figures`: PASS or FAIL, and 0 or 1."""
    profile = {key: value for path in profiles for key, value in yaml.safe_load(at_root(path).read_text()).items()}
    try:
        found = dict(against_commit(profile["tables"], profile["figures"]))
    except (OSError, subprocess.CalledProcessError) as error:
        print(f"FAIL: there is no commit to compare with ({first_line(error)}): clone the repository with git")
        return 1
    lines = [f"{path}: {line}" for path, differs in found.items() for line in differs]
    print(*lines, sep="\n", end="\n" if lines else "")
    where = f"{profile['tables']} and {profile['figures']}"
    print(f"FAIL: {len(lines)} numbers are not as committed; `git diff`" if lines else f"PASS: {where} are as committed")
    return int(bool(lines))


def main(arguments: Sequence[str]) -> int:
    """Exit status: 0 when all numbers agree, 1 when one does not or a run failed, 2 for other arguments."""
    if arguments and all(argument.endswith(".yaml") for argument in arguments):
        return finished(arguments)
    if list(arguments) not in ([], ["--update"]):
        print(f"usage: python -m prunelib.lab.verify [--update | PROFILE.yaml …]; got {' '.join(arguments)}", file=sys.stderr)
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
