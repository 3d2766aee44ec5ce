"""Claims: pairing, statistics, intervals and verdicts on tables made by hand; committed values recomputed by other means."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from prunelib import claims
from prunelib.claims import judge, table
from prunelib.claims.__main__ import main
from prunelib.claims.judge import measure, paired, pick
from prunelib.claims.slicing import quartile_range
from prunelib.figures.save import registry
from prunelib.lab import runs

ROOT = Path(__file__).resolve().parents[1]
NAN = float("nan")
PARAMETERS = {
    **{name: f"data/{name}.csv" for name in ("statistics", "selection", "blocks", "tasks", "slicing", "healing", "combining")},
    "optimum_runs": "data/optimum",
    "converged": "data/healing",
    "gpu": "data/speed",
    "calibration": "pydocs",
    "alpha_text": "pydocs",
    "fair_calibration": "pyreadmes",
    "fair_alpha_text": "pycomments",
    "healing_text": "pydocs",
    "other_text": "pycomments",
}


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
    bootstrap = measure(pick(many, model="b"), "mean", interval="bootstrap").iloc[0]
    assert 1 < bootstrap["low"] < 4.25 < bootstrap["high"] < 9
    own = rows(value=[0.1], low=[0.0], high=[0.3], n=[50])
    row = measure(judge.percent(own), interval="row").iloc[0]
    assert tuple(row) == ("a", 10, 0, 30, 50, "95 % interval of the run, n = 50", "r/0")
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


@pytest.fixture(scope="module")
def found() -> pd.DataFrame:
    return claims.outcomes(claims.Tables(PARAMETERS))


def test_every_claim_is_measured_or_says_why_not_and_every_verdict_occurs(found):
    tested = found["measured"].notna()
    assert (tested | found["reason"].notna()).all()
    assert set(found["figure"].dropna()) <= set(registry())
    assert found.loc[tested, "short"].str.len().between(1, 45).all()
    assert 0 not in claims.counts(found).values(), "negative results are published like the others"


def test_two_claims_recomputed_by_other_means(found):
    selection = pick(runs.read_table("data/selection.csv"), metric="nll_over_cosine", method="simdiff_mssd", search="ternary")
    selection = selection[(selection["calibration"] == "pydocs") & (selection["alpha_corpus"] == "pydocs")]
    selection = selection[selection["layers_removed"] > 0]
    for part in pick(found, id="simdiff-02").itertuples():
        mine = selection[selection["model"].str.endswith(part.model)].groupby("calibration_seed")["value"].mean()
        assert (part.measured, part.low, part.high) == pytest.approx((mine.median(), mine.min(), mine.max()))
    slicing = pick(runs.read_table("data/slicing.csv"), metric="nll", part="sweep")
    for part in pick(found, id="dynamic-01").itertuples():
        mine = slicing[slicing["model"].str.endswith(part.model)]
        constant = mine[mine["method"] == "constant"].set_index("slice_percentage")["value"]
        dynamic = mine[mine["method"] == "dynamic"]
        change = 100 * (np.exp(dynamic["value"] - dynamic["slice_percentage"].map(constant)) - 1)
        assert part.measured == pytest.approx(change.min())


def test_arithmetic_of_the_papers(found):
    values = found[found["tested"] == "the paper's own numbers"].set_index("id")["measured"].round(2)
    expected = {"simdiff-13": -0.30, "simdiff-17": -1.06, "simdiff-18": 79.82, "simdiff-21": 1.06, "deeper-14": 17.5}
    assert values.to_dict() == expected
    published = {"simdiff-16": 91.44, "simdiff-24": 43.2, "dynamic-01": -7, "deeper-01": 45}
    assert found.drop_duplicates("id").set_index("id")["published"][list(published)].to_dict() == published


def test_a_profile_without_tables_has_no_verdicts_where_rows_are_missing():
    places = dict.fromkeys(name for name, value in PARAMETERS.items() if "/" in value)
    tables = claims.Tables({**PARAMETERS, **places})
    found = claims.outcomes(tables)
    verdicts = found.set_index("id")["verdict"]
    assert pd.isna(verdicts["simdiff-02"])
    assert verdicts["simdiff-20"] == "not testable here", "it says why these rows are not here"
    assert verdicts["simdiff-13"] == "fails", "recomputed from the paper's numbers alone"
    assert ", 36 had no run." in claims.markdown(found, runs.PAPERS)
    with pytest.raises(AttributeError, match="no table or setting 'other'"):
        tables.other  # noqa: B018


def test_the_table_goes_between_the_comment_lines_of_a_document(tmp_path, monkeypatch, found):
    monkeypatch.setattr("prunelib.claims.__main__.outcomes", lambda _: found)
    document = tmp_path / "a.md"
    document.write_text(f"before\n{claims.BEGIN}\nSTALE\n{claims.END}\nafter\n")
    main(document)
    text = document.read_text()
    assert text.startswith(f"before\n{claims.BEGIN}\n\nOf {found['id'].nunique()} claims")
    assert text.endswith(f"{claims.END}\nafter\n")
    assert "STALE" not in text
    document.write_text("no lines")
    with pytest.raises(ValueError, match="needs the line"):
        main(document)
