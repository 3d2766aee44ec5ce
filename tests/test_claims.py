"""Claims: pairing, statistics, intervals and verdicts on tables made by hand; committed values recomputed by other means."""

import numpy as np
import pandas as pd
import pytest

from prunelib import claims
from prunelib.claims import __main__ as document
from prunelib.claims import judge, table
from prunelib.claims.judge import measure, paired, pick
from prunelib.claims.slicing import quartile_range
from prunelib.figures.save import registry
from prunelib.io import at_root
from prunelib.lab import runs

NAN = float("nan")


def rows(**columns) -> pd.DataFrame:
    frame = pd.DataFrame(columns)
    return frame.assign(model=frame.get("model", "a"), run=[f"r/{place}" for place in range(len(frame))])


def test_conditions_select_rows():
    three = rows(k=[1, 2, 3], text=["x", "x", "y"], alpha=[NAN, 0.5, 0.5], value=[1.0, 2.0, 4.0])
    for where, values in (
        ({}, [1, 2, 4]),
        ({"k": [1, 3]}, [1, 4]),
        ({"k": judge.between(2)}, [2, 4]),
        ({"alpha": None}, [1]),
        ({"nothing": None}, [1, 2, 4]),  # a column that is not there is missing everywhere
        ({"nothing": 0}, []),
        ({"text": "x", "k": lambda k: k == k.max()}, [2]),  # conditions apply in their order
    ):
        assert pick(three, **where)["value"].tolist() == values


def test_rows_are_paired_by_the_columns_that_both_have():
    new = rows(k=[1, 2, 3], value=[3.0, 5.0, 9.0])
    old = rows(k=[1, 2], value=[4.0, 8.0])
    gap = paired(new, old, ["k"])
    assert gap["value"].tolist() == [-1, -3], "K = 3 has no partner and no part"
    assert gap["run"].tolist() == ["r/0 r/0", "r/1 r/1"]
    dense = rows(k=[NAN], value=[2.0])
    assert paired(old, dense, ["k"], how="/")["value"].tolist() == [2, 4], "the dense row has no K: it stands under every one"
    assert paired(dense, old, ["k"])["k"].tolist() == [1, 2], "the column comes from the side that has it"
    assert paired(old, rows(k=[], value=[]), ["k"]).empty
    with pytest.raises(judge.ClaimError, match="two rows agree in model, k"):
        paired(rows(k=[1, 1], value=[1.0, 2.0]), old, ["k"])


def test_values_and_intervals_of_every_kind():
    many = rows(model=["b"] * 4 + ["a"] * 2, seed=[0, 0, 1, 2, 0, 1], value=[1.0, 3.0, 4.0, 9.0, 5.0, 5.0])
    b, a = measure(many, "mean", draws="seed").itertuples(index=False)
    assert tuple(b) == ("b", 4, 2, 9, 4, "least and greatest of 3 draws", "r/0 r/1 r/2 r/3")
    assert (a.measured, a.low, a.high) == (5, 5, 5)
    left_out = measure(pick(many, model="b"), "mean", interval="leave_one_out").iloc[0]
    assert (left_out["low"], left_out["high"]) == pytest.approx((8 / 3, 16 / 3))
    shifted = measure(rows(value=[0.0, 0.0, 9.0]), lambda part: len(part), interval="leave_one_out").iloc[0]
    assert (shifted["measured"], shifted["low"], shifted["high"]) == (3, 2, 3), "the value itself is in its interval"
    bootstrap = measure(pick(many, model="b"), "mean", interval="bootstrap").iloc[0]
    assert 1 < bootstrap["low"] < 4.25 < bootstrap["high"] < 9
    own = rows(value=[0.1], low=[0.0], high=[0.3], n=[50])
    row = measure(judge.percent(own), interval="row").iloc[0]
    assert tuple(row) == ("a", 10, 0, 30, 50, "interval of the run, n = 50", "r/0")
    assert measure(pick(own, value=7)).empty
    assert measure(own.drop(columns="model"))["model"].tolist() == [claims.PRINTED]
    with pytest.raises(judge.ClaimError, match="there are 4: narrow them"):
        measure(pick(many, model="b"))


def test_statistics():
    four = rows(x=[1, 2, 3, 4], part=[0, 0, 1, 1], value=[2.0, 4.0, 7.0, 6.0])
    assert judge.spearman("x")(four) == pytest.approx(0.8)
    assert quartile_range(four) == pytest.approx(6.25 - 3.5)
    assert judge.median_of("part", "mean")(four) == pytest.approx(4.75)


@pytest.mark.parametrize(
    ("ends", "low", "high", "published", "verdict"),
    [
        ({"below": 0}, -2, -1, NAN, "holds"),
        ({"below": 0}, -2, 1, NAN, "differs"),
        ({"below": 0}, 0, 1, NAN, "fails"),
        ({"above": -1, "below": 1}, NAN, NAN, NAN, "holds"),
        ({"within": 0.2}, 0.1, 0.3, 0.4, "differs"),
        ({"within": 0.2}, 0.7, 0.8, 0.4, "fails"),
    ],
)
def test_verdicts(ends, low, high, published, verdict):
    measured = 0.0 if low != low else (low + high) / 2
    assert table.judge({"measured": measured, "low": low, "high": high}, ends, published) == verdict


def test_real_models_decide_and_reference_models_stand_beside_them(monkeypatch, tmp_path):
    (tmp_path / "claims.csv").write_text(
        "id,paper,source,claim,short,form,unit,digits,above,below,within,figure,reason\n"
        "x-1,x,Fig 1,Both,both,form,nats,1,,0,,,\n"
        "x-2,x,Fig 2,Small,small,form,,1,,0,,,\nx-3,x,Fig 3,None,,form,,1,,,,,no model\n"
    )
    real = {"x-1": measure(rows(model=["big"], value=[-1.0])), "x-2": measure(rows(value=[NAN]))}
    small = {"x-1": measure(rows(model=["ref-a", "ref-b", "big"], value=[-1.0, 2.0, 5.0]))}
    small["x-2"] = measure(rows(model=["ref-a"], value=[1.0]))
    monkeypatch.setattr(table, "CLAIMS", tmp_path / "claims.csv")
    for paper in (table.simdiff, table.slicing, table.deeper_layers, table.own):
        monkeypatch.setattr(paper, "measures", lambda tables: tables.parameters)
    found = table.outcomes(claims.Tables(real), claims.Tables(small))
    verdicts = found.drop_duplicates("id").set_index("id")[["judged_on", "verdict", "verdict_reference"]]
    assert verdicts.loc["x-1"].tolist() == ["real models", "holds", "differs"]
    assert verdicts.loc["x-2"].tolist() == ["reference models", "fails", "fails"]
    assert verdicts.loc["x-3", "verdict"] == "not testable here"
    assert found["model"].tolist()[:4] == ["big", "ref-a", "ref-b", "ref-a"], "a model of both tables is that of the first"
    assert table.changes(found).to_numpy().tolist() == [
        ["x-1", "both", "≈ differs: ref-a −1.0, ref-b 2.0 nats", "✓ holds: big −1.0 nats"]
    ]
    assert "| real models | 1 | 0 | 0 |\n| reference models | 0 | 1 | 0 |" in table.markdown(table.summary(found))
    assert "| ✗ fails, on reference models alone |" in table.page(found)


@pytest.fixture(scope="module")
def tables() -> list[claims.Tables]:
    first = claims.Tables.of_profile("profiles/smollm2.yaml")
    return [first, claims.Tables.of_profile(first.parameters["reference"])]


@pytest.fixture(scope="module")
def found(tables) -> pd.DataFrame:
    return claims.outcomes(*tables)


def test_every_claim_is_measured_or_says_why_not_and_every_verdict_occurs(found):
    tested = found["measured"].notna()
    assert (tested == (found["reason"] == "")).all()
    assert set(found["figure"]) <= {"", *registry()}
    assert found.loc[tested, "short"].str.len().between(1, 45).all()
    assert set(found["verdict"]) == set(claims.VERDICTS), "negative results are published like the others"


def test_the_words_of_the_chapter_are_those_of_the_tables(found):
    """`In plain words` and the three points on top of chapter 08 name these claims; rewrite them when this fails."""
    real = found[found["judged_on"] == "real models"].drop_duplicates("id").groupby("verdict")["id"].apply(" ".join)
    words = {
        "holds": "simdiff-01 simdiff-02 simdiff-09 simdiff-19 simdiff-20 dynamic-01 dynamic-03 dynamic-04 dynamic-05 "
        "dynamic-06 deeper-03 deeper-04 deeper-05 deeper-06 deeper-08 deeper-09 deeper-12",
        "fails": "simdiff-03 simdiff-05 simdiff-06 simdiff-07 simdiff-08 simdiff-10 simdiff-11 simdiff-12 dynamic-07 "
        "dynamic-08 dynamic-09 deeper-02 deeper-07 deeper-10 deeper-11 own-02",
        "differs": "simdiff-04 simdiff-14 simdiff-15 own-01",
    }
    assert real.to_dict() == words
    assert len(claims.changes(found)) / found["id"].nunique() == pytest.approx(0.3, abs=0.03)
    assert set(found.loc[found["model"] == "gemma-3-270m", "id"]) == {"simdiff-14", "simdiff-15"}


def test_claims_recomputed_by_other_means(found):
    for name, folder, calibration, alpha in (
        ("smollm2-135m-instruct", "data/pretrained", "wikitext2", "alpaca"),
        ("ref-llama-32l", "data", "pydocs", "pydocs"),
    ):
        selection = pick(runs.read_table(f"{folder}/selection.csv"), metric="nll_over_cosine", method="simdiff_mssd")
        selection = selection[selection["model"].str.endswith(name) & (selection["role"] == "choice")]
        selection = pick(selection, search="ternary", calibration=calibration, alpha_corpus=alpha)
        mine = selection[selection["layers_removed"] > 0].groupby("calibration_seed")["value"].mean()
        part = pick(found, id="simdiff-02", model=name).iloc[0]
        assert (part["measured"], part["low"], part["high"]) == pytest.approx((mine.median(), mine.min(), mine.max()))
    slicing = pick(runs.read_table("data/pretrained/slicing.csv"), metric="nll", part="sweep")
    constant = slicing[slicing["method"] == "constant"].set_index("slice_percentage")["value"]
    dynamic = slicing[slicing["method"] == "dynamic"]
    change = 100 * (np.exp(dynamic["value"] - dynamic["slice_percentage"].map(constant)) - 1)
    assert pick(found, id="dynamic-01")["measured"].iloc[0] == pytest.approx(change.min())
    tasks = runs.read_table("data/pretrained/tasks.csv").query(
        "run.str.endswith('blocks') and metric == 'average' and size in (0, 4)"
    )
    means = tasks.set_index("method")["value"]
    chance = (
        0.25 + 0.5 + 0.25 + 0
    ) / 4  # ARC-e, PIQA, HellaSwag; LAMBADA asks for a word. In WinoGrande the dense model guesses
    left = 100 * (means["deepest"] - chance) / (means["dense"] - chance)
    assert pick(found, id="deeper-06")["measured"].iloc[0] == pytest.approx(left, abs=0.1)
    healed = runs.read_table("data/pretrained/healing.csv").query(
        "run.str.endswith('choices') and metric == 'nll' and text == 'c4' and step == 300"
    )
    healed = healed.set_index("method")["value"]
    gap = healed["deepest"] - healed["block_influence"]
    assert pick(found, id="deeper-07")["measured"].iloc[0] == pytest.approx(gap)


def test_a_quarter_of_the_layers_is_that_of_each_model(found):
    rules = pick(runs.read_table("data/pretrained/selection.csv"), role="choice", metric="nll", calibration_seed=[0, 1, 2])
    for model, layers in (("smollm2-135m-instruct", 8), ("gemma-3-270m", 4)):
        mine = rules[rules["run"].str.endswith(f"{model}__rules") & (rules["layers_removed"] == layers)]
        mine = mine.pivot(index="calibration_seed", columns="method", values="value")
        assert pick(found, id="simdiff-15", model=model)["measured"].iloc[0] == pytest.approx(
            (mine["simdiff_mssd"] - mine["greedy"]).median()
        )


def test_arithmetic_of_the_papers(found):
    values = found[found["judged_on"] == "the papers' own numbers"].set_index("id")["measured"].round(2)
    assert values.to_dict() == {"simdiff-13": -0.30, "simdiff-17": -1.06, "simdiff-18": 79.82, "simdiff-21": 1.06}
    published = {"simdiff-08": 0.65, "simdiff-20": 1.49, "dynamic-01": -7}
    assert found.drop_duplicates("id").set_index("id")["published"][list(published)].to_dict() == pytest.approx(published)


def test_a_profile_without_tables_has_no_verdicts_where_rows_are_missing(tables):
    places = {name: None for name, value in tables[0].parameters.items() if "/" in str(value)}
    empty = claims.Tables({**tables[0].parameters, **places})
    found = claims.outcomes(empty)
    verdicts = found.set_index("id")["verdict"]
    assert pd.isna(verdicts["simdiff-02"])
    assert verdicts["simdiff-20"] == "not testable here", "it says why these rows are not here"
    assert verdicts["simdiff-13"] == "fails", "recomputed from the paper's numbers alone"
    assert claims.summary(found)["no run"].sum() == verdicts.isna().sum() > 30
    with pytest.raises(AttributeError, match="no table or setting 'other'"):
        empty.other  # noqa: B018


def test_the_claims_of_the_documents_are_current():
    for path, text in document.documents().items():
        assert at_root(path).read_text(encoding="utf-8") == text, "run python -m prunelib.claims"


def test_a_document_without_the_comment_lines_is_refused(tmp_path, monkeypatch, tables):
    monkeypatch.setattr(document, "at_root", lambda path: tmp_path / "a.md")
    monkeypatch.setattr(document, "outcomes", lambda *_: claims.outcomes(claims.Tables(dict.fromkeys(tables[0].parameters))))
    monkeypatch.setattr(document, "FINDINGS", ())
    (tmp_path / "a.md").write_text("no lines")
    with pytest.raises(ValueError, match="needs the line"):
        document.documents()
