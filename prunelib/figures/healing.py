"""Chapter 05: how much of what a cut costs does training bring back?"""

from dataclasses import dataclass, replace

import numpy as np
import pandas as pd

from prunelib.figures import style as fig
from prunelib.figures.save import Chapter, Drawing, figure, markdown, pick
from prunelib.lab.runs import PUBLISHED, published

CHAPTER = "05_healing"
READS = {"healing": None, "converged": None}
# Columns that a model before its training and after it have in common, and those that may lack in a table.
CUT = ["model", "run", "method", "size", "slice_percentage", "repair"]
OPTIONAL = ("slice_percentage", "healing_corpus", "unique", "trained_modules", "task")
LOSSES = ["before", "after", "dense"]
MODELS = [fig.Method("", color, marker) for color, marker in (("#332288", "o"), ("#b07aa1", "s"), ("#44aa99", "^"))]
LIKE, OTHER = "text as trained on", "another text"
MAIN = ("choices", "curve", "sizes")  # studies with one recipe and several choices of layers
# Studies that change one thing of the base case, and what a row of the figure says of it.
VARIANTS = {
    "base": "base: rank {rank:.0f}, rate {learning_rate:g}",
    "rank": "rank {rank:.0f}",
    "modules": "modules: {trained_modules} alone",
    "recipe": "recipe: {recipe}",
    "distillation": "recipe: {recipe}",
    "qlora": "recipe: {recipe}",
    "rate": "learning rate: {learning_rate:g}",
    "seed": "seed {healing_seed:.0f}",
    "data": "text: {healing_corpus}{copies}",
    "unique": "text: {healing_corpus}{copies}",
    "sliced": "width: sliced by {slice_percentage:.0%} instead",
}


@dataclass(frozen=True)
class Healings:
    """The healing runs of a chapter.

    rows: all rows; `where` says of a held-out text whether it is like the training text. healed: one line per trained model
    and text, with the loss `before` and `after` and the `dense` model's, in nats per token, and the share of what was lost that
    is `recovered`, over the dense model as it was and, where it was trained alike, over that one (`recovered_alike`). base: the
    case that every ablation changes one thing of, for the models that have ablations.
    """

    rows: pd.DataFrame
    healed: pd.DataFrame
    base: pd.DataFrame

    def titles(self) -> dict[str, str]:
        """The two kinds of held-out text, with their names."""
        texts = self.base.groupby("where")["text"].unique()
        return {where: f"{where}\n({', '.join(names)})" for where, names in texts.items()}

    def looks(self) -> dict[str, fig.Method]:
        """The look of every model, with the tokens of its trainings."""
        tokens, found = self.rows.groupby("model", sort=False)["tokens"].max() / 1e6, {}
        for (name, count), look in zip(tokens.items(), MODELS, strict=False):
            found[name] = replace(look, title=f"{fig.short(name)}, {count:.2g}M tokens")
        return found


def healings(chapter: Chapter) -> Healings:
    """The tables of a chapter as `Healings`; of a model in both tables the longer trainings, those of `converged`."""
    rows = chapter.table("healing")
    if chapter["converged"] is not None:
        longer = pick(chapter.table("converged"), experiment="healing").dropna(axis=1, how="all")
        rows = pd.concat([rows[~rows["model"].isin(longer["model"])], longer], ignore_index=True)
    rows = rows.assign(**{column: np.nan for column in OPTIONAL if column not in rows})
    rows["study"] = rows["run_part"].str.split("_").str[0]  # curve, rank, recipe, …
    trained_on = rows[rows["study"].isin(MAIN)].groupby("model")["healing_corpus"].first()
    rows["where"] = np.where(rows["text"] == rows["model"].map(trained_on), LIKE, OTHER)

    loss = pick(rows, metric="nll")
    last = loss["step"] == loss.groupby("run")["step"].transform("max")
    after = loss[(loss["recipe"] != "none") & last].rename(columns={"value": "after"})
    before = pick(loss, recipe="none").rename(columns={"value": "before"})
    place = ["model", "text"]
    dense = pick(before, method="dense").groupby(place)["before"].first().rename("dense").reset_index()
    before = before.drop_duplicates([*CUT, "text"])[[*CUT, "text", "before"]]
    alike = pick(after, method="dense", may_be_empty=True).groupby(place)["after"].first().rename("dense_alike").reset_index()
    healed = after.merge(before, on=[*CUT, "text"], how="left").merge(dense, on=place, how="left").merge(alike, "left", place)
    lost = (healed["before"] - healed["dense"]).where(lambda nats: nats > 0.01)
    healed["recovered"] = (healed["before"] - healed["after"]) / lost
    healed["recovered_alike"] = 1 - (healed["after"] - healed["dense_alike"]) / lost
    healed["nats_over_dense"] = healed["after"] - healed["dense"]
    case = ["model", "method", "size"]
    ablated = pick(healed, study="rank", may_be_empty=True)[case].drop_duplicates()
    base = pick(healed, study=MAIN, repair="none", recipe="lora", may_be_empty=True).merge(ablated, on=case)
    return Healings(rows, healed, base.drop_duplicates([*case, "text"]))


@figure("deeper_layers_fig3_healed_loss", reads=READS)
def fig3_healed_loss(chapter: Chapter) -> Drawing:
    """Loss over the logarithm of the vocabulary size before and after, against the fraction of layers removed."""
    found, keys = healings(chapter), ["model", "method"]
    rows = pick(found.healed, study=MAIN, where=LIKE, repair="none").drop_duplicates([*keys, "size"])
    rows = rows[rows["method"] != "dense"]
    sizes = rows.groupby(keys)["size"].transform("size")
    rows = rows[sizes == sizes.groupby(rows["model"]).transform("max")]  # the rules that were healed at most sizes
    scales = pick(found.rows, metric="log_vocabulary").groupby("model")["value"].first()
    rows[LOSSES] = rows[LOSSES].div(rows["model"].map(scales), axis=0)
    start = rows.drop_duplicates(keys).assign(fraction=0.0, before=lambda one: one["dense"], after=lambda one: one["dense"])
    data = pd.concat([start, rows])
    texts = rows.groupby("model")["text"].first().items()
    titles = {name: f"{fig.short(name)}\non {fig.text_title(text)}" for name, text in texts}
    grid = fig.Panels(data, "model", titles=titles, height=3.8, sharey=True, sharex=True)
    for axes, part in grid:
        fig.level(axes, part["dense"].iloc[0])
        for method, line in part.groupby("method", sort=False):
            look = fig.METHODS[method.split()[0]]
            look = replace(look, title=f"{look.title.split(' (')[0]}, healed")
            axes.plot(line["fraction"], line["before"], ":", color=look.color, linewidth=1.2)
            fig.curve(axes, line, look, x="fraction", y="after")
        axes.plot([], [], ":", color="#555555", label="before healing")
        fig.percent(axes.xaxis)
    told = 100 * rows.groupby("model", sort=False)[["recovered", "recovered_alike"]].agg(["min", "max"])
    told.columns = ["recovered, %: least", "most", "over the dense model trained alike: least", "most of these"]
    straight = data.groupby(keys)[["fraction", "after"]].apply(lambda one: one["fraction"].corr(one["after"]) ** 2)
    told["R² of a line through the healed losses of a rule, least"] = straight.groupby("model").min()
    title = "{}: training wins back {:.0f}% to {:.0f}% of the loss".format(fig.short(told.index[0]), *told.iloc[0])
    keep = [*keys, "tokens", "fraction", "before", "after"]
    labels = {"x": "layers removed, %", "y": "loss / log(vocabulary)", "text": markdown(told.reset_index())}
    return grid.done(rows, **labels, keep=keep, title=title)


@figure("own_healing_tokens", reads=READS)
def healing_tokens(chapter: Chapter) -> Drawing:
    """Loss over the dense model against the tokens of the training, for every way to choose the layers."""
    found = healings(chapter)
    rows = pick(found.rows, metric="nll", study=MAIN, repair="none")
    unlike = rows.sort_values("where", key=lambda where: where == LIKE, kind="stable").groupby("model")["text"].first()
    rows = rows[rows["text"] == rows["model"].map(unlike)]  # not the training text, where there is another
    dense = pick(rows, method="dense", recipe="none", model=list(rows["model"].unique())).groupby("model")["value"].first()
    rows = rows[rows["method"].isin(rows.loc[rows["recipe"] != "none", "method"]) & (rows["method"] != "dense")]
    counts = rows.groupby(["model", "size"], sort=False)["method"].nunique().reset_index()
    sizes = counts.sort_values(["method", "size"]).groupby("model", sort=False)["size"].last()  # where most rules were healed
    rows = rows[rows["size"] == rows["model"].map(sizes)].drop_duplicates(["model", "method", "step", "recipe"])
    data = rows.assign(layers_removed=rows["size"].astype(int), nats_over_dense=rows["value"] - rows["model"].map(dense))
    # Where zero tokens are drawn on a logarithmic axis; a method of several sets has its number in its name.
    data["place"] = data["tokens"].clip(lower=data.loc[data["tokens"] > 0, "tokens"].min() / 3)
    looks = {method: replace(fig.METHODS[method.split()[0]], line="-") for method in data["method"].unique()}
    texts = data.groupby("model")["text"].first()
    titles = {name: f"{fig.short(name)}\nK = {sizes[name]:.0f}, {fig.text_title(text)}" for name, text in texts.items()}
    grid = fig.Panels(data, "model", titles=titles, height=4.1, sharey=True, sharex=True)
    for axes, part in grid:
        for method, line in part.groupby("method", sort=False):
            fig.curve(axes, line, looks[method], x="place", y="nats_over_dense", markersize=4)
        axes.set_xscale("log")
        fig.log_scale(axes)
        marks = {data["place"].min(): "0"} | {at: f"{at / 1e6:g}M" for at in (1e5, 1e6) if at < data["tokens"].max()}
        axes.set_xticks(list(marks), list(marks.values()))
    keep = ["model", "method", "layers_removed", "text", "tokens", "nats_over_dense"]
    note = "one training for each line; random layers: one line for each set"
    first = data[(data["model"] == data["model"].iloc[0]) & (data["recipe"] != "none")]
    ends = first[first["step"] == first["step"].max()]["nats_over_dense"].agg(["min", "max"])
    title = "After healing the choices of layers still cost {:.2f} to {:.2f} nats".format(*ends)
    title += f" ({fig.short(first['model'].iloc[0])})"
    labels = {"x": "tokens of training", "y": "extra loss (nats/token, log)", "title": title}
    return grid.done(pd.concat([rows, found.healed]), **labels, keep=keep, note=note, text=_healed_table(found))


def _healed_table(found: Healings) -> str:
    """In Markdown: the first model's losses before and after on each text, what the dense control gains, and equal choices."""
    model, times = found.rows["model"].iloc[0], {"start": "before", "nats_over_dense": "after"}
    rows = pick(found.healed, model=model, study=MAIN, repair="none").drop_duplicates(["method", "size", "text"])
    rows = rows.assign(start=rows["before"] - rows["dense"], K=rows["size"].astype(int))
    rows["method"] = rows["method"].replace({method: look.title for method, look in fig.METHODS.items()})
    control, cut = (rows[(rows["method"] == "dense") == dense] for dense in (True, False))
    table = cut.pivot(index=["K", "method"], columns="text", values=list(times)).swaplevel(axis=1)
    table = table[[(text, when) for text in cut["text"].unique() for when in times]]
    table.columns = [f"{text}: {times[when]}" for text, when in table]
    parts = [f"Extra loss of {fig.short(model)}, in nats per token:", markdown(table.reset_index())]
    gains = ", ".join(f"{-one.nats_over_dense:.2f} nats on {one.text}" for one in control.itertuples())
    parts += [f"The dense model gains {gains} by the same training."] if gains else []
    for (size, _), part in cut.groupby(["K", "removed_layers"]):
        if len(same := part["method"].unique()) > 1:
            parts.append(f"K = {size}: {' and '.join(same)} removed the same layers.")
    return "\n\n".join(parts)


@figure("own_healing_ablations", reads=READS)
def healing_ablations(chapter: Chapter) -> Drawing:
    """Share of the lost nats that a training wins back; every line changes one thing of the base case."""
    found, case = healings(chapter), ["model", "method", "size"]
    changed = pick(found.healed, study=(*VARIANTS,), repair="none", may_be_empty=True)
    changed = changed[(changed["study"] == "sliced") | changed[case].isin(found.base[case].to_dict("list")).all(axis=1)]
    data = pd.concat([found.base.assign(study="base"), changed])
    data = pick(data, model=tuple(found.base["model"]))
    data["copies"] = np.where(data["unique"].astype(str) == "True", ", deduplicated", "")
    names = [VARIANTS[row["study"]].format(**row) for row in data.to_dict("records")]
    data["variant"] = [name.replace("gromov_qlora", "QLoRA").replace("_", " ") for name in names]
    rows = data.drop_duplicates("variant")
    group = rows["study"].replace({"unique": "data", "distillation": "recipe", "qlora": "recipe"}).map(list(VARIANTS).index)
    number = rows["rank"].where(rows["study"] == "rank", rows["learning_rate"].where(rows["study"] == "rate", 0))
    rows = rows.assign(group=group, number=number)
    rows = rows.sort_values(["group", "number"], kind="stable")
    data, looks = data[np.isfinite(data["recovered"])], found.looks()
    data = data.sort_values("where", key=lambda where: where != LIKE, kind="stable")
    grid = fig.Panels(data, "where", titles=found.titles(), height=0.25 * len(rows) + 1.4, sharey=True)
    for axes, part in grid:
        for place, (name, one) in enumerate(part.groupby("model", sort=False)):
            base = one.loc[one["study"] == "base", "recovered"].iloc[0]
            axes.axvline(base, color=looks[name].color, linewidth=0.8, alpha=0.6)
            places = one["variant"].map(list(rows["variant"]).index) + 0.18 * place
            look = {"color": looks[name].color, "label": looks[name].title, "markersize": 5}
            axes.plot(one["recovered"], places, looks[name].marker, **look)
        axes.axvline(1, color="black", linestyle=":", linewidth=1, label="dense")
        axes.axvline(0, color="#333333", linewidth=1, label="not healed")
        axes.hlines(np.flatnonzero(rows["group"].diff() > 0) - 0.5, *axes.get_xlim(), color="#cccccc", linewidth=0.7)
        fig.percent(axes.xaxis)
        fig.titled_rows(axes, list(rows["variant"]))
    keep = ["where", "text", "study", "variant", "model", "tokens", *LOSSES, "recovered"]
    note = "vertical lines: the base case of each model; one training each; lost: over the dense model as it was"
    labels = {"x": "share of the lost nats recovered, %", "note": note, "text": _repaired(found)}
    ends = (data.loc[data["recovered"].agg(end)] for end in ("idxmin", "idxmax"))
    ends = " to ".join(f"{one['recovered']:.0%} ({one['variant']})" for one in ends)
    return grid.done(data, **labels, keep=keep, title=f"A training recovers {ends} of the lost nats")


def _repaired(found: Healings) -> str:
    """In Markdown: extra loss of the base case before and after training, and of the best closed-form repair of its cut."""
    base = pick(found.base, where=LIKE)
    repaired = pick(found.healed, study="repair", where=LIKE, model=tuple(base["model"]), may_be_empty=True)
    repaired = repaired[repaired["repair"] != "none"].sort_values("before").drop_duplicates("model")
    rows = pd.concat([base, repaired]).sort_values("model", kind="stable").astype({"size": int, "tokens": int})
    names = {"model": "model", "size": "layers removed", "repair": "repair in closed form", "extra": "extra loss, nats"}
    names |= {"tokens": "tokens of training", "nats_over_dense": "extra loss after it"}
    return markdown(rows.assign(extra=rows["before"] - rows["dense"])[list(names)].rename(columns=names))


@figure("deeper_layers_fig9_rank", reads=READS)
def fig9_rank(chapter: Chapter) -> Drawing:
    """Loss over the dense model against the rank of the adapters, on both kinds of held-out text."""
    found, keys = healings(chapter), ["model", "text"]
    data = pd.concat([pick(found.healed, study="rank", repair="none"), found.base]).drop_duplicates([*keys, "rank"])
    data = data.sort_values(["model", "rank"], kind="stable")
    grid = fig.Panels(data, "where", titles=found.titles(), height=3.4, sharey=True)
    for axes, part in grid:
        fig.lines(axes, part, found.looks(), x="rank", y="nats_over_dense", series="model")
        axes.set_xscale("log", base=2)
        axes.set_xticks(data["rank"].unique(), [f"{rank:.0f}" for rank in data["rank"].unique()])
    keep = [*keys, "where", "tokens", "method", "size", "rank", *LOSSES, "nats_over_dense"]
    labels = {"x": "rank of the adapters", "y": "extra loss (nats/token)", "note": "one training for each point"}
    gain = data.groupby(keys)["nats_over_dense"].agg(lambda one: one.iloc[0] - one.iloc[-1])
    span = f"{data['rank'].min():.0f} to {data['rank'].max():.0f}"
    labels["title"] = f"From rank {span} the extra loss falls by {gain.min():.2f} to {gain.max():.2f} nats"
    return grid.done(data, **labels, keep=keep)


def _simdiff(chapter: Chapter) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Accuracy before and after healing, published (K = 12) and ours, and the share of the dense accuracy (`level`).

    Ours is the first model of the chapter that was asked, with the 95 % interval over the items; and the rows behind it.
    Table A.7 prints the dense row of another model: the right one is in Table 3.
    """
    paper = pick(published("simdiff"), item=("table3", "tableA7"), task="avg8", metric="avg_acc")
    dense = pick(paper, item="table3", model="Llama-3.1-8B", method="dense")["value"].iloc[0]
    paper = paper[(paper["item"] == "tableA7") & (paper["method"] != "dense")]
    paper = paper.assign(healed=paper["healed"] != "none", source="published", level=dense)
    asked, keys = chapter.table("healing"), ["method", "recipe"]
    asked = asked[asked["task"].notna() & asked["run_part"].isin(MAIN)]
    asked = pick(asked, model=asked["model"].iloc[0])
    # The mean of several tasks, or the one task.
    means = pick(asked, task="all", metric=["average", "average_low", "average_high"], may_be_empty=True)
    rows = means if len(means) else pick(asked, metric="acc").assign(metric="average")
    wide = 100 * rows.pivot_table(index=keys, columns="metric", values="value", sort=False)
    wide = wide.rename(columns={"average": "value", "average_low": "low", "average_high": "high"}).reset_index()
    size = int(pick(rows, method="block_influence")["size"].max())
    kept = rows.loc[rows["size"] == size, "method"]
    ours = wide[wide["method"].isin(kept)].assign(healed=wide["recipe"] != "none", source=f"ours: K = {size}")
    ours["level"] = wide.loc[(wide["method"] == "dense") & (wide["recipe"] == "none"), "value"].iloc[0]
    data = pd.concat([paper, ours], ignore_index=True)
    levels = data.drop_duplicates("source").assign(method="dense", healed=False, value=lambda one: one["level"])
    data = pd.concat([data, levels.drop(columns=["low", "high"], errors="ignore")])
    data = data.rename(columns={"value": "accuracy_percent"})
    data["retained_percent"] = 100 * data["accuracy_percent"] / data["level"]
    columns = ["method", "healed", "accuracy_percent", "low", "high", "source", "level", "retained_percent"]
    return data.reindex(columns=columns).dropna(axis=1, how="all"), asked


@figure("simdiff_fig3_healing", reads={"healing": None})
def fig3_healing(chapter: Chapter) -> Drawing:
    """SimDiff's Figure 3: accuracy before and after healing, published and ours."""
    data, rows = _simdiff(chapter)
    name, ours = rows["model"].iloc[0], data["source"].iloc[-1]
    chance = 100 * pick(rows, metric="chance").groupby("task")["value"].first()
    chance = chance.reindex(rows.loc[rows["task"] != "all", "task"].unique()).fillna(0).mean()  # of a next word it is 0
    titles = ("published: K = 12\nLlama-3.1-8B", f"{ours}\n{fig.short(name)}")
    grid = fig.Panels(data, "source", titles=titles, height=3.2, sharex=True)
    for axes, part in grid:
        axes.axvline(part["level"].iloc[0], color="black", linestyle=":", label="dense")
        cut = part[part["method"] != "dense"].assign(place=lambda one: pd.factorize(one["method"])[0])
        for healed, shift, color in ((False, 0.12, "#999999"), (True, -0.12, "#000000")):
            one = cut[cut["healed"] == healed]
            value = one["accuracy_percent"]
            error = np.nan_to_num([value - one.get("low", value), one.get("high", value) - value])
            hollow = {"markerfacecolor": "white"} if "published" in set(part["source"]) else {}
            axes.errorbar(value, one["place"] + shift, xerr=error, fmt="o", color=color, **hollow)
            axes.plot([], [], "o", color=color, label="healed (LoRA)" if healed else "before")
        fig.titled_rows(axes, [fig.METHODS[method.split()[0]].title for method in cut["method"].unique()])
    axes.axvline(chance, color="#333333", linestyle="-", linewidth=0.8, label="chance (ours)")
    gains = data.pivot(index=["source", "method"], columns="healed", values="accuracy_percent").dropna()
    gains = (gains[True] - gains[False]).groupby("source").mean()
    title = f"Healing adds {gains[ours]:.1f} points in the mean (published: {gains['published']:.1f})"
    note = "hollow: published; ours: 95 % interval over the items, one training each"
    labels = {"x": "mean accuracy, %", "note": note, "title": title}
    return grid.done(rows, **labels, keep=[*data.columns.drop("level")], published=[PUBLISHED])


@figure("simdiff_tablea7_healing", reads={"healing": None})
def tablea7_healing(chapter: Chapter) -> Drawing:
    """SimDiff's Table A.7, also as printed: over the wrong dense row. RP is the share of the dense accuracy kept, in %."""
    right, rows = _simdiff(chapter)
    table = pick(published("simdiff", "tableA7"), task="avg8")
    table = table.assign(healed=table["healed"] != "none", source="published, as printed")
    printed = table.pivot(index=["source", "method", "healed"], columns="metric", values="value").reset_index()
    right = right.drop(columns="level").rename(columns={"accuracy_percent": "avg_acc"})
    data = pd.concat([printed, right]).replace({"healed": {True: "lora", False: "no"}})
    data = data.rename(columns={"avg_acc": "mean accuracy", "retained_percent": "RP"})
    return Drawing(None, data, rows, published=[PUBLISHED])
