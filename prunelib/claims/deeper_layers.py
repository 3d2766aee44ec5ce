"""Claims of "The Unreasonable Ineffectiveness of the Deeper Layers" (arXiv 2403.17887), measured."""

import numpy as np
import pandas as pd

from prunelib.claims.judge import NOTHING, Tables, between, measure, median_of, paired, percent, pick, spearman
from prunelib.lab import runs


def published() -> dict[str, float]:
    """What the paper prints, by claim: of a range its lower end."""
    headline = runs.published("deeper_layers", "headline")
    where = {
        "deeper-01": {"model": "Llama-2", "task": "mmlu"},
        "deeper-14": {"method": "similarity_4bit", "task": "memory"},
        "deeper-15": {"model": "Mistral-7B", "task": "mmlu"},
        "deeper-16": {"model": "Llama-2-70B", "task": "c4_val_loss"},
    }
    return {name: float(pick(headline, **one)["value"].min()) for name, one in where.items()}


def measures(t: Tables) -> dict[str, pd.DataFrame]:
    """Our values, by claim."""
    tasks, choices = pick(t.tasks, run_part="blocks"), pick(t.blocks, role="choice", metric="nll", size=between(1, 16))
    chance = pick(tasks, metric="chance", task="pydocs_summary", method="dense")
    means = pick(tasks, metric="average", task="all")
    kept, dense = (paired(pick(means, **one), chance) for one in ({"method": "deepest", "size": 4}, {"method": "dense"}))
    nearest = paired(pick(choices, method="angular"), pick(choices, method="deepest"), ["size", "calibration_seed"])
    memory = pick(runs.published("deeper_layers", "headline"), method="dense", task="memory").drop(columns="model")
    return _healed(t) | {
        "deeper-02": measure(percent(pick(tasks, metric="over_dense", task="all", method="angular", size=4)), interval="row"),
        "deeper-05": measure(nearest, "mean", draws="calibration_seed"),
        "deeper-06": measure(percent(paired(kept, dense, how="/"))),
        "deeper-11": _deep_layers_are_closer(t),
        "deeper-12": _distance_says_what_can_go(t),
        "deeper-13": measure(
            pick(t.combining, role="cost", metric="interaction", format="nf4", method="greedy", size=8), interval="row"
        ),
        "deeper-14": measure(memory.assign(value=memory["value"] / 8)),
    }


def _healed(t: Tables) -> dict[str, pd.DataFrame]:
    """From the long healings, by the entries of their profile."""
    rows = pick(t.converged, experiment="healing", metric="nll")
    lora = pick(rows, recipe="lora")
    if len(lora):
        lora = lora[lora["step"] == lora.groupby("run")["step"].transform("max")]
    here, curve = {"text": t.healing_text}, ["curve", "curve_deeper"]
    nearest, before = (pick(one, **here, run_part=curve, method="angular") for one in (lora, pick(rows, recipe="none")))
    dense = pick(rows, **here, run_part="curve", method="dense", recipe="none").drop(columns="size", errors="ignore")
    deepest = paired(
        pick(lora, **here, run_part=["curve_deepest", "curve_deepest_deeper"], method="deepest"), nearest, ["size"]
    )
    recovered = paired(paired(before, nearest, ["size"]), paired(before, dense, ["size"]), ["size"], how="/")
    base = {"method": "angular", "size": 8}
    seeds, ranks = (pick(lora, run_part=[study, "curve"], **base) for study in ("seed", "rank"))
    found = {
        "deeper-03": (
            pick(lora, **here, run_part=curve, method=["angular", "dense"]),
            lambda rows: rows["fraction"].corr(rows["value"]) ** 2,
        ),
        "deeper-07": (deepest.assign(value=deepest["value"].abs()), "mean"),
        "deeper-08": (pick(seeds, **here), lambda rows: np.ptp(rows["value"])),
        "deeper-09": (pick(ranks, **here), spearman("rank")),
        "deeper-10": (pick(ranks, text=t.other_text), spearman("rank")),
    }
    found = {name: measure(rows, statistic, interval="leave_one_out") for name, (rows, statistic) in found.items()}
    return found | {"deeper-04": measure(percent(recovered), "min")}


def _deep_layers_are_closer(t: Tables) -> pd.DataFrame:
    rows = pick(t.blocks, role=None, metric="angular", size=between(1, 8))
    if len(rows):
        rows = rows[rows["start"] < rows.groupby(["model", "size"])["start"].transform("max")]
    return measure(rows, median_of("size", spearman("start")), draws="calibration_seed")


def _distance_says_what_can_go(t: Tables) -> pd.DataFrame:
    true = pick(t.optimum_runs, role="every_block", metric="nll", size=between(1, 8))
    distance = pick(t.blocks, role=None, metric="angular", size=between(1, 8))
    if true.empty or distance.empty:
        return measure(NOTHING)
    columns = ["model", "size", "start", "calibration_seed", "value", "run"]
    distance = distance[columns].rename(columns={"value": "distance", "run": "of"})
    both = true.drop(columns="calibration_seed", errors="ignore").merge(distance, on=["model", "size", "start"])
    both["run"] = both["run"] + " " + both["of"]
    return measure(both, median_of("size", spearman("distance")), draws="calibration_seed")
