"""Corpora: what is read from where, and windows that are the same bytes for the same seed."""

import gzip
import json
import lzma
import re
import socket

import numpy as np
import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from prunelib.text import corpora
from prunelib.text.corpora import Corpus, load
from prunelib.text.windows import consecutive_windows, sample_windows, token_stream, windows_sha256

WORDS = [f"w{number}" for number in range(500)]


def word_tokenizer(**special: str) -> PreTrainedTokenizerFast:
    """One token per word: w0 is 0, w1 is 1, …; then the special tokens."""
    vocabulary = {word: number for number, word in enumerate([*WORDS, "<unk>", *dict.fromkeys(special.values())])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", **special)


def corpus(*documents: str) -> Corpus:
    return Corpus("toy", "train", documents, "made here")


def counting(count: int) -> Corpus:
    """One document whose token at position p is p."""
    return corpus(" ".join(WORDS[:count]))


def test_text_file_is_cut_at_document_ends_only(tmp_path):
    text = "first\n\nstill first\n<|endoftext|>\nsecond <|endoftext|> goes on\n<|endoftext|>\n"
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    (tmp_path / "a.txt.xz").write_bytes(lzma.compress(text.encode()))
    plain, packed = load(tmp_path / "a.txt"), load(str(tmp_path / "a.txt.xz"), "evaluation")
    assert plain.documents == ("first\n\nstill first", "second <|endoftext|> goes on")
    assert packed.documents == plain.documents and packed.sha256 == plain.sha256
    assert (plain.name, plain.split, packed.name, packed.split) == ("a.txt", "train", "a.txt.xz", "evaluation")


def test_json_forms_agree(tmp_path):
    records = [{"text": "one ä"}, {"text": "two\nlines"}, {"text": "  "}]
    lines = "\n".join(json.dumps(record) for record in records) + "\n\n"
    (tmp_path / "a.jsonl").write_text(lines, encoding="utf-8")
    (tmp_path / "a.json").write_text(json.dumps(records, indent=1), encoding="utf-8")
    (tmp_path / "a.json.gz").write_bytes(gzip.compress(lines.encode()))
    (tmp_path / "a.jsonl.xz").write_bytes(lzma.compress(lines.encode()))
    Dataset.from_list(records).to_parquet(tmp_path / "a.parquet")
    found = {path.name: load(path).documents for path in tmp_path.iterdir()}
    assert len(found) == 5
    assert set(found.values()) == {("one ä", "two\nlines")}


def test_instruction_records_take_the_alpaca_prompt(tmp_path):
    records = [
        {"instruction": "Add.", "input": "1 and 2", "output": "3"},
        {"instruction": "Greet.", "input": "", "output": "Hello"},
    ]
    (tmp_path / "a.json").write_text(json.dumps(records), encoding="utf-8")
    request = "Write a response that appropriately completes the request.\n\n### Instruction:\n"
    begin, more = "Below is an instruction that describes a task", ", paired with an input that provides further context"
    assert load(tmp_path / "a.json").documents == (
        f"{begin}{more}. {request}Add.\n\n### Input:\n1 and 2\n\n### Response:\n3",
        f"{begin}. {request}Greet.\n\n### Response:\nHello",
    )


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "good"}\n{"text": \n', "line 2 of a.jsonl is not valid JSON"),
        ("a.jsonl", b'{"text": "good"}\n"bad"\n', "line 2 of a.jsonl holds a str"),
        ("a.jsonl", b'{"text": "good"}\n{"body": "bad"}\n', "line 2 of a.jsonl: needs the field 'text'.*it has body"),
        ("a.txt", b" \n<|endoftext|>\n\n", "is empty"),
        ("a.txt", b"\xff\xfe\x00", "a.txt is damaged or not UTF-8"),
        ("a.jsonl.gz", gzip.compress(b'{"text": "cut"}' * 999, mtime=0)[:-20], "a.jsonl.gz is damaged"),
        ("a.pdf", b"", "unknown corpus .*a.pdf.*pydocs.*wikitext2.*jsonl"),
    ],
)
def test_bad_files_are_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load(tmp_path / name)


@pytest.mark.parametrize(
    ("arguments", "settings", "error", "message"),
    [
        (("wikitext",), {}, ValueError, "unknown corpus 'wikitext'"),
        (("alpaca", "test"), {}, ValueError, "'alpaca' has no split 'test': choose one of train"),
        (("absent.txt",), {}, FileNotFoundError, r"absent\.txt"),
        (("c4",), {"data_dir": "absent"}, FileNotFoundError, "is no folder"),
        (("c4",), {"max_documents": 0}, ValueError, "max_documents=0"),
    ],
)
def test_bad_requests_are_named(arguments, settings, error, message):
    with pytest.raises(error, match=message):
        load(*arguments, **settings)


@pytest.mark.parametrize(("name", "split"), [("wikitext2", "evaluation"), ("c4", "calibration")])
def test_without_network_and_copy_the_error_names_the_remedy(monkeypatch, name, split):
    def refuse(*arguments, **options):
        raise OSError("no network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    # The client, which retries for long, must not be reached.
    monkeypatch.setattr("datasets.load_dataset", lambda *arguments, **options: pytest.fail("asked"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    with pytest.raises(RuntimeError, match=rf"corpus '{name}' .*is on the hub, which cannot be reached.*data_dir=FOLDER"):
        load(name, split)


def test_hub_is_asked_for_the_pinned_revision(monkeypatch):
    asked = {}

    def load_dataset(path, **options):
        if path == "tatsu-lab/alpaca":
            raise ConnectionError("Couldn't reach it\nand much more")
        asked[path] = options
        return [{"text": " = A = \n"}, {"text": ""}, {"text": " b \n"}]

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    monkeypatch.setattr(corpora, "require_hub", lambda *arguments: None)
    assert load("wikitext2", "evaluation").documents == (" = A = \n\n\n\n\n b \n",)
    assert load("c4", "evaluation").documents == (" = A = \n", " b \n")
    assert load("c4", "evaluation", max_documents=1).documents == (" = A = \n",)
    assert all(re.fullmatch("[0-9a-f]{40}", options["revision"]) and options["streaming"] for options in asked.values())
    assert asked["Salesforce/wikitext"]["data_files"] == {"test": "wikitext-2-raw-v1/test-*.parquet"}
    assert asked["allenai/c4"]["data_files"] == {"validation": "en/c4-validation.00000-of-00008.json.gz"}
    with pytest.raises(RuntimeError, match=r"alpaca could not be read \(ConnectionError: Couldn't reach it\).*data_dir"):
        load("alpaca")


def test_an_offline_copy_is_read_as_the_hub_lays_it_out(tmp_path):
    (tmp_path / "wikitext-2-raw-v1").mkdir()
    rows = Dataset.from_list([{"text": " = A = \n"}, {"text": ""}])
    rows.to_parquet(tmp_path / "wikitext-2-raw-v1" / "test-00000-of-00001.parquet")
    found = load("wikitext2", "evaluation", data_dir=tmp_path)
    assert (found.documents, found.split) == ((" = A = \n\n\n",), "test")
    assert str(tmp_path) not in found.source
    shard = tmp_path / "en" / "c4-train.00000-of-01024.json.gz"
    shard.parent.mkdir()
    shard.write_bytes(gzip.compress(b"".join(b'{"text": "n%d"}\n' % number for number in range(30))))
    assert load("c4", data_dir=tmp_path, max_documents=3).documents == ("n0", "n1", "n2")
    with pytest.raises(FileNotFoundError, match=r"no offline copy of 'c4' \(validation\).*hf download.*validation"):
        load("c4", "evaluation", data_dir=tmp_path)


def test_a_plain_copy_is_one_file_for_each_split(tmp_path):
    (tmp_path / "wikitext").mkdir()
    (tmp_path / "wikitext" / "wiki.valid.raw").write_text(" = A = \n \n one \n")
    (tmp_path / "wikitext" / "validation.jsonl").write_text('{"page": "as lm-eval reads it"}')
    (tmp_path / "c4").mkdir()
    (tmp_path / "c4" / "sample.jsonl").write_text('{"text": "a"}\n{"text": "b"}\n')
    assert load("wikitext2", "validation", data_dir=tmp_path).documents == (" = A = \n\n\n\n\n one \n",)
    assert load("c4", "calibration", data_dir=tmp_path, max_documents=1).documents == ("a",)
    assert load("c4", data_dir=tmp_path / "c4").documents == ("a", "b")
    with pytest.raises(FileNotFoundError, match=r"no offline copy of 'c4' \(validation\).*validation\.jsonl"):
        load("c4", "evaluation", data_dir=tmp_path)  # a sample of the training text is not the evaluation text


def test_a_raw_file_is_the_rows_of_wikitext(tmp_path):
    raw = " \n = A = \n \n one \n two \n \n \n = B = \n \n three \n \n"
    rows = ["", " = A = \n", "", " one \n", " two \n", "", "", " = B = \n", "", " three \n", ""]
    (tmp_path / "wiki.test.raw").write_text(raw, encoding="utf-8")
    assert load(tmp_path / "wiki.test.raw").documents == ("\n\n".join(rows),)


def test_stream_puts_the_end_of_text_between_documents():
    tokenizer = word_tokenizer(eos_token="</s>")
    end = tokenizer.eos_token_id
    many = corpus(*(f"w{number} w0" for number in range(1, 200)))
    expected = [token for number in range(1, 200) for token in (end, number, 0)][1:]
    assert token_stream(many, tokenizer).tolist() == expected
    assert token_stream(many, word_tokenizer()).tolist() == [token for token in expected if token != end]


@pytest.mark.parametrize("bos", [False, True])
def test_consecutive_windows_cover_the_text_once(bos):
    tokenizer = word_tokenizer(bos_token="<s>")
    windows = consecutive_windows(counting(100), tokenizer, 9, bos=bos)
    content = windows[:, 1:] if bos else windows
    assert content.flatten().tolist() == list(range(100 // content.shape[1] * content.shape[1]))
    assert not bos or set(windows[:, 0].tolist()) == {tokenizer.bos_token_id}
    # A few windows stand for the whole text, not for its beginning.
    spread = [i * len(windows) // 3 for i in range(3)]
    assert torch.equal(consecutive_windows(counting(100), tokenizer, 9, limit=3, bos=bos), windows[spread])


def test_sampled_windows_are_pieces_of_the_text_without_overlap():
    for seed in range(20):
        windows = sample_windows(counting(100), word_tokenizer(bos_token="<s>"), 11, 9, seed, bos=True)[:, 1:]
        starts = windows[:, 0]
        assert torch.equal(windows, starts[:, None] + torch.arange(8))
        assert torch.sort(starts).values.diff().min() >= 8
        assert windows.max() < 100


def test_every_placement_is_equally_likely():
    # 2 windows of 2 tokens in 5: the pairs of starts are (0, 2), (0, 3), (1, 3).
    found = [sample_windows(counting(5), word_tokenizer(), 2, 2, seed)[:, 0].tolist() for seed in range(600)]
    pairs, counts = np.unique(np.sort(found, axis=1), axis=0, return_counts=True)
    assert pairs.tolist() == [[0, 2], [0, 3], [1, 3]]
    assert counts.min() > 150  # 200 expected, standard deviation 12
    assert 240 < sum(first < second for first, second in found) < 360  # their order is random too


def test_same_seed_same_bytes_other_seed_other_windows():
    before = torch.get_rng_state()
    first, again, other = (sample_windows(counting(400), word_tokenizer(), 8, 16, seed) for seed in (3, 3, 4))
    assert torch.equal(torch.get_rng_state(), before), "the global generator must be left alone"
    assert torch.equal(first, again)
    assert windows_sha256(first) == windows_sha256(again) != windows_sha256(other)
    # Golden: other numbers would mean that a library changed what a seed gives, and with it every committed result.
    assert first[:, 0].tolist() == [347, 223, 110, 296, 23, 64, 80, 312]


def test_short_corpus_gives_overlap_with_a_warning_and_too_short_an_error():
    tokenizer = word_tokenizer(bos_token="<s>")
    with pytest.warns(UserWarning, match=r"has 20 tokens, 9 separate windows need 72: they overlap"):
        windows = sample_windows(counting(20), tokenizer, 9, 8, seed=0)
    assert torch.equal(windows, windows[:, :1] + torch.arange(8))
    assert sample_windows(counting(7), tokenizer, 1, 8, seed=0, bos=True).shape == (1, 8)
    for bos, needed in ((False, 9), (True, 8)):
        with pytest.raises(ValueError, match=rf"corpus 'toy' \(train\) has 7 tokens; a window needs {needed}"):
            sample_windows(counting(7), tokenizer, 1, 9, seed=0, bos=bos)
    with pytest.raises(ValueError, match="bos=True, but the tokenizer has no bos_token"):
        sample_windows(counting(50), word_tokenizer(), 1, 8, seed=0, bos=True)
