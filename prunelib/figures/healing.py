"""Chapter 05: how much of what a cut costs does training bring back?"""

from dataclasses import dataclass

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import PercentFormatter

from prunelib.figures.save import Chapter, Drawing, figure, markdown, pick
from prunelib.figures.style import METHODS, Sketch, curve, dense_line, rows_as
from prunelib.lab.runs import PUBLISHED, published

CHAPTER = "05_healing"
READS = {"healing": None}
BLOCKS = ("angular", "deepest")
KINDS = {"before": {"linestyle": ":", "markersize": 3.5}, "short": {"markerfacecolor": "white", "linewidth": 1.0}, "long": {}}
MARKERS, COLORS = "os^", [METHODS[name].color for name in ("block_influence", "simdiff_mssd", "simdiff_masd")]
# Columns that a model before its training and after it have in common, and those that may lack in a table.
CUT = ["budget", "name", "run", "method", "size", "slice_percentage", "repair"]
OPTIONAL = ("slice_percentage", "healing_corpus", "unique", "trained_modules", "task")
TRAINING = ["recipe", "trained_modules", "rank", "learning_rate", "healing_corpus", "unique", "healing_seed", "trainable"]
# Studies that change one thing of the base case: their group in the figure, and what a row says of it.
VARIANTS = {
    "curve": ("base case", "rank {rank:.0f}, rate {learning_rate:g}"),
    "rank": ("rank", "rank {rank:.0f}"),
    "modules": ("modules", "{trained_modules} alone"),
    "recipe": ("recipe", "{recipe}"),
    "rate": ("learning rate", "{learning_rate:g}"),
    "seed": ("seed", "seed {healing_seed:.0f}"),
    "data": ("text", "{healing_corpus}{copies}"),
    "unique": ("text", "{healing_corpus}{copies}"),
    "sliced": ("width", "sliced by {slice_percentage:.0%} instead"),
}


@dataclass(frozen=True)
class Healings:
    """The healing runs of a chapter: `short` ones of the profile, and `long` ones where it names a folder of them.

    rows: all rows. healed: one line per trained model and text, with the loss `before` and `after` and the `dense` model's, in
    nats per token, and the share `recovered`. base: the case that every ablation changes one thing of. texts: the
    held-out texts, first the one that is like the training text. dense: (budget, model, text) → its loss.
    """

    rows: pd.DataFrame
    healed: pd.DataFrame
    base: pd.DataFrame
    dense: dict[tuple[str, str, str], float]
    texts: list[str]

    @property
    def models(self) -> list[str]:
        return list(self.rows["name"].unique())

    @property
    def budgets(self) -> list[str]:
        return list(self.rows["budget"].unique())

    @property
    def titles(self) -> list[str]:
        """The titles of the texts."""
        return [f"{self.texts[0]}, as trained on", *(f"{text}, not trained on" for text in self.texts[1:])]

    def tokens(self, budget: str) -> str:
        """A budget in words, by the tokens of its longest training; "before" stays as it is."""
        if budget == "before":
            return budget
        count = self.rows.loc[(self.rows["budget"] == budget) & (self.rows["recipe"] != "none"), "tokens"].max()
        return f"{count / 1e6:.1f}M tokens" if count >= 1e6 else f"{count / 1e3:.0f}k tokens"

    def look(self, name: str, budget: str) -> dict:
        """Color, marker and label of a model and a budget."""
        index = self.models.index(name)
        return {"marker": MARKERS[index], "color": COLORS[index], "label": f"{name}, {self.tokens(budget)}", **KINDS[budget]}


def healings(chapter: Chapter) -> Healings:
    """The tables of a chapter as `Healings`. Budgets differ in their windows: each is compared with its own dense model."""
    parts = {"short": chapter.table("healing")}
    if chapter["converged"] is not None:
        parts["long"] = pick(chapter.table("converged"), experiment="healing").dropna(axis=1, how="all")
    rows = pd.concat([part.assign(budget=budget) for budget, part in parts.items()], ignore_index=True)
    rows = rows.assign(model=rows["name"], **{column: np.nan for column in OPTIONAL if column not in rows})
    rows["study"] = rows["run_part"].str.split("_").str[0]  # curve, rank, recipe, …

    loss = pick(rows, metric="nll")
    before = pick(loss, recipe="none")
    last = loss["step"] == loss.groupby(["budget", "run"])["step"].transform("max")
    after = loss[(loss["recipe"] != "none") & last].rename(columns={"value": "after"})
    dense = pick(before, method="dense").groupby(["budget", "name", "text"])["value"].first().to_dict()
    before = before.drop_duplicates([*CUT, "text"]).rename(columns={"value": "before"})

    healed = after.merge(before[[*CUT, "text", "before"]], on=[*CUT, "text"], how="left")
    healed["dense"] = [dense[place] for place in zip(healed["budget"], healed["name"], healed["text"], strict=True)]
    healed["nats_over_dense"] = healed["after"] - healed["dense"]
    lost = healed["before"] - healed["dense"]
    healed["recovered"] = ((healed["before"] - healed["after"]) / lost).where(lost > 0.01)
    base = pick(healed, study="curve", method="angular", repair="none")
    base = base[base["size"] == base["name"].map(pick(healed, study="rank").groupby("name")["size"].max())]
    return Healings(rows, healed, base, dense, list(rows["text"].dropna().unique()))


def answers(rows: pd.DataFrame) -> pd.DataFrame:
    """Accuracy on the tasks: the mean of several where there are several, else that of the one task."""
    mean = rows[(rows["task"] == "all") & (rows["metric"] == "average")]
    return mean if len(mean) else rows[rows["task"].notna() & (rows["metric"] == "acc")]


def _curves(ax: Axes, part: pd.DataFrame, found: Healings) -> None:
    """One line per rule and kind (before, short, long) of `part`: `value` over `fraction`."""
    for (rule, kind), line in part.groupby(["method", "kind"]):
        label = f"{METHODS[rule].title.split(' (')[0]}, {'healed, ' * (kind != 'before')}{found.tokens(kind)}"
        curve(ax, line, rule, x="fraction", label=label, **KINDS[kind])
    ax.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))


@figure("deeper_layers_fig3_healed_loss", reads=READS)
def fig3_healed_loss(chapter: Chapter) -> Drawing:
    """Loss over the logarithm of the vocabulary size before and after, against the fraction of layers removed."""
    found = healings(chapter)
    widest, scales = found.budgets[-1], pick(found.rows, metric="log_vocabulary").groupby("name")["value"].first()
    rows = pick(found.healed, study="curve", text=found.texts[0])
    losses = ["before", "after", "dense"]
    rows[losses] = rows[losses].div(rows["name"].map(scales), axis=0)
    data = pick(rows, method=BLOCKS)
    before = pick(data, budget=widest).assign(kind="before", value=lambda one: one["before"])
    start = before.drop_duplicates(["model", "method"]).assign(fraction=0.0, value=lambda one: one["dense"])
    lines = pd.concat([start, before, data.assign(kind=data["budget"], value=data["after"])])
    sketch = Sketch(found.models, height=3.4, sharey=True)
    for (ax,), name in sketch:
        dense_line(ax, pick(start, model=name)["dense"].iloc[0], label="dense")
        _curves(ax, pick(lines, model=name), found)
        for value in pick(rows, model=name, method="dense", budget=widest, may_be_empty=True)["after"]:
            ax.axhline(value, color="#888888", linestyle="--", linewidth=1, label="dense, trained as well")
    sketch.keep(data[["model", "method", "budget", "tokens", "fraction", "before", "after"]])
    return sketch.done(rows, x="fraction of layers removed", y="loss / log vocabulary size")


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
    longest = next_token["budget"] == found.budgets[-1]
    last = next_token["step"] == next_token.groupby(["budget", "name", "method"])["step"].transform("max")
    rows = pd.concat([asked, next_token[np.where(next_token["recipe"] == "none", longest, last)]])
    rows["kind"] = rows["budget"].where(rows["recipe"] != "none", "before")
    data = pick(rows, method=BLOCKS)
    places = list(data[["model", "panel"]].drop_duplicates().itertuples(index=False, name=None))
    sketch = Sketch(places, titles=[", ".join(place) for place in places], height=4.0)
    for (ax,), (name, panel) in sketch:
        _curves(ax, pick(data, model=name, panel=panel), found)
        dense_line(ax, pick(rows, name=name, panel=panel, method="dense", recipe="none")["value"].iloc[0], label="dense")
        if panel == "tasks":
            ax.axhline(0.25, color="#333333", linestyle="--", linewidth=1, label="chance")
        ax.yaxis.set_major_formatter(PercentFormatter(1.0, symbol="", decimals=0))
    sketch.keep(data[["model", "panel", "method", "kind", "fraction", "value", "low", "high", "n"]])
    note = "tasks: mean of the tasks, 95 % interval over their items"
    return sketch.done(data, x="fraction of layers removed", y="accuracy, %", note=note)


@figure("own_healing_tokens", reads=READS)
def healing_tokens(chapter: Chapter) -> Drawing:
    """Loss over the dense model against the tokens of the training, for every way to choose the layers."""
    found = healings(chapter)
    text, budget = found.texts[0], found.budgets[-1]
    rows = pick(found.rows, metric="nll", text=text, budget=budget, study=("choices", "curve"))
    rows = rows[rows["method"].isin(rows.loc[rows["recipe"] != "none", "method"])]
    sizes = pick(rows, study="choices").groupby("name", sort=False)["size"].max().astype(int)
    rows = rows[(rows["size"] == rows["name"].map(sizes)) | (rows["method"] == "dense")]
    rows = rows.drop_duplicates(["name", "method", "step", "recipe"])
    over = rows["value"] - [found.dense[budget, name, text] for name in rows["name"]]
    data = rows.assign(layers_removed=rows["name"].map(sizes), nats_over_dense=over)
    # Where zero tokens are drawn on a logarithmic axis.
    data["place"] = data["tokens"].clip(lower=data.loc[data["tokens"] > 0, "tokens"].min() / 3)
    titles = [f"{name}, {size} layers removed" for name, size in sizes.items()]
    sketch = Sketch(list(sizes.index), titles=titles, height=3.5, sharey=True)
    for (ax,), name in sketch:
        for method, line in pick(data, model=name).groupby("method", sort=False):
            look = METHODS[method.split(" ")[0]]
            style = {"label": "dense, trained as well", "linestyle": "-"} if method == "dense" else {}
            curve(ax, line, look, x="place", y="nats_over_dense", marker=look.marker, markersize=4, **style)
        ax.axhline(0, color="black", linestyle=":", linewidth=1)
        ax.set_xscale("log")
    sketch.keep(data[["model", "method", "layers_removed", "tokens", "nats_over_dense"]])
    return sketch.done(rows, x="tokens of training (left end: none)", y="nats per token over dense")


@figure("own_healing_ablations", reads=READS)
def healing_ablations(chapter: Chapter) -> Drawing:
    """Share of the lost nats that a training wins back; every line changes one thing of the base case."""
    found = healings(chapter)
    data = pd.concat([found.base, pick(found.healed, study=[*VARIANTS][1:], repair="none")])
    data["copies"] = np.where(data["unique"].astype(str) == "True", ", deduplicated", "")
    data["group"] = data["study"].map(lambda study: VARIANTS[study][0])
    data["variant"] = [VARIANTS[row["study"]][1].format(**row).replace("_", " ") for row in data.to_dict("records")]
    lines, groups = data[["group", "variant"]].drop_duplicates(), [group for group, _ in VARIANTS.values()]
    number = lines["variant"].str.extract(r"(\d+)")[0].astype(float).where(lines["group"] == "rank", 0)
    lines = lines.assign(place=lines["group"].map(groups.index), number=number).sort_values(["place", "number"], kind="stable")
    lines["y"] = np.arange(len(lines))
    data = data[np.isfinite(data["recovered"])].merge(lines[["group", "variant", "y"]])
    sketch = Sketch(found.texts, titles=found.titles, height=0.25 * len(lines) + 1.6, sharey=True)
    for (ax,), text in sketch:
        for (name, budget), part in pick(data, text=text).groupby(["model", "budget"], sort=False):
            shift = 0.18 * (found.models.index(name) - (budget == "short"))
            ax.plot(part["recovered"], part["y"] + shift, **found.look(name, budget) | {"linestyle": "", "markersize": 5})
        ax.axvline(1, color="black", linestyle=":", linewidth=1, label="dense")
        ax.axvline(0, color="#333333", linestyle="--", linewidth=1, label="not healed")
        for first in lines.loc[lines["place"].diff() > 0, "y"]:
            ax.axhline(first - 0.5, color="#cccccc", linewidth=0.7)
        ax.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        pairs = zip(lines["group"], lines["variant"], strict=True)
        rows_as(ax, [b if b.startswith(a) else f"{a.removesuffix(' case')}: {b}" for a, b in pairs])
    sketch.keep(data[["text", "group", "variant", "model", "tokens", "before", "after", "dense", "recovered"]])
    return sketch.done(data, x="share of the lost nats recovered")


@figure("deeper_layers_fig9_rank", reads=READS)
def fig9_rank(chapter: Chapter) -> Drawing:
    """Loss over the dense model against the rank of the adapters, on both held-out texts."""
    found = healings(chapter)
    keys = ["name", "budget", "text"]
    data = pd.concat([pick(found.healed, study="rank", repair="none"), found.base]).sort_values("rank", kind="stable")
    data = data.drop_duplicates([*keys, "rank"])
    data = data[data.groupby(keys)["rank"].transform("size") > 1]
    sketch = Sketch(found.texts, titles=found.titles, height=3.2, sharey=True)
    for (ax,), text in sketch:
        for (name, budget), part in pick(data, text=text).groupby(["model", "budget"]):
            ax.plot(part["rank"], part["nats_over_dense"], **found.look(name, budget))
        ax.set_xscale("log", base=2)
        ax.set_xticks(data["rank"].unique(), [f"{rank:.0f}" for rank in data["rank"].unique()])
    sketch.keep(data[[*keys, "tokens", "method", "size", "rank", "before", "after", "dense", "nats_over_dense"]])
    return sketch.done(data, x="rank of the adapters", y="nats per token over dense")


@figure("own_healing_repair", reads=READS)
def healing_repair(chapter: Chapter) -> Drawing:
    """The same cut repaired in closed form, trained, and both."""
    found = healings(chapter)
    repaired = pick(found.healed, study="repair", text=found.texts[0])
    rows = pd.concat([pick(found.base, recipe="lora", text=found.texts[0]), repaired[repaired["repair"] != "none"]])
    first = rows.drop_duplicates(["name", "repair"], keep="last")  # before training: measured with the longest budget
    before = first.assign(training="before", nats_over_dense=first["before"] - first["dense"])
    data = pd.concat([before, rows.assign(training=rows["budget"])])
    repairs = ["none", *sorted(set(data["repair"]) - {"none"})]
    titles = [f"{name}, {pick(data, model=name)['size'].max():.0f} layers removed" for name in found.models]
    sketch = Sketch(found.models, titles=titles, height=2.9, sharey=True)
    for ((ax,), name), color in zip(sketch, COLORS, strict=False):
        looks = {"before": ("#777777", "#bbbbbb"), "short": (color, "white"), "long": (color, color)}
        here = pick(data, model=name)
        places = here["repair"].map(repairs.index)
        spans = here.groupby(places)["nats_over_dense"].agg(["min", "max"])
        ax.hlines(spans.index, spans["min"], spans["max"], color="#bbbbbb", linewidth=1.5, zorder=1)
        for training, part in here.groupby("training", sort=False):
            edge, face = looks[training]
            style = {"color": edge, "markerfacecolor": face, "label": found.tokens(training)}
            ax.plot(part["nats_over_dense"], places[here["training"] == training], "o", **style)
        ax.axvline(0, color="black", linestyle=":", linewidth=1)
        rows_as(ax, ["no repair", *(name.replace("_", " + ") for name in repairs[1:])])
    sketch.keep(data[["model", "repair", "training", "nats_over_dense"]])
    return sketch.done(rows, x="nats per token over dense")


def _average(table: pd.DataFrame) -> pd.DataFrame:
    return pick(table, task="avg8", metric="avg_acc")


def _simdiff(found: Healings) -> pd.DataFrame:
    """Accuracy before and after healing, published (K = 12) and ours, and the share of the dense accuracy (`level`).

    Table A.7 prints the dense row of another model: the right one is in Table 3.
    """
    paper = _average(published("simdiff", "tableA7"))
    dense = pick(_average(published("simdiff", "table3")), model="Llama-3.1-8B", method="dense")["value"].iloc[0]
    paper = paper[paper["method"] != "dense"].assign(healed=paper["healed"] != "none", source="published", level=dense)
    rows = answers(found.rows)
    start = pick(rows, method="dense", recipe="none")["value"].mean()
    kept = pick(rows, study="choices", method=("simdiff_mssd", "simdiff_masd", "block_influence", "greedy"))
    ours = kept.assign(healed=kept["recipe"] != "none").groupby(["method", "healed"], sort=False)["value"].mean().mul(100)
    ours = ours.reset_index().assign(source="ours", level=100 * start)
    data = pd.concat([paper[list(ours)], ours], ignore_index=True)
    levels = data.drop_duplicates("source").assign(method="dense", healed=False)
    data = pd.concat([data, levels.assign(value=levels["level"])]).rename(columns={"value": "accuracy_percent"})
    return data.assign(retained_percent=100 * data["accuracy_percent"] / data["level"])


@figure("simdiff_fig3_healing", reads=READS)
def fig3_healing(chapter: Chapter) -> Drawing:
    """SimDiff's Figure 3: accuracy before and after healing, published and ours."""
    found = healings(chapter)
    data, rows = _simdiff(found), pick(found.rows, study=("choices", "curve"))
    names = ", ".join(answers(rows)["name"].unique())
    sketch = Sketch.pair("Llama-3.1-8B, K = 12", f"{names}, {found.tokens('short')}", height=3.2)
    for (ax,), source in sketch:
        here = pick(data, source=source)
        bars, level = here[here["method"] != "dense"], here["level"].iloc[0]
        methods = list(bars["method"].unique())
        for row in bars.itertuples():
            look, place = METHODS[row.method], methods.index(row.method) + (0.2 if row.healed else -0.2)
            style = {"color": look.color} if row.healed else {"color": "white", "hatch": "///"}
            ax.bar_label(ax.bar(place, row.accuracy_percent, 0.36, edgecolor=look.color, **style), fmt="%.1f", fontsize=8)
        ax.bar(0, 0, color="white", edgecolor="#555555", hatch="///", label="before")
        ax.bar(0, 0, color="#555555", label="healed (LoRA)")
        dense_line(ax, level, label="dense")
        ax.set_xticks(range(len(methods)), [METHODS[method].title.replace(" (", "\n(") for method in methods])
        ax.set_ylim(0, 1.12 * level)
        ax.grid(axis="x", visible=False)
    sketch.keep(data.drop(columns="level"))
    return sketch.done(rows, y="mean accuracy, %", published=[PUBLISHED])


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


@figure("own_table_recovered", reads=READS)
def table_recovered(chapter: Chapter) -> Drawing:
    """Loss before and after every healing, the share of the lost nats recovered, and that per thousand tokens."""
    found = healings(chapter)
    rows = pick(found.healed, text=found.texts[0])
    rows = rows.assign(per_thousand_tokens=rows["recovered"] / (rows["tokens"] / 1000))
    losses = ["before", "after", "dense", "recovered", "per_thousand_tokens"]
    data = rows[["name", "budget", "study", *CUT[3:], *TRAINING, "tokens", *losses]]
    brief = pick(data, study=("curve", "choices"), repair="none").sort_values(["budget", "name", "size", "after"])
    digits = {"per_thousand_tokens": 5} | dict.fromkeys(losses[:4], 3)
    text = markdown(brief[["name", "budget", "method", "size", *losses]], digits=digits)
    return Drawing(None, data.dropna(axis=1, how="all"), rows, text)
