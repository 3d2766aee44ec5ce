"""Chapter 07: how much time and memory do removed layers save, beside what the device allows?

A limit is the larger of bytes over bandwidth and FLOPs over the rate of a matrix product, both measured in the same run.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import PercentFormatter

from prunelib.figures.save import Chapter, Drawing, figure, markdown, pick
from prunelib.figures.style import Method, Sketch, curve, log_scale, whole_numbers
from prunelib.lab.runs import PUBLISHED, published

CHAPTER = "07_speed_and_memory"
SPEED, COMBINING = {"speed": None}, {"combining": None}
TABLE4 = "16x4x2048"  # SimDiff's setting: batch 16, prompts of 4 tokens, 2,048 new ones
PHASES = {"prefill": Method("prefill", "prefill", "#0072b2", "o"), "decode": Method("decode", "decode", "#d55e00", "s")}
KINDS = {"layers": ("whole layers", "#332288", -0.2), "sliced": ("sliced", "#cc3311", 0.2)}
FORMATS = {
    name: Method(name, name, color, marker)
    for name, color, marker in (
        ("float32", "#000000", "o"),
        ("bf16", "#777777", "X"),
        ("int8", "#0072b2", "s"),
        ("nf4", "#d55e00", "^"),
    )
}
COLORS, MARKERS = ("#d55e00", "#0072b2", "#009e73", "#cc79a7"), "os^D"
COLUMNS = {  # of the tables: a column of `Timings.times`, its name and its decimals
    "mode": ("steps", 2),
    "layers_removed": ("layers removed", 0),
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
    def models(self) -> list[str]:
        return list(self.rows["name"].unique())

    def title(self, name: str) -> str:
        device = pick(self.rows, name=name)["device"].iloc[0]
        return f"{name} ({'GPU' if device.startswith('cuda') else 'processor'})"

    def sketch(self, names: Sequence[str], parts: int = 1, **options: object) -> Sketch:
        """A figure with one column per model."""
        return Sketch(names, parts, titles=[self.title(name) for name in names], **options)


def timings(chapter: Chapter) -> Timings:
    """The tables of a chapter as `Timings`: the fastest steps of every model, in SimDiff's setting; of prefill the longest."""
    tables = [chapter.table(name) for name in ("gpu", "speed") if chapter[name] is not None]
    rows = pd.concat([pick(table, experiment="speed") for table in tables], ignore_index=True)
    rows["model"], rows["as_layers"] = rows["name"], rows["as_layers"].fillna(rows["layers_removed"])
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


def table4_published() -> pd.DataFrame:
    """SimDiff's Table 4: tokens per second of an A40 at every number of removed layers, and the speed-up over dense."""
    table = published("simdiff", "table4")
    table = table.pivot_table(index=["layers_removed", "ratio_percent"], columns="metric", values="value").reset_index()
    speedup = table["tokens_per_s"] / table["tokens_per_s"].iloc[0]
    return table.assign(model="Llama-3.1-8B, A40 (published)", mode="not said", speedup=speedup)


def _table(data: pd.DataFrame, rows: pd.DataFrame, columns: Sequence[str], **options: object) -> Drawing:
    """These columns under their names in `COLUMNS`; those that no row has are left out."""
    names = {column: COLUMNS[column][0] for column in columns if column in COLUMNS}
    data = data.reindex(columns=list(columns)).dropna(axis=1, how="all").rename(columns=names)
    data = data.astype({"layers removed": int})
    return Drawing(None, data, rows, markdown(data, digits=dict(COLUMNS.values())), **options)


@figure("simdiff_table4_throughput", reads=SPEED)
def table4_throughput(chapter: Chapter) -> Drawing:
    """SimDiff's Table 4, published and ours: tokens per second, and the speed-up beside the ratio of the limits."""
    found, keys = timings(chapter), ["model", "layers_removed"]
    gone = pick(found.rows, role="variant", metric="removed", method="layers").groupby(keys)["value"].first()
    ours = pick(found.shown, phase="generation", method="layers").join(100 * gone.rename("ratio_percent"), on=keys)
    ours = ours.sort_values(keys, key=lambda one: one.map(found.models.index) if one.name == "model" else one, kind="stable")
    ours["limit_share"] *= 100
    both = pd.concat([table4_published(), ours.assign(model=ours["model"].map(found.title))])
    columns = ["model", "mode", "layers_removed", "ratio_percent", "tokens_per_s", "tokens_per_s_low", "tokens_per_s_high"]
    return _table(both, ours, [*columns, "speedup", "limit_speedup", "limit_share"], published=[PUBLISHED])


def _measured(ax: Axes, part: pd.DataFrame, metric: str, scale: float | int = 1.0, **style: object) -> None:
    """A metric of one phase over the layers removed, with its quartiles."""
    line = part.assign(value=scale * part[metric], low=scale * part[f"{metric}_low"], high=scale * part[f"{metric}_high"])
    phase = part["phase"].iloc[0]
    curve(ax, line, PHASES[phase], label=f"{phase}, measured", **style)
    whole_numbers(ax, part["layers_removed"].astype(int))


@figure("own_latency_by_layers", reads=SPEED)
def latency_by_layers(chapter: Chapter) -> Drawing:
    """Time of a prefill and of a decode step against the number of layers removed, with a line through it and the limit."""
    found = timings(chapter)
    keys = ["model", "phase", "mode", "setting"]
    lines = pick(found.rows, role="fit", fitted="seconds").set_index([*keys, "metric"])["value"].unstack().add_prefix("fit_")
    data = pick(found.shown, method="layers", phase=list(PHASES)).merge(lines.reset_index(), how="left", on=keys)
    sketch = found.sketch(found.models, 2, height=2.3, sharex="col")
    for (name, phase), part in data.groupby(["model", "phase"]):
        ax = sketch.grid[list(PHASES).index(phase), found.models.index(name)]
        first, removed = part.iloc[0], part["layers_removed"]
        _measured(ax, part, "seconds", 1000, linestyle="")
        ax.plot(removed, 1000 * part["limit_seconds"], "--", color="#777777", label="limit")
        note = first["setting"]
        if pd.notna(first["fit_slope"]):
            fitted = 1000 * (first["fit_intercept"] + first["fit_slope"] * removed)
            ax.plot(removed, fitted, color=PHASES[phase].color, linewidth=1, label=f"{phase}, line")
            note += f"\n{-1000 * first['fit_slope']:.3g} ms per layer"
        ax.text(0.97, 0.95, note, transform=ax.transAxes, ha="right", va="top", fontsize=8)
        ax.set_ylim(0, 1250 * part[["seconds", "limit_seconds"]].max().max())
    sketch.keep(data[[*keys, "layers_removed", "seconds", "seconds_low", "seconds_high", "limit_seconds", *lines.columns]])
    text = data.drop_duplicates(["model", "phase"])[["model", "phase", "setting", *lines.columns]]
    text = markdown(text, digits={"fit_slope": 7, "fit_intercept": 5, "fit_r2": 5})
    note = "in a panel: batch × prompt × new tokens; error bars: quartiles of rounds with all models in turn"
    return sketch.done(data, x="layers removed", y=("ms per prefill", "ms per step"), note=note, text=text)


@figure("own_speedup", reads=SPEED)
def speedup(chapter: Chapter) -> Drawing:
    """Speed-up over the dense model, the ratio of the limits, and the published numbers of an A40."""
    found, paper = timings(chapter), table4_published().assign(phase="generation")
    rows = pick(found.shown, method="layers", phase=list(PHASES))
    columns = ["model", "phase", "layers_removed", "speedup", "speedup_low", "speedup_high", "limit_speedup"]
    sketch = found.sketch(found.models, height=3.0, sharey=True)
    sketch.keep(rows[columns])
    for (ax,), name in sketch:
        ax.axhline(1, color="black", linewidth=0.8)
        for phase, part in pick(rows, model=name).groupby("phase", sort=False):
            _measured(ax, part, "speedup", linewidth=1)
            style = {"color": PHASES[phase].color, "label": f"{phase}, by the limits"}
            ax.plot(part["layers_removed"], part["limit_speedup"], ":", **style)
        if name == "llama-3.1-8b":
            sketch.keep(paper.reindex(columns=columns))
            style = {"marker": "s", "markerfacecolor": "white", "color": "#777777", "label": "A40, generation (published)"}
            ax.plot(paper["layers_removed"].astype(int), paper["speedup"], "--", **style)
    note = "error bars: quartiles of the ratio within a round"
    return sketch.done(rows, x="layers removed", y="speed-up over dense", note=note, published=[PUBLISHED])


@figure("own_step_by_cache", reads=SPEED)
def step_by_cache(chapter: Chapter) -> Drawing:
    """Time of a decode step against the tokens in the cache, of models that were timed at three lengths or more."""
    found = timings(chapter)
    decoded = pick(found.shown, phase="decode", method="layers").drop_duplicates("model")[["model", "mode", "setting"]]
    rows = pick(found.rows, role="segment", metric="seconds", method="layers").merge(decoded)
    lengths = rows.groupby("model")["cache_length"].transform("nunique")
    rows = rows[lengths >= min(3, lengths.max())].rename(columns={"value": "seconds"})
    sketch = found.sketch(list(rows["model"].unique()), height=2.8)
    for (ax,), name in sketch:
        lines = pick(rows, model=name).groupby("layers_removed")
        for (size, line), gray in zip(lines, np.linspace(0, 0.6, len(lines)), strict=True):
            ax.plot(line["cache_length"], 1000 * line["seconds"], "o-", markersize=3.5, color=str(gray))
            end = (line["cache_length"].iloc[-1], 1000 * line["seconds"].iloc[-1])
            ax.annotate(f"{size:.0f} removed", end, xytext=(6, -3), textcoords="offset points", fontsize=8)
        ax.set_ylim(bottom=0)
        ax.margins(x=0.12)
    sketch.keep(rows[["model", "layers_removed", "cache_length", "seconds", "low", "high"]])
    return sketch.done(rows, x="tokens in the cache", y="ms per step", below="lines: number of layers removed")


@figure("own_memory_by_layers", reads=SPEED)
def memory_by_layers(chapter: Chapter) -> Drawing:
    """Peak memory of a generation and the bytes of the parameters, of models on a device that counts its memory."""
    found = timings(chapter)
    counted = pick(found.rows, role="variant", metric="parameter_bytes", method="layers")
    counted = counted.drop_duplicates(["model", "layers_removed"]).assign(what="parameters")
    prefilled = pick(found.shown, phase="prefill")[["model", "mode"]].drop_duplicates()
    peaks = pick(found.rows, role="speed", metric="peak_bytes", method="layers", may_be_empty=True).merge(prefilled)
    if len(peaks):
        counted = pick(counted, model=set(peaks["model"]))
    data = pd.concat([counted, peaks.assign(what="peak, " + peaks["setting"])]).rename(columns={"value": "bytes"})
    sketch = found.sketch(list(data["model"].unique()), height=2.8)
    for (ax,), name in sketch:
        here = pick(data, model=name)
        for color, (what, line) in zip(("#777777", *COLORS), here.groupby("what", sort=False), strict=False):
            style = {"linestyle": "--"} if what == "parameters" else {"marker": "o"}
            line = line.sort_values("layers_removed")
            ax.plot(line["layers_removed"], line["bytes"] / 2**30, color=color, label=what, **style)
        ax.set_ylim(0, 1.1 * here["bytes"].max() / 2**30)
        whole_numbers(ax, here["layers_removed"].astype(int))
    sketch.keep(data[["model", "what", "layers_removed", "bytes"]])
    return sketch.done(data, x="layers removed", y="GiB", note="batch × prompt × new tokens; parameters are counted")


@figure("own_depth_or_slicing", reads=SPEED)
def depth_or_slicing(chapter: Chapter) -> Drawing:
    """Speed-up of whole layers removed, and of a constant slice that removes as many parameters."""
    found = timings(chapter)
    # A generation is decode in all but name, and a prompt of four tokens no prefill.
    prefill = (found.times["phase"] == "prefill") & (found.times["new_tokens"] == 0)
    times = found.times[prefill | (found.times["phase"] == "decode")]
    keys = ["model", "setting", "phase", "mode", "as_layers"]
    data = times.merge(pick(times, method="sliced")[keys].drop_duplicates())
    widths = [max(2, len(pick(data, model=name)) // 2) for name in found.models]
    titles = [f"{name}: as {pick(data, model=name)['as_layers'].iloc[0]:.0f} layers" for name in found.models]
    sketch = Sketch(found.models, titles=titles, height=2.8, sharey=True, width_ratios=widths)
    for (ax,), name in sketch:
        pairs = pick(data, model=name).groupby(keys, sort=False)
        for place, (_, pair) in enumerate(pairs):
            for row in pair.itertuples():
                title, color, shift = KINDS[row.method]
                error = [[row.speedup - row.speedup_low], [row.speedup_high - row.speedup]]
                ax.bar(place + shift, row.speedup, 0.36, yerr=error, color=color, label=title)
                ends = (place + shift - 0.18, place + shift + 0.18)
                ax.hlines(row.limit_speedup, *ends, color="black", linewidth=1.6, label="by the limits")
        ax.axhline(1, color="black", linewidth=0.8)
        ax.set_xticks(range(len(pairs)), [f"{phase}\n{setting}" for _, setting, phase, *_ in pairs.groups], fontsize=7.5)
        ax.grid(visible=False, axis="x")
    sketch.keep(data[["model", "setting", "phase", "mode", "method", "as_layers", "speedup", "limit_speedup"]])
    return sketch.done(data, y="speed-up over dense")


@figure("own_table_speed_limits", reads=SPEED)
def table_speed_limits(chapter: Chapter) -> Drawing:
    """Every setting beside its limit, dense and with the most layers removed; `end to end`: a generation timed as a whole."""
    found = timings(chapter)
    rows = pick(found.times, method="layers")
    most = rows.groupby(["model", "mode", "setting", "phase"])["layers_removed"].transform("max")
    rows = rows[(rows["layers_removed"] == 0) | (rows["layers_removed"] == most)]
    shares = {share: 100 * rows[share] for share in ("limit_share", "speedup_share")}
    data = rows.assign(model=rows["model"].map(found.title), **shares)
    columns = ["model", "mode", "setting", "phase", "layers_removed", "seconds", "tokens_per_s", "limit_share"]
    return _table(data, rows, [*columns, "speedup", "limit_speedup", "speedup_share", "whole_seconds"])


@figure("own_prune_and_quantize", reads=COMBINING)
def prune_and_quantize(chapter: Chapter) -> Drawing:
    """What pruning and quantizing together cost beyond the sum of their costs, and the loss against the bytes that are left."""
    table = chapter.table("combining")
    costs, formats = pick(table, role="cost"), pick(table, role="format")
    keys = ["name", "format", "method", "size"]
    bytes_left = pick(formats, metric="bytes").rename(columns={"value": "MiB"})
    frontier = pick(formats, metric="nll").rename(columns={"value": "nll"}).merge(bytes_left[[*keys, "MiB"]], on=keys)
    frontier["MiB"] /= 2**20
    sketch = Sketch(list(costs["name"].unique()), 2, down=True, height=3.0)
    for (left, right), name in sketch:
        gaps = pick(costs, name=name, metric="interaction")
        sizes, kinds = sorted(gaps["size"].unique()), list(gaps["format"].unique())
        gaps["place"] = gaps["size"].map(sizes.index)
        for index, kind in enumerate(kinds):
            offset = 0.12 * (index - (len(kinds) - 1) / 2)
            curve(left, pick(gaps, format=kind), FORMATS[kind], x="place", offset=offset, linestyle="none")
        left.axhline(0, color="#333333", linewidth=1.0)
        left.set_xticks(range(len(sizes)), [f"{size:g}" for size in sizes])
        left.set_xlim(-0.5, len(sizes) - 0.5)
        for kind in ("float32", *kinds):
            curve(right, pick(frontier, name=name, format=kind), FORMATS[kind], x="MiB", y="nll")
        log_scale(right, "x")
        right.set(ylabel="nats per token", title=f"{', '.join(f'{size:g}' for size in [0, *sizes])} layers removed")
    sketch.keep(costs[[*keys, "metric", "value", "low", "high", "n"]])
    sketch.keep(frontier[[*keys, "nll", "MiB"]])
    gap = pick(costs, metric="interaction")
    less, more = (gap["high"] < 0).sum(), (gap["low"] > 0).sum()
    text = (
        f"In {len(gap) - less - more} of {len(gap)} combinations the interval of the interaction holds 0; in {less} both "
        f"together cost less than the sum, in {more} more. The largest interaction is {gap['value'].abs().max():.3f} nats."
    )
    labels = {"x": ("layers removed", "weights, MiB"), "y": ["cost beyond the sum, nats"] * len(sketch.names)}
    note = "error bars: 95 % bootstrap interval over windows"
    return sketch.done(pd.concat([costs, formats]), **labels, columns=4, note=note, text=text)


@figure("own_speculative_decoding", reads=COMBINING)
def speculative_decoding(chapter: Chapter) -> Drawing:
    """Pruned models as drafts: how often the dense model accepts their tokens, and the speed of decoding with them."""
    table = chapter.table("combining")
    drafts, decoding = pick(table, role="draft"), pick(table, role="decoding")
    markers = dict(zip(drafts["name"].unique(), MARKERS, strict=False))
    colors = dict(zip(drafts["recipe"].unique(), COLORS, strict=False))
    sketch = Sketch(("acceptance", "speed"), titles=("tokens accepted", "speed of decoding, dense alone = 1"), height=3.4)
    left, right = sketch.grid[0]
    accepted = pick(drafts, metric="acceptance_greedy")
    half = 1.96 * accepted["stderr"].fillna(0)
    accepted = accepted.assign(low=accepted["value"] - half, high=accepted["value"] + half)
    for (name, recipe), line in accepted.groupby(["name", "recipe"], sort=False):
        look = Method(name, f"{name}, {'unhealed' if recipe == 'none' else recipe}", colors[recipe], markers[name])
        curve(left, line, look, x="fraction", linewidth=1.0)
    left.plot([0, 1], [1, 0], color="#333333", linestyle=":", label="cost of a step, if time goes with layers")
    left.set(xlim=(0, 0.8), ylim=(0, 1.02))
    left.yaxis.set_major_formatter(PercentFormatter(1.0))
    fast = pick(decoding, metric=("speedup", "expected_speedup"))
    for (name, recipe, count, metric), line in fast.groupby(["name", "recipe", "proposals", "metric"], sort=False):
        measured = {"marker": markers[name], "linewidth": 1.0, "linestyle": {1: "-", 4: "--"}.get(int(count), "-.")}
        style = measured if metric == "speedup" else {"marker": "_", "markersize": 9, "linestyle": "none"}
        line = line.sort_values("fraction")
        right.plot(line["fraction"], line["value"], color=colors[recipe], **style)
    right.axhline(1, color="#333333", linestyle=":")
    for label, style in (("1 proposal, measured", "-"), ("4 proposals, measured", "--"), ("expected", "_")):
        right.plot([], [], style, color="#777777", label=label)
    right.set(xlim=(0, 0.8), ylim=(0, None))
    for ax in (left, right):
        ax.xaxis.set_major_formatter(PercentFormatter(1.0))
    data = pd.concat([drafts, decoding])
    sketch.keep(data[["name", "role", "method", "size", "fraction", "recipe", "proposals", "metric", "value", "stderr", "n"]])
    note, text = "error bars: 1.96 standard errors over windows", _drafts(drafts, decoding)
    return sketch.done(data, x="fraction of layers removed", note=note, text=text)


def _drafts(drafts: pd.DataFrame, decoding: pd.DataFrame) -> str:
    """How many drafts could pay, and what was measured."""
    rows = pd.concat([drafts, decoding[decoding["proposals"].isna()]])
    table = rows.pivot_table(index=["name", "method", "size", "recipe"], columns="metric", values="value")
    pays = table["acceptance_greedy"] > table["draft_over_dense"]
    speeds = pick(decoding, metric="speedup")["value"]
    same = pick(decoding, metric=("same_text", "same_text_assisted"))["value"]
    return (
        f"{pays.sum()} of {len(pays)} drafts are accepted more often than their step costs, the condition for any gain. The "
        f"speed is {speeds.min():.2f} to {speeds.max():.2f} of the dense model's. The text was the dense model's in "
        f"{(same == 1).sum()} of {len(same)} comparisons, those with transformers' assisted generation among them."
    )


def devices(chapter: Chapter) -> str:
    """Markdown: one line per model, with the bandwidth and the rate of a matrix product that its device reached."""
    found, lines = timings(chapter), []
    for name, one in pick(found.rows, role="ceiling").groupby("model", sort=False):
        loads = one.groupby("load")["value"].max()
        bandwidth, rate = max(loads["read"], loads["copy"]) / 1e9, loads["matmul"] / 1e12
        lines.append(f"- {found.title(name)}: {bandwidth:,.0f} GB/s and {rate:,.2f} TFLOP/s measured")
    missing = "- **No measurement on a GPU is here** (`make gpu` makes them): small models on a processor only."
    return "\n".join(lines if any("GPU" in line for line in lines) else [*lines, missing])
