"""Claims of Dynamic LLM Slicing (arXiv 2411.03513), measured."""

import numpy as np
import pandas as pd

from prunelib.claims.judge import Tables, measure, only, paired, percent, pick, spearman, value_of
from prunelib.io import at_root
from prunelib.lab import runs

PUBLISHED_LR = "data/published/dynamic_slicing_mistral7b_lr.csv"  # the vector of the authors' repository
PLAN = ["slice_percentage", "slice_base"]


def quartile_range(rows: pd.DataFrame) -> float:
    """Width of the middle half of the values."""
    return rows["value"].quantile(0.75) - rows["value"].quantile(0.25)


def published() -> dict[str, float]:
    """What the paper prints, or what follows from its numbers, by claim."""
    headline = runs.published("dynamic_slicing", "headline")
    redundancy = pd.read_csv(at_root(PUBLISHED_LR)).rename(columns={"lr": "value"})
    return {
        "dynamic-01": -only(pick(headline, task="ppl_decrease_vs_slicegpt")),
        "dynamic-02": only(pick(headline, task="avg_acc_gain_over_slicegpt")),
        "dynamic-08": value_of(redundancy, spearman("layer")),
        "dynamic-09": value_of(redundancy, quartile_range),
    }


def measures(t: Tables) -> dict[str, pd.DataFrame]:
    """Our values, by claim."""

    def losses(part: str, method: str) -> pd.DataFrame:
        return pick(t.slicing, role="plan", metric="nll", part=part, method=method)

    dynamic = losses("sweep", "dynamic")
    # The base of a constant plan is its mean slice, so it takes no part in a pairing.
    constant = losses("sweep", "constant").drop(columns="slice_base", errors="ignore")
    # Where constant slicing adds parameters, by its shortcuts, no dynamic plan is of equal size.
    smaller = pick(t.slicing, role="plan", metric="removed", part="sweep", method="constant", value=lambda removed: removed > 0)
    equal = constant.merge(smaller[["run", "slice_percentage"]]) if len(smaller) else constant
    gap = paired(dynamic, constant, PLAN).drop(columns=["low", "high"], errors="ignore")
    ppl = gap.assign(value=100 * np.expm1(gap["value"].astype(float)))  # of dynamic over constant slicing, per cent
    tasks = pick(t.slicing, role="task", metric="over_constant", task="all", part="sweep", method="dynamic")
    best = tasks.loc[tasks.groupby("model", sort=False)["value"].idxmax()] if len(tasks) else tasks
    windows = paired(losses("windows", "dynamic"), losses("windows", "constant"), ["slice_percentage", "window_seed"])
    control = {"slice_percentage": 0.3, "slice_base": 0.1}
    random = paired(pick(dynamic, **control), pick(losses("control", "random_order"), **control), ["control_seed"])
    redundancy = pick(t.slicing, metric="layer_redundancy", role="layer", normalize="minmax", calibration=t.calibration)
    return {
        "dynamic-01": measure(ppl, "min"),
        "dynamic-02": measure(percent(best), interval="row"),
        "dynamic-03": measure(ppl, "mean", interval="bootstrap"),
        "dynamic-04": measure(windows, "mean", draws="window_seed"),
        "dynamic-05": measure(paired(losses("equal_parameters", "dynamic"), equal, PLAN), "mean", interval="leave_one_out"),
        "dynamic-06": measure(random, "mean", draws="control_seed"),
        "dynamic-07": measure(paired(dynamic, losses("control", "keep_first_full"), PLAN), "mean", interval="leave_one_out"),
        "dynamic-08": measure(redundancy, spearman("layer"), draws="calibration_seed"),
        "dynamic-09": measure(redundancy, quartile_range, draws="calibration_seed"),
    }
