"""Claims of Dynamic LLM Slicing (arXiv 2411.03513), measured."""

from functools import partial

import numpy as np
import pandas as pd

from prunelib.claims import judge
from prunelib.claims.judge import Measured, Statistic, Tables, claim, measure, only, paired, percent, pick
from prunelib.io import at_root

PUBLISHED_LR = "data/published/dynamic_slicing_mistral7b_lr.csv"  # the vector of the authors' repository
CONTROL = {"slice_percentage": 0.3, "slice_base": 0.1}


def printed(table: pd.DataFrame, task: str) -> float:
    """A number of the abstract."""
    return only(pick(table, paper="dynamic_slicing", item="headline", task=task))


def printed_redundancy(table: pd.DataFrame, statistic: Statistic) -> float:
    """A statistic of the published redundancies of Mistral-7B."""
    return judge.value_of(pd.read_csv(at_root(PUBLISHED_LR)).rename(columns={"lr": "value"}), statistic)


def losses(t: Tables, part: str, method: str, **where: object) -> pd.DataFrame:
    """Loss of the plans of one part and method."""
    return pick(t.slicing, role="plan", metric="nll", part=part, method=method, **where)


def constant_plans(t: Tables) -> pd.DataFrame:
    """Constant slicing; its slice base is the mean slice, so it does not take part in a pairing."""
    return losses(t, "sweep", "constant").drop(columns="slice_base", errors="ignore")


def change_of_perplexity(t: Tables) -> pd.DataFrame:
    """Perplexity of dynamic over constant slicing in per cent, for every mean slice and slice base."""
    gap = paired(losses(t, "sweep", "dynamic"), constant_plans(t), ["slice_percentage", "slice_base"])
    return judge.scaled(gap.drop(columns=["low", "high"], errors="ignore"), lambda value: 100 * np.expm1(value))


@claim("dynamic-01", lambda p: -printed(p, "ppl_decrease_vs_slicegpt"))
def lower_perplexity_at_best(t: Tables) -> list[Measured]:
    return measure(change_of_perplexity(t), "min")


@claim("dynamic-02", lambda p: printed(p, "avg_acc_gain_over_slicegpt"))
def higher_accuracy_at_best(t: Tables) -> list[Measured]:
    rows = pick(t.slicing, role="task", metric="over_constant", task="all", part="sweep", method="dynamic")
    return measure(percent(rows), "max", interval="row")


@claim("dynamic-03")
def lower_perplexity_in_the_mean(t: Tables) -> list[Measured]:
    return measure(change_of_perplexity(t), "mean", interval="bootstrap")


@claim("dynamic-04")
def on_other_windows(t: Tables) -> list[Measured]:
    gap = paired(losses(t, "windows", "dynamic"), losses(t, "windows", "constant"), ["slice_percentage", "window_seed"])
    return measure(gap, "mean", draws="window_seed")


@claim("dynamic-05")
def at_equal_parameters(t: Tables) -> list[Measured]:
    gap = paired(losses(t, "equal_parameters", "dynamic"), constant_plans(t), ["slice_percentage", "slice_base"])
    return measure(gap, "mean", interval="leave_one_out")


@claim("dynamic-06")
def better_than_random_order(t: Tables) -> list[Measured]:
    random = losses(t, "control", "random_order", **CONTROL)
    gap = paired(losses(t, "sweep", "dynamic", **CONTROL), random, ["control_seed"])
    return measure(gap, "mean", draws="control_seed")


@claim("dynamic-07")
def better_than_keeping_layer_0(t: Tables) -> list[Measured]:
    kept = losses(t, "control", "keep_first_full")
    gap = paired(losses(t, "sweep", "dynamic"), kept, ["slice_percentage", "slice_base"])
    return measure(gap, "mean", interval="leave_one_out")


def redundancies(t: Tables, statistic: Statistic) -> list[Measured]:
    """A statistic of our layer redundancies, by calibration draw."""
    rows = pick(t.slicing, metric="layer_redundancy", role="layer", normalize="minmax", calibration=t.calibration)
    return measure(rows, statistic, draws="calibration_seed")


def quartile_range(rows: pd.DataFrame) -> float:
    """Width of the middle half of the values."""
    return rows["value"].quantile(0.75) - rows["value"].quantile(0.25)


for number, statistic in (("08", judge.spearman("layer")), ("09", quartile_range)):
    claim(f"dynamic-{number}", partial(printed_redundancy, statistic=statistic))(partial(redundancies, statistic=statistic))
