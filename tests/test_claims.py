"""Claims: every statistic and verdict on tables made by hand; the committed file, tables, figure and README agree."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml

from prunelib.claims import claims
from prunelib.figures import style as figures
from prunelib.lab import profile as grid
from prunelib.lab import runs as results

ROOT = Path(__file__).resolve().parents[1]
NAN = float("nan")


def made(tmp_path, rows, name="t.csv") -> claims.Tables:
    """A table `t` of runs; rows without a model are of one called a."""
    rows = [{"run": f"r/m__{place}", "model": "folder/a", "code": "c", **row} for place, row in enumerate(rows)]
    pd.DataFrame(rows).to_csv(tmp_path / name, index=False)
    return claims.Tables({"t": str(tmp_path / name), "none": None}, {"text": "x"})


def one(tables, **spec) -> claims.Measured:
    (found,) = claims.measure({"table": "t", **spec}, tables, tables.settings)
    return found


# ------------------------------------------------------------------------------------------------------------ rows


def test_conditions_select_rows(tmp_path):
    tables = made(
        tmp_path,
        [
            {"k": 1, "text": "x", "alpha": NAN, "value": 1.0},
            {"k": 2, "text": "x", "alpha": 0.5, "value": 2.0},
            {"k": 3, "text": "y", "alpha": 0.5, "value": 4.0},
        ],
    )

    def values(**where):
        return claims.select(tables["t"], where, tables.settings)["value"].tolist()

    assert values() == [1, 2, 4]
    assert values(k=2) == [2]
    assert values(k=[1, 3]) == [1, 4]
    assert values(k={"from": 2}) == [2, 4]
    assert values(k={"to": 2}) == [1, 2]
    assert values(text="$text") == [1, 2]
    assert values(alpha=None) == [1]
    assert values(nothing=None) == [1, 2, 4], "a column that is not there is missing everywhere"
    assert values(nothing=0) == []
    assert values(k={"greatest_of": ["text"]}) == [2, 4]
    assert values(k={"below_greatest_of": ["model"]}) == [1, 2]
    assert values(text="x", k={"greatest_of": ["model"]}) == [2], "conditions apply in their order"
    assert values(entry="2") == [4], "the part of the run's name behind the last `__`"
    with pytest.raises(claims.ClaimError, match=r"asks for \$other, which is not set; set are: text"):
        values(text="$other")


def test_terms_are_paired_weighted_and_divided(tmp_path):
    tables = made(
        tmp_path,
        [
            {"method": "dense", "k": NAN, "value": 2.0},
            *({"method": "new", "k": k, "value": v} for k, v in ((1, 3.0), (2, 5.0), (3, 9.0))),
            *({"method": "old", "k": k, "value": v} for k, v in ((1, 4.0), (2, 8.0))),
        ],
    )
    gap = [{"where": {"method": "new"}}, {"weight": -1, "where": {"method": "old"}}]
    found = one(tables, terms=gap, pair=["k"], statistic="mean")
    assert (found.value, found.n) == (-2.0, 2), "K = 3 has no partner and no part"
    assert found.runs == ("r/m__1", "r/m__2", "r/m__4", "r/m__5")
    over = one(
        tables,
        terms=[{"where": {"method": "new"}}],
        over=[{"where": {"method": "dense"}}],
        pair=["k"],
        x="k",
        statistic="spearman",
    )
    assert over.value == pytest.approx(1.0)
    ratio = claims.paired(
        {
            "table": "t",
            "terms": [{"where": {"method": "old"}}],
            "over": [{"where": {"method": "dense"}}],
            "pair": ["k"],
            "then": "percent",
        },
        tables,
    )
    assert ratio["value"].tolist() == [200, 400], "the dense row has no K: it stands under every one"
    ignoring = [{"where": {"method": "new"}}, {"weight": -1, "where": {"method": "old", "k": 1}, "ignoring": ["k"]}]
    assert claims.paired({"table": "t", "terms": ignoring, "pair": ["k"]}, tables)["value"].tolist() == [-1, 1, 5]
    logs = one(tables, terms=gap, pair=["k"], first="log", then="percent_change", statistic="least")
    assert logs.value == pytest.approx(100 * (5 / 8 - 1))
    with pytest.raises(claims.ClaimError, match="two rows of a term have the same model"):
        claims.paired({"table": "t", "terms": gap}, tables)
    with pytest.raises(claims.ClaimError, match="`k` must be one of the columns"):
        claims.paired({"table": "t", "terms": gap, "x": "k", "pair": ["method"]}, tables)


def test_x_may_come_from_other_rows(tmp_path):
    rows = [{"what": "loss", "start": s, "value": v} for s, v in ((0, 1.0), (1, 2.0), (2, 3.0))]
    rows += [{"what": "distance", "start": s, "value": v} for s, v in ((0, 30.0), (1, 20.0), (2, 10.0))]
    x = {"table": "t", "where": {"what": "distance"}}
    found = one(made(tmp_path, rows), where={"what": "loss"}, x=x, pair=["start"], statistic="spearman")
    assert found.value == pytest.approx(-1)
    assert len(found.runs) == 6


# ------------------------------------------------------------------------------------------------------------ numbers


@pytest.mark.parametrize(
    ("statistic", "expected"),
    [
        ("mean", 2.5),
        ("median", 1.5),
        ("least", -1.0),
        ("greatest", 8.0),
        ("range", 9.0),
        ("quartile_range", 3.5 - 0.5),
        ("percent_below_zero", 25.0),
        ("percent_above_zero", 75.0),
        ("x_of_greatest", 4.0),
        ("spearman", 0.8),
        ("linearity", np.corrcoef([1, 2, 3, 4], [1, -1, 2, 8])[0, 1] ** 2),
    ],
)
def test_statistics(tmp_path, statistic, expected):
    tables = made(tmp_path, [{"k": k, "value": v} for k, v in ((1, 1.0), (2, -1.0), (3, 2.0), (4, 8.0))])
    found = one(tables, x="k", statistic=statistic)
    assert found.value == pytest.approx(expected)
    assert (found.model, found.n, found.interval) == ("a", 4, "")
    assert np.isnan(found.low)


def test_every_statistic_has_a_test():
    (mark,) = test_statistics.pytestmark
    assert {case[0] for case in mark.args[1]} | {"only"} == set(claims.STATISTICS)


def test_only_takes_one_row_and_a_plateau_has_a_middle(tmp_path):
    tables = made(tmp_path, [{"k": k, "value": v} for k, v in ((1, 3.0), (2, 7.0), (3, 7.0))])
    assert one(tables, where={"k": 1}).value == 3
    assert one(tables, x="k", statistic="x_of_greatest").value == 2.5
    with pytest.raises(claims.ClaimError, match="`only` takes one row, there are 3"):
        one(tables)


def test_draws_give_their_median_and_their_ends(tmp_path):
    rows = [{"seed": s, "k": k, "value": v} for s, vs in enumerate(((1, 3), (4, 6), (10, 10))) for k, v in enumerate(vs)]
    found = one(made(tmp_path, rows), statistic="mean", draws="seed")
    assert (found.value, found.low, found.high, found.n) == (5, 2, 10, 6)
    assert found.interval == "least and greatest of 3 draws"
    within = one(made(tmp_path, rows), statistic="range", each=["seed"])
    assert within.value == 2, "the median of 2, 2 and 0"


def test_other_intervals(tmp_path):
    rows = [{"k": k, "value": v, "low": v - 0.5, "high": v + 1, "stderr": 0.1, "n": 40} for k, v in enumerate((1.0, 2.0, 6.0))]
    tables = made(tmp_path, rows)
    left_out = one(tables, statistic="mean", interval="leave_one_out")
    assert (left_out.low, left_out.high) == (1.5, 4.0)
    row = one(tables, statistic="greatest", then="percent", interval="row")
    assert (row.value, row.low, row.high, row.n) == (600, 550, 700, 40), "that of the row which is the greatest"
    error = one(tables, where={"k": 0}, interval="stderr")
    assert (error.low, error.high) == pytest.approx((1 - 0.196, 1 + 0.196))
    drawn = one(tables, statistic="mean", interval="bootstrap")
    assert drawn == one(tables, statistic="mean", interval="bootstrap"), "the same resamples every time"
    assert 1 <= drawn.low < 3 < drawn.high <= 6


def test_models_are_apart_and_missing_is_missing(tmp_path):
    rows = [{"model": "x/b", "value": 1.0}, {"model": "x/a", "value": 2.0}, {"model": "x/a", "value": NAN}]
    tables = made(tmp_path, rows)
    found = claims.measure({"table": "t"}, tables)
    assert [(part.model, part.value) for part in found] == [("b", 1.0), ("a", 2.0)], "in the order of the table"
    assert claims.measure({"table": "t", "where": {"model": "c"}}, tables) == []
    assert claims.measure({"table": "none"}, tables) == []
    with pytest.raises(claims.ClaimError, match="there is no table 'u'; there are published, t, none"):
        claims.measure({"table": "u"}, tables)


# ----------------------------------------------------------------------------------------------------------- verdicts


@pytest.mark.parametrize(
    ("value", "low", "high", "rule", "verdict"),
    [
        (-1, -2, -0.5, {"below": 0}, "holds"),
        (-1, -2, 0.5, {"below": 0}, "differs"),
        (1, 0.5, 2, {"below": 0}, "fails"),
        (0, 0, 0, {"below": 0}, "fails"),  # the same is not less
        (3, NAN, NAN, {"above": 2}, "holds"),
        (2, NAN, NAN, {"above": 2}, "fails"),
        (0.1, 0, 0.2, {"above": -1, "below": 1}, "holds"),
        (0.1, 0, 1.2, {"above": -1, "below": 1}, "differs"),
        (5.4, 5.3, 5.45, {"within": 0.5}, "holds"),
        (5.4, 5.3, 5.6, {"within": 0.5}, "differs"),
        (6, NAN, NAN, {"within": 0.5}, "fails"),
    ],
)
def test_verdicts(value, low, high, rule, verdict):
    measured = claims.Measured("a", float(value), float(low), float(high), 1, "")
    assert claims.judge(measured, claims.Rule(**rule), 5.0) == verdict


def entry(**changes) -> dict:
    base = {"id": "c-1", "paper": "simdiff", "source": "Fig 1", "claim": "It is less.", "form": "form"}
    return {**base, "measure": {"table": "t", "statistic": "mean"}, "rule": {"below": 0}} | changes


def written(tmp_path, *entries) -> Path:
    path = tmp_path / "claims.yaml"
    path.write_text(yaml.safe_dump({"claims": list(entries)}))
    return path


@pytest.mark.parametrize(
    ("values", "reason", "verdict"),
    [
        ({"a": -1.0, "b": -2.0}, None, "holds"),
        ({"a": 1.0, "b": 2.0}, None, "fails"),
        ({"a": -1.0, "b": 2.0}, None, "differs"),
        ({}, None, None),
        ({}, "no such model here", "not testable here"),
        ({"a": -1.0}, "no such model here", "holds"),
    ],
)
def test_a_claim_has_the_verdict_of_its_models(tmp_path, values, reason, verdict):
    tables = made(tmp_path, [{"model": name, "value": value} for name, value in values.items()] or [{"value": NAN}])
    changes = {"reason": reason} if reason else {}
    (claim,) = claims.read(written(tmp_path, entry(**changes)))
    found = claims.outcome(claim, tables)
    assert found.verdict == verdict
    assert claims.counts([found]) == {name: int(name == verdict) for name in claims.VERDICTS}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"verdict": "holds"}, "claim c-1: unknown key `verdict`"),
        ({"form": "maybe"}, "`form` is one of number, form, "),
        ({"rule": None, "measure": None}, "neither a measure nor a reason"),
        ({"measure": None}, "a measure needs a rule"),
        ({"measure": {"table": "t", "statistic": "mode"}}, "there is no statistic 'mode'; there are only, mean"),
        ({"measure": {"table": "t", "wher": {}}}, "unknown key `wher` of a measure"),
        ({"measure": {"table": "t", "terms": [{"weights": 1}]}}, "unknown key `weights` of a term"),
        ({"measure": {"table": "t", "statistic": "spearman"}}, "the statistic spearman needs `x`"),
        ({"measure": {"table": "t", "draws": "seed", "interval": "row"}}, "not from both"),
    ],
)
def test_a_claim_that_says_nothing_computable_is_refused(tmp_path, changes, message):
    bad = {name: value for name, value in entry(**changes).items() if value is not None}
    with pytest.raises(claims.ClaimError, match=message):
        claims.read(written(tmp_path, bad))


def test_two_claims_of_one_name_are_refused_and_errors_name_the_claim(tmp_path):
    with pytest.raises(claims.ClaimError, match="two claims are called c-1"):
        claims.read(written(tmp_path, entry(), entry()))
    (claim,) = claims.read(written(tmp_path, entry(rule={"within": 1})))
    with pytest.raises(claims.ClaimError, match="claim c-1: `within` needs a published value"):
        claims.outcome(claim, made(tmp_path, [{"value": 1.0}]))
    (claim,) = claims.read(written(tmp_path, entry(published={"where": {"paper": "simdiff", "item": "fig99"}})))
    with pytest.raises(claims.ClaimError, match=r"claim c-1: published\.csv has no such row"):
        claims.outcome(claim, made(tmp_path, [{"value": 1.0}]))


# ------------------------------------------------------------------------------------------------------------ showing


def test_table_and_markdown_show_everything(tmp_path):
    rows = [{"model": "a", "seed": seed, "value": value} for seed, value in enumerate((-1.0, -3.0))]
    tables = made(tmp_path, [*rows, {"model": "b", "seed": 0, "value": 2.0}])
    published = {"where": {"paper": "simdiff", "item": "table2", "method": "dense", "metric": "ppl"}}
    spec = {"table": "t", "statistic": "mean", "draws": "seed"}
    untested = entry(id="c-2", claim="A number.", reason="no model")
    del untested["measure"], untested["rule"]
    listed = claims.read(
        written(tmp_path, entry(measure=spec, published=published, figure="simdiff_fig1_x", unit="nll"), untested)
    )
    found = claims.outcomes(listed, tables)
    frame = claims.table(found, tables)
    assert frame["id"].tolist() == ["c-1", "c-1", "c-2"]
    assert frame["verdict"].tolist() == ["differs", "differs", "not testable here"]
    assert frame["verdict_of_model"].tolist()[:2] == ["holds", "fails"]
    assert frame["runs"].tolist()[:2] == ["r/m__0 r/m__1", "r/m__2"]
    assert claims.behind(found, tables)["run"].tolist() == ["r/m__0", "r/m__1", "r/m__2"]
    text = claims.markdown(found, {"simdiff": "SimDiff, arXiv"})
    assert "| claim | published | a | b | holds if | verdict |" in text
    measured = "5.32 | −2.00 [−3.00, −1.00] | 2.00 | below 0 nats | ≈ differs |"
    assert f"| `c-1` It is less. ([Fig 1](figures/simdiff_fig1_x.png)) | {measured}" in text
    assert "- `c-2` A number. (SimDiff, Fig 1): no model" in text
    assert text.startswith("Of 2 claims 0 hold, 0 fail, 1 differ")


def test_a_document_is_changed_between_the_comments_only():
    text = f"before\n{claims.BEGIN}\nold\n{claims.END}\nafter\n"
    assert claims.replaced(text, "new") == f"before\n{claims.BEGIN}\n\nnew\n\n{claims.END}\nafter\n"
    assert claims.replaced(claims.replaced(text, "new"), "new") == claims.replaced(text, "new")
    for bad in ("nothing", f"{claims.END}\n{claims.BEGIN}", text + text):
        with pytest.raises(claims.ClaimError, match="the document needs the line"):
            claims.replaced(bad, "new")


@pytest.mark.parametrize(
    ("value", "digits", "text"), [(-0.001, 2, "0.00"), (-1.5, 1, "−1.5"), (1234.5, 0, "1,234"), (None, 2, "–"), (NAN, 2, "–")]
)
def test_numbers_are_printed_one_way(value, digits, text):
    assert claims.number(value, digits) == text


# -------------------------------------------------------------------------------------------------- the committed claims


@pytest.fixture(scope="module")
def tables():
    return claims.of_profile()


@pytest.fixture(scope="module")
def found(tables):
    return claims.outcomes(claims.read(), tables)


def test_every_claim_names_its_paper_a_figure_and_its_chapter(found):
    for one in found:
        claim = one.claim
        assert claim.paper in figures.PAPERS
        assert claim.claim.endswith(")") or claim.claim.endswith("."), claim.id
        if one.measured:
            assert claim.short and len(claim.short) <= 45, claim.id
        if claim.figure is not None:
            assert claim.figure in grid.figure_stems(f"notebooks/{claim.chapter}.ipynb"), claim.id


def test_claims_hold_no_verdict_and_every_verdict_occurs(found):
    text = (ROOT / claims.CLAIMS).read_text(encoding="utf-8")
    assert "verdict:" not in text
    assert set(claims.counts(found).values()).isdisjoint({0}), "negative results are published like the others"
    assert {one.claim.paper for one in found} == {"simdiff", "dynamic_slicing", "deeper_layers"}


def test_every_measured_value_names_runs_of_the_committed_tables(found, tables):
    for one in found:
        for part in one.measured:
            if part.model != claims.PRINTED:
                read = [tables[name] for name in claims.tables_behind(one.claim)]
                assert part.runs
                assert set(part.runs) <= {run for table in read for run in table["run"]}, one.claim.id
                assert np.isfinite(part.value)


def test_two_claims_recomputed_by_other_means(found):
    """Independent of the language of data/claims.yaml."""
    by_name = {one.claim.id: one for one in found}
    table = results.read_table("data/results.csv")
    rows = table[(table["metric"] == "nats_over_cosine") & (table["method"] == "simdiff_mssd") & (table["search"] == "ternary")]
    rows = rows[(rows["calibration"] == "pydocs") & (rows["alpha_corpus"] == "pydocs") & (rows["layers_removed"] > 0)]
    for part in by_name["simdiff-02"].measured:
        mine = rows[rows["model"].str.endswith(part.model)].groupby("calibration_seed")["value"].mean()
        assert (part.value, part.low, part.high) == pytest.approx((mine.median(), mine.min(), mine.max()))
    slicing = results.read_table("data/slicing.csv")
    slicing = slicing[(slicing["metric"] == "nll") & (slicing["part"] == "sweep")]
    for part in by_name["dynamic-01"].measured:
        mine = slicing[slicing["model"].str.endswith(part.model)]
        constant = mine[mine["method"] == "constant"].set_index("slice_percentage")["value"]
        dynamic = mine[mine["method"] == "dynamic"]
        change = 100 * (np.exp(dynamic["value"] - dynamic["slice_percentage"].map(constant)) - 1)
        assert part.value == pytest.approx(change.min())


def test_arithmetic_of_the_papers(found):
    values = {one.claim.id: one.measured[0].value for one in found if one.claim.form == "arithmetic"}
    assert {name: round(value, 2) for name, value in values.items()} == {
        "simdiff-13": -0.30,
        "simdiff-17": -1.06,
        "simdiff-18": 79.82,
        "simdiff-21": 1.06,
        "deeper-14": 17.5,
    }


def test_the_readme_holds_the_computed_table(found, tables_as_committed):
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    block = text.split(claims.BEGIN)[1].split(claims.END)[0].strip()
    assert block == claims.markdown(found, figures.PAPERS), "run: python -m prunelib.claims.claims README.md"


def test_the_committed_figure_is_of_the_committed_tables(found, tables):
    """Values to nine digits, verdicts exactly."""
    drawn = pd.read_csv(ROOT / "figures" / "own_table_claims.csv", dtype={"published": float})
    now = claims.table(found, tables)
    assert drawn["id"].tolist() == now["id"].tolist(), "draw chapter 08 again"
    assert drawn["verdict"].fillna("").tolist() == now["verdict"].fillna("").tolist(), "draw chapter 08 again"
    measured = now["measured"].to_numpy(dtype=float)
    np.testing.assert_allclose(drawn["measured"].to_numpy(dtype=float), measured, rtol=1e-8, atol=1e-12)


def test_published_values_are_those_of_the_paper(found):
    by_name = {one.claim.id: one.published for one in found}
    assert by_name["simdiff-16"] == 91.44
    assert by_name["simdiff-24"] == 43.2
    assert by_name["dynamic-01"] == -7
    assert by_name["deeper-01"] == 45
    pairs = results.published("simdiff", "fig5b")
    both = pairs.pivot_table(index="layers_removed", columns="method", values="value")
    assert by_name["simdiff-02"] == pytest.approx(np.log(both["simdiff_mssd"] / both["shortgpt"]).mean())
