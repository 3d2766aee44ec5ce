"""Chapter 05: how much of what a cut costs does training bring back?"""

from dataclasses import dataclass, replace

import numpy as np
import pandas as pd

from prunelib.figures import style as fig
from prunelib.figures.save import Chapter, Drawing, figure, pick
from prunelib.lab.runs import PUBLISHED, published

CHAPTER = "05_healing"
READS = {"healing": None, "converged": None}
BLOCKS = ("angular", "deepest")
KINDS = {"before": {"line": ":"}, "short": {"hollow": True}, "long": {}}  # budgets of training; `long` ones of a folder
# Columns that a model before its training and after it have in common, and those that may lack in a table.
CUT = ["budget", "model", "run", "method", "size", "slice_percentage", "repair"]
OPTIONAL = ("slice_percentage", "healing_corpus", "unique", "trained_modules", "task")
LOSSES = ["before", "after", "dense"]
# Studies that change one thing of the base case, and what a row of the figure says of it.
VARIANTS = {
    "curve": "base: rank {rank:.0f}, rate {learning_rate:g}",
    "rank": "rank {rank:.0f}",
    "modules": "modules: {trained_modules} alone",
    "recipe": "recipe: {recipe}",
    "rate": "learning rate: {learning_rate:g}",
    "seed": "seed {healing_seed:.0f}",
    "data": "text: {healing_corpus}{copies}",
    "unique": "text: {healing_corpus}{copies}",
    "sliced": "width: sliced by {slice_percentage:.0%} instead",
}


@dataclass(frozen=True)
class Healings:
    """The healing runs of a chapter: `short` ones of the profile, and `long` ones where it names a folder of them.

    rows: all rows. healed: one line per trained model and text, with the loss `before` and `after` and the `dense` model's, in
    nats per token, and the share `recovered`. base: the case that every ablation changes one thing of. longest: the budget of
    the longest training. texts: the held-out texts, first the one that is like the training text.
    """

    rows: pd.DataFrame
    healed: pd.DataFrame
    base: pd.DataFrame
    longest: str
    texts: list[str]

    @property
    def titles(self) -> dict[str, str]:
        """The titles of the texts."""
        return {text: f"{text}, {'as' if text == self.texts[0] else 'not'} trained on" for text in self.texts}

    def tokens(self, budget: str) -> str:
        """A budget in words, by the tokens of its longest training; "before" stays as it is."""
        if budget == "before":
            return budget
        count = self.rows.loc[(self.rows["budget"] == budget) & (self.rows["recipe"] != "none"), "tokens"].max()
        return f"{count / 1e6:.1f}M tokens" if count >= 1e6 else f"{count / 1e3:.0f}k tokens"

    def looks(self) -> dict[str, fig.Method]:
        """The look of every model and budget, as "model budget"."""
        found = {}
        for name, method in zip(self.rows["model"].unique(), ("block_influence", "simdiff_mssd", "simdiff_masd"), strict=False):
            for budget in self.rows["budget"].unique():
                title = f"{name}, {self.tokens(budget)}"
                found[f"{name} {budget}"] = replace(fig.METHODS[method], title=title, **KINDS[budget])
        return found


def healings(chapter: Chapter) -> Healings:
    """The tables of a chapter as `Healings`. Budgets differ in their windows: each is compared with its own dense model."""
    parts = {"short": chapter.table("healing")}
    if chapter["converged"] is not None:
        parts["long"] = pick(chapter.table("converged"), experiment="healing").dropna(axis=1, how="all")
    rows = pd.concat([part.assign(budget=budget) for budget, part in parts.items()], ignore_index=True)
    rows = rows.assign(**{column: np.nan for column in OPTIONAL if column not in rows})
    rows["study"] = rows["run_part"].str.split("_").str[0]  # curve, rank, recipe, …
    rows["kind"] = rows["budget"].where(rows["recipe"] != "none", "before")

    loss = pick(rows, metric="nll")
    last = loss["step"] == loss.groupby(["budget", "run"])["step"].transform("max")
    after = loss[(loss["recipe"] != "none") & last].rename(columns={"value": "after"})
    before = pick(loss, recipe="none").rename(columns={"value": "before"})
    where = ["budget", "model", "text"]
    dense = pick(before, method="dense").groupby(where)["before"].first().rename("dense").reset_index()
    before = before.drop_duplicates([*CUT, "text"])[[*CUT, "text", "before"]]
    healed = after.merge(before, on=[*CUT, "text"], how="left").merge(dense, on=where, how="left")
    lost = healed["before"] - healed["dense"]
    recovered = ((healed["before"] - healed["after"]) / lost).where(lost > 0.01)
    healed = healed.assign(nats_over_dense=healed["after"] - healed["dense"], recovered=recovered)
    base = pick(healed, study="curve", method="angular", repair="none")
    base = base[base["size"] == base["model"].map(pick(healed, study="rank").groupby("model")["size"].max())]
    return Healings(rows, healed, base, rows["budget"].iloc[-1], list(rows["text"].dropna().unique()))


def answers(rows: pd.DataFrame) -> pd.DataFrame:
    """Accuracy on the tasks: the mean of several where there are several, else that of the one task."""
    mean = rows[(rows["task"] == "all") & (rows["metric"] == "average")]
    return mean if len(mean) else rows[rows["task"].notna() & (rows["metric"] == "acc")]


def _by_rule(data: pd.DataFrame, found: Healings) -> tuple[pd.DataFrame, dict[str, fig.Method]]:
    """Numbers with a column `line` for their rule and kind (before, short, long), and the looks of these lines."""
    looks = {}
    for method, kind in data[["method", "kind"]].drop_duplicates().itertuples(index=False):
        title = f"{fig.METHODS[method].title.split(' (')[0]}, {'healed, ' * (kind != 'before')}{found.tokens(kind)}"
        looks[f"{method} {kind}"] = replace(fig.METHODS[method], title=title, **KINDS[kind])
    return data.assign(line=data["method"] + " " + data["kind"]), looks


@figure("deeper_layers_fig3_healed_loss", reads=READS)
def fig3_healed_loss(chapter: Chapter) -> Drawing:
    """Loss over the logarithm of the vocabulary size before and after, against the fraction of layers removed."""
    found = healings(chapter)
    rows = pick(found.healed, study="curve", text=found.texts[0])
    scales = pick(found.rows, metric="log_vocabulary").groupby("model")["value"].first()
    rows[LOSSES] = rows[LOSSES].div(rows["model"].map(scales), axis=0)
    data = pick(rows, method=BLOCKS)
    before = pick(data, budget=found.longest).assign(kind="before", value=lambda one: one["before"])
    start = before.drop_duplicates(["model", "method"]).assign(fraction=0.0, value=lambda one: one["dense"])
    lines, looks = _by_rule(pd.concat([start, before, data.assign(kind=data["budget"], value=data["after"])]), found)
    grid = fig.Panels(lines, "model", height=3.4, sharey=True)
    for axes, part in grid:
        fig.level(axes, part["dense"].iloc[0], "dense")
        fig.lines(axes, part, looks, x="fraction", series="line")
        trained = pick(rows, model=part["model"].iloc[0], method="dense", budget=found.longest, may_be_empty=True)["after"]
        for value in trained:
            fig.level(axes, value, "dense, trained as well", "#888888", "--")
    grid.data = data
    keep = ["model", "method", "budget", "tokens", "fraction", "before", "after"]
    return grid.done(rows, x="layers removed, %", y="loss / log(vocabulary)", keep=keep)


@figure("deeper_layers_fig2_healed_accuracy", reads=READS)
def fig2_healed_accuracy(chapter: Chapter) -> Drawing:
    """Accuracy on the tasks (95 % interval over their items) and of the next token, before and after."""
    found = healings(chapter)
    keys, ends = ["run", "method", "fraction", "recipe"], ["average_low", "average_high"]
    bounds = pick(found.rows, task="all", metric=ends, may_be_empty=True).set_index([*keys, "metric"])["value"].unstack()
    bounds = bounds.reindex(columns=ends).set_axis(["low", "high"], axis=1).reset_index()
    asked = answers(found.rows).merge(bounds, how="left", on=keys).assign(panel="tasks")
    asked = asked[(asked["study"] == "curve") | (asked["method"] == "dense")]
    next_token = pick(found.rows, metric="accuracy", text=found.texts[0], study="curve").assign(panel="next token")
    longest = next_token["budget"] == found.longest
    last = next_token["step"] == next_token.groupby(["budget", "model", "method"])["step"].transform("max")
    rows = pd.concat([asked, next_token[np.where(next_token["recipe"] == "none", longest, last)]])
    rows["title"] = rows["model"] + ", " + rows["panel"]
    data, looks = _by_rule(pick(rows, method=BLOCKS), found)
    grid = fig.Panels(data, "title", height=4.0)
    for axes, part in grid:
        fig.lines(axes, part, looks, x="fraction", series="line")
        fig.level(axes, pick(rows, title=part["title"].iloc[0], method="dense", recipe="none")["value"].iloc[0], "dense")
        if "tasks" in set(part["panel"]):
            fig.level(axes, 0.25, "chance", "#333333", "--")
        fig.percent(axes.yaxis)
    note = "tasks: mean of the tasks, 95 % interval over their items"
    keep = ["model", "panel", "method", "kind", "fraction", "value", "low", "high", "n"]
    return grid.done(data, x="layers removed, %", y="accuracy, %", note=note, keep=keep)


@figure("own_healing_tokens", reads=READS)
def healing_tokens(chapter: Chapter) -> Drawing:
    """Loss over the dense model against the tokens of the training, for every way to choose the layers."""
    found = healings(chapter)
    rows = pick(found.rows, metric="nll", text=found.texts[0], budget=found.longest, study=("choices", "curve"))
    dense = pick(rows, method="dense", recipe="none").groupby("model")["value"].first()
    rows = rows[rows["method"].isin(rows.loc[rows["recipe"] != "none", "method"])]
    sizes = pick(rows, study="choices").groupby("model", sort=False)["size"].max().astype(int)
    rows = rows[(rows["size"] == rows["model"].map(sizes)) | (rows["method"] == "dense")]
    rows = rows.drop_duplicates(["model", "method", "step", "recipe"])
    data = rows.assign(layers_removed=rows["model"].map(sizes), nats_over_dense=rows["value"] - rows["model"].map(dense))
    # Where zero tokens are drawn on a logarithmic axis; a method of several sets has its number in its name.
    data["place"] = data["tokens"].clip(lower=data.loc[data["tokens"] > 0, "tokens"].min() / 3)
    looks = {method: replace(fig.METHODS[method.split()[0]], line="-") for method in data["method"].unique()}
    looks["dense"] = fig.Method("dense, trained as well", "#000000", "")
    titles = {name: f"{name}, {size} layers removed" for name, size in sizes.items()}
    grid = fig.Panels(data, "model", titles=titles, height=3.5, sharey=True)
    for axes, part in grid:
        for method, line in part.groupby("method", sort=False):
            fig.curve(axes, line, looks[method], x="place", y="nats_over_dense", markersize=4)
        axes.axhline(0, color="black", linestyle=":", linewidth=1)
        axes.set_xscale("log")
    keep = ["model", "method", "layers_removed", "tokens", "nats_over_dense"]
    return grid.done(rows, x="tokens of training (left end: none)", y="nats per token over dense", keep=keep)


@figure("own_healing_ablations", reads=READS)
def healing_ablations(chapter: Chapter) -> Drawing:
    """Share of the lost nats that a training wins back; every line changes one thing of the base case."""
    found = healings(chapter)
    data = pd.concat([found.base, pick(found.healed, study=(*VARIANTS,)[1:], repair="none")])
    data["copies"] = np.where(data["unique"].astype(str) == "True", ", deduplicated", "")
    data["variant"] = [VARIANTS[row["study"]].format(**row).replace("_", " ") for row in data.to_dict("records")]
    rows = data.drop_duplicates("variant")
    group = rows["study"].replace("unique", "data").map(list(VARIANTS).index)
    rows = rows.assign(group=group, number=rows["rank"].where(rows["study"] == "rank", 0))
    rows = rows.sort_values(["group", "number"], kind="stable")
    data, models = data[np.isfinite(data["recovered"])], list(found.rows["model"].unique())
    grid = fig.Panels(data, "text", titles=found.titles, height=0.25 * len(rows) + 1.6, sharey=True)
    for axes, part in grid:
        for series, look in found.looks().items():
            one = part[(part["model"] + " " + part["budget"]) == series]
            if len(one):
                shift = 0.18 * (models.index(one["model"].iloc[0]) - look.hollow)
                style = {"markerfacecolor": "white" if look.hollow else look.color, "markersize": 5, "label": look.title}
                places = one["variant"].map(list(rows["variant"]).index) + shift
                axes.plot(one["recovered"], places, look.marker, color=look.color, **style)
        axes.axvline(1, color="black", linestyle=":", linewidth=1, label="dense")
        axes.axvline(0, color="#333333", linestyle="--", linewidth=1, label="not healed")
        axes.hlines(np.flatnonzero(rows["group"].diff() > 0) - 0.5, *axes.get_xlim(), color="#cccccc", linewidth=0.7)
        fig.percent(axes.xaxis)
        fig.titled_rows(axes, list(rows["variant"]))
    keep = ["text", "study", "variant", "model", "tokens", *LOSSES, "recovered"]
    return grid.done(data, x="share of the lost nats recovered, %", keep=keep, text=_repaired(found))


def _repaired(found: Healings) -> str:
    """In Markdown: the base case before and after training, and the best closed-form repair of the same cut."""
    base = pick(found.base, recipe="lora", text=found.texts[0])
    repaired = pick(found.healed, study="repair", text=found.texts[0], may_be_empty=True)
    repaired, lines = repaired[repaired["repair"] != "none"].sort_values("before"), []
    for one in base.to_dict("records"):
        line = f"- {one['model']}, {one['size']:.0f} layers removed: {one['before'] - one['dense']:.2f} nats over dense, "
        line += (
            f"{one['nats_over_dense']:.2f} after {found.tokens(one['budget'])} of training ({one['recovered']:.0%} recovered)"
        )
        for best in pick(repaired, model=one["model"], budget=one["budget"], may_be_empty=True).head(1).to_dict("records"):
            line += f"; repaired in closed form ({best['repair'].replace('_', ' + ')}) {best['before'] - best['dense']:.2f}, "
            line += f"after the same training {best['nats_over_dense']:.2f}"
        lines.append(line)
    return "\n".join(lines)


@figure("deeper_layers_fig9_rank", reads=READS)
def fig9_rank(chapter: Chapter) -> Drawing:
    """Loss over the dense model against the rank of the adapters, on both held-out texts."""
    found = healings(chapter)
    keys = ["model", "budget", "text"]
    data = pd.concat([pick(found.healed, study="rank", repair="none"), found.base]).drop_duplicates([*keys, "rank"])
    data = data[data.groupby(keys)["rank"].transform("size") > 1]
    data = data.assign(line=data["model"] + " " + data["budget"]).sort_values(["line", "rank"], kind="stable")
    grid = fig.Panels(data, "text", titles=found.titles, height=3.2, sharey=True)
    for axes, part in grid:
        fig.lines(axes, part, found.looks(), x="rank", y="nats_over_dense", series="line")
        axes.set_xscale("log", base=2)
        axes.set_xticks(data["rank"].unique(), [f"{rank:.0f}" for rank in data["rank"].unique()])
    keep = [*keys, "tokens", "method", "size", "rank", *LOSSES, "nats_over_dense"]
    return grid.done(data, x="rank of the adapters", y="nats per token over dense", keep=keep)


def _simdiff(found: Healings) -> pd.DataFrame:
    """Accuracy before and after healing, published (K = 12) and ours, and the share of the dense accuracy (`level`).

    Table A.7 prints the dense row of another model: the right one is in Table 3.
    """
    paper = pick(published("simdiff"), item=("table3", "tableA7"), task="avg8", metric="avg_acc")
    dense = pick(paper, item="table3", model="Llama-3.1-8B", method="dense")["value"].iloc[0]
    paper = paper[(paper["item"] == "tableA7") & (paper["method"] != "dense")]
    paper = paper.assign(healed=paper["healed"] != "none", source="published", level=dense)
    rows = answers(found.rows)
    start = 100 * pick(rows, method="dense", recipe="none")["value"].mean()
    kept = pick(rows, study="choices", method=("simdiff_mssd", "simdiff_masd", "block_influence", "greedy"))
    ours = kept.assign(healed=kept["recipe"] != "none").groupby(["method", "healed"], sort=False)["value"].mean().mul(100)
    ours = ours.reset_index().assign(source="ours", level=start)
    data = pd.concat([paper[list(ours)], ours], ignore_index=True)
    levels = data.drop_duplicates("source").assign(method="dense", healed=False)
    data = pd.concat([data, levels.assign(value=levels["level"])]).rename(columns={"value": "accuracy_percent"})
    return data.assign(retained_percent=100 * data["accuracy_percent"] / data["level"])


@figure("simdiff_fig3_healing", reads=READS)
def fig3_healing(chapter: Chapter) -> Drawing:
    """SimDiff's Figure 3: accuracy before and after healing, published and ours."""
    found = healings(chapter)
    data, rows = _simdiff(found), pick(found.rows, study=("choices", "curve"))
    names = ", ".join(answers(rows)["model"].unique())
    titles = ("published: Llama-3.1-8B, K = 12", f"ours: {names}, {found.tokens('short')}")
    grid = fig.Panels(data, "source", titles=titles, height=3.2)
    for axes, part in grid:
        fig.level(axes, part["level"].iloc[0], "dense")
        bars = part[part["method"] != "dense"].pivot(index="method", columns="healed", values="accuracy_percent")
        for healed, shift, style in ((False, -0.2, {"color": "white", "hatch": "///"}), (True, 0.2, {})):
            colors = [fig.METHODS[method].color for method in bars.index]
            drawn = axes.bar(np.arange(len(bars)) + shift, bars[healed], 0.36, edgecolor=colors, **{"color": colors, **style})
            axes.bar_label(drawn, fmt="%.1f", fontsize=8)
            axes.bar(0, 0, edgecolor="#555555", label="healed (LoRA)" if healed else "before", **{"color": "#555555", **style})
        axes.set_xticks(range(len(bars)), [fig.METHODS[method].title.replace(" (", "\n(") for method in bars.index], fontsize=8)
        axes.set_ylim(0, 1.12 * part["level"].iloc[0])
        axes.grid(axis="x", visible=False)
    keep = ["method", "healed", "accuracy_percent", "source", "retained_percent"]
    return grid.done(rows, y="mean accuracy, %", keep=keep, published=[PUBLISHED])


@figure("simdiff_tablea7_healing", reads=READS)
def tablea7_healing(chapter: Chapter) -> Drawing:
    """SimDiff's Table A.7, also as printed: over the wrong dense row. RP is the share of the dense accuracy kept, in %."""
    found, table = healings(chapter), pick(published("simdiff", "tableA7"), task="avg8")
    table = table.assign(healed=table["healed"] != "none", source="published, as printed")
    printed = table.pivot(index=["source", "method", "healed"], columns="metric", values="value").reset_index()
    right = _simdiff(found).drop(columns="level").rename(columns={"accuracy_percent": "avg_acc"})
    data = pd.concat([printed, right]).replace({"healed": {True: "lora", False: "no"}})
    data = data.rename(columns={"avg_acc": "mean accuracy", "retained_percent": "RP"})
    return Drawing(None, data, pick(found.rows, study=("choices", "curve")), published=[PUBLISHED])
