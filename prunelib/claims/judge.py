"""Measure the claims of the papers on the tables, and judge them.

`data/claims.csv` says what is claimed, where, and when it holds. A function marked with `claim` measures it: from the tables to
a value for every model. Neither a number of ours nor a verdict is written down: a table that changes leaves no old verdict.

A model's verdict is **holds** when the whole interval obeys the rule, **fails** when none of it does, **differs** when the
border lies inside. A claim's verdict is that of its models where they agree, else **differs**. A claim that nothing measures
is **not testable here** and says why. Where a profile lacks the rows, there is no verdict, unless the claim says why.
"""

import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd

from prunelib.io import at_root
from prunelib.lab import runs

CLAIMS = "data/claims.csv"
HOLDS, FAILS, DIFFERS, NOT_HERE = "holds", "fails", "differs", "not testable here"
VERDICTS = (HOLDS, FAILS, DIFFERS, NOT_HERE)
PRINTED = "as printed"  # stands for the model where the paper's own numbers are recomputed
RESAMPLES = 2000
FORMS = {
    "number": "the number",
    "form": "the form, on other models",
    "arithmetic": "the paper's own numbers",
    "stricter": "a stricter test, on other models",
}
"""What is tested: the printed number itself; what it says, on models of another size; the paper's own numbers, recomputed; the
same as a form, tested harder than the paper does."""

Statistic = Callable[[pd.DataFrame], float]


class ClaimError(ValueError):
    """A claim that cannot be computed as it is written."""


@dataclass
class Tables:
    """The tables of a profile, each read when it is first asked for: `tables.selection`, `tables.blocks`, …

    parameters: name → CSV file, folder or list of run files, None where a profile has no such table (it has no rows then),
    or a setting such as `calibration`, the text behind the scores. A table gets the column `entry`, the name of a run in its
    profile, and `model` is the last part of the model's name.
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
            self._read[name] = _read(value)
        return self._read[name]

    def code(self, used: Collection[str]) -> pd.DataFrame:
        """The given runs with the hash of the library that made each: columns `run` and `code`."""
        parts = [table.loc[table["run"].isin(used), ["run", "code"]] for table in self._read.values() if len(table)]
        return pd.concat([pd.DataFrame({"run": [], "code": []}), *parts]).drop_duplicates()


def _read(place: str | list[str] | None) -> pd.DataFrame:
    folder = at_root(place) if isinstance(place, str) and not place.endswith(".csv") else None
    if place is None or (folder is not None and not any(folder.rglob("[!.]*.json"))):
        return pd.DataFrame()
    if isinstance(place, str) and folder is None:
        table = runs.read_table(place)
    else:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # committed runs of several versions of the library; every row names its own
            table = runs.collect(place)
    entry = table["run"].str.rsplit("__", n=1).str[-1]
    return table.assign(entry=entry, model=table["model"].str.rsplit("/", n=1).str[-1])


# ------------------------------------------------------------------------------------------------------------------- rows


def pick(table: pd.DataFrame, **where: Any) -> pd.DataFrame:
    """The rows that fit every condition: a value, a list of values, None for missing, or a function of the column.

    A column that is not there is missing in every row.
    """
    for name, wanted in where.items():
        column = table[name] if name in table else pd.Series(np.nan, index=table.index, dtype=object)
        if callable(wanted):
            fits = wanted(column)
        else:
            fits = column.isna() if wanted is None else column.isin(wanted if isinstance(wanted, list) else [wanted])
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
    keys = [name for name in ("model", *on) if all(name in side and side[name].notna().any() for side in (a, b))]
    for side in (a, b):
        own = [name for name in ("model", *on) if name in side and side[name].notna().any()]
        if side.duplicated(own).any() if own else len(side) > 1:
            raise ClaimError(f"two rows agree in {', '.join(own) or 'all keys'}: narrow them")
    if a.empty or b.empty:
        return pd.DataFrame()
    a = a.drop(columns=[name for name in on if name in a and a[name].isna().all()])
    wanted = [*keys, *(name for name in on if name not in keys and name not in a), column, "run"]
    other = b[[name for name in wanted if name in b]]
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


# ------------------------------------------------------------------------------------------------------------- statistics


def mean(rows: pd.DataFrame) -> float:
    """Mean of the values."""
    return float(rows["value"].mean())


def median(rows: pd.DataFrame) -> float:
    """Median of the values."""
    return float(rows["value"].median())


def only(rows: pd.DataFrame) -> float:
    """The only value. Raises ClaimError when there are several."""
    if len(rows) != 1:
        raise ClaimError(f"one row is asked for, there are {len(rows)}: narrow them")
    return float(rows["value"].iloc[0])


def spearman(x: str) -> Statistic:
    """Rank correlation of the values with the column `x`."""
    return lambda rows: float(np.corrcoef(rows[x].astype(float).rank(), rows["value"].rank())[0, 1])


def linearity(x: str) -> Statistic:
    """R² of a straight line through the values over the column `x`."""
    return lambda rows: float(np.corrcoef(rows[x].astype(float), rows["value"])[0, 1] ** 2)


def quartile_range(rows: pd.DataFrame) -> float:
    """Width of the middle half of the values."""
    return float(np.subtract(*np.quantile(rows["value"], (0.75, 0.25))))


def median_of(column: str, statistic: Statistic) -> Statistic:
    """Median, over the values of `column`, of a statistic within each."""
    return lambda rows: float(np.median([statistic(part) for _, part in rows.groupby(column)]))


# -------------------------------------------------------------------------------------------------------------- measuring


@dataclass(frozen=True)
class Measured:
    """One model's value. `low` and `high` are NaN without an interval, `interval` says what they are; `runs` are behind it."""

    model: str
    value: float | int
    low: float | int = float("nan")
    high: float | int = float("nan")
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
    return [_measured(str(model), part, statistic, draws, interval) for model, part in groups if len(part)]


def _measured(model: str, rows: pd.DataFrame, statistic: Statistic, draws: str | None, interval: str | None) -> Measured:
    used = tuple(sorted({run for line in rows["run"] for run in str(line).split()})) if "run" in rows else ()
    low = high = float("nan")
    words, n = "", len(rows)
    if draws is not None:
        found = [statistic(part) for _, part in rows.groupby(draws)] or [statistic(rows)]
        value = float(np.median(found))
        if len(found) > 1:
            low, high, words = min(found), max(found), f"least and greatest of {len(found)} draws"
        return Measured(model, value, low, high, n, words, used)
    value = statistic(rows)
    if interval in ("row", "row_quartiles"):
        row = rows.iloc[int(np.argmin(np.abs(rows["value"].to_numpy(dtype=float) - value)))]
        low, high = float(row["low"]), float(row["high"])
        n = int(row["n"]) if np.isfinite(row["n"]) else n
        words = f"95 % interval of the run, n = {n}" if interval == "row" else f"quartiles of {n} rounds of the run"
    elif interval == "leave_one_out" and n > 2:
        again = [statistic(rows.drop(index)) for index in rows.index]
        low, high, words = min(again), max(again), f"least and greatest with one of {n} values left out"
    elif interval == "bootstrap" and n > 2:
        generator = np.random.default_rng(0)
        values = rows[["value"]]  # the other columns would cost a hundred times as much
        again = [statistic(values.iloc[generator.integers(n, size=n)]) for _ in range(RESAMPLES)]
        low, high = (float(end) for end in np.quantile(again, (0.025, 0.975)))
        words = f"95 % bootstrap over {n} values"
    return Measured(model, value, low, high, n, words, used)


# ---------------------------------------------------------------------------------------------------------------- judging


@dataclass(frozen=True)
class Rule:
    """Where a measured value must lie for a claim to hold, ends excluded. within: its distance from the published value."""

    above: float | int = float("-inf")
    below: float | int = float("inf")
    within: float | int | None = None

    def judge(self, one: Measured, published: float | int | None = None) -> str:
        """Whether a value with its interval obeys the rule: holds, fails, or differs when the border lies inside."""
        if self.within is not None and published is None:
            raise ClaimError("`within` needs a published value")
        lower, upper = (self.above, self.below) if self.within is None else (published - self.within, published + self.within)
        low, high = (end if np.isfinite(end) else one.value for end in (one.low, one.high))
        if lower < low and high < upper:
            return HOLDS
        return FAILS if high <= lower or upper <= low else DIFFERS

    def words(self) -> str:
        """The rule as a reader wants it: `below 0`."""
        if self.within is not None:
            return f"within {self.within:g} of published"
        return " and ".join(
            f"{name} {end:g}" for name, end in (("above", self.above), ("below", self.below)) if np.isfinite(end)
        )


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
class Claim:
    """One line of data/claims.csv.

    claim: one sentence, our words; short: a few. source: section, table or figure. form: a key of `FORMS`. holds: when it
    does, None where nothing measures it. figure: the stem that shows it. reason: why it cannot be tested here. note: what a
    reader of the verdict should know.
    """

    id: str
    paper: str
    source: str
    claim: str
    short: str
    form: str
    unit: str
    digits: int
    holds: Rule | None
    figure: str
    reason: str
    note: str


def read_claims() -> list[Claim]:
    """All claims, in the order of the file. Raises ClaimError naming one without a measure and its rule, or a reason."""
    table = pd.read_csv(at_root(CLAIMS), dtype={"digits": int}, keep_default_na=False)
    claims = []
    for line in table.to_dict("records"):
        ends = {name: float(line.pop(name)) if line[name] != "" else line.pop(name) for name in ("above", "below", "within")}
        rule = Rule(**{name: end for name, end in ends.items() if end != ""}) if set(ends.values()) != {""} else None
        one = Claim(**line, holds=rule)
        if one.form not in FORMS or (one.id in MEASURES) != (rule is not None) or not (one.reason or rule):
            raise ClaimError(f"claim {one.id}: give a known form, and a measure with a rule or a reason why there is none")
        claims.append(one)
    return claims


@dataclass(frozen=True)
class Outcome:
    """A claim with what was computed for it. `verdict` is None when the profile has no rows for it."""

    claim: Claim
    published: float | None
    measured: tuple[Measured, ...]
    verdicts: tuple[str, ...]  # one for each of `measured`
    verdict: str | None


def outcomes(tables: Tables) -> list[Outcome]:
    """All claims, measured and judged, in their order. Raises ClaimError naming the claim that cannot be computed."""
    printed = runs.published()
    found = []
    for one in read_claims():
        try:
            published = PUBLISHED[one.id](printed) if one.id in PUBLISHED else None
            measured = tuple(MEASURES[one.id](tables)) if one.id in MEASURES else ()
            verdicts = tuple(one.holds.judge(part, published) for part in measured)
        except (ClaimError, KeyError) as error:
            raise ClaimError(f"claim {one.id}: {error}") from error
        agreed = verdicts[0] if len(set(verdicts)) == 1 else DIFFERS
        verdict = agreed if measured else NOT_HERE if one.reason else None
        found.append(Outcome(one, published, measured, verdicts, verdict))
    return found
