"""Claims of SimDiff (arXiv 2604.19520), measured."""

from functools import partial

import numpy as np
import pandas as pd

from prunelib.claims.judge import PUBLISHED, Measured, Tables, between, claim, measure, only, paired, percent, pick, value_of
from prunelib.lab.runs import published

SIMDIFF = ["simdiff_mssd", "simdiff_masd"]
SEVEN_TASKS = ["piqa", "hellaswag", "winogrande", "arc_easy", "arc_challenge", "openbookqa", "mathqa"]  # Table 3 without BoolQ
NINE_TASKS = ["cmnli", "hellaswag", "piqa", "coqa", "boolq", "race_middle", "race_high", "xsum", "c3"]  # Table 1 without WSC


def printed(table: pd.DataFrame, **where: object) -> float:
    """The only published value of SimDiff that fits."""
    return only(pick(table, paper="simdiff", **where))


def printed_gap(table: pd.DataFrame, method: str, other: str, *on: str, log: bool = False, **where: object) -> pd.DataFrame:
    """Differences between two methods in a published table, of the logarithms if asked."""
    rows = pick(table, paper="simdiff", **where).drop(columns="model")
    rows = rows.assign(value=np.log(rows["value"])) if log else rows
    return paired(pick(rows, method=method), pick(rows, method=other), on)


def best_alpha(table: pd.DataFrame, item: str) -> float:
    """The alpha of the greatest accuracy at K = 8 in a published heat map."""
    rows = pick(table, paper="simdiff", item=item, layers_removed=8)
    return float(rows.loc[rows["value"] == rows["value"].max(), "alpha"].mean())  # the middle of a plateau


def choices(t: Tables, fair: bool = False, **where: object) -> pd.DataFrame:
    """Chosen sets of layers in the paper's protocol (one kind of text for all), or with every text different (`fair`)."""
    calibration, alpha = (t.fair_calibration, t.fair_alpha_text) if fair else (t.calibration, t.alpha_text)
    where = {"run_part": "simdiff", "role": "choice", "calibration": calibration, "alpha_corpus": alpha} | where
    return pick(t.selection, **where)


@claim(
    "simdiff-01",
    lambda p: (
        printed(p, item="fig5a", method="shortgpt", layers_removed=12)
        / printed(p, item="table2", method="dense", metric="ppl", model="Mistral-7B-v0.3")
    ),
)
def cosine_explodes(t: Tables) -> list[Measured]:
    cosine = choices(t, metric="ppl", method="block_influence", layers_removed=12, alpha_corpus=None)
    dense = choices(t, metric="ppl", method="dense", calibration=None, alpha_corpus=None)
    return measure(paired(cosine, dense, ["calibration_seed"], how="/"), "median", draws="calibration_seed")


def over_cosine(t: Tables, method: str, fair: bool = False) -> list[Measured]:
    """Loss over that of the cosine rule, alpha by ternary search, mean over K."""
    rows = choices(t, fair, metric="nll_over_cosine", method=method, search="ternary", layers_removed=between(1))
    return measure(rows, "mean", draws="calibration_seed")


for method, number in (("simdiff_mssd", "02"), ("simdiff_masd", "03")):
    claim(
        f"simdiff-{number}",
        lambda p, method=method: value_of(
            printed_gap(p, method, "shortgpt", "layers_removed", log=True, item="fig5b", metric="ppl"), "mean"
        ),
    )(partial(over_cosine, method=method))

claim("simdiff-04")(partial(over_cosine, method="simdiff_mssd", fair=True))
claim("simdiff-05")(partial(over_cosine, method="simdiff_masd", fair=True))


@claim("simdiff-06", lambda p: only(printed_gap(p, *SIMDIFF[::-1], log=True, item="fig5a", metric="ppl", layers_removed=12)))
def masd_below_mssd(t: Tables) -> list[Measured]:
    rows = choices(t, metric="nll", search="ternary", layers_removed=12)
    gap = paired(pick(rows, method="simdiff_masd"), pick(rows, method="simdiff_mssd"), ["calibration_seed"])
    return measure(gap, "mean", draws="calibration_seed")


def exact_alpha(t: Tables, method: str) -> list[Measured]:
    """The exact best alpha, median over K from 8 on."""
    rows = choices(t, metric="nll", method=method, search="exact", layers_removed=between(8))
    return measure(rows.rename(columns={"value": "nll", "alpha": "value"}), "median", draws="calibration_seed")


claim("simdiff-07", lambda p: best_alpha(p, "fig4a"))(partial(exact_alpha, method="simdiff_mssd"))
claim("simdiff-08", lambda p: best_alpha(p, "fig4b"))(partial(exact_alpha, method="simdiff_masd"))


def printed_collapse(table: pd.DataFrame) -> float:
    """Accuracy at alpha = 1 minus that at 0.8, mean over K."""
    rows = pick(table, paper="simdiff", item="fig4a")
    return value_of(paired(pick(rows, alpha=1.0), pick(rows, alpha=0.8), ["layers_removed"]), "mean")


@claim("simdiff-09", printed_collapse)
def difference_alone_collapses(t: Tables) -> list[Measured]:
    shared = {"metric": "accuracy", "method": SIMDIFF, "layers_removed": between(8)}
    alone = choices(t, role="path", alpha_high=1.0, alpha_corpus=None, **shared)
    best = choices(t, search="exact", **shared)
    gap = paired(alone, best, ["method", "layers_removed", "calibration_seed"])
    return measure(percent(gap.drop(columns=["low", "high"], errors="ignore")), "mean", draws="calibration_seed")


@claim("simdiff-10")
def ternary_search_finds_it(t: Tables) -> list[Measured]:
    where = {"metric": "nll", "method": SIMDIFF, "layers_removed": between(1)}
    rows = pick(t.selection, run_part="simdiff", role="choice", **where)
    on = ["method", "layers_removed", "calibration", "calibration_seed", "alpha_corpus"]
    missed = paired(pick(rows, search="ternary"), pick(rows, search="exact"), on, column="alpha_nll")
    return measure(missed, lambda rows: 100 * float((rows["value"] > 0).mean()), interval="bootstrap")


def answers_over_cosine(t: Tables, method: str) -> list[Measured]:
    """Mean accuracy over that of the cosine rule, in points, with 8 layers gone."""
    rows = pick(t.tasks, run_part="tables", metric="over_cosine", task="all", method=method, size=8)
    return measure(percent(rows), interval="row")


for method, number in (("simdiff_mssd", "11"), ("simdiff_masd", "12")):
    claim(
        f"simdiff-{number}",
        lambda p, method=method: only(printed_gap(p, method, "shortgpt", item="table3", metric="avg_acc", layers_removed=8)),
    )(partial(answers_over_cosine, method=method))


def printed_means(item: str, other: str, tasks: list[str], **where: object) -> list[Measured]:
    """MSSD over another method in a printed table, mean over the given tasks."""
    return measure(printed_gap(published("simdiff"), "simdiff_mssd", other, "task", item=item, task=tasks, **where), "mean")


@claim(
    "simdiff-13",
    lambda p: only(printed_gap(p, "simdiff_mssd", "entrodrop", item="table3", metric="avg_acc", layers_removed=10)),
)
def best_mean_without_boolq(t: Tables) -> list[Measured]:
    return printed_means("table3", "entrodrop", SEVEN_TASKS, metric="acc", layers_removed=10)


def mssd_over(t: Tables, other: str) -> list[Measured]:
    """Loss of MSSD over that of another rule, 8 layers gone, on the same small budget."""
    rows = pick(t.selection, run_part="rules", metric="nll", role="choice", layers_removed=8)
    gap = paired(pick(rows, method="simdiff_mssd"), pick(rows, method=other), ["calibration_seed"])
    return measure(gap, "mean", draws="calibration_seed")


claim("simdiff-14")(partial(mssd_over, other="entropy_gain_attention"))
claim("simdiff-15", lambda p: only(printed_gap(p, "simdiff", "sleb", log=True, item="table2", metric="ppl")))(
    partial(mssd_over, other="greedy")
)


@claim("simdiff-17", lambda p: only(printed_gap(p, "simdiff_mssd", "shortgpt", item="table1", metric="avg_acc")))
def best_mean_without_wsc(t: Tables) -> list[Measured]:
    return printed_means("table1", "shortgpt", NINE_TASKS, metric=["acc", "score"])


PUBLISHED["simdiff-16"] = partial(printed, item="table1", method="simdiff_mssd", metric="retained_percent")


@claim("simdiff-18", partial(printed, item="tableA7", method="simdiff_mssd", healed="lora", metric="retained_percent"))
def retained_after_lora(t: Tables) -> list[Measured]:
    rows = pick(published("simdiff"), metric="avg_acc").drop(columns="model")
    healed = pick(rows, item="tableA7", method="simdiff_mssd", healed="lora")
    return measure(percent(paired(healed, pick(rows, item="table3", method="dense"), how="/")))


def printed_healing(table: pd.DataFrame) -> float:
    """Points that LoRA brings back, mean of both variants."""
    rows = pick(table, paper="simdiff", item="tableA7", metric="avg_acc", method=SIMDIFF)
    return value_of(paired(pick(rows, healed="lora"), pick(rows, healed="none"), ["method"]), "mean")


@claim("simdiff-19", printed_healing)
def lora_brings_accuracy_back(t: Tables) -> list[Measured]:
    rows = pick(t.healing, run_part="choices", metric="average", task="all", method=SIMDIFF)
    gap = paired(pick(rows, recipe="lora"), pick(rows, recipe="none"), ["method"])
    return measure(percent(gap), "mean")


@claim("simdiff-20", partial(printed, item="table4", layers_removed=12, metric="speedup"))
def faster_without_12_layers(t: Tables) -> list[Measured]:
    rows = pick(t.gpu, role="speed", phase="generation", setting="16x4x2048", mode="graph", layers_removed=12)
    return measure(pick(rows, metric="speedup"), interval="row_quartiles")


@claim("simdiff-21", partial(printed, item="table4", layers_removed=4, metric="speedup"))
def faster_without_4_layers(t: Tables) -> list[Measured]:
    rates = pick(published("simdiff"), item="table4", metric="tokens_per_s").drop(columns="model")
    return measure(paired(pick(rates, layers_removed=4), pick(rates, layers_removed=0), how="/"))


PUBLISHED["simdiff-22"] = partial(printed, item="text", model="Qwen2.5-3B")


def perplexity_on_wikitext(t: Tables, model: str, method: str) -> list[Measured]:
    """Perplexity of a model without 8 layers, scores and alpha on WikiText-2 as in the paper."""
    where = {"run_part": "simdiff", "role": "choice", "metric": "ppl", "layers_removed": 8, "model": model, "method": method}
    where |= {"calibration": "wikitext2", "corpus": "wikitext2"}
    if method in SIMDIFF:
        where |= {"alpha_corpus": "wikitext2", "search": "ternary"}
    return measure(pick(t.selection, **where), "median", draws="calibration_seed")


for number, model, method, where in (
    ("23", "Qwen2.5-0.5B", "simdiff_mssd", {"item": "table5", "model": "Qwen2.5-0.5B", "method": ["simdiff", "simdiff_mssd"]}),
    ("24", "Llama-3.1-8B", "simdiff_mssd", {"item": "fig5b", "method": "simdiff_mssd"}),
    ("25", "Mistral-7B-v0.3", "simdiff_masd", {"item": "fig5a", "method": "simdiff_masd"}),
    ("26", "Llama-3.1-8B", "block_influence", {"item": "fig5b", "method": "shortgpt"}),
):
    claim(f"simdiff-{number}", partial(printed, layers_removed=8, metric="ppl", **where))(
        partial(perplexity_on_wikitext, model=model, method=method)
    )
