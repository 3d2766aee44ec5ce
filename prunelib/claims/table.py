"""The claims with their values and verdicts, as a table and as Markdown.

`data/claims.csv` says what is claimed, where, and when it holds; `measures` of each paper computes our values from the tables.
Neither a number of ours nor a verdict is written down: a table that changes leaves no old verdict.

A model's verdict is **holds** when the whole interval obeys the rule, **fails** when none of it does, **differs** when the
border lies inside. A claim's verdict is that of its models where they agree, else **differs**; the real models decide, the
small reference models of this repository only where there are no others. A claim that nothing measures is **not testable here**
and says why. Where a profile lacks the rows, there is no verdict, unless the claim says why.
"""

import functools
import operator
from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from prunelib.claims import deeper_layers, own, simdiff, slicing
from prunelib.claims.judge import PRINTED, ClaimError, Tables
from prunelib.io import at_root

CLAIMS = "data/claims.csv"
VERDICTS = HOLDS, FAILS, DIFFERS, NOT_HERE = "holds", "fails", "differs", "not testable here"
MARKS = dict(zip(VERDICTS, "✓✗≈–", strict=True)) | {None: "–"}
JUDGES = REAL, REFERENCE, PAPER = "real models", "reference models", "the papers' own numbers"
RULE = {"above": "> ", "below": "< ", "within": "± "}  # columns of a rule; within: that far from the published value


def outcomes(*sources: Tables) -> pd.DataFrame:
    """One line per claim and model, one for a claim without measured values; `runs` are the run files behind a value.

    sources: tables of different models; of a model that is in several, the first counts. `verdict` is that of the real models
    where they were measured, `judged_on` says whose it is, `verdict_reference` is that of the reference models.

    Raises ClaimError naming a claim that has neither a measure with a rule nor a reason why there is none.
    """
    published = simdiff.published() | slicing.published()
    papers = (simdiff, slicing, deeper_layers, own)
    measured = [functools.reduce(operator.or_, (paper.measures(one) for paper in papers)) for one in sources]
    lines = []
    for facts in pd.read_csv(at_root(CLAIMS), dtype={"digits": int}, keep_default_na=False).to_dict("records"):
        name, reason, value = facts["id"], facts["reason"], published.get(facts["id"], np.nan)
        ends = {end: float(facts[end]) for end in RULE if facts[end] != ""}
        if (name in measured[0]) != bool(ends) or not (reason or ends):
            raise ClaimError(f"claim {name}: give a measure with a rule, or a reason why there is none")
        ours = pd.concat([one[name] for one in measured]).drop_duplicates("model").to_dict("records") if ends else []
        rule = ", ".join(f"{RULE[end]}{value:g}" for end, value in ends.items())
        verdicts = dict.fromkeys(JUDGES)
        for one in ours:
            one |= {"holds_if": f"{rule} {facts['unit']}".strip(), "verdict_of_model": judge(one, ends, value)}
            before = verdicts[group(one["model"])]
            verdicts[group(one["model"])] = one["verdict_of_model"] if before in (None, one["verdict_of_model"]) else DIFFERS
        judged_on = next((judges for judges, verdict in verdicts.items() if verdict), None)
        common = facts | {"published": value, "judged_on": judged_on, "verdict_reference": verdicts[REFERENCE]}
        common |= {"verdict": verdicts[judged_on], "reason": ""} if ours else {}
        lines += [common | one for one in ours or [{"verdict": NOT_HERE if reason else None}]]
    return pd.DataFrame(lines).drop(columns=list(RULE)).astype({"n": "Int64"})


def group(model: str) -> str:
    """Who judges: a model, one of the small reference models of this repository, or the paper itself."""
    return PAPER if model == PRINTED else REFERENCE if model.startswith("ref-") else REAL


def judge(one: Mapping, ends: Mapping[str, float | int], published: float) -> str:
    """Whether a measured value with its interval lies inside the `ends` of a rule."""
    lower, upper = ends.get("above", -np.inf), ends.get("below", np.inf)
    if "within" in ends:
        lower, upper = published - ends["within"], published + ends["within"]
    low, high = (one[end] if np.isfinite(one[end]) else one["measured"] for end in ("low", "high"))
    if lower < low and high < upper:
        return HOLDS
    return FAILS if high <= lower or upper <= low else DIFFERS


def number(value: float | None, digits: int) -> str:
    """A number as it is printed everywhere: fixed decimals, a true minus, no minus at zero; `–` for a missing one."""
    if value is None or not np.isfinite(value):
        return "–"
    return f"{value:z,.{digits}f}".replace("-", "−")


def values(found: pd.DataFrame) -> list[str]:
    """`value [low, high]` of every line."""
    lines = zip(*(found[name] for name in ("measured", "low", "high", "digits")), strict=True)
    texts = ([number(one, digits) for one in ends] for *ends, digits in lines)
    return [value if "–" in ends else f"{value} [{', '.join(ends)}]" for value, *ends in texts]


def marked(verdict: str | float | None) -> str:
    """A verdict behind its sign; nothing for a missing one."""
    return f"{MARKS[verdict]} {verdict}" if pd.notna(verdict) else ""


def models(found: pd.DataFrame) -> list[str]:
    """The models in the order of who judges, those with more claims first."""
    return sorted(found["model"].value_counts().index, key=lambda name: JUDGES.index(group(name)))


def summary(found: pd.DataFrame) -> pd.DataFrame:
    """How many claims got each verdict, by who judged them."""
    each = found.drop_duplicates("id")
    table = pd.crosstab(each["judged_on"].fillna("nothing"), each["verdict"].fillna("no run"))
    table = table.reindex(index=[*JUDGES, "nothing"], columns=[*VERDICTS, "no run"], fill_value=0)
    return table.loc[table.any(axis=1), table.any()].rename_axis("judged on").reset_index()


def changes(found: pd.DataFrame) -> pd.DataFrame:
    """The claims on which the real models disagree with the reference models: both verdicts, with every model's value."""
    lines = []
    for name, part in found[found["judged_on"] == REAL].groupby("id", sort=False):
        one, said = part.iloc[0], {REFERENCE: [], REAL: []}
        for model, value in zip(part["model"], values(part), strict=True):
            said[group(model)].append(f"{model} {value}")
        if said[REFERENCE] and one["verdict"] != one["verdict_reference"]:
            verdicts = {REFERENCE: one["verdict_reference"], REAL: one["verdict"]}
            texts = {who: f"{marked(verdicts[who])}: {', '.join(said[who])} {one['unit']}".strip() for who in said}
            lines.append({"id": name, "claim": one["short"], **texts})
    return pd.DataFrame(lines, columns=["id", "claim", REFERENCE, REAL])


def page(found: pd.DataFrame, figures: str = "figures") -> str:
    """The claims of a document: how many hold, every tested one with its values, and the others with the reason."""
    tested, lines, others = found[found["measured"].notna()], [], []
    for name, part in found.groupby("id", sort=False):
        one, cells = part.iloc[0], dict(zip(part["model"], values(part), strict=True))
        source = (
            f"[{one['source']}]({figures}/{one['figure']}.{'csv' if '_table' in one['figure'] else 'png'})"
            if one["figure"]
            else one["source"]
        )
        text = f"`{name}` {one['claim']} ({source})"
        if pd.isna(one["measured"]):
            others.append(f"- {text}: {one['reason'] or 'no rows in this profile'}")
            continue
        line = {"claim": text, "published": number(one["published"], int(one["digits"]))}
        line |= {model: cells.get(model, "") for model in models(tested)} | {"holds if": one["holds_if"]}
        line["verdict"] = marked(one["verdict"]) + f", on {REFERENCE} alone" * (one["judged_on"] == REFERENCE)
        lines.append(line | {REFERENCE: marked(one["verdict_reference"])})
    parts = [markdown(summary(found)), "Measured: value [interval].", markdown(pd.DataFrame(lines))]
    return "\n\n".join([*parts, f"Not tested, {len(others)} claims, and why:", "\n".join(others)])


def markdown(data: pd.DataFrame, *, digits: int | Mapping[str, int] = 2) -> str:
    """A table in Markdown: numbers to the right with `digits` decimals (for all, or one per column), whole ones as they are."""

    def cell(value: Any, places: int) -> str:
        if pd.isna(value):
            return "–"
        return f"{value:,.{places}f}" if isinstance(value, float | np.floating) else str(value).replace("|", "\\|")

    columns = {}
    for name, column in data.items():
        places = digits if isinstance(digits, int) else digits.get(name, 2)
        rule = "---:" if pd.api.types.is_numeric_dtype(column) else "---"
        columns[str(name)] = [rule, *(cell(value, places) for value in column)]
    lines = [columns, *zip(*columns.values(), strict=True)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
