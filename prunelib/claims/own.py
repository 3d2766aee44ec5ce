"""Claims of this project about its own methods, measured like those of the papers."""

import pandas as pd

from prunelib.claims.judge import Tables, measure, paired, pick


def measures(t: Tables) -> dict[str, pd.DataFrame]:
    """Our values, by claim: loss of the surrogate's choices over that of greedy search, both on KL, from the same draws."""
    rows, found = pick(t.selection, run_part="frontier_kl", role="choice", metric="nll"), {}
    for claim, size in (("own-01", 8), ("own-02", 12)):
        sides = [pick(rows, method=method, layers_removed=size) for method in ("surrogate_kl", "greedy_kl")]
        found[claim] = measure(paired(*sides, ["calibration_seed"]), "mean", draws="calibration_seed")
    return found
