"""Chapter 06: what is in the text of a healing twice, and how much of the evaluation text is in it?"""

import pandas as pd

from prunelib.figures.healing import healings
from prunelib.figures.save import Chapter, Drawing, figure, markdown, pick

CHAPTER = "06_healing_data"


def _searched(chapter: Chapter, table: str) -> pd.DataFrame:
    """The rows of the first model (one scores the texts) with a column `text`."""
    rows = chapter.table(table)
    return pick(rows, run=rows["run"].iloc[0]).assign(text=lambda one: one["corpus"] + ", " + one["split"])


@figure("own_table_deduplication", reads={"duplicates": None, "web": None, "healing": None, "converged": None})
def table_deduplication(chapter: Chapter) -> Drawing:
    """What deduplication removes, and the loss after healing on either text, at the same tokens of the same recipe."""
    rows = pd.concat([_searched(chapter, table) for table in ("duplicates", "web") if chapter[table]], ignore_index=True)
    kinds = ("documents", "characters", "clusters", "kept_characters", "clusters_thorough")
    counts = pick(rows, metric=kinds).pivot(index="text", columns="metric", values="value")
    near = pick(rows, metric="near_duplicates", may_be_empty=True)  # the evaluation text is the first target of each
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
    overlap = 100 * pick(rows, metric="share", state="raw", least=0.5).pivot(index="text", columns="target", values="value")
    parts = [markdown(texts), markdown(pairs, digits=3)] if len(pairs) else [markdown(texts)]
    parts += ["Share (%) of the evaluation documents, and of the task items, of which half of the 25-grams occur in a text:"]
    text = "\n\n".join([*parts, markdown(overlap.reset_index(), digits=1)])
    return Drawing(None, pd.concat([texts, pairs]).dropna(axis=1, how="all"), pd.concat([used, healed]), text)


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
