"""What claims are measured with: rows of the tables, paired, and a value with its interval for every model."""

import os
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import yaml

from prunelib.io import at_root
from prunelib.lab import profile, runs

PRINTED = "as printed"  # stands for the model where the paper's own numbers are recomputed
NAN = float("nan")
NOTHING = pd.DataFrame(columns=["model", "value", "run", "code"])


class ClaimError(ValueError):
    """A claim that cannot be computed as it is written."""


def load(source: str | os.PathLike | Iterable[str | os.PathLike]) -> pd.DataFrame:
    """A table of runs: its CSV, or a folder or list of run files.

    `model` is the last part of the model's name, `run_part` the entry of the profile that a run belongs to.
    """
    if isinstance(source, str | os.PathLike) and Path(source).suffix == ".csv":
        table = runs.read_table(source)
    else:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # committed runs of several versions of the library; every row names its own
            table = runs.collect(source)
    parts = table["run"].str.split("__").str[1]
    return table.assign(model=table["model"].str.rsplit("/", n=1).str[-1], run_part=parts)


@dataclass
class Tables:
    """The tables of a profile, each read when it is first asked for: `tables.selection`, `tables.blocks`, …

    parameters: name → what `load` reads, None where a profile has no such table (it has no rows then), or a setting such as
    `calibration`, the text behind the scores.
    """

    parameters: Mapping[str, Any]
    _read: dict[str, pd.DataFrame] = field(default_factory=dict)

    @classmethod
    def of_profile(cls, path: str | os.PathLike) -> "Tables":
        """Those that the chapter of the claims has in a profile."""
        settings = yaml.safe_load(at_root(path).read_text(encoding="utf-8"))
        return cls(profile.chapter_values(profile.read(settings), "08_claims"))

    def __getattr__(self, name: str) -> Any:
        if name not in self.parameters:
            raise AttributeError(f"no table or setting {name!r}; there are: {', '.join(self.parameters)}")
        value = self.parameters[name]
        if value is not None and "/" not in str(value):
            return value
        if name not in self._read:
            folder = at_root(value) if isinstance(value, str) and not value.endswith(".csv") else None
            there = value is not None and (folder is None or any(folder.rglob("[!.]*.json")))
            self._read[name] = load(value) if there else NOTHING
        return self._read[name]

    def code(self, used: Iterable[str]) -> pd.DataFrame:
        """The given runs with their model and the hash of the library that made each: columns `run`, `code` and `model`."""
        found = pd.concat([table[["run", "code", "model"]] for table in self._read.values()]).drop_duplicates()
        return found[found["run"].isin(used)]


def pick(table: pd.DataFrame, **where: Any) -> pd.DataFrame:
    """The rows that fit every condition: a value, several values, None for missing, or a function of the column.

    A column that is not there is missing in every row.
    """
    for name, wanted in where.items():
        column = table[name] if name in table else pd.Series(np.nan, index=table.index, dtype=object)
        if callable(wanted):
            fits = wanted(column)
        else:
            fits = column.isna() if wanted is None else column.isin([wanted] if np.isscalar(wanted) else list(wanted))
        table = table[fits.to_numpy(dtype=bool, na_value=False)]
    return table


def between(low: float | int, high: float | int = np.inf) -> Callable[[pd.Series], pd.Series]:
    """A condition of `pick`: a number from `low` to `high`, both included."""
    return lambda column: pd.to_numeric(column, errors="coerce").between(low, high)


def paired(a: pd.DataFrame, b: pd.DataFrame, on: Sequence[str] = (), how: str = "-", column: str = "value") -> pd.DataFrame:
    """`a - b` or `a / b` (`how`) of the rows that agree in the model and the columns `on`.

    A column that is missing in all rows of one side (the dense model has no calibration) does not take part. Raises
    ClaimError when two rows of a side agree.
    """
    own = [[name for name in ("model", *on) if name in side and side[name].notna().any()] for side in (a, b)]
    for side, names in zip((a, b), own, strict=True):
        if side.duplicated(names).any() if names else len(side) > 1:
            raise ClaimError(f"two rows agree in {', '.join(names) or 'all keys'}: narrow them")
    if a.empty or b.empty:
        return NOTHING
    keys = [name for name in own[0] if name in own[1]]
    a, b = a.drop(columns=set(on) & set(a) - set(own[0])), b[[*own[1], *b.columns.intersection([column, "run"])]]
    both = a.merge(b, suffixes=("", "_other"), **({"on": keys} if keys else {"how": "cross"}))
    left, right = both[column].astype(float), both.pop(f"{column}_other").astype(float)
    if "run_other" in both:
        both["run"] = both["run"] + " " + both.pop("run_other")
    return both.assign(value=left - right if how == "-" else left / right)


def percent(rows: pd.DataFrame) -> pd.DataFrame:
    """Values as per cent, and their interval where the rows have one."""
    return rows.assign(**{name: 100 * rows[name].astype(float) for name in ("value", "low", "high") if name in rows})


Statistic = str | Callable[[pd.DataFrame], float]
"""Of some rows: a function, or the name of one that pandas has for their values (`mean`, `median`, `min`, …)."""


def value_of(rows: pd.DataFrame, statistic: Statistic) -> float:
    """A statistic of some rows."""
    return float(rows["value"].agg(statistic) if isinstance(statistic, str) else statistic(rows))


def only(rows: pd.DataFrame) -> float:
    """The only value. Raises ClaimError when there are several."""
    if len(rows) != 1:
        raise ClaimError(f"one row is asked for, there are {len(rows)}: narrow them")
    return float(rows["value"].iloc[0])


def spearman(x: str) -> Statistic:
    """Rank correlation of the values with the column `x`."""
    return lambda rows: rows[x].astype(float).rank().corr(rows["value"].rank())


def median_of(column: str, statistic: Statistic) -> Statistic:
    """Median, over the values of `column`, of a statistic within each."""
    return lambda rows: np.median([value_of(part, statistic) for _, part in rows.groupby(column)])


def measure(
    rows: pd.DataFrame, statistic: Statistic = only, *, draws: str | None = None, interval: str | None = None
) -> pd.DataFrame:
    """The statistic of every model's rows: a line each with `measured`, `low`, `high`, `n`, what the `interval` is, and `runs`.

    draws: the column of the random draws; the value is the median over them, the interval goes from the least to the greatest.
    interval: another one: "bootstrap" (95 % for a mean), "leave_one_out" (least and greatest), "row" (that of the row itself:
    95 % of task items, quartiles of times).
    """
    found = []
    rows = rows if "model" in rows else rows.assign(model=PRINTED)
    for model, part in rows.dropna(subset=["value"]).groupby("model", sort=False):
        used = sorted({run for line in part.get("run", ()) for run in line.split()})
        found.append((model, *_with_interval(part, statistic, draws, interval), " ".join(used)))
    return pd.DataFrame(found, columns=["model", "measured", "low", "high", "n", "interval", "runs"])


def _with_interval(
    rows: pd.DataFrame, statistic: Statistic, draws: str | None, interval: str | None
) -> tuple[float, float, float, int, str]:
    """Value, low, high, n and what the interval is, for one model."""
    n = len(rows)
    if draws is not None:
        found = [value_of(part, statistic) for _, part in rows.groupby(draws, dropna=False)]
        if len(found) > 1:
            return float(np.median(found)), min(found), max(found), n, f"least and greatest of {len(found)} draws"
        return found[0], NAN, NAN, n, ""
    value = value_of(rows, statistic)
    if interval == "row":
        row = rows.iloc[0]
        return value, float(row["low"]), float(row["high"]), int(row["n"]), f"interval of the run, n = {row['n']:.0f}"
    if interval == "leave_one_out" and n > 2:
        again = [value, *(value_of(rows.drop(index), statistic) for index in rows.index)]
        return value, min(again), max(again), n, f"least and greatest with at most one of {n} values left out"
    if interval == "bootstrap" and n > 2:
        again = rows["value"].to_numpy(dtype=float)[np.random.default_rng(0).integers(n, size=(2000, n))].mean(axis=1)
        return value, *map(float, np.quantile(again, (0.025, 0.975))), n, f"95 % bootstrap over {n} values"
    return value, NAN, NAN, n, ""
