"""Numbers in running text: computed, corrected, and none of them untraced."""

import json
import re
from pathlib import Path

import pandas as pd
import pytest
import yaml

from prunelib.claims import claims
from prunelib.lab import prose

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def tables(tmp_path):
    rows = [{"run": f"r/{k}", "code": "c", "model": "m/a", "k": k, "value": value} for k, value in ((1, 0.31), (2, 0.44))]
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
    with pytest.raises(prose.ProseError, match="s-1: low: no rows of b"):
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
it costs 1 to 2 nats. It takes 17 min. Also 3.5 times as much, to 4e-7.
"""
    stated = [prose.Stated("It takes {minutes} min", "timed by hand")]
    assert prose.untraced(document, [sentence], stated) == [
        "3.5 in «the on with [costs] . . Also 3.5 times as much, to 4»",
        "4 in «. Also 3.5 times as much, to 4»",
    ]
    assert len(prose.untraced(document, [], [])) == 5


def test_numbers_in_words_that_measure_are_found():
    found = {
        "it takes half a minute": ["half a"],
        "in about a minute or within the hour": ["a minute", "the hour"],
        "a third of it, its first third, two thirds": ["a third", "its first third", "two thirds"],
        "costs a hundredth of a nat and Twice that, eight times as many": ["a hundredth", "Twice", "eight times"],
        "With thirty minutes": ["thirty minutes"],
        "two models, three papers, the sixth digit, a second call, one of four, at once, per thousand tokens": [],
    }
    for document, expected in found.items():
        assert [line.split(" in «")[0] for line in prose.untraced_words(document, [], [])] == expected
        assert prose.untraced_words(document, [], [prose.Stated(document, "arithmetic")]) == []


# ------------------------------------------------------------------------------------------------------- numbers of files

TIMES = {
    "steps": [
        {"step": "figures", "cores": 2, "seconds": 2520.0, "peak_mib": 2344},
        {"step": "figures", "cores": 4, "seconds": 1260.0},
        {"step": "verify", "seconds": 300.0, "passed": True, "by": "hand"},
    ],
    "tokens": [16, 2048],
    "none": 0,
}


@pytest.fixture
def held(tmp_path):
    path = tmp_path / "times.json"
    path.write_text(json.dumps(TIMES))

    def value(at, digits=0, **more):
        spec = {"file": str(path), "at": at, "digits": digits, **more}
        return prose.values(prose.Sentence("s-2", "{n}", {"n": spec}), claims.Tables({}))["n"]

    return value


def test_numbers_of_a_file(held):
    two, four = ({"step": "figures", "cores": cores} for cores in (2, 4))
    assert held(["steps", two, "seconds"]) == "2,520"
    assert held(["steps", two, "seconds"], then="minutes") == "42"
    assert held(["steps", two, "peak_mib"], 1, then="gib") == "2.3"
    assert held(["steps", two, "seconds"], 1, over=["steps", four, "seconds"]) == "2.0"
    assert held(["steps", {"step": "verify"}, "seconds"], over=["steps", two, "seconds"], then="percent") == "12"
    assert held(["steps", 2, "seconds"], 1) == "300.0"
    assert held(["tokens", 1]) == "2,048"
    assert held(["tokens", 1], times=["tokens", 0]) == "32,768"
    assert held(["tokens", 1], times=["tokens", 1], over=["tokens", 0]) == "262,144"


@pytest.mark.parametrize(
    ("at", "message"),
    [
        (["stages"], r"times.json has no «stages»; there are steps, tokens, none$"),
        (
            ["steps", {"step": "verify"}, "minutes"],
            r"has no «steps / {step: verify} / minutes»; there are step, seconds",
        ),
        (["steps", {"step": "figures"}, "seconds"], r"has 2 elements at «steps / {step: figures}», where one is to be$"),
        (["steps", {"step": "test"}, "seconds"], r"has no elements at «steps / {step: test}», where one is to be$"),
        (["steps", {"cores": None}, "seconds"], r"has no elements at «steps / {cores: None}»"),
        (["steps", 3], r"has no «steps / 3»$"),
        (["tokens", "1"], r"has no «tokens / 1»$"),
        (["none", "x"], r"has no «none / x»$"),
        (["steps"], r"«steps» is no number$"),
        (["steps", 2, "passed"], r"«steps / 2 / passed» is no number$"),
        (["steps", 2, "by"], r"«steps / 2 / by» is no number$"),
    ],
)
def test_what_a_file_does_not_hold_is_named(held, at, message):
    with pytest.raises(prose.ProseError, match="^s-2: n: .*" + message.removeprefix("^")):
        held(at)
    with pytest.raises(prose.ProseError, match=message):
        held(["tokens", 0], over=at)
    with pytest.raises(prose.ProseError, match=message):
        held(["tokens", 0], times=at)


def test_a_number_of_a_file_says_what_is_read(held, tmp_path):
    for more, message in (
        ({"weight": 2}, "unknown key `weight` of a number of a file; there are at, digits, file, over, then, times"),
        ({"then": "hours"}, "there is no then 'hours'; there are none, percent, .*minutes, gib"),
        ({"over": ["none"]}, "times.json: «none» is zero and divides nothing"),
    ):
        with pytest.raises(prose.ProseError, match=f"^s-2: n: .*{message}"):
            held(["tokens", 0], **more)
    (tmp_path / "cut.json").write_text('{"a": ')
    for spec, message in (
        ({"file": str(tmp_path / "away.json"), "at": ["a"], "digits": 0}, "away.json cannot be read: No such file"),
        ({"file": str(tmp_path / "cut.json"), "at": ["a"], "digits": 0}, "cut.json is no JSON"),
        ({"file": str(tmp_path / "times.json"), "digits": 0}, "a number of a file needs `at`"),
        ({"file": str(tmp_path / "times.json"), "at": ["none"]}, "a number of a file needs `digits`"),
    ):
        with pytest.raises(prose.ProseError, match=f"^s-2: n: .*{message}"):
            prose.values(prose.Sentence("s-2", "{n}", {"n": spec}), claims.Tables({}))


def test_numbers_of_a_file_are_written_and_traced(tmp_path):
    path = tmp_path / "times.json"
    path.write_text(json.dumps(TIMES))
    spec = {"file": str(path), "at": ["steps", {"step": "verify"}, "seconds"], "then": "minutes", "digits": 0}
    one = prose.Sentence("s-2", "it takes {minutes} min.", {"minutes": spec})
    document = "Here it takes 17\nmin. There 18."
    tables = claims.Tables({})
    assert prose.wrong("it takes 6 min.", [one], tables) == ["s-2: it takes 5 min."]
    assert prose.corrected("Here it takes 17 min. There 18.", [one], tables) == "Here it takes 5 min. There 18."
    assert prose.untraced(document, [one], []) == ["18 in «Here There 18.»"]
    first, second = prose.numbers(document, [one], [], {"t": "data/t.csv"})
    assert (first.kind, first.source, first.id) == (prose.COMPUTED, str(path), "s-2-minutes")
    assert second.kind == prose.UNTRACED


def test_units_of_a_table(tables):
    spec = {"model": "a", "digits": 2, "table": "t", "statistic": "greatest"}
    shown = {"m": {**spec, "column": "k", "then": "minutes"}, "g": {**spec, "then": "gib", "digits": 5}}
    assert prose.values(prose.Sentence("s-3", "{m} {g}", shown), tables) == {"m": "0.03", "g": "0.00043"}


# ------------------------------------------------------------------------------------------------------- the README


@pytest.fixture(scope="module")
def committed():
    return prose.read()


def test_computed_numbers_of_the_readme(committed, tables_as_committed):
    document = (ROOT / "README.md").read_text(encoding="utf-8")
    assert prose.wrong(document, committed[0], prose.tables()) == [], "run: python -m prunelib.lab.prose README.md"


def test_every_number_of_the_readme_has_an_origin(committed):
    document = (ROOT / "README.md").read_text(encoding="utf-8")
    lost = prose.untraced(document, *committed) + prose.untraced_words(document, *committed)
    assert lost == [], "say in data/numbers.yaml how it is computed, or what made it"


def test_every_number_is_traced_to_its_line_and_file(committed, capsys):
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    found = prose.trace("README.md")
    for line in found:
        place, shown, kind, name, source = re.fullmatch(r"README\.md:(\d+): (\S+)  (\w+)  (\S+)  (.+)", line).groups()
        assert shown in lines[int(place) - 1]
        assert kind in (prose.COMPUTED, prose.FOUND, prose.STATED), line
        assert (name == "–") == (kind != prose.COMPUTED)
        assert source in prose.BY or all((ROOT / one).exists() for one in source.split(", ")), line
    computed = {f"{one.id}-{name}" for one in committed[0] for name in one.numbers}
    assert computed == {line.split("  ")[2] for line in found} - {"–"}
    before = (ROOT / "README.md").read_bytes()
    assert prose.main(["--trace", "README.md"]) == 0
    assert capsys.readouterr().out.splitlines() == found
    assert (ROOT / "README.md").read_bytes() == before, "only the other command writes"
    chapter = "notebooks/07_speed_and_memory.ipynb"
    assert any(
        re.fullmatch(rf"{chapter}:cell \d+: 2,048  computed  setting-new  data/speed/.*\.json", line)
        for line in prose.trace(chapter)
    )
    assert prose.main(["--trace"]) == prose.main(["--other", "README.md"]) == 2


def test_every_computed_number_has_an_id_and_what_is_committed(committed):
    """One id leads to one number, and from there to a file that data/SHA256SUMS or figures/ holds."""
    listed = yaml.safe_load((ROOT / prose.CHAPTER_NUMBERS).read_text(encoding="utf-8"))
    hashed = {line.split("  ", 1)[1] for line in (ROOT / "data/SHA256SUMS").read_text(encoding="utf-8").splitlines()}
    places = prose.tables().places
    for sentences in (committed[0], *(prose.read(prose.CHAPTER_NUMBERS, part)[0] for part in listed)):
        names = [f"{one.id}-{name}" for one in sentences for name in one.numbers]
        assert sorted(names) == sorted(set(names)), "an id is there twice"
        for one in sentences:
            for name, spec in one.numbers.items():
                files = [places.get(source) or f"data/published/{source}.csv" for source in prose._sources(spec)]
                files = [spec["file"]] if "file" in spec else files
                assert files, f"{one.id}-{name} is computed from nothing"
                for file in files:
                    known = file in hashed or any(other.startswith(f"{file}/") for other in hashed)
                    assert known or (file.startswith("figures/") and (ROOT / file).is_file()), f"{one.id}-{name}: {file}"


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
    (tmp_path / "box.runs.csv").write_text("run,n_samples\nr/1,128\n")
    stated = [prose.Stated("wins {share} % of {all} and {other}.", str(path))]
    assert prose.missing("It wins 55 % of 1,235 and 0.553.", stated) == []
    assert prose.missing("It wins 56 % of −1,234.6 and 0.55.", stated) == [
        f"56 of «wins {{share}} % of {{all}} and {{other}}.» is not in {path}"
    ]
    assert prose.missing("of 128 samples", [prose.Stated("of {n} samples", str(path))]) == []
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
    with pytest.raises(prose.ProseError, match="s-1: n: no rows of as printed"):
        prose.values(prose.Sentence("s-1", "{n}", {"n": {**spec, "where": {"k": 9}}}), tables)
