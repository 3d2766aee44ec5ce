"""Chapter 02: does the calibration text decide more than the way of searching? (arXiv 2604.24938)"""

import pandas as pd

from prunelib.figures import style as fig
from prunelib.figures.save import Chapter, Drawing, figure, markdown, pick

CHAPTER = "02_layer_search"
BUDGETS = ("c4_2k", "c4_16k", "alpaca_2k", "alpaca_16k")
ONE_SHOT = ("block_influence", "simdiff_mssd", "leave_one_out_nll", "leave_one_out_kl")
SEARCHES = ("greedy", "greedy_kl", "evolutionary")
SIZE = 8


def effects(losses: pd.DataFrame) -> dict[str, float]:
    """Standard deviations over rules with one text, over texts with one rule, and over draws, in the unit of `losses`.

    losses: one model's rows at one K, with `method`, `run_part`, `calibration_seed` and `value`. Each is the mean of those of
    medians over draws, of the rules that every text has; averaged over rules first, texts that help one and harm another
    would cancel.
    """
    table = losses.pivot_table(index="method", columns="run_part", values="value", aggfunc="median").dropna()
    draws = losses.groupby(["method", "run_part"])["value"].std().mean()  # none of one draw
    return {"rules": table.std().mean(), "texts": table.std(axis=1).mean(), "draws": draws}


@figure("own_calibration_or_search", reads={"selection": (*BUDGETS, "rules"), "tasks": BUDGETS})
def calibration_or_search(chapter: Chapter) -> Drawing:
    """Loss without 8 layers of rules and searches, by calibration text and its length; two texts and tasks as a table."""
    table = chapter.table("selection")
    budgets = [part for part in BUDGETS if part in set(table["run_part"])] or ["rules"]  # a profile with one budget
    rows = pick(table, run_part=budgets, metric="nll", role=("choice", "other_text"), method=(*ONE_SHOT, *SEARCHES))
    rows = rows[rows["layers_removed"] == min(SIZE, rows["layers_removed"].max())]
    reported = rows[rows["role"] == "choice"]
    data = fig.spread(reported, ["model", "run_part", "method"])
    found = {name: effects(part) for name, part in reported.groupby("model", sort=False)}
    spans = pd.DataFrame(found).T.agg(["min", "max"]).map("{:.2f}".format)
    rules, texts = (" to ".join(spans[name].unique()) for name in ("rules", "texts"))
    title = f"K = {SIZE}: the rule moves the loss by {rules} nats, the calibration text by {texts}"
    order = [name for name in (*ONE_SHOT, *SEARCHES) if name in set(data["method"])]
    names = {part: f"{fig.text_title(text)}, {tokens}" for part, text, tokens in _budgets(rows)}
    data = data.sort_values(["model", "run_part"], key=lambda one: one.map(budgets.index) if one.name == "run_part" else one)
    grid = fig.Panels(data, "run_part", "model", titles=names, height=0.25 * len(order) + 1.2, sharey=True, sharex="row")
    for axes, part in grid:
        level = data[data["model"].isin(part["model"])]
        fig.dots(axes, part, order=order, low=0.98 * level["low"].min(), high=1.02 * level["high"].max())
    lines = []
    for (name, corpus), part in rows.groupby(["model", "corpus"], sort=False):
        line = {"model": fig.short(name), "reported on": fig.text_title(corpus), **effects(part)}
        lines.append(line | {"different choices": f"{part.groupby('method')['removed_layers'].nunique().sum()} of {len(part)}"})
    if len(budgets) > 1:
        scored = pick(chapter.table("tasks"), run_part=budgets, metric="average", size=SIZE)
        rows = pd.concat([rows, scored])
        for name, part in scored.groupby("model", sort=False):
            lines.append({"model": fig.short(name), "reported on": "tasks (share of answers, one draw)", **effects(part)})
    found = markdown(pd.DataFrame(lines).fillna({"different choices": "–"}), digits=3)
    text = f"Standard deviations over rules, over texts and lengths, and over draws (nats):\n\n{found}"
    note = f"median and min–max of {data['n'].max()} draws; calibration text and its tokens above; "
    note += f"loss on {fig.text_title(reported['corpus'].iloc[0])}"
    models = list(data["model"].unique())
    return grid.done(rows, x="loss (nats/token)", y=models, note=note, title=title * (len(budgets) > 1), text=text)


def _budgets(rows: pd.DataFrame) -> list[tuple[str, str, str]]:
    """Entry of the profile, its text, and its tokens in words."""
    sizes = rows.drop_duplicates("run_part")
    counts = (sizes["n_samples"] * sizes["seq_len"]).astype(int)
    return list(zip(sizes["run_part"], sizes["calibration"], (f"{count / 1024:.0f}k" for count in counts), strict=True))
