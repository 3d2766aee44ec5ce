"""Figures of generation and of the newer recipes: what they say is what the rows say, and tables without them can be drawn."""

from itertools import product
from pathlib import Path

import matplotlib
import pandas as pd
import pytest

matplotlib.use("agg")

from prunelib import claims
from prunelib.figures import Chapter, frontier_healing, save

ROOT = Path(__file__).resolve().parents[1]
METHODS = ("block_influence", "greedy")


def made(part, recipe, metric, value, *, method, size=8, text="wikitext2", **more):
    trained = {"learning_rate": 0.001, "healing_seed": 0, "tokens": 2457600, "step": 300} if recipe != "none" else {"step": 0}
    place = {"run": f"healing/smollm2-135m-instruct__{part}", "run_part": part, "model": "smollm2-135m-instruct", "code": "c"}
    place |= {"method": method, "size": size, "recipe": recipe, "repair": "none", "text": text, **trained, **more}
    return {**place, "metric": metric, "value": value}


@pytest.fixture
def table():
    """The committed healings, with made-up rows: agreement and repetition by K, and recipes with known losses."""
    rows = claims.load("data/pretrained/healing.csv")
    rows = rows[rows["run_part"].isin(("choices", "sizes"))]
    values, new = {"agreement": 0.5, "repeated_4": 0.3, "dense_nll": 2.0, "nll": 4.0}, []
    for metric, value in values.items():
        for method, size in [("dense", 0), *product(METHODS, (4, 8))]:
            new.append(made("generation", "none", metric, value * (1 - size / 16), method=method, size=size))
        for method in ("dense", *METHODS):
            size = 0 if method == "dense" else 8
            new.append(made("healed_generation", "none", metric, value * (1 - size / 16), method=method, size=size))
            new.append(made("healed_generation", "lora", metric, 0.8 * value, method=method, size=size))
    for method, text in product(METHODS, ("wikitext2", "c4")):
        new.append(made("frontier_recipes", "none", "nll", 5.0, method=method, text=text))
        for rate, other in ((0.001, 3.3), (0.0003, 3.2)):
            like = other - 0.2 if rate == 0.001 else other  # the better one on C4 is the worse one on WikiText-2
            value = like if text == "c4" else other
            new.append(made("frontier_recipes", "last3_head", "nll", value, method=method, text=text, learning_rate=rate))
    return pd.concat([rows, pd.DataFrame(new)], ignore_index=True)


@pytest.fixture
def drawn(monkeypatch, tmp_path):
    monkeypatch.setattr(save, "picture", lambda *_: b"")
    return lambda draw, table: draw(Chapter(tmp_path, {"healing": "t.csv", "converged": None}, {"healing": table}))


def test_generation_before_and_after_healing(table, drawn):
    drawing = drawn(frontier_healing.healing_generation, table)
    found = drawing.data.set_index(["metric", "state", "method", "size"])["value"]
    assert found["agreement", "as cut", "greedy", 4] == 0.5 * 0.75
    assert found["nll", "healed", "greedy", 8] == 3.2
    assert found["repeated_4", "healed", "dense", 0] == pytest.approx(0.24)
    title = drawing.figure.get_suptitle()
    assert (
        "Without 8 layers 25% of" in title and "healed 40%" in title and "15% of its 4-grams, healed 24% (dense 30%)" in title
    )


def test_baselines_take_the_rate_that_is_better_on_the_text_trained_on(table, drawn):
    drawing = drawn(frontier_healing.healing_baselines, table)
    last = drawing.data[drawing.data["what"].str.startswith("last three")]
    assert set(last["learning_rate"]) == {0.001}
    assert set(last.loc[last["text"] == "wikitext2", "after"]) == {3.3}
    base = table[(table["run_part"] == "choices") & (table["method"] == "greedy") & (table["metric"] == "nll")]
    base = base[(base["recipe"] == "lora") & (base["step"] == 300) & (base["text"] == "wikitext2")]["value"].iloc[0]
    lora = drawing.data[(drawing.data["what"] == "LoRA") & (drawing.data["method"] == "greedy")].set_index("text")
    assert lora.loc["wikitext2", "after"] == base
    assert "last three layers, norm, head" in drawing.figure.get_suptitle()


def test_tables_without_them_are_drawn_with_what_there_is(table, drawn):
    table = table[table["run_part"].isin(("choices", "sizes"))]
    drawing = drawn(frontier_healing.healing_generation, table)
    assert set(drawing.data["metric"]) == {"nll"} and "no texts" in drawing.figure.get_suptitle()
    assert set(drawn(frontier_healing.healing_baselines, table).data["what"]) == {"LoRA"}
