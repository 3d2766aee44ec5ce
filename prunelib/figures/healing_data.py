"""Chapter 06: what is in the text of a healing twice, and how much of the evaluation text is in it?"""

import pandas as pd
from matplotlib.ticker import MaxNLocator, PercentFormatter

from prunelib.figures.healing import healings
from prunelib.figures.save import Chapter, Drawing, figure, markdown, pick
from prunelib.figures.style import Method, Sketch, curve

CHAPTER = "06_healing_data"
READS = {"duplicates": None}
LOOKS = [("#d55e00", "s", "-"), ("#0072b2", "o", "--"), ("#009e73", "^", "-."), ("#8c6d1f", "D", ":"), ("#882255", "v", "-")]


def searched(chapter: Chapter) -> tuple[pd.DataFrame, dict[str, Method]]:
    """The rows of the first model (one scores the texts) with a column `text`, and the look of every text."""
    rows = chapter.table("duplicates")
    rows = pick(rows, run=rows["run"].iloc[0]).assign(text=rows["corpus"] + ", " + rows["split"])
    texts = rows["text"].dropna().unique()
    return rows, {text: Method(text, text, *look) for text, look in zip(texts, LOOKS, strict=False)}


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


@figure("own_overlap", reads=READS)
def overlap(chapter: Chapter) -> Drawing:
    """Share of the evaluation documents, and of the task items, whose 25-grams occur in the other texts."""
    rows, looks = searched(chapter)
    target = rows["target"].dropna().iloc[0]
    data = pick(rows, metric="share", state="raw")
    most = data[(data["target"] != target) & (data["least"] == 0.8)]
    tasks = list(most["target"].unique())
    titles = (f"documents: {target.replace(' ', ', ')}", "task items, 80 % or more of them")
    sketch = Sketch(("documents", "items"), titles=titles, height=3.2, width_ratios=(1.15, 1) if tasks else (1, 0.01))
    left, right = sketch.grid[0]
    for text, part in pick(data, target=target).groupby("text", sort=False):
        curve(left, part, looks[text], x="least", markersize=4.5)
    left.set(ylim=(0, None), ylabel="documents, %", xlabel="part that occurs, at least, %")
    for axis in (left.xaxis, left.yaxis):
        axis.set_major_formatter(PercentFormatter(1.0, symbol=""))
    width = 0.8 / len(looks)
    for text, part in most.groupby("text", sort=False):
        place = part["target"].map(tasks.index) + (list(looks).index(text) - (len(looks) - 1) / 2) * width
        right.bar(place, 100 * part["value"], 0.9 * width, color=looks[text].color)
    right.set_xticks(range(len(tasks)), [task.removeprefix("pydocs_").replace("_", " ") for task in tasks])
    right.set(ylabel="items, %", visible=bool(tasks))
    right.yaxis.set_major_locator(MaxNLocator(6, integer=True))
    right.grid(False, axis="x")
    sketch.keep(data[["text", "target", "least", "value", "n"]])
    return sketch.done(data, columns=2)


@figure("own_table_deduplication", reads={"duplicates": None, "healing": None})
def table_deduplication(chapter: Chapter) -> Drawing:
    """What deduplication removes, and the loss after healing on either text, at the same tokens of the same recipe."""
    rows, _ = searched(chapter)
    kinds = ("documents", "characters", "clusters", "kept_characters", "clusters_thorough")
    counts = pick(rows, metric=kinds).pivot(index="text", columns="metric", values="value")
    near = pick(rows, metric="near_duplicates", target=rows["target"].dropna().iloc[0], may_be_empty=True)
    texts = counts[["documents"]].assign(
        **{
            "million characters": counts["characters"] / 1e6,
            "documents that go, %": 100 * (1 - counts["clusters"] / counts["documents"]),
            "characters that go, %": 100 * (1 - counts["kept_characters"] / counts["characters"]),
            "missed by the bands": counts["clusters"] - counts["clusters_thorough"],
            "near-copies of the evaluation text": near.groupby("text")["value"].first(),
        }
    )
    whole = ("documents", "missed by the bands", "near-copies of the evaluation text")
    texts = texts.rename_axis(columns=None).reset_index().astype(dict.fromkeys(whole, "Int64"))
    used = rows[rows["metric"] != "largest"]
    pairs, healed = _paired(chapter)
    if pairs.empty:
        return Drawing(None, texts, used)
    text = "\n\n".join((markdown(texts), markdown(pairs, digits=3)))
    return Drawing(None, pd.concat([texts, pairs]), pd.concat([used, healed]), text)


def _paired(chapter: Chapter) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Healings on a raw text beside those on its deduplicated form, all else equal, and the rows of these texts."""
    if chapter["healing"] is None:
        return pd.DataFrame(), pd.DataFrame()
    healed = pick(healings(chapter).healed, repair="none")
    healed = healed[healed["unique"].notna()].astype({"unique": str})
    shown = ["name", "method", "size", "recipe", "healing_corpus", "healing_seed", "tokens", "text"]
    same = [*shown, "rank", "trained_modules", "learning_rate"]
    healed = healed.drop_duplicates([*same, "unique"])
    raw = pick(healed, unique="False", may_be_empty=True).rename(columns={"after": "raw"})
    kept = pick(healed, unique="True", may_be_empty=True).rename(columns={"after": "deduplicated"})
    pairs = raw[[*same, "before", "raw"]].merge(kept[[*same, "deduplicated"]], on=same)
    pairs = pairs.assign(difference=pairs["deduplicated"] - pairs["raw"]).drop(columns=same[len(shown) :])
    pairs = pairs.astype({"size": int, "healing_seed": int, "tokens": int})
    names = {"name": "model", "size": "layers removed", "text": "measured on"}
    return pairs.rename(columns=names), healed[healed["healing_corpus"].isin(pairs["healing_corpus"])]
