"""Texts and tasks as people have them: read as meant, or refused by file and line (docs/faults.md)."""

import gzip
import json
from functools import partial

import pyarrow
import pyarrow.parquet
import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from prunelib import models
from prunelib.io import project_root
from prunelib.text import corpora

TEXT = "first, naïve\n<|endoftext|>\nsecond"


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le with a mark"])
@pytest.mark.parametrize("newline", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("compressed", [False, True])
def test_encodings_and_newlines(encoding, newline, compressed, tmp_path):
    text = TEXT.replace("\n", newline)
    raw = ("\ufeff" + text).encode("utf-16-le") if "mark" in encoding else text.encode(encoding)
    (tmp_path / f"a.txt{'.gz' * compressed}").write_bytes(gzip.compress(raw) if compressed else raw)
    assert corpora.load(tmp_path / f"a.txt{'.gz' * compressed}").documents == ("first, naïve", "second")


def test_utf_16_without_a_mark_and_latin_1_are_refused(tmp_path):
    for encoding, message in (("utf-16-le", "holds NUL bytes"), ("latin-1", "damaged or not UTF-8")):
        (tmp_path / "a.txt").write_bytes(TEXT.encode(encoding))
        with pytest.raises(ValueError, match=rf"a\.txt .*{message}|a\.txt {message}"):
            corpora.load(tmp_path / "a.txt")


@pytest.mark.parametrize(
    ("name", "lines", "message"),
    [
        ("a.jsonl", ['{"text": "good"}', "", '{"text": null}'], "line 3 of a.jsonl: needs the field 'text'"),
        ("a.jsonl", ['{"text": "good"}', "null"], "line 2 of a.jsonl holds a NoneType"),
        ("a.jsonl", ['{"text": "good"}', '{"text": 3}'], "line 2 of a.jsonl: needs the field 'text'.*as strings"),
        ("a.json", ['[{"text": "good"},', "{}]"], "record 2 of a.json: needs"),
        ("a.json", ['[{"text": "good"},', "7]"], "record 2 of a.json holds a int"),
    ],
)
def test_null_and_odd_records_are_named_by_file_and_line(name, lines, message, tmp_path):
    (tmp_path / name).write_text("\n".join(lines))
    with pytest.raises(ValueError, match=message):
        corpora.load(tmp_path / name)


def parquet(path, *texts):
    path.parent.mkdir(exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.table({"text": list(texts)}), path)


def test_paths_are_no_patterns(tmp_path):
    parquet(tmp_path / "part[1].parquet", "the right text")
    parquet(tmp_path / "part1.parquet", "another text")
    parquet(tmp_path / "data [v2]" / "train.parquet", "fine")
    assert corpora.load(tmp_path / "part[1].parquet").documents == ("the right text",)
    assert corpora.load(tmp_path / "data [v2]" / "train.parquet").documents == ("fine",)
    (tmp_path / "part1.parquet.gz").write_bytes(gzip.compress((tmp_path / "part1.parquet").read_bytes()))
    assert corpora.load(tmp_path / "part1.parquet.gz").documents == ("another text",)
    copy = tmp_path / "copy [1]*" / "en"
    copy.mkdir(parents=True)
    (copy / "c4-train.00000-of-01024.json.gz").write_bytes(gzip.compress(b'{"text": "one"}\n{"text": "two"}\n'))
    assert corpora.load("c4", "train", data_dir=copy.parent).documents == ("one", "two")
    (copy / "c4-train.00000-of-01024.json.gz").write_bytes(gzip.compress(b'{"text": "one"}\n{"url": "two"}\n'))
    with pytest.raises(ValueError, match=r"line 2 of c4-train.*needs the field 'text'"):
        corpora.load("c4", "train", data_dir=copy.parent)
    parquet(tmp_path / "null.parquet", "one", None)
    with pytest.raises(ValueError, match=r"record 2 of null\.parquet: needs"):
        corpora.load(tmp_path / "null.parquet")


def test_a_folder_is_its_files(tmp_path):
    for name in ("b.txt", "a.txt", "notes.md", ".hidden.txt"):
        (tmp_path / name).write_text(name)
    assert corpora.load(tmp_path).documents == ("a.txt", "b.txt")
    (tmp_path / "test.txt").write_text("test")
    assert corpora.load(tmp_path, "test").documents == ("test",)
    with pytest.raises(FileNotFoundError, match="no file of the split 'train', only of a, b, test"):
        corpora.load(tmp_path)


def test_colons_in_names(tmp_path, monkeypatch):
    (tmp_path / "10:30").mkdir()
    (tmp_path / "10:30" / "a:b.txt").write_text("text")
    monkeypatch.chdir(tmp_path)
    for path in (tmp_path / "10:30" / "a:b.txt", "10:30/a:b.txt", "absent:b.txt", "10:30"):
        assert corpora.named(str(path)) == (str(path), "train")
    assert corpora.named("pydocs:evaluation") == ("pydocs", "evaluation")


def test_inputs_are_found_by_one_rule(tmp_path, monkeypatch):
    """A relative path is read in the working directory where it is there, else below the project root."""
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "test.txt").write_text("here")
    monkeypatch.chdir(tmp_path)
    assert corpora.load("own/test.txt").documents == ("here",)
    assert corpora.load("wikitext2", "test", data_dir="own").documents == ("here",)
    assert models.load_tokenizer("data/reference/ref-llama-32l").eos_token_id is not None


@pytest.fixture(scope="module")
def ask():
    """Tasks on a random model: (task, records, …) → `TaskResults`."""
    pytest.importorskip("lm_eval")
    from prunelib.evaluation.tasks import evaluate_tasks

    tokenizer = models.load_tokenizer(project_root() / "data" / "reference" / "ref-llama-32l")
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=4096, max_position_embeddings=512, **sizes)).eval()
    return partial(evaluate_tasks, model, tokenizer, bos=True, progress=False)


def written(folder, task, rows):
    (folder / task).mkdir(exist_ok=True)
    (folder / task / "test.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / task / "train.jsonl").write_text(json.dumps(rows[0]))
    return folder


def arc(question="q", choices=("x", "y"), key="A", **changes):
    row = {"id": "1", "question": question, "choices": {"text": list(choices), "label": list("ABCD")[: len(choices)]}}
    return row | {"answerKey": key} | changes


LONG = "A tree stood there. " * 200


@pytest.mark.parametrize(
    ("second", "message"),
    [
        (
            {name: value for name, value in arc().items() if name != "question"},
            r"line 2 of test\.jsonl: .*the column 'question'",
        ),
        (arc(question=None), r"line 2 of test\.jsonl: .*reads the column 'question', which it lacks"),
        (arc(choices=("", "y")), "item 2 of task 'arc_easy': a choice is empty"),
        (arc(key="E"), "item 2 of task 'arc_easy': .*not in list"),
        (arc(id=1), r"line 2 of test\.jsonl: 'id' is 1, of another type than in the records before"),
        (arc(choices=(LONG, "y")), "the answer .*A tree stood.* has .* tokens, the model reads 512"),
    ],
    ids=["no question", "null question", "empty choice", "no such answer", "two types", "longer than the model"],
)
def test_every_record_is_checked_and_named(ask, second, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        ask(["arc_easy"], data_dir=written(tmp_path, "arc_easy", [arc(), second]))


def test_prompts_that_are_cut_are_counted(ask, tmp_path):
    rows = [{"question": "q", "answer": "#### 1"}, {"question": LONG, "answer": "#### 1"}]
    found = ask(["gsm8k"], data_dir=written(tmp_path, "gsm8k", rows))
    assert (found["gsm8k"].n, found.settings["truncated_requests"]) == (2, 1)
