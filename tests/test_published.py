"""The numbers carried over from papers: complete, consistent, and their known errors are really errors."""

import math
import re
from collections import defaultdict
from pathlib import Path

import pandas as pd
import pytest

from prunelib.lab import runs as results

FOLDER = Path(__file__).resolve().parents[1] / "data" / "published"
README = (FOLDER / "README.md").read_text(encoding="utf-8")
ROW = ["paper", "item", "model", "method", "layers_removed", "ratio_percent", "healed", "alpha"]
TABLES = ("table1", "table2", "table3", "table5", "tableA7")


@pytest.fixture(scope="module")
def everything():
    return results.published()


@pytest.fixture(scope="module")
def simdiff():
    return results.published("simdiff")


def one(table, **columns) -> float:
    """The value of the only row that fits."""
    for name, value in columns.items():
        table = table[table[name] == value]
    assert len(table) == 1, columns
    return float(table["value"].iloc[0])


def by_row(table: pd.DataFrame) -> dict[tuple, dict[str, float]]:
    """Task → value of every row of a printed table, by the text of its key (some cells are missing)."""
    groups = table.groupby(ROW, dropna=False, sort=False)
    return {key: dict(zip(group["task"], group["value"], strict=True)) for key, group in groups}


def averages(table: pd.DataFrame) -> list[tuple[tuple, float, float]]:
    """Row, printed and recomputed mean, of every printed average whose tasks are all given."""
    tasks = {repr(key): row for key, row in by_row(table[table["metric"].isin(["acc", "acc_norm", "score"])]).items()}
    found = []
    for key, printed in by_row(table[(table["metric"] == "avg_acc") & table["task"].str.fullmatch(r"avg\d+")]).items():
        for name, value in printed.items():
            behind = tasks.get(repr(key), {})
            if len(behind) == int(name.removeprefix("avg")):
                found.append((key, value, sum(behind.values()) / len(behind)))
    return found


def mean_without(table: pd.DataFrame, task: str) -> pd.Series:
    """Mean of the tasks of every row but one of them, by method."""
    kept = table[table["metric"].isin(["acc", "score"]) & (table["task"] != task)]
    return kept.groupby("method")["value"].mean().round(2)


def test_rows_are_numbers_with_unique_keys(everything):
    assert everything["value"].map(math.isfinite).all()
    key = [name for name in everything if name not in ("value", "note")]
    assert not everything.duplicated(key).any()
    for name in ("paper", "item", "method", "healed", "task", "metric"):
        assert everything[name].notna().all(), name
    assert set(everything["healed"]) == {"none", "lora", "qlora", "distil", "sft", "train"}
    assert (everything.loc[everything["method"] == "dense", "layers_removed"].dropna() == 0).all()
    accuracies = everything[everything["metric"].isin(["acc", "acc_norm", "avg_acc"])]
    assert accuracies["value"].between(0, 100).all()
    assert (everything.loc[everything["metric"] == "ppl", "value"] > 1).all()


def test_readme_counts_and_names_what_is_there(everything):
    rows, papers = re.search(r"([\d,]+) numbers of (\d+) papers", README).groups()
    assert int(rows.replace(",", "")) == len(everything)
    assert int(papers) == everything["paper"].nunique()
    assert {path.name for path in FOLDER.glob("*.csv")} == set(re.findall(r"^\| `(\w+\.csv)`", README, re.MULTILINE))


def test_retention_after_healing_averages_a_perplexity_with_tasks(everything):
    rows = everything[everything["paper"] == "rearchitecting_llms"]
    printed = rows[rows["metric"] == "retained_percent"].set_index("task")["value"]
    dense, healed = (
        rows[rows["item"] == item].drop_duplicates("task").set_index("task")["value"] for item in ("whole_sets", "healing")
    )
    tasks = ["arc_easy", "hellaswag", "lambada_openai", "piqa", "winogrande"]
    assert 100 * dense["cosmopedia"] / healed["cosmopedia"] == pytest.approx(printed["cosmopedia"], abs=0.005)
    assert 100 * healed[tasks].sum() / dense[tasks].sum() == pytest.approx(printed["avg5"], abs=0.005)
    assert (printed["cosmopedia"] + printed["avg5"]) / 2 == pytest.approx(printed["all"], abs=0.005)


def test_reader_selects_and_refuses_unknown_names():
    table = results.published("simdiff", "fig4a")
    assert list(table.index) == list(range(30))
    assert table["layers_removed"].dtype == "Int64"
    with pytest.raises(results.ResultError, match=r"no paper 'simdif'; there are: simdiff, "):
        results.published("simdif")
    with pytest.raises(results.ResultError, match=r"no item 'fig9'; there are: table1, "):
        results.published("simdiff", "fig9")


def test_vectors_and_settings_are_consistent():
    vector = pd.read_csv(FOLDER / "dynamic_slicing_mistral7b_lr.csv")
    assert list(vector["layer"]) == list(range(32))
    assert vector["lr"].mean() == pytest.approx(0.795673948388219, abs=1e-12)
    assert (vector["lr"].idxmin(), vector["lr"].idxmax()) == (0, 25)
    healing = pd.read_csv(FOLDER / "deeper_layers_healing.csv")
    assert (healing["tokens"] == healing["steps"] * healing["global_batch"] * healing["seq_len"]).all()
    assert healing["model"].is_unique


def test_averages_recompute_from_their_tasks_but_one(everything):
    found = averages(everything)
    assert len(found) == 139
    assert sum(key[0] == "simdiff" and key[1] in TABLES for key, *_ in found) == 67
    # A mean of printed numbers, each within 0.005 (LLM-Streamline's within 0.05); 1e-9 for binary fractions.
    digits = {"llm_streamline": 0.05}
    wrong = [(key, mean) for key, printed, mean in found if abs(mean - printed) > digits.get(key[0], 0.005) + 1e-9]
    assert [(key[0], key[3], key[5]) for key, _ in wrong] == [("llm_pruner", "l2", 20)]
    assert wrong[0][1] == pytest.approx(42.6586, abs=1e-4)


def retained(simdiff) -> dict[tuple, tuple[float, float, float]]:
    """Printed retained percentage, the one from the rounded averages, and how much their rounding can explain."""
    found = {}
    for item in ("table1", "table2", "table3", "tableA7"):
        table = simdiff[simdiff["item"] == item]
        means = table[table["metric"] == "avg_acc"]
        # Table A.7 is about Llama-3.1-8B; its own dense row is not.
        source = simdiff[(simdiff["item"] == "table3") & (simdiff["metric"] == "avg_acc")] if item == "tableA7" else means
        for row in table[table["metric"] == "retained_percent"].itertuples():
            copied = item == "table1" and row.method in ("dense_laco", "laco", "llm_pruner", "slicegpt")
            dense = one(source, method="dense_laco" if copied else "dense")
            same = means[(means["method"] == row.method) & (means["healed"] == row.healed)]
            mean = one(same[same["layers_removed"].fillna(-1) == (-1 if pd.isna(row.layers_removed) else row.layers_removed)])
            rounding = 100 * 0.005 / dense * (1 + mean / dense) + 0.005
            found[item, row.method, row.layers_removed, row.healed] = (row.value, 100 * mean / dense, rounding)
    return found


def test_retained_percentages_are_wrong_in_table_a7_alone(simdiff):
    checked = retained(simdiff)
    assert len(checked) == 40
    off = {key: row for key, row in checked.items() if abs(row[0] - row[1]) > row[2]}
    wrong = {key: (printed, round(value, 2)) for key, (printed, value, _) in off.items()}
    assert wrong == {
        ("tableA7", "dense", 0, "none"): (100, 98.42),
        ("tableA7", "simdiff_masd", 12, "none"): (66.70, 65.65),
        ("tableA7", "simdiff_mssd", 12, "lora"): (81.10, 79.82),
        ("tableA7", "simdiff_masd", 12, "lora"): (80.54, 79.27),
    }


def test_repeated_rows_are_the_known_ones(simdiff):
    """Two rows with the same eight accuracies: the variants coincide, a table is quoted, or a row was copied by mistake."""
    eight = simdiff[(simdiff["metric"] == "acc") & simdiff["item"].isin(("table2", "table3", "table5", "tableA7"))]
    same = defaultdict(set)
    for (_, item, model, method, count, *_), tasks in by_row(eight).items():
        assert len(tasks) == 8
        same[tuple(sorted(tasks.items()))].add((item, model, method, int(count) if not pd.isna(count) else None))
    repeated = {frozenset(rows) for rows in same.values() if len(rows) > 1}
    llama, small, large = "Llama-3.1-8B", "Qwen2.5-1.5B", "Qwen2.5-3B"
    expected = [
        # Both variants choose the same layers, or Table A.7 quotes Table 3.
        *({("table3", llama, f"simdiff_{kind}", count) for kind in ("mssd", "masd")} for count in (8, 10)),
        *({(item, llama, f"simdiff_{kind}", 12) for item in ("table3", "tableA7")} for kind in ("mssd", "masd")),
        {("table5", large, method, 8) for method in ("shortgpt", "simdiff")},
    ]
    errors = [
        {("tableA7", llama, "dense", 0), ("table2", "Mistral-7B-v0.3", "dense", 0)},
        {("table5", small, "simdiff", 10), ("table5", large, "simdiff", 10), ("table5", large, "shortgpt", 10)},
        {("table5", small, "simdiff", 12), ("table5", large, "shortgpt", 12)},
    ]
    assert repeated == {*map(frozenset, expected), *map(frozenset, errors)}


def test_gain_of_qwen_3b_rests_on_a_copied_row(simdiff):
    table = simdiff[(simdiff["item"] == "table5") & (simdiff["metric"] == "avg_acc") & (simdiff["layers_removed"] == 12)]
    copied = one(table, model="Qwen2.5-3B", method="shortgpt")
    assert copied == one(table, model="Qwen2.5-1.5B", method="simdiff")
    best = table[(table["model"] == "Qwen2.5-3B") & table["method"].str.startswith("simdiff")]["value"].max()
    claim = one(simdiff, item="text", model="Qwen2.5-3B")
    assert best - copied == pytest.approx(claim, abs=1e-9)


def test_figure_4_is_constant_where_one_set_of_layers_must_hold(simdiff):
    """A set of lowest layers at two values of alpha is the one at every alpha between them, so its accuracy is too."""
    broken = []
    for item in ("fig4a", "fig4b"):
        for count, group in simdiff[simdiff["item"] == item].groupby("layers_removed"):
            line = group.sort_values("alpha")
            for value in line["value"].unique():
                at = line.index[line["value"] == value]
                between = line.loc[at[0] : at[-1]]
                broken += [(item, count, cell.alpha, cell.value) for cell in between.itertuples() if cell.value != value]
    assert broken == [("fig4a", 8, 0.5, 48.27)]
    assert one(simdiff, item="fig4b", layers_removed=8, alpha=0.5) == 48.27


def test_table_3_is_a_column_of_figure_4(simdiff):
    for method, item, alpha in (("simdiff_mssd", "fig4a", 0.8), ("simdiff_masd", "fig4b", 0.7)):
        for count in (8, 10, 12):
            mean = one(simdiff, item="table3", method=method, layers_removed=count, metric="avg_acc")
            assert mean == one(simdiff, item=item, layers_removed=count, alpha=alpha)


def test_order_of_table_1_hangs_on_wsc(simdiff):
    table = simdiff[simdiff["item"] == "table1"]
    means = mean_without(table, "wsc")
    assert (means["shortgpt"], means["simdiff_masd"], means["simdiff_mssd"]) == (44.03, 43.52, 42.97)
    with_wsc = table[table["metric"] == "avg_acc"].set_index("method")["value"]
    assert with_wsc["simdiff_mssd"] > with_wsc["shortgpt"]


def test_boolq_is_at_the_level_of_a_constant_answer(simdiff):
    """2033 of the 3270 answers are yes."""
    yes = 100 * 2033 / 3270
    boolq = simdiff[simdiff["task"] == "boolq"]
    assert round(yes, 2) == one(boolq, item="table2", method="sleb") == 62.17
    pruned = boolq[(boolq["model"] == "Llama-2-13B") & (boolq["method"] != "dense")]
    assert len(pruned) >= 6
    assert pruned["value"].between(62.17, 62.63).all()
    at = simdiff[(simdiff["item"] == "table3") & (simdiff["layers_removed"] == 10)]
    means = mean_without(at, "boolq")
    assert means.idxmax() == "entrodrop"
    assert (means["entrodrop"], means["simdiff_mssd"]) == (40.61, 40.31)


def test_other_known_errors_of_simdiff(simdiff):
    fig5a = simdiff[(simdiff["item"] == "fig5a") & (simdiff["layers_removed"] == 8)]
    ours = one(simdiff, item="table2", method="simdiff", metric="ppl")
    assert round(ours, 1) == one(fig5a, method="simdiff_masd")
    assert one(fig5a, method="simdiff_mssd") > 2 * ours
    shortgpt = simdiff[(simdiff["item"] == "fig5a") & (simdiff["method"] == "shortgpt")].set_index("layers_removed")["value"]
    assert shortgpt[6] < one(simdiff, item="table2", method="shortgpt", metric="ppl") < shortgpt[8]

    copied = simdiff[(simdiff["item"] == "table2") & (simdiff["method"] == "shortened_llm")]
    assert one(copied, metric="ppl") == one(copied, task="piqa")
    assert one(simdiff, item="table2", method="sleb", metric="ppl") > 100_000

    speed = simdiff[simdiff["item"] == "table4"].pivot_table(index="layers_removed", columns="metric", values="value")
    wrong = [count for count, row in speed.iterrows() if round(row.tokens_per_s / speed.tokens_per_s[0], 2) != row.speedup]
    assert wrong == [4]

    text = simdiff[simdiff["item"] == "text"]
    means = simdiff[(simdiff["metric"] == "avg_acc") & (simdiff["item"] == "table3")]
    typo = one(text, model="Llama-3.1-8B", method="simdiff_masd")
    assert sorted(str(typo)) == sorted(str(one(means, method="simdiff_masd", layers_removed=12))), "two digits swapped"
    assert (
        one(text, method="dense") == one(simdiff, item="table2", method="dense", metric="avg_acc") != one(means, method="dense")
    )


def test_slicegpt_percentage_disagrees_with_its_milliseconds():
    table = results.published("slicegpt", "table2")
    for device, agrees in (("decode_A100-40GB", True), ("decode_RTX6000-48GB", False)):
        rows = table[table["task"] == device]
        ratio = one(rows, method="slicegpt", metric="gpu_ms_per_token") / one(rows, method="dense", metric="gpu_ms_per_token")
        assert (round(100 * ratio) == one(rows, metric="compute_percent_of_dense")) is agrees
