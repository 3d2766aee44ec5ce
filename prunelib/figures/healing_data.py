"""Chapter 06: what is in the text of a healing twice, and how much of the evaluation text is in it?"""

import pandas as pd

from prunelib.figures import style as fig
from prunelib.figures.healing import healings
from prunelib.figures.save import Chapter, Drawing, figure, markdown, pick

CHAPTER = "06_healing_data"
READS = {"duplicates": None}
LOOKS = [("#d55e00", "s", "-"), ("#0072b2", "o", "--"), ("#009e73", "^", "-."), ("#8c6d1f", "D", ":"), ("#882255", "v", "-")]


def _searched(chapter: Chapter) -> pd.DataFrame:
    """The rows of the first model (one scores the texts) with a column `text`."""
    rows = chapter.table("duplicates")
    return pick(rows, run=rows["run"].iloc[0]).assign(text=lambda one: one["corpus"] + ", " + one["split"])


@figure("own_table_largest_clusters", reads=READS)
def table_largest_clusters(chapter: Chapter) -> Drawing:
    """One document of each of the largest clusters."""
    rows = _searched(chapter)
    largest = pick(rows, metric="largest", may_be_empty=True).sort_values("value", ascending=False, kind="stable")
    if largest.empty:
        return Drawing(None, pd.DataFrame({"text": rows["text"].dropna().unique(), "documents": 1}), rows)  # no near-copies
    data = largest.rename(columns={"value": "documents", "sources": "found in"}).astype({"documents": int, "characters": int})
    data = data[["text", "documents", "characters", "found in", "excerpt"]]
    quoted = [f"`{' '.join(one.replace('`', ' ').split())}`" for one in data["excerpt"]]  # Markdown must not read them
    return Drawing(None, data, largest, markdown(data.assign(excerpt=quoted)))


@figure("own_overlap", reads=READS)
def overlap(chapter: Chapter) -> Drawing:
    """Share of the evaluation documents, and of the task items, whose 25-grams occur in the other texts."""
    rows = _searched(chapter)
    evaluation = rows["target"].dropna().iloc[0]
    data = pick(rows, metric="share", state="raw")
    data = data.assign(panel=(data["target"] == evaluation).map({True: "documents", False: "task items"}), item=data["target"])
    data["item"] = data["item"].str.removeprefix("pydocs_").str.replace("_", " ")
    looks = {text: fig.Method(text, *look) for text, look in zip(rows["text"].dropna().unique(), LOOKS, strict=False)}
    titles = {"documents": f"documents: {evaluation.replace(' ', ', ')}", "task items": "task items, 80 % or more of them"}
    grid = fig.Panels(data, "panel", titles=titles, height=3.2)
    for axes, part in grid:
        if "documents" in set(part["panel"]):
            fig.lines(axes, part, looks, x="least", series="text", markersize=4.5)
            fig.percent(axes.xaxis)
            axes.set(xlabel="share of a document that is found, at least, %", ylabel="share of all, %", ylim=(0, None))
        else:
            bars = part[part["least"] == 0.8].pivot(index="item", columns="text", values="value")
            bars = bars.reindex(index=part["item"].unique(), columns=list(looks))
            bars.plot.bar(ax=axes, color=[look.color for look in looks.values()], legend=False, rot=0, width=0.8, label="")
            axes.set_xlabel("")
            axes.grid(visible=False, axis="x")
        fig.percent(axes.yaxis)
    return grid.done(data, keep=["text", "target", "least", "value", "n"])


@figure("own_table_deduplication", reads={"duplicates": None, "healing": None})
def table_deduplication(chapter: Chapter) -> Drawing:
    """What deduplication removes, and the loss after healing on either text, at the same tokens of the same recipe."""
    rows = _searched(chapter)
    kinds = ("documents", "characters", "clusters", "kept_characters", "clusters_thorough")
    counts = pick(rows, metric=kinds).pivot(index="text", columns="metric", values="value")
    near = pick(rows, metric="near_duplicates", target=rows["target"].dropna().iloc[0], may_be_empty=True)
    texts = {
        "documents": counts["documents"],
        "million characters": counts["characters"] / 1e6,
        "documents that go, %": 100 * (1 - counts["clusters"] / counts["documents"]),
        "characters that go, %": 100 * (1 - counts["kept_characters"] / counts["characters"]),
        "missed by the bands": counts["clusters"] - counts["clusters_thorough"],
        "near-copies of the evaluation text": near.groupby("text")["value"].first(),
    }
    whole = ("documents", "missed by the bands", "near-copies of the evaluation text")
    texts = pd.DataFrame(texts).reset_index().astype(dict.fromkeys(whole, "Int64"))
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
    shown = ["model", "method", "size", "recipe", "healing_corpus", "healing_seed", "tokens", "text"]
    same = [*shown, "rank", "trained_modules", "learning_rate"]
    healed = healed.drop_duplicates([*same, "unique"])
    raw = pick(healed, unique="False", may_be_empty=True).rename(columns={"after": "raw"})
    kept = pick(healed, unique="True", may_be_empty=True).rename(columns={"after": "deduplicated"})
    pairs = raw[[*same, "before", "raw"]].merge(kept[[*same, "deduplicated"]], on=same)
    pairs = pairs.assign(difference=pairs["deduplicated"] - pairs["raw"]).drop(columns=same[len(shown) :])
    pairs = pairs.astype({"size": int, "healing_seed": int, "tokens": int})
    names = {"size": "layers removed", "text": "measured on"}
    return pairs.rename(columns=names), healed[healed["healing_corpus"].isin(pairs["healing_corpus"])]
