"""Chapter 05: how much of what a cut costs does training bring back?"""

from dataclasses import dataclass

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import PercentFormatter

from prunelib.figures.save import Chapter, Drawing, figure, markdown, pick
from prunelib.figures.style import METHODS, curve, dense_line, label_axes, legend, panels, published_and_ours
from prunelib.lab.runs import PUBLISHED, published

CHAPTER = "05_healing"
READS = {"healing": None}
BLOCKS = ("angular", "deepest")
FEW, MANY = {"markerfacecolor": "white", "linewidth": 1.0}, {}
KINDS = {"before": {"linestyle": ":", "markersize": 3.5}, "short": FEW, "long": MANY}
MARKERS, COLORS = "os^", [METHODS[name].color for name in ("block_influence", "simdiff_mssd", "simdiff_masd")]
TRAINING = [
    *("recipe", "trained_modules", "rank", "learning_rate"),
    *("healing_corpus", "unique", "healing_seed", "trainable", "tokens"),
]
# Columns that a model before its training and after it have in common, and those that may lack in a table.
CUT = ["budget", "name", "run", "method", "size", "slice_percentage", "repair"]
OPTIONAL = ("slice_percentage", "healing_corpus", "unique", "trained_modules", "task")
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
        return list(dict.fromkeys(self.rows["name"]))

    @property
    def budgets(self) -> list[str]:
        return list(dict.fromkeys(self.rows["budget"]))

    def tokens(self, budget: str) -> str:
        """A budget in words, by the tokens of its longest training; "before" stays as it is."""
        if budget == "before":
            return budget
        count = self.rows.loc[(self.rows["budget"] == budget) & (self.rows["recipe"] != "none"), "tokens"].max()
        return f"{count / 1e6:.1f}M tokens" if count >= 1e6 else f"{count / 1e3:.0f}k tokens"

    def title(self, text: str) -> str:
        return text + (", as trained on" if text == self.texts[0] else ", not trained on")


def healings(chapter: Chapter) -> Healings:
    """The tables of a chapter as `Healings`. Budgets differ in their windows: each is compared with its own dense model."""
    parts = {"short": chapter.table("healing")}
    if chapter["converged"] is not None:
        found = chapter.table("converged")
        parts["long"] = found[found["experiment"] == "healing"].dropna(axis=1, how="all")
    rows = pd.concat([part.assign(budget=budget) for budget, part in parts.items()], ignore_index=True)
    rows = rows.assign(model=rows["name"], **{column: np.nan for column in OPTIONAL if column not in rows})
    rows["study"] = rows["run_part"].str.split("_").str[0]  # curve, rank, recipe, …
    texts = list(rows["text"].dropna().unique())

    loss = rows[rows["metric"] == "nll"]
    before = loss[loss["recipe"] == "none"]
    last = loss["step"] == loss.groupby(["budget", "run"])["step"].transform("max")
    after = loss[(loss["recipe"] != "none") & last].rename(columns={"value": "after"})
    before_cut = before.drop_duplicates([*CUT, "text"]).rename(columns={"value": "before"})[[*CUT, "text", "before"]]
    dense = before[before["method"] == "dense"].groupby(["budget", "name", "text"])["value"].first().to_dict()

    healed = after.merge(before_cut, on=[*CUT, "text"], how="left")
    healed["dense"] = [
        dense[one.budget, one.name, one.text] for one in healed[["budget", "name", "text"]].itertuples(index=False)
    ]
    healed["nats_over_dense"] = healed["after"] - healed["dense"]
    lost = healed["before"] - healed["dense"]
    healed["recovered"] = ((healed["before"] - healed["after"]) / lost).where(lost > 0.01)
    healed["per_thousand_tokens"] = healed["recovered"] / (healed["tokens"] / 1000)
    sizes = healed[healed["study"] == "rank"].groupby("name")["size"].max()
    cuts = pick(healed, study="curve", method="angular", repair="none")
    base = cuts[cuts["size"] == cuts["name"].map(sizes)]
    return Healings(rows, healed, base, dense, texts)


def answers(rows: pd.DataFrame) -> pd.DataFrame:
    """Accuracy on the tasks: the mean of several where there are several, else that of the one task."""
    mean = rows[(rows["task"] == "all") & (rows["metric"] == "average")]
    return mean if len(mean) else rows[rows["task"].notna() & (rows["metric"] == "acc")]


def _curves(ax: Axes, part: pd.DataFrame, found: Healings) -> None:
    """One line per rule and kind (before, short, long) of `part`: `value` over `fraction`."""
    for (rule, kind), line in part.groupby(["method", "kind"]):
        label = f"{METHODS[rule].title.split(' (')[0]}, {'healed, ' * (kind != 'before')}{found.tokens(kind)}"
        curve(ax, line, rule, x="fraction", label=label, **KINDS[kind])


@figure("deeper_layers_fig3_healed_loss", reads=READS)
def fig3_healed_loss(chapter: Chapter) -> Drawing:
    """Loss over the logarithm of the vocabulary size before and after, against the fraction of layers removed."""
    found = healings(chapter)
    widest, scales = found.budgets[-1], pick(found.rows, metric="log_vocabulary").groupby("name")["value"].first()
    rows = pick(found.healed, study="curve", text=found.texts[0])
    for column in ("before", "after", "dense"):
        rows[column] /= rows["name"].map(scales)
    data = pick(rows, method=BLOCKS)
    before = data[data["budget"] == widest].assign(kind="before")
    start = before.drop_duplicates(["model", "method"]).assign(fraction=0.0, before=lambda one: one["dense"])
    before = pd.concat([start, before]).assign(value=lambda one: one["before"])
    lines = pd.concat([before, data.assign(kind=data["budget"], value=data["after"])])
    drawn, axes = panels(1, len(found.models), height=3.4, squeeze=False, sharey=True)
    for ax, name in zip(axes[0], found.models, strict=True):
        dense_line(ax, pick(start, model=name)["dense"].iloc[0], label="dense")
        _curves(ax, pick(lines, model=name), found)
        for value in pick(rows, model=name, method="dense", budget=widest, may_be_empty=True)["after"]:
            ax.axhline(value, color="#888888", linestyle="--", linewidth=1, label="dense, trained as well")
        ax.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        ax.set_title(name)
    label_axes(axes, x="fraction of layers dropped", y="loss / log vocabulary size")
    legend(drawn)
    return Drawing(drawn, data[["model", "method", "budget", "tokens", "fraction", "before", "after"]], rows)


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
    shown = data[["panel", "model"]].drop_duplicates().itertuples(index=False, name=None)
    drawn, axes = panels(1, data.groupby(["panel", "model"]).ngroups, height=4.0, squeeze=False)
    for ax, (panel, name) in zip(axes[0], shown, strict=True):
        _curves(ax, pick(data, model=name, panel=panel), found)
        dense_line(ax, pick(rows, name=name, panel=panel, method="dense", recipe="none")["value"].iloc[0], label="dense")
        if panel == "tasks":
            ax.axhline(0.25, color="#333333", linestyle="--", linewidth=1, label="chance")
        for axis in (ax.xaxis, ax.yaxis):
            axis.set_major_formatter(PercentFormatter(1.0, symbol="", decimals=0))
        ax.set_title(f"{name}, {panel}")
    label_axes(axes, x="layers dropped, %", y="accuracy, %")
    legend(drawn, note="tasks: mean of the tasks, 95 % interval over their items")
    shown = data[["model", "panel", "method", "kind", "fraction", "value", "low", "high", "n"]].dropna(axis=1, how="all")
    return Drawing(drawn, shown, data)


@figure("own_healing_tokens", reads=READS)
def healing_tokens(chapter: Chapter) -> Drawing:
    """Loss over the dense model against the tokens of the training, for every way to choose the layers."""
    found = healings(chapter)
    budget = found.budgets[-1]
    rows = pick(found.rows, metric="nll", text=found.texts[0], budget=budget, study=("choices", "curve"))
    rows = rows[rows["method"].isin(rows.loc[rows["recipe"] != "none", "method"])]
    sizes = pick(rows, study="choices").groupby("name", sort=False)["size"].max().astype(int)
    rows = rows[(rows["size"] == rows["name"].map(sizes)) | (rows["method"] == "dense")]
    rows = rows.drop_duplicates(["name", "method", "step", "recipe"])
    over = rows["value"] - [found.dense[budget, name, found.texts[0]] for name in rows["name"]]
    data = rows.assign(layers_removed=rows["name"].map(sizes), nats_over_dense=over)
    # Where zero tokens are drawn on a logarithmic axis.
    data["place"] = data["tokens"].clip(lower=data.loc[data["tokens"] > 0, "tokens"].min() / 3)
    drawn, axes = panels(1, len(sizes), height=3.5, squeeze=False, sharey=True)
    for ax, (name, size) in zip(axes[0], sizes.items(), strict=True):
        for method, line in pick(data, model=name).groupby("method", sort=False):
            look = METHODS[method.split(" ")[0]]
            style = {"label": "dense, trained as well", "linestyle": "-"} if method == "dense" else {}
            curve(ax, line, look, x="place", y="nats_over_dense", marker=look.marker, markersize=4, **style)
        ax.axhline(0, color="black", linestyle=":", linewidth=1)
        ax.set_xscale("log")
        ax.set_title(f"{name}, {size} layers removed")
    label_axes(axes, x="tokens of training (left end: none)", y="nats per token over dense")
    legend(drawn)
    return Drawing(drawn, data[["model", "method", "layers_removed", "tokens", "nats_over_dense"]], rows)


@figure("own_healing_ablations", reads=READS)
def healing_ablations(chapter: Chapter) -> Drawing:
    """Share of the lost nats that a training wins back; every line changes one thing of the base case."""
    found = healings(chapter)
    changed = pick(found.healed, study=[study for study in VARIANTS if study != "curve"], repair="none")
    data = pd.concat([found.base, changed])
    data["copies"] = np.where(data["unique"].astype(str) == "True", ", deduplicated", "")
    data["group"] = data["study"].map(lambda study: VARIANTS[study][0])
    data["variant"] = [VARIANTS[row["study"]][1].format(**row).replace("_", " ") for row in data.to_dict("records")]
    lines, groups = data[["group", "variant"]].drop_duplicates(), [group for group, _ in VARIANTS.values()]
    number = lines["variant"].str.extract(r"(\d+)")[0].astype(float).where(lines["group"] == "rank", 0)
    lines = lines.assign(place=lines["group"].map(groups.index), number=number).sort_values(["place", "number"], kind="stable")
    lines["y"] = np.arange(len(lines)) + 0.6 * (lines["place"].diff() > 0).cumsum()  # a gap between groups
    data = data[np.isfinite(data["recovered"])].merge(lines[["group", "variant", "y"]])
    drawn, axes = panels(1, len(found.texts), height=0.23 * (lines["y"].max() + 1) + 1.6, squeeze=False, sharey=True)
    for ax, text in zip(axes[0], found.texts, strict=True):
        for (name, budget), part in pick(data, text=text).groupby(["model", "budget"], sort=False):
            index, short = found.models.index(name), budget == "short"
            style = {"color": COLORS[index], "markerfacecolor": "white" if short else COLORS[index], "markersize": 5}
            y = part["y"] + 0.18 * (index - short)
            ax.plot(part["recovered"], y, MARKERS[index], label=f"{name}, {found.tokens(budget)}", **style)
        ax.axvline(1, color="black", linestyle=":", linewidth=1, label="dense")
        ax.axvline(0, color="#333333", linestyle="--", linewidth=1, label="not healed")
        ax.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        ax.set(title=found.title(text), xlabel="share of the lost nats recovered")
        ax.grid(axis="y", visible=False)
    pairs = lines[["group", "variant"]].itertuples(index=False)
    axes[0][0].set_yticks(lines["y"], [b if b.startswith(a) else f"{a.removesuffix(' case')}: {b}" for a, b in pairs])
    axes[0][0].set_ylim(lines["y"].max() + 0.6, -0.7)
    legend(drawn)
    columns = ["text", "group", "variant", "model", "tokens", "before", "after", "dense", "recovered"]
    return Drawing(drawn, data[columns], data)


@figure("deeper_layers_fig9_rank", reads=READS)
def fig9_rank(chapter: Chapter) -> Drawing:
    """Loss over the dense model against the rank of the adapters, on both held-out texts."""
    found = healings(chapter)
    keys = ["name", "budget", "text"]
    data = pd.concat([pick(found.healed, study="rank", repair="none"), found.base]).sort_values("rank", kind="stable")
    data = data.drop_duplicates([*keys, "rank"])
    data = data[data.groupby(keys)["rank"].transform("size") > 1]
    drawn, axes = panels(1, len(found.texts), height=3.2, squeeze=False, sharey=True)
    for ax, text in zip(axes[0], found.texts, strict=True):
        for (name, budget), part in pick(data, text=text).groupby(["model", "budget"]):
            index = found.models.index(name)
            style = {"marker": MARKERS[index], "color": COLORS[index], "label": f"{name}, {found.tokens(budget)}"}
            ax.plot(part["rank"], part["nats_over_dense"], **style, **KINDS[budget])
        ax.set_xscale("log", base=2)
        ax.set_xticks(data["rank"].unique(), [f"{rank:.0f}" for rank in data["rank"].unique()])
        ax.set_title(found.title(text))
    label_axes(axes, x="rank of the adapters", y="nats per token over dense")
    legend(drawn)
    columns = [*keys, "tokens", "method", "size", "rank", "before", "after", "dense", "nats_over_dense"]
    return Drawing(drawn, data[columns], data)


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
    drawn, axes = panels(1, len(found.models), height=2.9, squeeze=False, sharey=True)
    for ax, name, color in zip(axes[0], found.models, COLORS, strict=False):
        looks = {"before": ("#777777", "#bbbbbb"), "short": (color, "white"), "long": (color, color)}
        for place, repair in enumerate(repairs):
            part = pick(data, model=name, repair=repair, may_be_empty=True)
            ax.plot(part["nats_over_dense"], [place] * len(part), "-", color="#bbbbbb", linewidth=1.5, zorder=1)
            for row in part.itertuples():
                label = found.tokens(row.training)
                edge, face = looks[row.training]
                ax.plot([row.nats_over_dense], [place], "o", color=edge, markerfacecolor=face, label=label)
        ax.axvline(0, color="black", linestyle=":", linewidth=1)
        ax.set(title=f"{name}, {pick(data, model=name)['size'].max():.0f} layers removed", xlabel="nats per token over dense")
        ax.grid(axis="y", visible=False)
    axes[0][0].set_yticks(range(len(repairs)), ["no repair", *(name.replace("_", " + ") for name in repairs[1:])])
    axes[0][0].set_ylim(len(repairs) - 0.5, -0.5)
    legend(drawn)
    return Drawing(drawn, data[["model", "repair", "training", "nats_over_dense"]], rows)


def _simdiff(chapter: Chapter) -> tuple[pd.DataFrame, pd.DataFrame, Healings]:
    """Accuracy before and after healing, published (K = 12) and ours, and the share of the dense accuracy.

    Table A.7 prints the dense row of another model: the right one is in Table 3.
    """
    found = healings(chapter)
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
    data["retained_percent"] = 100 * data["accuracy_percent"] / data["level"]
    return data, found.rows[found.rows["study"].isin(("choices", "curve"))], found


def _average(table: pd.DataFrame) -> pd.DataFrame:
    return pick(table, task="avg8", metric="avg_acc")


@figure("simdiff_fig3_healing", reads=READS)
def fig3_healing(chapter: Chapter) -> Drawing:
    """SimDiff's Figure 3: accuracy before and after healing, published and ours."""
    data, rows, found = _simdiff(chapter)
    names = ", ".join(answers(rows)["name"].unique())
    drawn, axes = published_and_ours("Llama-3.1-8B, K = 12", f"{names}, {found.tokens('short')}")
    for ax, source in zip(axes, ("published", "ours"), strict=True):
        bars = data[(data["source"] == source) & (data["method"] != "dense")]
        methods = list(bars["method"].unique())
        for row in bars.itertuples():
            look, place = METHODS[row.method], methods.index(row.method) + (0.2 if row.healed else -0.2)
            style = {"color": look.color} if row.healed else {"color": "white", "hatch": "///"}
            bar = ax.bar(place, row.accuracy_percent, 0.36, edgecolor=look.color, **style)
            ax.bar_label(bar, fmt="%.1f", fontsize=8)
        level = pick(data, source=source)["level"].iloc[0]
        dense_line(ax, level, label="dense")
        ax.set_xticks(range(len(methods)), [METHODS[method].title.replace(" (", "\n(") for method in methods])
        ax.set_ylim(0, 1.12 * level)
        ax.grid(axis="x", visible=False)
    axes[0].set_ylabel("mean accuracy, %")
    axes[0].bar([0], [0], color="white", edgecolor="#555555", hatch="///", label="before")
    axes[0].bar([0], [0], color="#555555", label="healed (LoRA)")
    legend(drawn)
    return Drawing(drawn, data.drop(columns="level"), rows, published=[PUBLISHED])


@figure("simdiff_tablea7_healing", reads=READS)
def tablea7_healing(chapter: Chapter) -> Drawing:
    """SimDiff's Table A.7, also as printed: over the wrong dense row. RP is the share of the dense accuracy kept, in %."""
    data, rows, _ = _simdiff(chapter)
    table = published("simdiff", "tableA7")
    table = table.assign(healed=table["healed"] != "none", source="published, as printed")
    printed = table[table["task"] == "avg8"].pivot(index=["source", "method", "healed"], columns="metric", values="value")
    printed = printed.reset_index().rename(columns={"avg_acc": "accuracy_percent"})
    data = pd.concat([printed, data.drop(columns="level")]).replace({"healed": {True: "lora", False: "no"}})
    data = data.rename(columns={"accuracy_percent": "mean accuracy", "retained_percent": "RP"})
    return Drawing(None, data, rows, published=[PUBLISHED])


@figure("own_table_recovered", reads=READS)
def table_recovered(chapter: Chapter) -> Drawing:
    """Loss before and after every healing, the share of the lost nats recovered, and that per thousand tokens."""
    found = healings(chapter)
    rows = pick(found.healed, text=found.texts[0])
    losses = ["before", "after", "dense", "recovered", "per_thousand_tokens"]
    data = rows[["name", "budget", "study", "method", "size", "slice_percentage", "repair", *TRAINING, *losses]]
    brief = pick(data, study=("curve", "choices"), repair="none").sort_values(["budget", "name", "size", "after"])
    data = data.dropna(axis=1, how="all")
    digits = {"per_thousand_tokens": 5} | dict.fromkeys(losses[:4], 3)
    return Drawing(None, data, rows, markdown(brief[["name", "budget", "method", "size", *losses]], digits=digits))
