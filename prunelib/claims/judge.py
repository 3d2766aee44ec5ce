"""Measure the claims of the papers on the tables, and judge them.

`data/claims.csv` says what is claimed, where, and when it holds. A function marked with `claim` measures it: from the tables to
a value for every model. Neither a number of ours nor a verdict is written down: a table that changes leaves no old verdict.

A model's verdict is **holds** when the whole interval obeys the rule, **fails** when none of it does, **differs** when the
border lies inside. A claim's verdict is that of its models where they agree, else **differs**. A claim that nothing measures
is **not testable here** and says why. Where a profile lacks the rows, there is no verdict, unless the claim says why.
"""

import os
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from prunelib.io import at_root
from prunelib.lab import runs

CLAIMS = "data/claims.csv"
VERDICTS = HOLDS, FAILS, DIFFERS, NOT_HERE = "holds", "fails", "differs", "not testable here"
PRINTED = "as printed"  # stands for the model where the paper's own numbers are recomputed
NAN = float("nan")
FORMS = {
    "number": "the number",
    "form": "the form, on other models",
    "arithmetic": "the paper's own numbers",
    "stricter": "a stricter test, on other models",
}
"""What is tested: the printed number itself; what it says, on models of another size; the paper's own numbers, recomputed; the
same as a form, tested harder than the paper does."""


class ClaimError(ValueError):
    """A claim that cannot be computed as it is written."""


def load(source: str | os.PathLike | Iterable[str | os.PathLike]) -> pd.DataFrame:
    """A table of runs: its CSV, or a folder or list of run files. `model` is the last part of the model's name, `run_part` the
    entry of the profile that a run belongs to.
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

    def __getattr__(self, name: str) -> Any:
        if name not in self.parameters:
            raise AttributeError(f"no table or setting {name!r}; there are: {', '.join(self.parameters)}")
        value = self.parameters[name]
        if value is not None and "/" not in str(value):
            return value
        if name not in self._read:
            folder = at_root(value) if isinstance(value, str) and not value.endswith(".csv") else None
            there = value is not None and (folder is None or any(folder.rglob("[!.]*.json")))
            self._read[name] = load(value) if there else pd.DataFrame()
        return self._read[name]

    def code(self, used: Iterable[str]) -> pd.DataFrame:
        """The given runs with the hash of the library that made each: columns `run` and `code`."""
        parts = [table.loc[table["run"].isin(used), ["run", "code"]] for table in self._read.values() if len(table)]
        return pd.concat([pd.DataFrame({"run": [], "code": []}), *parts]).drop_duplicates()


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


def last_step(table: pd.DataFrame) -> pd.DataFrame:
    """Of each training, the rows of its last step."""
    return table[table["step"] == table.groupby("run")["step"].transform("max")] if len(table) else table


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
        return pd.DataFrame()
    keys = [name for name in own[0] if name in own[1]]
    a = a.drop(columns=[name for name in on if name in a and name not in own[0]])
    other = b[[*keys, *(name for name in own[1] if name not in a), *(name for name in (column, "run") if name in b)]]
    both = a.merge(other, suffixes=("", "_other"), **({"on": keys} if keys else {"how": "cross"}))
    left, right = both[column].astype(float), both.pop(f"{column}_other").astype(float)
    if "run_other" in both:
        both["run"] = both["run"] + " " + both.pop("run_other")
    return both.assign(value=left - right if how == "-" else left / right)


def scaled(rows: pd.DataFrame, function: Callable[[Any], Any]) -> pd.DataFrame:
    """`function` of the values, and of the interval where the rows have one."""
    return rows.assign(**{name: function(rows[name].astype(float)) for name in ("value", "low", "high") if name in rows})


def percent(rows: pd.DataFrame) -> pd.DataFrame:
    """Values as per cent."""
    return scaled(rows, lambda value: 100 * value)


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


@dataclass(frozen=True)
class Measured:
    """One model's value. `low` and `high` are NaN without an interval, `interval` says what they are; `runs` are behind it."""

    model: str
    value: float | int
    low: float | int = NAN
    high: float | int = NAN
    n: int = 1
    interval: str = ""
    runs: tuple[str, ...] = ()


def measure(
    rows: pd.DataFrame, statistic: Statistic = only, *, draws: str | None = None, interval: str | None = None
) -> list[Measured]:
    """The statistic of every model's rows, in their order; none where there are no rows.

    draws: the column of the random draws; the value is the median over them, the interval goes from the least to the greatest.
    interval: another one: "bootstrap" (95 % over the rows), "leave_one_out" (least and greatest), "row" or "row_quartiles"
    (that of the row itself).
    """
    rows = rows.dropna(subset=["value"]) if len(rows) else rows
    groups = rows.groupby("model", sort=False) if "model" in rows and rows["model"].notna().any() else [(PRINTED, rows)]
    found = []
    for model, part in groups:
        if len(part):
            used = tuple(sorted({run for line in part["run"] for run in str(line).split()})) if "run" in part else ()
            found.append(Measured(str(model), *_with_interval(part, statistic, draws, interval), used))
    return found


def _with_interval(
    rows: pd.DataFrame, statistic: Statistic, draws: str | None, interval: str | None
) -> tuple[float, float, float, int, str]:
    """Value, low, high, n and what the interval is, for one model."""
    n = len(rows)
    if draws is not None:
        found = [value_of(part, statistic) for _, part in rows.groupby(draws)] or [value_of(rows, statistic)]
        if len(found) == 1:
            return found[0], NAN, NAN, n, ""
        return float(np.median(found)), min(found), max(found), n, f"least and greatest of {len(found)} draws"
    value = value_of(rows, statistic)
    if interval in ("row", "row_quartiles"):
        row = rows.loc[(rows["value"].astype(float) - value).abs().idxmin()]
        n = int(row["n"]) if np.isfinite(row["n"]) else n
        words = f"95 % interval of the run, n = {n}" if interval == "row" else f"quartiles of {n} rounds of the run"
        return value, float(row["low"]), float(row["high"]), n, words
    if interval == "leave_one_out" and n > 2:
        again = [value_of(rows.drop(index), statistic) for index in rows.index]
        return value, min(again), max(again), n, f"least and greatest with one of {n} values left out"
    if interval == "bootstrap" and n > 2:
        generator, values = np.random.default_rng(0), rows[["value"]]  # other columns would cost a hundred times as much
        again = [value_of(values.iloc[generator.integers(n, size=n)], statistic) for _ in range(2000)]
        return value, *map(float, np.quantile(again, (0.025, 0.975))), n, f"95 % bootstrap over {n} values"
    return value, NAN, NAN, n, ""


@dataclass(frozen=True)
class Rule:
    """Where a measured value must lie for a claim to hold, ends excluded. within: its distance from the published value."""

    above: float | int = -np.inf
    below: float | int = np.inf
    within: float | int | None = None

    def judge(self, one: Measured, published: float | int | None = None) -> str:
        """Whether a value with its interval obeys the rule: holds, fails, or differs when the border lies inside."""
        lower, upper = (self.above, self.below) if self.within is None else (published - self.within, published + self.within)
        low, high = (end if np.isfinite(end) else one.value for end in (one.low, one.high))
        if lower < low and high < upper:
            return HOLDS
        return FAILS if high <= lower or upper <= low else DIFFERS

    def words(self) -> str:
        """The rule as a reader wants it: `below 0`."""
        if self.within is not None:
            return f"within {self.within:g} of published"
        ends = (("above", self.above), ("below", self.below))
        return " and ".join(f"{name} {end:g}" for name, end in ends if np.isfinite(end))


MEASURES: dict[str, Callable[[Tables], list[Measured]]] = {}
PUBLISHED: dict[str, Callable[[pd.DataFrame], float]] = {}
"""By the id of a claim: what computes our value, and what finds the published one."""


def claim(identifier: str, published: Callable[[pd.DataFrame], float] | None = None) -> Callable:
    """Decorator of the function that measures a claim: `(tables) -> list[Measured]`.

    published: finds or computes the value that the paper prints, from the table of published numbers.
    """

    def decorate(function: Callable[[Tables], list[Measured]]) -> Callable[[Tables], list[Measured]]:
        MEASURES[identifier] = function
        if published is not None:
            PUBLISHED[identifier] = published
        return function

    return decorate


@dataclass(frozen=True)
class Outcome:
    """A claim with what was computed for it.

    claim: its line of data/claims.csv, by column. rule: when it holds, None where nothing measures it. verdicts: one per
    `measured`. verdict: None when the profile has no rows for it.
    """

    claim: Any
    rule: Rule | None
    published: float | None
    measured: tuple[Measured, ...]
    verdicts: tuple[str, ...]
    verdict: str | None


def outcomes(tables: Tables) -> list[Outcome]:
    """All claims, measured and judged, in the order of their file. Raises ClaimError naming one that cannot be computed."""
    printed, found = runs.published(), []
    for one in pd.read_csv(at_root(CLAIMS), dtype={"digits": int}, keep_default_na=False).itertuples(index=False):
        ends = {name: float(getattr(one, name)) for name in ("above", "below", "within") if getattr(one, name) != ""}
        if one.form not in FORMS or (one.id in MEASURES) != bool(ends) or not (one.reason or ends):
            raise ClaimError(f"claim {one.id}: give a known form, and a measure with a rule or a reason why there is none")
        rule = Rule(**ends) if ends else None
        try:
            published = float(PUBLISHED[one.id](printed)) if one.id in PUBLISHED else None
            measured = tuple(MEASURES[one.id](tables)) if one.id in MEASURES else ()
            verdicts = tuple(rule.judge(part, published) for part in measured)
        except (ClaimError, KeyError) as error:
            raise ClaimError(f"claim {one.id}: {error}") from error
        agreed = verdicts[0] if len(set(verdicts)) == 1 else DIFFERS
        found.append(
            Outcome(one, rule, published, measured, verdicts, agreed if measured else NOT_HERE if one.reason else None)
        )
    return found
