"""Claims of SimDiff (arXiv 2604.19520), measured."""

from functools import partial

import numpy as np
import pandas as pd

from prunelib.claims.judge import Tables, between, measure, only, paired, percent, pick
from prunelib.lab import runs

SIMDIFF = ["simdiff_mssd", "simdiff_masd"]
SEVEN_TASKS = ["piqa", "hellaswag", "winogrande", "arc_easy", "arc_challenge", "openbookqa", "mathqa"]  # Table 3 without BoolQ
NINE_TASKS = ["cmnli", "hellaswag", "piqa", "coqa", "boolq", "race_middle", "race_high", "xsum", "c3"]  # Table 1 without WSC


def printed(table: pd.DataFrame, **where: object) -> float:
    """The only published value that fits."""
    return only(pick(table, **where))


def gap(table: pd.DataFrame, method: str, other: str, on: str = "item", **where: object) -> pd.DataFrame:
    """Differences between two methods in a published table; of perplexities those of the logarithms."""
    rows = pick(table, **where).drop(columns="model")
    rows = rows.assign(value=np.log(rows["value"])) if where["metric"] == "ppl" else rows
    return paired(pick(rows, method=method), pick(rows, method=other), [on])


def best_alpha(table: pd.DataFrame, item: str) -> float:
    """The alpha of the greatest accuracy at K = 8 in a published heat map."""
    rows = pick(table, item=item, layers_removed=8)
    return float(rows.loc[rows["value"] == rows["value"].max(), "alpha"].mean())  # the middle of a plateau


def published() -> dict[str, float]:
    """What the paper prints, or what follows from its numbers, by claim."""
    p = runs.published("simdiff")
    dense = printed(p, item="table2", method="dense", metric="ppl", model="Mistral-7B-v0.3")
    line, healed = pick(p, item="fig4a"), pick(p, item="tableA7", metric="avg_acc", method=SIMDIFF)
    collapse = paired(pick(line, alpha=1.0), pick(line, alpha=0.8), ["layers_removed"])
    by_size = {"on": "layers_removed", "item": "fig5b", "metric": "ppl"}
    at_8 = {"item": "table3", "metric": "avg_acc", "layers_removed": 8}
    speedup = {"item": "table4", "metric": "speedup"}
    return {
        "simdiff-01": printed(p, item="fig5a", method="shortgpt", layers_removed=12) / dense,
        "simdiff-02": gap(p, "simdiff_mssd", "shortgpt", **by_size)["value"].mean(),
        "simdiff-03": gap(p, "simdiff_masd", "shortgpt", **by_size)["value"].mean(),
        "simdiff-06": only(gap(p, *SIMDIFF[::-1], item="fig5a", metric="ppl", layers_removed=12)),
        "simdiff-07": best_alpha(p, "fig4a"),
        "simdiff-08": best_alpha(p, "fig4b"),
        "simdiff-09": collapse["value"].mean(),
        "simdiff-11": only(gap(p, "simdiff_mssd", "shortgpt", **at_8)),
        "simdiff-12": only(gap(p, "simdiff_masd", "shortgpt", **at_8)),
        "simdiff-13": only(gap(p, "simdiff_mssd", "entrodrop", **at_8 | {"layers_removed": 10})),
        "simdiff-15": only(gap(p, "simdiff", "sleb", item="table2", metric="ppl")),
        "simdiff-17": only(gap(p, "simdiff_mssd", "shortgpt", item="table1", metric="avg_acc")),
        "simdiff-18": printed(p, item="tableA7", method="simdiff_mssd", healed="lora", metric="retained_percent"),
        "simdiff-19": paired(pick(healed, healed="lora"), pick(healed, healed="none"), ["method"])["value"].mean(),
        "simdiff-20": printed(p, layers_removed=12, **speedup),
        "simdiff-21": printed(p, layers_removed=4, **speedup),
    }


def measures(t: Tables) -> dict[str, pd.DataFrame]:
    """Our values, by claim."""
    rules = pick(t.selection, run_part="rules")  # the same budget for every rule
    quarter = pick(rules, metric="nll", role="choice")
    if len(rules):
        layers = rules.groupby("model")["layer"].nunique()
        quarter = quarter[quarter["layers_removed"] == quarter["model"].map(layers / 4).round()]
    tasks = percent(pick(t.tasks, run_part=["tables", "items"], metric="over_cosine", task="all", size=8))
    healed = pick(t.healing, run_part="choices", metric="average", task="all", method=SIMDIFF)
    healed = paired(pick(healed, recipe="lora"), pick(healed, recipe="none"), ["method"])
    faster = pick(t.gpu, role="speed", phase="generation", setting="16x4x2048", mode="graph", layers_removed=12)
    found = {
        "simdiff-11": measure(pick(tasks, method="simdiff_mssd"), interval="row"),
        "simdiff-12": measure(pick(tasks, method="simdiff_masd"), interval="row"),
        "simdiff-14": _loss_over(quarter, "simdiff_mssd", "entropy_gain_attention"),
        "simdiff-15": _loss_over(quarter, "simdiff_mssd", "greedy"),
        "simdiff-19": measure(percent(healed), "mean"),
        "simdiff-20": measure(pick(faster, metric="speedup"), interval="row"),
    }
    return found | _choices(t) | _arithmetic()


def _choices(t: Tables) -> dict[str, pd.DataFrame]:
    """From the sets of layers chosen in the paper's protocol, with one kind of text for all, or every text different (fair)."""
    draws = {"draws": "calibration_seed"}
    rows = pick(t.selection, run_part="simdiff")
    chosen = pick(rows, role="choice")
    paper = pick(chosen, calibration=t.calibration, alpha_corpus=t.alpha_text)
    fair = pick(chosen, calibration=t.fair_calibration, alpha_corpus=t.fair_alpha_text)
    cosine = pick(chosen, metric="ppl", method="block_influence", layers_removed=12, calibration=t.calibration)
    dense = pick(chosen, metric="ppl", method="dense", calibration=None)
    over_cosine = {"metric": "nll_over_cosine", "search": "ternary", "layers_removed": between(1)}
    alpha = pick(paper, metric="nll", search="exact", layers_removed=between(8))
    alpha = alpha.assign(value=alpha.get("alpha"))
    shared = {"metric": "accuracy", "method": SIMDIFF, "layers_removed": between(8)}
    alone = pick(rows, role="path", calibration=t.calibration, alpha_corpus=None, alpha_high=1.0, **shared)
    collapse = paired(alone, pick(paper, search="exact", **shared), ["method", "layers_removed", "calibration_seed"])
    searches = pick(chosen, metric="nll", method=SIMDIFF, layers_removed=between(1))
    on = ["method", "layers_removed", "calibration", "calibration_seed", "alpha_corpus"]
    missed = paired(pick(searches, search="ternary"), pick(searches, search="exact"), on, column="alpha_nll")
    return {
        "simdiff-01": measure(paired(cosine, dense, ["calibration_seed"], how="/"), "median", **draws),
        "simdiff-02": measure(pick(paper, method="simdiff_mssd", **over_cosine), "mean", **draws),
        "simdiff-03": measure(pick(paper, method="simdiff_masd", **over_cosine), "mean", **draws),
        "simdiff-04": measure(pick(fair, method="simdiff_mssd", **over_cosine), "mean", **draws),
        "simdiff-05": measure(pick(fair, method="simdiff_masd", **over_cosine), "mean", **draws),
        "simdiff-06": _loss_over(pick(paper, metric="nll", search="ternary", layers_removed=12), *SIMDIFF[::-1]),
        "simdiff-07": measure(pick(alpha, method="simdiff_mssd"), "median", **draws),
        "simdiff-08": measure(pick(alpha, method="simdiff_masd"), "median", **draws),
        "simdiff-09": measure(percent(collapse.drop(columns=["low", "high"], errors="ignore")), "mean", **draws),
        "simdiff-10": measure(missed.assign(value=100.0 * (missed["value"] > 0)), "mean", interval="bootstrap"),
    }


def _loss_over(rows: pd.DataFrame, method: str, other: str) -> pd.DataFrame:
    """Loss of one rule's choices over that of another's, from the same calibration draws."""
    pairs = paired(pick(rows, method=method), pick(rows, method=other), ["calibration_seed"])
    return measure(pairs, "mean", draws="calibration_seed")


def _arithmetic() -> dict[str, pd.DataFrame]:
    """The paper's own numbers, recomputed."""
    p = runs.published("simdiff")
    over = partial(gap, p, "simdiff_mssd", on="task")
    rows = pick(p, metric=["avg_acc", "tokens_per_s"]).drop(columns="model")
    healed, rates = pick(rows, item="tableA7", method="simdiff_mssd", healed="lora"), pick(rows, item="table4")
    retained = paired(healed, pick(rows, item="table3", method="dense"), how="/")
    return {
        "simdiff-13": measure(over("entrodrop", item="table3", task=SEVEN_TASKS, metric="acc", layers_removed=10), "mean"),
        "simdiff-17": measure(over("shortgpt", item="table1", task=NINE_TASKS, metric=["acc", "score"]), "mean"),
        "simdiff-18": measure(percent(retained)),
        "simdiff-21": measure(paired(pick(rates, layers_removed=4), pick(rates, layers_removed=0), how="/")),
    }
