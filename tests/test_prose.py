"""Numbers in running text: computed, corrected, and none of them untraced."""

import json
from pathlib import Path

import pandas as pd
import pytest
import yaml

from prunelib import claims, prose

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def tables(tmp_path):
    rows = [{"run": f"r/{k}", "model": "m/a", "k": k, "value": value} for k, value in ((1, 0.31), (2, 0.44))]
    pd.DataFrame(rows).to_csv(tmp_path / "t.csv", index=False)
    return claims.Tables({"t": str(tmp_path / "t.csv")})


@pytest.fixture
def sentence():
    of = {"model": "a", "digits": 1, "table": "t"}
    numbers = {"low": {**of, "statistic": "least"}, "high": {**of, "statistic": "greatest"}}
    return prose.Sentence("s-1", "it costs {low} to {high} nats.", numbers)


def test_numbers_are_computed_and_written_where_the_words_are(tables, sentence):
    assert prose.values(sentence, tables) == {"low": "0.3", "high": "0.4"}
    document = "Before 7.0, it\ncosts 1,234.5 to −0.2\nnats. After."
    assert prose.wrong(document, [sentence], tables) == ["s-1: it costs 0.3 to 0.4 nats."]
    fixed = prose.corrected(document, [sentence], tables)
    assert fixed == "Before 7.0, it\ncosts 0.3 to 0.4\nnats. After.", "lines stay as they are broken"
    assert prose.wrong(fixed, [sentence], tables) == []
    assert prose.corrected(fixed, [sentence], tables) == fixed


def test_a_sentence_that_cannot_be_made_is_named(tables, sentence):
    for document, times in (("it costs nothing.", 0), ("it costs 1 to 2 nats. it costs 1 to 2 nats.", 2)):
        with pytest.raises(prose.ProseError, match=f"s-1: the document holds .* {times} times, not once"):
            prose.corrected(document, [sentence], tables)
    numbers = {"low": {**sentence.numbers["low"], "model": "b"}}
    with pytest.raises(prose.ProseError, match="s-1: no rows for `low` of b"):
        prose.values(prose.Sentence("s-1", "{low}", numbers), tables)
    numbers = {"low": {"model": "a", "digits": 1, "table": "u"}}
    with pytest.raises(prose.ProseError, match="s-1: low: there is no table 'u'"):
        prose.values(prose.Sentence("s-1", "{low}", numbers), tables)


def test_places_and_numbers_must_agree(tmp_path):
    path = tmp_path / "numbers.yaml"
    path.write_text(yaml.safe_dump({"sentences": [{"id": "s-1", "text": "{a} {b}", "numbers": {"a": {}}}], "stated": []}))
    with pytest.raises(prose.ProseError, match="s-1: the places in the text are not the names"):
        prose.read(path)


def test_untraced_numbers_are_found(sentence):
    document = f"""
In chapter 01 and Figures 1, 2 and 4a the 32-layer Llama-2-7B on H200 with `n=3` [costs](a/b4.png).
{claims.BEGIN} 5 {claims.END}
```
6
```
it costs 1 to 2 nats. It takes 17 min. Also 3.5 times as much.
"""
    stated = [prose.Stated("It takes {minutes} min", "timed by hand")]
    assert prose.untraced(document, [sentence], stated) == ["3.5 in «ith [costs] . . Also 3.5 times as much.»"]
    assert len(prose.untraced(document, [], [])) == 4


# ------------------------------------------------------------------------------------------------------- the README


@pytest.fixture(scope="module")
def committed():
    return prose.read()


def test_computed_numbers_of_the_readme(committed):
    document = (ROOT / "README.md").read_text(encoding="utf-8")
    assert prose.wrong(document, committed[0], claims.of_profile()) == [], "run: python -m prunelib.prose README.md"


def test_every_number_of_the_readme_has_an_origin(committed):
    document = (ROOT / "README.md").read_text(encoding="utf-8")
    assert prose.untraced(document, *committed) == [], "say in data/numbers.yaml how it is computed, or what made it"


def test_stated_numbers_are_in_the_readme_and_their_origins_are_there(committed):
    document = (ROOT / "README.md").read_text(encoding="utf-8")
    for one in committed[1]:
        assert one.source in prose.BY or (ROOT / one.source).exists(), one.source
        assert prose._pattern(one.text).search(document), f"data/numbers.yaml states what the README does not say: {one.text}"


# ------------------------------------------------------------------------------------------------------- chapters


def test_numbers_of_a_text_have_a_kind_and_a_place(sentence):
    document = (
        "## 1. Load\nAt layer 0 and K = 8, 10 and 12 (arXiv 2401.15024), it costs 0.3 to\n0.4 nats. A box holds 16, and 7 more."
    )
    stated = [prose.Stated("A box holds {n},", "figures/box.csv")]
    found = prose.numbers(document, [sentence], stated, {"t": "data/t.csv"})
    assert [document[one.start : one.end] for one in found] == ["0.3", "0.4", "16", "7"]
    assert [one.kind for one in found] == [prose.COMPUTED, prose.COMPUTED, prose.FOUND, prose.UNTRACED]
    assert [one.source for one in found] == ["data/t.csv", "data/t.csv", "figures/box.csv", prose.CHAPTER_NUMBERS]
    assert [one.id for one in found] == ["s-1-low", "s-1-high", None, None]
    assert "and 7 more" in found[-1].around


def test_numbers_that_are_said_to_be_in_a_csv_are_looked_for(tmp_path):
    path = tmp_path / "box.csv"
    path.write_text("name,value\nllama32,0.5528\nx,-1234.56\n")
    stated = [prose.Stated("wins {share} % of {all} and {other}.", str(path))]
    assert prose.missing("It wins 55 % of 1,235 and 0.553.", stated) == []
    assert prose.missing("It wins 56 % of −1,234.6 and 0.55.", stated) == [
        f"56 of «wins {{share}} % of {{all}} and {{other}}.» is not in {path}"
    ]
    assert prose.missing("It wins 1 % of 2 and 3.", [prose.Stated("wins {a} % of {b}", "timed by hand")]) == []


def test_sentences_of_a_notebook_are_corrected_in_their_cell(tables, sentence):
    cells = [
        {"cell_type": "markdown", "source": ["Before,\n", "it costs 7 to\n", "8 nats."]},
        {"cell_type": "code", "source": "# it costs 7 to 8 nats."},
    ]
    content = json.dumps({"cells": cells}, indent=1) + "\n"
    fixed = json.loads(prose.corrected_notebook(content, [sentence], tables))["cells"]
    assert fixed[0]["source"] == ["Before,\n", "it costs 0.3 to\n", "0.4 nats."]
    assert fixed[1] == cells[1], "code is code"
    with pytest.raises(prose.ProseError, match="is in 2 cells, not in one"):
        prose.corrected_notebook(json.dumps({"cells": [cells[0], cells[0]]}), [sentence], tables)


def test_a_table_without_models_needs_no_model(tables):
    spec = {"digits": 2, "table": "t", "by": None, "where": {"k": 1}}
    assert prose.values(prose.Sentence("s-1", "{n}", {"n": spec}), tables) == {"n": "0.31"}
    with pytest.raises(prose.ProseError, match="s-1: no rows for `n` of as printed"):
        prose.values(prose.Sentence("s-1", "{n}", {"n": {**spec, "where": {"k": 9}}}), tables)
