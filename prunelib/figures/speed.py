"""Chapter 07: how much time and memory do removed layers save, beside what the device allows?

A limit is the larger of bytes over bandwidth and FLOPs over the rate of a matrix product, both measured in the same run.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd

from prunelib.figures import style as fig
from prunelib.figures.save import Chapter, Drawing, figure, markdown, pick
from prunelib.lab.runs import PUBLISHED, published

CHAPTER = "07_speed_and_memory"
SPEED, COMBINING = {"speed": None, "gpu": None}, {"combining": None}
TABLE4 = "16x4x2048"  # SimDiff's setting: batch 16, prompts of 4 tokens, 2,048 new ones
PHASES = {"prefill": fig.Method("prefill", "#0072b2"), "decode": fig.Method("decode", "#d55e00", "s")}
FORMATS = {
    "float32": fig.Method("float32", "#000000"),
    "bf16": fig.Method("bf16", "#777777", "X"),
    "int8": fig.Method("int8", "#0072b2", "s"),
    "nf4": fig.Method("nf4", "#d55e00", "^"),
}
COLUMNS = {  # of the tables: a column of `Timings.times`, its name and its decimals
    "mode": ("steps", 2),
    "layers_removed": ("layers removed", 0),
    "as_layers": ("sliced as layers", 0),
    "ratio_percent": ("parameters removed, %", 1),
    "seconds": ("seconds", 5),
    "tokens_per_s": ("tokens/s", 1),
    "tokens_per_s_low": ("quartile 1", 1),
    "tokens_per_s_high": ("quartile 3", 1),
    "limit_share": ("reached, %", 0),
    "speedup": ("speed-up", 2),
    "limit_speedup": ("by the limits", 2),
    "speedup_share": ("of the limits' ratio, %", 1),
    "whole_seconds": ("end to end, s", 2),
    "peak": ("peak, GiB", 2),
}


@dataclass(frozen=True)
class Timings:
    """The speed runs of a chapter, those of a GPU first.

    rows: all rows. times: one line per model, mode, setting, phase, method and size; a column per metric, with its quartiles as
    `<metric>_low` and `<metric>_high`. shown: of these, per model and phase, the mode and setting that the figures show.
    """

    rows: pd.DataFrame
    times: pd.DataFrame
    shown: pd.DataFrame

    @property
    def titles(self) -> dict[str, str]:
        devices = self.rows.groupby("model", sort=False)["device"].first()
        return {name: f"{name} ({'GPU' if device.startswith('cuda') else 'processor'})" for name, device in devices.items()}


def timings(chapter: Chapter) -> Timings:
    """The tables of a chapter as `Timings`: the fastest steps of every model, in SimDiff's setting; of prefill the longest."""
    tables = [chapter.table(name) for name in ("gpu", "speed") if chapter[name] is not None]
    rows = pd.concat([pick(table, experiment="speed") for table in tables], ignore_index=True)
    rows["as_layers"] = rows["as_layers"].fillna(rows["layers_removed"])
    keys = ["model", "mode", "setting", "phase", "method", "as_layers"]
    sizes = ["batch", "prompt", "new_tokens", "layers_removed", "run", "code"]
    timed = pick(rows, role="speed")
    wide = timed.set_index([*keys, "metric"])[["value", "low", "high"]].unstack("metric")
    wide.columns = [metric if end == "value" else f"{metric}_{end}" for end, metric in wide.columns]
    times = timed.drop_duplicates(keys)[[*keys, *sizes]].merge(wide.reset_index(), on=keys).dropna(subset="seconds")

    parts = []
    for _, found in times.groupby("model", sort=False):
        longest = found.loc[(found["batch"] * found["prompt"]).where(found["phase"] == "prefill").idxmax()]
        parts.append(pick(found, phase="prefill", mode=longest["mode"], setting=longest["setting"]))
        decoded = pick(found, phase="decode", may_be_empty=True)
        for mode in [mode for mode in ("compiled", "graph", "plain") if mode in set(decoded["mode"])][:1]:
            settings = list(pick(decoded, mode=mode)["setting"])
            setting = TABLE4 if TABLE4 in settings else settings[0]
            parts.append(pick(found, phase=("decode", "generation"), mode=mode, setting=setting))
    return Timings(rows, times, pd.concat(parts))


def _table4_published() -> pd.DataFrame:
    """SimDiff's Table 4: tokens per second of an A40 at every number of removed layers, and the speed-up over dense."""
    table = published("simdiff", "table4")
    table = table.pivot_table(index=["layers_removed", "ratio_percent"], columns="metric", values="value").reset_index()
    speedup = table["tokens_per_s"] / table["tokens_per_s"].iloc[0]
    return table.assign(model="Llama-3.1-8B, A40 (published)", mode="not said", speedup=speedup)


def _table(data: pd.DataFrame, rows: pd.DataFrame, columns: Sequence[str], **options: object) -> Drawing:
    """These columns under their names in `COLUMNS`; those that no row has are left out."""
    names = {column: COLUMNS[column][0] for column in columns if column in COLUMNS}
    data = data.reindex(columns=list(columns)).dropna(axis=1, how="all").rename(columns=names)
    data = data.astype({"layers removed": "Int64"})
    return Drawing(None, data, rows, markdown(data, digits=dict(COLUMNS.values())), **options)


@figure("simdiff_table4_throughput", reads=SPEED)
def table4_throughput(chapter: Chapter) -> Drawing:
    """SimDiff's Table 4, published and ours: tokens per second, and the speed-up beside the ratio of the limits."""
    found, keys = timings(chapter), ["model", "layers_removed"]
    gone = pick(found.rows, role="variant", metric="removed", method="layers").groupby(keys)["value"].first()
    ours = pick(found.shown, phase="generation", method="layers").join(100 * gone.rename("ratio_percent"), on=keys)
    ours = ours.sort_values(keys, key=lambda one: one.map(list(found.titles).index) if one.name == "model" else one)
    ours["limit_share"] *= 100
    both = pd.concat([_table4_published(), ours.replace({"model": found.titles})])
    columns = ["model", "mode", "layers_removed", "ratio_percent", "tokens_per_s", "tokens_per_s_low", "tokens_per_s_high"]
    return _table(both, ours, [*columns, "speedup", "limit_speedup", "limit_share"], published=[PUBLISHED])


@figure("own_speed_by_layers", reads=SPEED)
def speed_by_layers(chapter: Chapter) -> Drawing:
    """Speed-up of a prefill and of a decode step by layers removed, beside the ratio of their limits and an A40's numbers."""
    found = timings(chapter)
    names = {"speedup": "value", "speedup_low": "low", "speedup_high": "high", "limit_speedup": "limit"}
    rows = pick(found.shown, method="layers", phase=list(PHASES)).rename(columns=names)
    paper = _table4_published().rename(columns=names).assign(phase="A40", model="llama-3.1-8b")
    keep = ["model", "phase", "mode", "setting", "layers_removed", *names.values()]
    data = pd.concat([rows[keep], paper.loc[paper["model"].isin(rows["model"]), paper.columns.intersection(keep)]])
    looks = PHASES | {"A40": fig.Method("A40, generation (published)", "#777777", "s", "--", hollow=True)}
    limits = {phase: replace(look, title=f"{phase}, limit", line=":", marker="") for phase, look in PHASES.items()}
    grid = fig.Panels(data, "model", titles=found.titles, height=3.3, sharey=True)
    for axes, part in grid:
        fig.lines(axes, part, looks, series="phase", linewidth=1)
        fig.lines(axes, part.dropna(subset="limit").drop(columns=["low", "high"]), limits, y="limit", series="phase")
    linear = pick(found.rows, role="fit", fitted="seconds", metric="r2")["value"]
    share = rows.loc[rows["layers_removed"] > 0, "value"] / rows["limit"]
    text = (
        f"Time is linear in the number of layers (R² of a line {linear.min():.3f} or more in all settings). "
        f"The speed-ups are {share.min():.0%} to {share.max():.0%} of what the limits give."
    )
    note = "error bars: quartiles of rounds with all models in turn; limit: the speed-up of the limits"
    title = f"Speed-ups are {share.min():.0%} to {share.max():.0%} of what the limits give"
    return grid.done(rows, x="layers removed", y=["speed-up"], note=note, text=text, title=title, published=[PUBLISHED])


@figure("own_table_speed_limits", reads=SPEED)
def table_speed_limits(chapter: Chapter) -> Drawing:
    """Every setting beside its limit, dense, with the most layers removed, and sliced; `end to end`: timed as a whole."""
    found = timings(chapter)
    most = found.times.groupby(["model", "mode", "setting", "phase"])["layers_removed"].transform("max")
    rows = found.times[found.times["layers_removed"].isin((0, np.nan)) | (found.times["layers_removed"] == most)]
    shares = {share: 100 * rows[share] for share in ("limit_share", "speedup_share")}
    peak = rows["peak_bytes"] / 2**30 if "peak_bytes" in rows else np.nan  # counted on a GPU
    data = rows.assign(model=rows["model"].map(found.titles), **shares, peak=peak)
    data["as_layers"] = data["as_layers"].where(data["method"] == "sliced")
    columns = ["model", "mode", "setting", "phase", "layers_removed", "as_layers", "seconds", "tokens_per_s", "limit_share"]
    return _table(data, rows, [*columns, "speedup", "limit_speedup", "speedup_share", "whole_seconds", "peak"])


@figure("own_prune_and_quantize", reads=COMBINING)
def prune_and_quantize(chapter: Chapter) -> Drawing:
    """What pruning and quantizing together cost beyond the sum of their costs, and the loss against the bytes that are left."""
    table, keys = chapter.table("combining"), ["model", "format", "method", "size"]
    gap, formats = pick(table, role="cost", metric="interaction"), pick(table, role="format")
    wide = formats.pivot_table(index=keys, columns="metric", values="value", sort=False).reset_index()
    frontier = wide.assign(x=wide["bytes"] / 2**20, value=wide["nll"], what="weights, MiB")
    data = pd.concat([gap.assign(what="layers removed", x=gap["size"]), frontier])
    grid = fig.Panels(data, "what", "model", titles=["cost beyond the sum (0: costs add up)", "loss of every size and format"])
    for axes, part in grid:
        if "layers removed" in set(part["what"]):
            fig.lines(axes, part, FORMATS, x="x", series="format", dodge=0.15, linestyle="none")
            axes.axhline(0, color="#333333", linewidth=1.0)
            continue
        fig.lines(axes, part, FORMATS, x="x", series="format")
        fig.log_scale(axes, "x")
        axes.set_ylabel("nats per token")
    less, more = (gap["high"] < 0).sum(), (gap["low"] > 0).sum()
    text = (
        f"In {len(gap) - less - more} of {len(gap)} combinations the interval of the interaction holds 0; in {less} both "
        f"together cost less than the sum, in {more} more. The largest interaction is {gap['value'].abs().max():.3f} nats.\n\n"
    )
    text += _drafts(table)
    labels = {"x": grid.columns, "y": [f"{name}\nnats" for name in grid.rows], "text": text}
    labels["title"] = f"Costs of pruning and quantizing add up in {len(gap) - less - more} of {len(gap)} combinations"
    note = "error bars: 95 % bootstrap interval over windows; along a line more and more layers are removed"
    return grid.done(pd.concat([gap, formats]), **labels, note=note, keep=[*keys, "what", "x", "value", "low", "high", "n"])


def _drafts(table: pd.DataFrame) -> str:
    """In Markdown: whether pruned models pay as drafts that propose tokens to the dense model."""
    rows = pick(table, role=("draft", "decoding"), may_be_empty=True)
    if set(rows["role"]) != {"draft", "decoding"}:
        return ""
    names = {"acceptance_greedy": "accepted", "draft_over_dense": "time of a step", "speedup": "speed of decoding, at most"}
    wide = rows.pivot_table(index=["model", "method", "size", "recipe"], columns="metric", values="value", aggfunc="max")
    same = pick(rows, metric=("same_text", "same_text_assisted"))["value"]
    told = "Pruned drafts beside the dense model alone; one can only pay where more is accepted than its step takes. The text "
    told += f"was the dense model's in {(same == 1).sum()} of {len(same)} comparisons, transformers' generation among them."
    return f"{told}\n\n{markdown(wide[list(names)].rename(columns=names).reset_index())}"


def devices(chapter: Chapter) -> str:
    """Markdown: one line per model, with the bandwidth and the rate of a matrix product that its device reached."""
    rows = pick((found := timings(chapter)).rows, role="ceiling")
    rates = rows.pivot_table(index="model", columns="load", values="value", aggfunc="max", sort=False).rename(found.titles)
    table = {"GB/s, measured": rates[["read", "copy"]].max(axis=1) / 1e9, "TFLOP/s, measured": rates["matmul"] / 1e12}
    missing = "\n\n**No measurement on a GPU is here** (`make gpu` makes them): small models on a processor only."
    return markdown(pd.DataFrame(table).reset_index()) + missing * (not rates.index.str.contains("GPU").any())
