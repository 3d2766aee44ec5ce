"""Claims of "The Unreasonable Ineffectiveness of the Deeper Layers" (arXiv 2403.17887), measured."""

import numpy as np
import pandas as pd

from prunelib.claims.judge import NOTHING, Tables, between, measure, median_of, paired, percent, pick, spearman


def measures(t: Tables) -> dict[str, pd.DataFrame]:
    """Our values, by claim."""
    tasks, choices = pick(t.tasks, run_part="blocks"), pick(t.blocks, role="choice", metric="nll", size=between(1, 16))
    nearest = paired(pick(choices, method="angular"), pick(choices, method="deepest"), ["size", "calibration_seed"])
    return _healed(t) | {
        "deeper-02": measure(percent(pick(tasks, metric="over_dense", task="all", method="angular", size=4)), interval="row"),
        "deeper-05": measure(nearest, "mean", draws="calibration_seed"),
        "deeper-06": _left_by_deepest(tasks),
        "deeper-11": _deep_layers_are_closer(t),
        "deeper-12": _distance_says_what_can_go(t),
        "deeper-13": measure(
            pick(t.combining, role="cost", metric="interaction", format="nf4", method="greedy", size=8), interval="row"
        ),
    }


def _left_by_deepest(tasks: pd.DataFrame) -> pd.DataFrame:
    """What removing the deepest four layers leaves of the dense model's mean accuracy above chance."""
    means, chance = pick(tasks, metric="average", task="all"), pick(tasks, metric="chance", method="dense")
    guessed = pick(tasks, metric="at_chance").get("task", ())  # not in the averages
    chance = pick(chance, task=lambda task: ~task.isin(guessed))
    dense, deepest = pick(means, method="dense"), pick(means, method="deepest", size=4)
    sums = chance.groupby("model", as_index=False)["value"].sum()  # open questions have no chance: zero
    chance = paired(sums, dense.assign(value=dense.get("n")), how="/")
    return measure(percent(paired(paired(deepest, chance), paired(dense, chance), how="/")))


def _healed(t: Tables) -> dict[str, pd.DataFrame]:
    """From the long healings, by the entries of their profile: of blocks, or of single layers where no blocks were healed."""
    rows = pick(t.converged, experiment="healing", metric="nll")
    lora, before = pick(rows, recipe="lora"), pick(rows, recipe="none", text=t.healing_text)
    if len(lora):
        lora = lora[lora["step"] == lora.groupby("run")["step"].transform("max")]
    parts, rule, varied = ["curve", "curve_deeper", "curve_deepest", "curve_deepest_deeper"], "angular", "angular"
    if pick(lora, run_part=parts).empty:
        parts, rule, varied = ["choices", "sizes"], "block_influence", "greedy"
    here = pick(lora, text=t.healing_text, run_part=parts)
    nearest, cut = pick(here, method=rule), pick(before, run_part=parts, method=rule)
    dense = pick(before, run_part=parts, method="dense").drop(columns="size", errors="ignore")
    recovered = paired(paired(cut, nearest, ["size"]), paired(cut, dense, ["size"]), ["size"], how="/")
    seeds, ranks = (pick(lora, run_part=[study, parts[0]], method=varied, size=8) for study in ("seed", "rank"))
    found = {
        "deeper-03": (pick(here, method=[rule, "dense"]), lambda rows: rows["fraction"].corr(rows["value"]) ** 2),
        "deeper-07": (paired(pick(here, method="deepest"), nearest, ["size"]), lambda rows: rows["value"].abs().mean()),
        "deeper-08": (pick(seeds, text=t.healing_text), lambda rows: np.ptp(rows["value"])),
        "deeper-09": (pick(ranks, text=t.healing_text), spearman("rank")),
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
    true = pick(pd.concat([t.optimum_runs, t.blocks]), role="every_block", metric="nll", size=between(1, 8))
    distance = pick(t.blocks, role=None, metric="angular", size=between(1, 8))
    if true.empty or distance.empty:
        return measure(NOTHING)
    columns = ["model", "size", "start", "calibration_seed", "value", "run"]
    distance = distance[columns].rename(columns={"value": "distance", "run": "of"})
    both = true.drop(columns="calibration_seed", errors="ignore").merge(distance, on=["model", "size", "start"])
    both["run"] = both["run"] + " " + both["of"]
    return measure(both, median_of("size", spearman("distance")), draws="calibration_seed")
