"""Chapter 05: what pruned and healed models write, and the recipes of 2024 to 2026 on equal tokens."""

import numpy as np
import pandas as pd

from prunelib.figures import style as fig
from prunelib.figures.healing import LIKE, MAIN, READS, healings
from prunelib.figures.save import Chapter, Drawing, figure, pick

CHAPTER = "05_healing"
LABELS = {  # metric → label of its axis; all but the losses are shares
    "nll": "loss on {text}\n(nats/token)",
    "agreement": "dense tokens\nchosen first, %",
    "repeated_4": "repeated\n4-grams, %",
    "dense_nll": "dense loss on texts\n(nats/token)",
}
SHARES = ("agreement", "repeated_4")
STATES = ("as cut", "healed")
LEVELS = {"as cut": ("dense", "black", ":"), "healed": ("dense, trained alike", "#777777", "-.")}
STUDIES = (*MAIN, "frontier", "recipe", "distillation", "qlora", "repair")
VARIANTS = {  # what a row of the comparison did, by its part, its repair or its recipe
    "lora": "LoRA",
    "frontier_self": "LoRA, on texts that the dense model wrote",
    "frontier_stages": "LoRA, pruned in four stages",
    "prune_comp": "Prune&Comp, then LoRA",
    "replaceme": "ReplaceMe, then LoRA",
    "refit": "refit, then LoRA",
    "distillation": "LoRA, distilled",
    "gromov_qlora": "QLoRA",
    "cut_adjacent": "layers beside the cuts",
    "last3_head": "last three layers, norm, head",
    "last_layers": "last two layers, norm, head",
    "full": "all weights",
}


@figure("own_healing_generation", reads=READS)
def healing_generation(chapter: Chapter) -> Drawing:
    """Loss, and what greedy continuations show, against the number of removed layers, before and after healing."""
    rows = healings(chapter).rows
    rows = rows[~rows["method"].str.match("random|deepest")]  # so bad that the others would be one line
    written = pick(rows, study=("generation", "healed"), metric=tuple(LABELS), may_be_empty=True)
    if written.empty:  # the loss alone, of runs that wrote no texts
        written = pick(rows, study=MAIN, metric="nll", repair="none")
    written = pick(written, model=written["model"].iloc[0])
    told = pick(written, metric=SHARES, may_be_empty=True)["text"]
    text = (told if len(told) else written["text"]).iloc[0]
    last = written["step"] == written.groupby("run")["step"].transform("max")
    data = written[(written["text"] == text) & ((written["recipe"] == "none") | last)]
    data = data.assign(state=np.where(data["recipe"] == "none", *STATES))
    keys = ["method", "size", "state", "metric"]
    data = data.drop_duplicates(keys).sort_values(["metric", "state"], key=lambda one: one.map([*LABELS, *STATES].index))
    whole, cut = data[data["method"] == "dense"], data[(data["method"] != "dense") & data["size"].notna()]
    grid = fig.Panels(cut, "state", "metric", height=max(1.8, 3.2 / data["metric"].nunique()), sharex=True, sharey="row")
    for axes, part in grid:
        fig.lines(axes, part, x="size")
        axes.set_xticks(cut["size"].unique())
        for one in pick(whole, metric=part["metric"].iloc[0]).itertuples():
            fig.level(axes, one.value, *LEVELS[one.state])
        if part["metric"].iloc[0] in SHARES:
            fig.percent(axes.yaxis)
    grid.data = data
    labels = {"x": "layers removed", "y": [LABELS[metric].format(text=fig.text_title(text)) for metric in grid.rows]}
    keep = ["model", *keys, "text", "value"]
    return grid.done(data, **labels, title=_written(cut, whole), keep=keep, note="one training for each healed point")


def _written(cut: pd.DataFrame, whole: pd.DataFrame) -> str:
    """The finding at the size that was healed with most methods: the means over them."""
    healed = pick(cut, state="healed", metric=SHARES, may_be_empty=True)
    if healed.empty:
        return "Loss before and after healing; these runs wrote no texts"
    size = healed.groupby("size")["method"].nunique().idxmax()
    alike = pick(cut, size=size, method=tuple(healed.loc[healed["size"] == size, "method"]))
    mean = alike.groupby(["metric", "state"])["value"].mean()
    dense = pick(whole, state="as cut", metric="repeated_4")["value"].iloc[0]
    chosen, repeated = ([mean[name, state] for state in STATES] for name in SHARES)
    said = f"Without {size:.0f} layers {chosen[0]:.0%} of the dense model's next tokens are chosen first, "
    said += f"healed {chosen[1]:.0%};\na text repeats {repeated[0]:.0%} of its 4-grams, healed {repeated[1]:.0%}"
    return f"{said} (dense {dense:.0%})"


@figure("own_healing_baselines", reads=READS)
def healing_baselines(chapter: Chapter) -> Drawing:
    """Loss over the dense model after healing by each recipe, on equal tokens; of several learning rates the better one."""
    healed = pick(healings(chapter).healed, study=STUDIES)
    healed = healed[healed["method"].ne("dense") & ~healed["method"].str.startswith("random") & healed["size"].notna()]
    tried = healed[~healed["study"].isin(MAIN)]
    keys = ["model", "method", "size", "tokens"]
    cases = (tried if len(tried) else healed)[keys].drop_duplicates()
    cases = pick(cases, model=cases["model"].iloc[0])
    repaired = healed["repair"].where(healed["repair"] != "none", healed["recipe"])
    data = healed.assign(variant=healed["run_part"].where(healed["run_part"].isin(VARIANTS), repaired)).merge(cases, on=keys)
    data["seeded"] = data["healing_seed"].eq(data["healing_seed"].min())
    data = data[data["variant"].isin(VARIANTS) & data["seeded"]].sort_values("nats_over_dense", kind="stable")
    best = data[data["where"] == LIKE].drop_duplicates(["variant", *keys])  # the learning rate is chosen on this text
    data = data.merge(best[["variant", "learning_rate", *keys]], on=["variant", "learning_rate", *keys])
    data = data.drop_duplicates(["variant", "where", *keys]).assign(what=lambda one: one["variant"].map(VARIANTS))
    order = [name for name in VARIANTS if name in set(data["variant"])]
    titles = {where: f"{where} ({fig.text_title(part['text'].iloc[0])})" for where, part in data.groupby("where")}
    grid = fig.Panels(data, "where", titles=titles, height=0.3 * len(order) + 1.6, sharey=True)
    for axes, part in grid:
        for place, (method, one) in enumerate(part.groupby("method", sort=False)):
            look, at = fig.METHODS[method], one["variant"].map(order.index) + 0.18 * place
            axes.plot(one["nats_over_dense"], at, look.marker, color=look.color, markersize=5, label=look.title)
        fig.titled_rows(axes, [VARIANTS[name] for name in order])
    unlike = data.sort_values("where", key=lambda one: one == LIKE, kind="stable")["text"].iloc[0]  # else the text trained on
    mean = data[data["text"] == unlike].groupby("what")["nats_over_dense"].mean()
    title = f"{fig.text_title(unlike)}: the best of {data['tokens'].iloc[0] / 1e6:.2g}M tokens is {mean.idxmin()},\n"
    title += f"{mean.min():.2f} nats over dense" + (f" (LoRA {mean['LoRA']:.2f})" if "LoRA" in mean else "")
    keep = ["what", "where", "text", *keys, "learning_rate", "trainable", "before", "after", "dense", "nats_over_dense"]
    labels = {
        "x": "extra loss after healing (nats/token)",
        "note": "one training each; where there are two learning rates, the better one",
    }
    return grid.done(data, **labels, keep=keep, title=title)
