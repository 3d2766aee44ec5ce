"""Claims of "The Unreasonable Ineffectiveness of the Deeper Layers" (arXiv 2403.17887), measured."""

from functools import partial

import numpy as np
import pandas as pd

from prunelib.claims import judge
from prunelib.claims.judge import PUBLISHED, Measured, Tables, between, claim, measure, paired, percent, pick, spearman
from prunelib.lab.runs import published

CURVE = ["curve", "curve_deeper"]  # entries of the long healings: the similarity rule
CURVE_DEEPEST = ["curve_deepest", "curve_deepest_deeper"]


def printed(table: pd.DataFrame, **where: object) -> float:
    """The first of the published values that fit: the lower end of a range."""
    return float(pick(table, paper="deeper_layers", item="headline", **where)["value"].min())


PUBLISHED["deeper-01"] = partial(printed, model="Llama-2", task="mmlu")
PUBLISHED["deeper-15"] = partial(printed, model="Mistral-7B", task="mmlu")
PUBLISHED["deeper-16"] = partial(printed, model="Llama-2-70B", task="c4_val_loss")


@claim("deeper-02")
def accuracy_has_a_plateau(t: Tables) -> list[Measured]:
    rows = pick(t.tasks, run_part="blocks", metric="over_dense", task="all", method="angular", size=4)
    return measure(percent(rows), interval="row")


def healing(t: Tables, text: str, **where: object) -> pd.DataFrame:
    """Losses on a text in the long healings."""
    return pick(t.converged, experiment="healing", metric="nll", text=text, **where)


def healed(t: Tables, text: str, **where: object) -> pd.DataFrame:
    """Losses at the end of a training with LoRA."""
    return judge.last_step(healing(t, text, recipe="lora", **where))


@claim("deeper-03")
def healed_loss_is_nearly_linear(t: Tables) -> list[Measured]:
    rows = healed(t, t.healing_text, run_part=CURVE, method=["angular", "dense"])
    return measure(rows, lambda rows: rows["fraction"].corr(rows["value"]) ** 2, interval="leave_one_out")


@claim("deeper-04")
def healing_wins_back_most(t: Tables) -> list[Measured]:
    before = healing(t, t.healing_text, run_part=CURVE, method="angular", recipe="none")
    after = healed(t, t.healing_text, run_part=CURVE, method="angular")
    dense = healing(t, t.healing_text, run_part="curve", method="dense", recipe="none").drop(columns="size", errors="ignore")
    share = paired(paired(before, after, ["size"]), paired(before, dense, ["size"]), ["size"], how="/")
    return measure(percent(share), "min")


@claim("deeper-05")
def nearest_block_beats_deepest(t: Tables) -> list[Measured]:
    rows = pick(t.blocks, role="choice", metric="nll", size=between(1, 16))
    gap = paired(pick(rows, method="angular"), pick(rows, method="deepest"), ["size", "calibration_seed"])
    return measure(gap, "mean", draws="calibration_seed")


@claim("deeper-06")
def deepest_is_near_chance(t: Tables) -> list[Measured]:
    rows = pick(t.tasks, run_part="blocks")
    chance = pick(rows, metric="chance", task="pydocs_summary", method="dense")
    means = pick(rows, metric="average", task="all")
    kept = paired(pick(means, method="deepest", size=4), chance)
    return measure(percent(paired(kept, paired(pick(means, method="dense"), chance), how="/")))


@claim("deeper-07")
def healed_deepest_close_to_nearest(t: Tables) -> list[Measured]:
    deepest = healed(t, t.healing_text, run_part=CURVE_DEEPEST, method="deepest")
    gap = paired(deepest, healed(t, t.healing_text, run_part=CURVE, method="angular"), ["size"])
    return measure(judge.scaled(gap, abs), "mean", interval="leave_one_out")


@claim("deeper-08")
def seed_hardly_matters(t: Tables) -> list[Measured]:
    rows = healed(t, t.healing_text, run_part=["seed", "curve"], method="angular", size=8)
    return measure(rows, lambda rows: np.ptp(rows["value"]), interval="leave_one_out")


def by_rank(t: Tables, text: str) -> list[Measured]:
    """Rank correlation of the rank of LoRA and the healed loss on the text that this setting names."""
    rows = healed(t, getattr(t, text), run_part=["rank", "curve"], method="angular", size=8)
    return measure(rows, spearman("rank"), interval="leave_one_out")


claim("deeper-09")(partial(by_rank, text="healing_text"))
claim("deeper-10")(partial(by_rank, text="other_text"))


@claim("deeper-11")
def deep_layers_are_closer(t: Tables) -> list[Measured]:
    rows = pick(t.blocks, role=None, metric="angular", size=between(1, 8))
    if len(rows):
        rows = rows[rows["start"] < rows.groupby(["model", "size"])["start"].transform("max")]
    return measure(rows, judge.median_of("size", spearman("start")), draws="calibration_seed")


@claim("deeper-12")
def distance_says_what_can_go(t: Tables) -> list[Measured]:
    true = pick(t.optimum_runs, role="every_block", metric="nll", size=between(1, 8))
    distance = pick(t.blocks, role=None, metric="angular", size=between(1, 8))
    if true.empty or distance.empty:
        return []
    columns = ["model", "size", "start", "calibration_seed", "value", "run"]
    distance = distance[columns].rename(columns={"value": "distance", "run": "of"})
    both = true.drop(columns="calibration_seed", errors="ignore").merge(distance, on=["model", "size", "start"])
    both = both.assign(run=both["run"] + " " + both["of"])
    return measure(both, judge.median_of("size", spearman("distance")), draws="calibration_seed")


@claim("deeper-13")
def pruning_and_four_bits_add_up(t: Tables) -> list[Measured]:
    rows = pick(t.combining, role="cost", metric="interaction", format="nf4", method="greedy", size=8)
    return measure(rows, interval="row")


@claim("deeper-14", partial(printed, method="similarity_4bit", task="memory"))
def an_eighth_of_the_memory(t: Tables) -> list[Measured]:
    rows = pick(published("deeper_layers", "headline"), method="dense", task="memory").drop(columns="model")
    return measure(judge.scaled(rows, lambda value: value / 8))
