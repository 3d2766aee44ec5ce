"""Chapter 06: what is in the text of a healing twice, and how much of the evaluation text is in it?"""

import pandas as pd
from matplotlib.ticker import MaxNLocator, PercentFormatter
from scipy.stats import t as student

from prunelib.figures.healing import healings
from prunelib.figures.save import Chapter, Drawing, figure, markdown, pick
from prunelib.figures.style import Method, curve, legend, log_scale, panels

CHAPTER = "06_healing_data"
READS = {"duplicates": None}
LOOKS = [("#d55e00", "s", "-"), ("#0072b2", "o", "--"), ("#009e73", "^", "-."), ("#8c6d1f", "D", ":"), ("#882255", "v", "-")]


def searched(chapter: Chapter) -> tuple[pd.DataFrame, dict[str, Method]]:
    """The rows of the first model (one scores the texts) with a column `text`, and the look of every text."""
    rows = chapter.table("duplicates")
    rows = pick(rows, run=rows["run"].iloc[0]).assign(text=rows["corpus"] + ", " + rows["split"])
    texts = rows["text"].dropna().unique()
    return rows, {text: Method(text, text, *look) for text, look in zip(texts, LOOKS, strict=False)}


@figure("own_cluster_sizes", reads=READS)
def cluster_sizes(chapter: Chapter) -> Drawing:
    """How many clusters of near-copies there are of every size, and the chance that two documents are compared at all."""
    rows, looks = searched(chapter)
    sizes = pick(rows, metric="clusters_of_size").astype({"size": int})
    chance = pick(rows, metric="compared_probability").astype({"bands": int, "rows_of_band": int})
    data = pd.concat([sizes.assign(what="clusters"), chance.assign(what="chance of being compared")])
    drawn, (left, right) = panels(1, 2, height=3.2)
    for text, look in looks.items():
        part = pick(sizes, text=text, may_be_empty=True)
        left.plot(part["size"], part["value"], look.marker, color=look.color, markerfacecolor="white", label=text)
    left.set(xlim=(0.8, 1.6 * sizes["size"].max()), ylim=(0.7, 2 * sizes["value"].max()))
    log_scale(left, "x")
    log_scale(left)
    left.set(xlabel="documents in a cluster", ylabel="clusters of that size")
    for index, ((bands, band), part) in enumerate(chance.groupby(["bands", "rows_of_band"], sort=False)):
        label = f"{bands} bands of {band}, {('used', 'thorough')[index]}"
        right.plot(part["similarity"], part["value"], ("-", "--")[index], color="#333333", label=label)
    threshold = rows["threshold"].iloc[0]
    right.axvline(threshold, color="#777777", linestyle=":", linewidth=1.2, label=f"threshold, {threshold:g}")
    right.set(xlim=(0.5, 1), ylim=(0, 1.03))
    right.set(xlabel="Jaccard similarity of two documents", ylabel="chance of being compared, %")
    right.yaxis.set_major_formatter(PercentFormatter(1.0, symbol=""))
    legend(drawn, columns=4)
    return Drawing(drawn, data[["text", "size", "value", "what", "bands", "rows_of_band", "similarity"]], data)


@figure("own_table_largest_clusters", reads=READS)
def table_largest_clusters(chapter: Chapter) -> Drawing:
    """One document of each of the largest clusters."""
    rows, looks = searched(chapter)
    largest = pick(rows, metric="largest", may_be_empty=True).sort_values("value", ascending=False, kind="stable")
    if largest.empty:
        return Drawing(None, pd.DataFrame({"text": list(looks), "documents": 1}), rows)  # no text has a near-copy
    data = largest.rename(columns={"value": "documents", "sources": "found in"}).astype({"documents": int, "characters": int})
    data = data[["text", "documents", "characters", "found in", "excerpt"]]
    quoted = [f"`{' '.join(one.replace('`', ' ').split())}`" for one in data["excerpt"]]  # Markdown must not read them
    return Drawing(None, data, largest, markdown(data.assign(excerpt=quoted)))


@figure("own_quality_by_cluster_size", reads=READS)
def quality_by_cluster_size(chapter: Chapter) -> Drawing:
    """Loss and rules passed of documents in clusters, by size, beside documents of the same lengths without a near-copy."""
    rows, looks = searched(chapter)
    data = pick(rows, role=("cluster", "same_length")).astype({"size_low": int, "size_high": int})
    half = student.ppf(0.975, data["n"] - 1) * data["stderr"]
    data = data.assign(low=data["value"] - half, high=data["value"] + half)
    bins = data[["size_low", "size_high"]].drop_duplicates().sort_values("size_low")
    data["place"] = data["size_low"].map(list(bins["size_low"]).index)
    drawn, axes = panels(1, 2, height=3.2)
    for ax, metric, label in zip(axes, ("nll", "passed"), ("loss, nats per token", "quality rules passed, %"), strict=True):
        for (text, role), part in pick(data, metric=metric).groupby(["text", "role"], sort=False):
            title, style = text, {"linestyle": "-"}
            if role == "same_length":
                title = f"{text}: no near-copy, same lengths"
                style = {"linestyle": "--", "color": "#777777", "markerfacecolor": "white"}
            offset = 0.05 * list(looks).index(text) + (0.06 if role == "cluster" else -0.06)
            curve(ax, part, looks[text], x="place", offset=offset, label=title, **style)
        names = [f"{low}" if low == high else f"{low}–{high}" for low, high in bins.itertuples(index=False)]
        ax.set_xticks(range(len(names)), names)
        ax.set(xlabel="documents in the cluster", ylabel=label)
    axes[1].set_ylim(0, 1.02)
    axes[1].yaxis.set_major_formatter(PercentFormatter(1.0, symbol=""))
    first = next(iter(looks))
    counted = pick(data, metric="nll", role="cluster", text=first).sort_values("size_low")["n"]
    many = f"documents of {first.split(',')[0]}, from left to right: {', '.join(f'{n:.0f}' for n in counted)}"
    legend(drawn, columns=2, note=f"error bars: 95 % interval; {many}")
    return Drawing(drawn, data[["text", "role", "size_low", "size_high", "metric", "value", "low", "high", "n"]], data)


@figure("own_overlap", reads=READS)
def overlap(chapter: Chapter) -> Drawing:
    """Share of the evaluation documents, and of the task items, whose 25-grams occur in the other texts."""
    rows, looks = searched(chapter)
    target = rows["target"].dropna().iloc[0]
    data = pick(rows, metric="share", state="raw")
    most = data[(data["target"] != target) & (data["least"] == 0.8)]
    tasks = list(most["target"].unique())
    drawn, (left, right) = panels(1, 2, height=3.2, width_ratios=(1.15, 1) if tasks else (1, 0.01))
    for text, part in pick(data, target=target).groupby("text", sort=False):
        curve(left, part, looks[text], x="least", markersize=4.5)
    left.set(title=f"documents: {target.replace(' ', ', ')}", ylabel="documents, %", xlabel="part that occurs, at least, %")
    left.set_ylim(bottom=0)
    for axis in (left.xaxis, left.yaxis):
        axis.set_major_formatter(PercentFormatter(1.0, symbol=""))
    width = 0.8 / len(looks)
    for text, part in most.groupby("text", sort=False):
        place = part["target"].map(tasks.index) + (list(looks).index(text) - (len(looks) - 1) / 2) * width
        right.bar(place, 100 * part["value"], 0.9 * width, color=looks[text].color)
    right.set_xticks(range(len(tasks)), [task.replace("pydocs_", "").replace("_", " ") for task in tasks])
    right.set(title="task items, 80 % or more of them", ylabel="items, %", visible=bool(tasks))
    right.yaxis.set_major_locator(MaxNLocator(6, integer=True))
    right.grid(False, axis="x")
    legend(drawn, [left], columns=2)
    return Drawing(drawn, data[["text", "target", "least", "value", "n"]], data)


@figure("own_table_deduplication", reads={"duplicates": None, "healing": None})
def table_deduplication(chapter: Chapter) -> Drawing:
    """What deduplication removes, and the loss after healing on either text, at the same tokens of the same recipe."""
    rows, looks = searched(chapter)
    kinds = ("documents", "characters", "clusters", "kept_characters", "clusters_thorough")
    counts = pick(rows, metric=kinds).pivot(index="text", columns="metric", values="value").loc[list(looks)]
    near = pick(rows, metric="near_duplicates", target=rows["target"].dropna().iloc[0], may_be_empty=True)
    texts = pd.DataFrame(
        {
            "documents": counts["documents"],
            "million characters": counts["characters"] / 1e6,
            "documents that go, %": 100 * (1 - counts["clusters"] / counts["documents"]),
            "characters that go, %": 100 * (1 - counts["kept_characters"] / counts["characters"]),
            "missed by the bands": counts["clusters"] - counts["clusters_thorough"],
            "near-copies of the evaluation text": near.groupby("text")["value"].first(),
        }
    ).reset_index()
    whole = {"documents": "Int64", "missed by the bands": "Int64", "near-copies of the evaluation text": "Int64"}
    texts = texts.astype(whole)
    used = rows[rows["metric"] != "largest"]
    if chapter["healing"] is None:
        return Drawing(None, texts, used)
    healed = pick(healings(chapter).healed, repair="none")
    healed = healed[healed["unique"].notna()].astype({"unique": str})
    # What is equal in all of these columns differs in the state of its text alone.
    same = ["name", "method", "size", "recipe", "healing_corpus", "healing_seed", "tokens", "text"]
    same += ["rank", "trained_modules", "learning_rate"]
    healed = healed.drop_duplicates([*same, "unique"])
    raw = pick(healed, unique="False", may_be_empty=True)[[*same, "before", "after"]].rename(columns={"after": "raw"})
    kept = pick(healed, unique="True", may_be_empty=True)[[*same, "after"]].rename(columns={"after": "deduplicated"})
    pairs = raw.merge(kept, on=same).drop(columns=same[-3:])
    if pairs.empty:
        return Drawing(None, texts, used)
    pairs["difference"] = pairs["deduplicated"] - pairs["raw"]
    pairs = pairs.rename(columns={"name": "model", "size": "layers removed", "text": "measured on"})
    pairs = pairs.astype({"layers removed": int, "healing_seed": int, "tokens": int})
    used = pd.concat([used, healed[healed["healing_corpus"].isin(pairs["healing_corpus"])]])
    text = "\n\n".join((markdown(texts), markdown(pairs, digits=3)))
    return Drawing(None, pd.concat([texts, pairs]), used, text)
