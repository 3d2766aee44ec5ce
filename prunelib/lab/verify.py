"""Does this machine compute what was published? `make verify`: the smoke profile against `data/verify/smoke_<experiment>.csv`.

Every number that differs by more than its tolerance is named, with what was expected; any makes the command fail. `--update`
makes the new numbers the expected ones.
"""

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from prunelib.io import at_root, project_root
from prunelib.lab.runs import write_table

TABLES = "build/smoke"
EXPECTED = "data/verify"
SMOKE = ("-m", "snakemake", "--configfile", "profiles/smoke.yaml", "--forceall", "--quiet", "all")

# Answers of a model: one to one of ten questions may turn on another machine, and with it an average over three tasks.
ANSWERS = ("acc", "acc_norm", "average", "average_low", "average_high", "constant_share", "over_dense", "over_cosine")
ANSWERS += ("over_constant",)
COSTS = ("cost_of_pruning", "cost_of_quantizing", "cost_of_both", "sum_of_costs", "interaction")
# Absolute differences allowed on another processor or number of threads: float32 sums in another order move a score in its
# sixth digit; a token whose two best candidates are that close may change sides. All coordinates must be equal.
TOLERANCES = {"nll": 2e-3, "nll_over_cosine": 2e-3, "alpha_nll": 2e-3, "accuracy": 4e-3, "low": 4e-3, "high": 4e-3, "n": 0}
TOLERANCES |= {"acceptance_greedy": 0.02, "acceptance_decoded": 0.2, "tokens_per_run": 1.0}
TOLERANCES |= {"mcnemar_p": 1.0, **dict.fromkeys(ANSWERS, 0.11), **dict.fromkeys(COSTS, 4e-3)}
RELATIVE = 2e-3  # of every other number
# Rows that hold times, or what follows from them.
TIMES = ("seconds", "forwards", "latency_over_dense", "draft_over_dense", "speedup", "expected_speedup", "best_drafted")
TIMES += ("whole_seconds", "tokens_per_s", "bytes_per_s", "flops_per_s", "limit_seconds", "limit_share", "limit_speedup")
TIMES += ("speedup_share", "peak_bytes", "slope", "intercept", "r2")
MEASURES = ("value", "n", "stderr", "low", "high", "alpha", "alpha_low", "alpha_high", "alpha_nll", "evaluations")
MEASURES += ("fraction", "mcnemar_p")


def read(path: str | Path) -> pd.DataFrame:
    """The rows of a table, times left out. The parameters of a run follow from its name and the profile."""
    table = pd.read_csv(at_root(path), low_memory=False)
    return table[~table["metric"].isin(TIMES)]


def compare(expected: pd.DataFrame, found: pd.DataFrame) -> list[str]:
    """One line for every row that is missing or new and every number that differs by more than its tolerance."""
    missing = [name for name in expected if name not in found]
    if missing:
        return [f"the table has no column {', '.join(missing)}"]
    keys = [name for name in expected if name not in MEASURES]
    old, new = (_by_coordinates(table, keys) for table in (expected, found))
    lines = [f"no such row any more: {_label(place)}" for place in old.index.difference(new.index, sort=False)]
    lines += [f"a row that was not there: {_label(place)}" for place in new.index.difference(old.index, sort=False)]
    both = old.index.intersection(new.index, sort=False)
    old, new = old.loc[both], new.loc[both]
    for name in (name for name in MEASURES if name in expected):
        # Whatever belongs to answers of a model moves with them: intervals and standard errors, too.
        answers = old["metric"].isin(ANSWERS) & (name not in ("n", "mcnemar_p"))
        kind = old["metric"].where(answers | (name == "value"), name)
        allowed = kind.map(TOLERANCES).fillna(RELATIVE * old[name].abs())
        differs = ~((new[name] - old[name]).abs() <= allowed) & ~(old[name].isna() & new[name].isna())
        for place in both[differs.to_numpy()]:
            was, now = old.at[place, name], new.at[place, name]
            lines.append(f"{_label(place)}: {name} is {now:.6g}, expected {was:.6g} ± {allowed[place]:.2g} ({now - was:+.2g})")
    return lines


def _by_coordinates(table: pd.DataFrame, keys: Sequence[str]) -> pd.DataFrame:
    """Rows by their coordinates as text; their order tells those with the same ones apart (intervals of alpha)."""

    def text(value: object) -> str:
        return "" if pd.isna(value) else f"{value:g}" if isinstance(value, float) else str(value)

    place = table[list(keys)].map(text)
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
