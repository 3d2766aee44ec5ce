"""Does this machine compute what was published? ``make verify``; and do two runs? ``python -m prunelib.lab.verify A.csv B.csv``

Compares, in this order: the files below ``data/`` and the embedded corpora with their committed hashes, then a fresh run
of the smoke profile with ``data/verify/smoke*.csv``, number by number, within `TOLERANCES`. Every difference is named; any
difference makes the command fail, but that of a table which ``make figures`` made anew.

Two tables, such as ``data/selection.csv`` of two clones, are compared in the same way: but for `TIMES` and `IGNORED` their
rows must be the same, and their numbers within `TOLERANCES`.
"""

import json
import subprocess
import sys
import warnings
from collections.abc import Mapping
from pathlib import Path

import pandas as pd

from prunelib.io import at_root, project_root
from prunelib.lab import checksums
from prunelib.lab import runs as results
from prunelib.text import embedded as pydocs

EXPECTED = {  # table of the smoke profile → committed expectation
    "build/smoke/results.csv": "data/verify/smoke.csv",
    "build/smoke/selection.csv": "data/verify/smoke_selection.csv",
    "build/smoke/blocks.csv": "data/verify/smoke_blocks.csv",
    "build/smoke/slicing.csv": "data/verify/smoke_slicing.csv",
    "build/smoke/tasks.csv": "data/verify/smoke_tasks.csv",
    "build/smoke/optimum.csv": "data/verify/smoke_optimum.csv",
    "build/smoke/healing.csv": "data/verify/smoke_healing.csv",
    "build/smoke/duplicates.csv": "data/verify/smoke_duplicates.csv",
    "build/smoke/speed.csv": "data/verify/smoke_speed.csv",
    "build/smoke/combining.csv": "data/verify/smoke_combining.csv",
}
PROFILE = "profiles/smoke.yaml"

# Absolute differences allowed on another processor or number of threads: float32 sums in another order move a score in
# its sixth digit; a token whose two best candidates are that close may change sides. Everything else must be equal.
TOLERANCES = {"nll": 2e-3, "nats_over_cosine": 2e-3, "alpha_nll": 2e-3, "accuracy": 4e-3, "low": 4e-3, "high": 4e-3, "n": 0}
# An answer to one of ten questions may turn, and with it an average over three tasks.
ANSWERS = ("acc", "acc_norm", "average", "average_low", "average_high", "constant_share", "over_dense", "over_cosine")
ANSWERS += ("over_constant",)
TOLERANCES |= dict.fromkeys(ANSWERS, 0.11)
COSTS = ("cost_of_pruning", "cost_of_quantizing", "cost_of_both", "sum_of_costs", "interaction")
TOLERANCES |= dict.fromkeys(COSTS, 4e-3)
TOLERANCES |= {"acceptance_greedy": 0.02, "acceptance_decoded": 0.2, "tokens_per_run": 1.0}
RELATIVE = 2e-3  # of every other number
# Rows that hold times, or what follows from them.
TIMES = ("seconds", "forwards", "latency_over_dense", "draft_over_dense", "speedup", "expected_speedup", "best_drafted")
TIMES += ("whole_seconds", "tokens_per_s", "bytes_per_s", "flops_per_s", "limit_seconds", "limit_share", "limit_speedup")
TIMES += ("speedup_share", "peak_bytes", "slope", "intercept", "r2")
IGNORED = ("code",)  # the hash of the library that made a row: verify compares numbers, not sources
MEASURES = (
    *("value", "n", "stderr", "low", "high", "alpha", "alpha_low", "alpha_high", "alpha_nll", "evaluations"),
    *("fraction", "mcnemar_p"),
)
TOLERANCES["mcnemar_p"] = 1.0  # follows from the answers


def compare_files() -> list[str]:
    """One line for every file below ``data/`` that is not the committed one; tables made anew are named, and pass."""
    lines, own = checksums.differences()
    if own:
        print(f"verify: made anew here, not compared with the committed ones: {', '.join(own)}")
    return lines


def compare_corpora(*, fresh: bool = True) -> list[str]:
    """One line for every split of an embedded corpus that differs from the manifest.

    First the built files; then, with ``fresh``, the text of the installed packages read anew, because the built files
    would hide an altered package.
    """
    lines = []
    manifest = json.loads(pydocs.manifest_path().read_text())
    for corpus, entry in manifest.items():
        for split in entry["splits"]:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always", pydocs.ManifestMismatch)
                try:
                    pydocs.check(corpus, split)
                except ValueError as error:
                    lines.append(str(error))
            lines += [str(warning.message) for warning in caught if warning.category is pydocs.ManifestMismatch]
        if fresh:
            read = pydocs.extract(corpus)
            for split, expected in entry["splits"].items():
                found = pydocs.digest(tuple(document for document in read if pydocs.split_of(corpus, document.name) == split))
                if found != expected["sha256"]:
                    was = expected["sha256"]
                    lines.append(
                        f"the installed packages give another {corpus}/{split} than the manifest ({found[:12]}… instead of "
                        f"{was[:12]}…): pip install --force-reinstall -r requirements.lock"
                    )
    return lines


def compare_tables(expected: pd.DataFrame, found: pd.DataFrame) -> list[str]:
    """One line for every row that is missing or new and every number that differs by more than its tolerance.

    A column that `found` has alone must be the same in all of its rows: `update` leaves such columns out.
    """
    columns = [name for name in expected if name not in IGNORED]
    unknown = [name for name in found if name not in expected and name not in IGNORED and found[name].nunique(dropna=False) > 1]
    missing = [name for name in columns if name not in found]
    if unknown or missing:
        return [f"the table has other columns: {', '.join(missing) or 'none'} missing, {', '.join(unknown) or 'none'} new"]
    keys = [name for name in columns if name not in MEASURES]

    def keyed(table: pd.DataFrame) -> dict[tuple, dict]:
        # Several intervals of alpha may share the same coordinates; their order tells them apart.
        place = table[keys].astype(object).where(table[keys].notna(), "").astype(str)
        place["nth"] = place.groupby(keys).cumcount()
        return dict(zip(place.itertuples(index=False, name=None), table[columns].to_dict("records"), strict=True))

    old, new = keyed(expected), keyed(found)
    lines = [f"no such row any more: {_label(old[place])}" for place in old if place not in new]
    lines += [f"a row that was not there: {_label(new[place])}" for place in new if place not in old]
    for place in old:
        if place in new:
            lines += _differences(old[place], new[place])
    return lines


def _differences(old: Mapping, new: Mapping) -> list[str]:
    lines = []
    for name in old:
        if name not in MEASURES or (pd.isna(old[name]) and pd.isna(new[name])):
            continue
        # Whatever belongs to answers of a model moves with them: intervals and standard errors, too.
        kind = old["metric"] if name == "value" or (old["metric"] in ANSWERS and name not in ("n", "mcnemar_p")) else name
        allowed = TOLERANCES.get(kind, RELATIVE * abs(old[name]))
        if not abs(new[name] - old[name]) <= allowed:
            lines.append(f"{_label(old)}: {name} is {new[name]:.6g}, expected {old[name]:.6g} ± {allowed:.2g}")
    return lines


def _label(row: Mapping) -> str:
    shown = ("run", "method", "layer", "tokens", "calibration", "calibration_seed", "corpus", "removed_layers", "metric")
    return ", ".join(f"{row[name]}" for name in shown if name in row and not pd.isna(row[name]))


def update() -> None:
    """Make what is here the committed expectation: the columns that tell its rows apart, and the numbers."""
    for table, expected in EXPECTED.items():
        whole = _without_times(at_root(table))
        kept = [name for name in whole if name == "metric" or whole[name].nunique(dropna=False) > 1]
        results.write_table(whole[[name for name in kept if name not in IGNORED]], expected)
    checksums.update()


def compare_two(old: Path, new: Path) -> int:
    """Print how the tables of two runs differ; the exit status, 0 when they agree."""
    tables = [_without_times(path) for path in (old, new)]
    lines = compare_tables(*tables)
    if lines:
        return _fail(f"{new} against {old}", lines)
    # Equal rows may stand in another order.
    values = [
        table.sort_values(list(table.columns.difference(MEASURES)), kind="stable")["value"].to_numpy() for table in tables
    ]
    print(f"verify: all {len(values[0])} numbers agree, {(values[0] == values[1]).sum()} of them in every digit; times aside")
    return 0


def _without_times(path: Path) -> pd.DataFrame:
    table = results.read_table(path)
    return table[~table["metric"].isin(TIMES)]


def main(arguments: list[str]) -> int:
    if len(arguments) == 2 and all(Path(argument).is_file() for argument in arguments):
        return compare_two(*map(Path, arguments))
    if arguments not in ([], ["--update"]):
        usage = "python -m prunelib.lab.verify [--update], or two tables: OLD.csv NEW.csv"
        print(f"usage: {usage}; got {' '.join(arguments)}", file=sys.stderr)
        return 2
    steps = []
    if not arguments:
        steps = [
            ("files in data/", compare_files),
            ("embedded corpora", compare_corpora),
        ]
    for what, step in steps:
        lines = step()
        if lines:
            # The runs below would only repeat that the input differs, thousands of numbers long.
            return _fail(what, lines)
        print(f"verify: {what} are the committed ones")
    command = [sys.executable, "-m", "prunelib.lab.batch", PROFILE, "--forceall", "--quiet", "all"]
    if subprocess.run(command, cwd=project_root()).returncode:
        return _fail("smoke profile", ["a run failed, see above"])
    if arguments:
        update()
        print(f"verify: wrote {', '.join(EXPECTED.values())} and {checksums.SUMS}")
        return 0
    lines, numbers = [], 0
    for table, committed in EXPECTED.items():
        expected = pd.read_csv(at_root(committed))
        lines += compare_tables(expected, _without_times(at_root(table)))
        numbers += len(expected)
    if lines:
        return _fail("smoke profile", lines)
    print(f"verify: all {numbers} numbers of the smoke profile agree with the committed ones")
    return 0


def _fail(what: str, lines: list[str]) -> int:
    print(f"verify: {what}: {len(lines)} difference{'s' * (len(lines) > 1)}", file=sys.stderr)
    for line in lines[:20]:
        print(f"  {line}", file=sys.stderr)
    if len(lines) > 20:
        print(f"  … and {len(lines) - 20} more", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
