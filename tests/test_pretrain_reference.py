"""The training script: mixed windows, resumption, and what is saved."""

import json

import numpy as np
import pretrain_reference as pretraining
import pytest
import torch
from pretrain_reference import WINDOW, Reference, Windows, read_documents, tokenize, train, train_tokenizer, window_starts
from transformers import AutoModelForCausalLM, AutoTokenizer

SHAPE = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
TINY = {"llama": SHAPE | {"num_key_value_heads": 2}, "gpt_neox": SHAPE | {"tie_word_embeddings": False}}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    text = folder / "text.txt"
    text.write_text("\n<|endoftext|>\n".join(f"Returns the {i}-th eigenvalue of a symmetric matrix." for i in range(200)))
    train_tokenizer([text], folder)
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture
def arrays(tokenizer):
    rng = np.random.default_rng(0)
    names = ("english", "pydocs", "english_held_out", "pydocs_held_out")
    return {name: rng.integers(1, len(tokenizer), 3000).astype(np.uint16) for name in names}


def test_documents_are_read_from_text_and_jsonl(tmp_path):
    text = tmp_path / "a.txt"
    text.write_text("first\nline\n<|endoftext|>\nsecond\n")
    assert list(read_documents(text)) == ["first\nline", "second"]
    lines = tmp_path / "b.jsonl"
    lines.write_text("\n".join(json.dumps({"text": t, "split": s}) for t, s in [("kept", "train"), ("held out", "evaluation")]))
    assert list(read_documents(lines)) == ["kept"]


def test_the_tokenizer_round_trips_any_text_and_a_document_begins_with_the_end_of_text_token(tokenizer, tmp_path):
    text = "naïve 1234 →\n    indented"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert [tokenizer.decode([i]) for i in tokenizer("1234")["input_ids"]] == ["1", "2", "3", "4"]
    path = tmp_path / "a.txt"
    path.write_text("one\n<|endoftext|>\ntwo")
    ids = tokenize(path, tokenizer)
    assert ids.dtype == np.uint16
    assert (ids == tokenizer.bos_token_id).sum() == 2
    assert ids[0] == tokenizer.bos_token_id


def test_every_pass_covers_the_text_without_overlap():
    starts = window_starts(100 * WINDOW, 99, np.random.default_rng(0))
    assert len(np.unique(starts)) == len(starts) == 99
    assert np.diff(np.sort(starts)).min() == WINDOW
    with pytest.raises(ValueError, match="1000 tokens of text are too few"):
        window_starts(1000, 4, np.random.default_rng(0))


def test_windows_mix_sources_in_their_shares_and_are_pure_functions_of_the_seed():
    sources = [np.zeros(5000, np.uint16), np.ones(5000, np.uint16)]
    windows = Windows(sources, [0.75, 0.25], 400, seed=3)
    from_second = [int(windows[i]["input_ids"][0]) for i in range(400)]
    assert sum(from_second) == 100
    assert from_second == [int(Windows(sources, [0.75, 0.25], 400, seed=3)[i]["input_ids"][0]) for i in range(400)]


class _Killed(Exception):
    """Stands for the end of the process."""


@pytest.mark.slow
@pytest.mark.parametrize("family", TINY)
def test_a_killed_training_resumes_to_the_same_weights(family, tokenizer, arrays, tmp_path, monkeypatch):
    reference = Reference(family, TINY[family], tokens=12 * 2 * WINDOW, batch=2, warmup=2, held_out_windows=2)
    monkeypatch.setattr(pretraining, "VOCABULARY", len(tokenizer))

    def run(name):
        train(name, reference, tokenizer, arrays, tmp_path / f"work_{name}", tmp_path / name)

    run("whole")
    original = Windows.__getitem__
    seen = {"windows": 0}

    def until_killed(self, index):
        seen["windows"] += len(self) == reference.steps * reference.batch
        if seen["windows"] == 14:  # in the middle of step 7; the last checkpoint is that of step 6
            raise _Killed
        return original(self, index)

    monkeypatch.setattr(Windows, "__getitem__", until_killed)
    with pytest.raises(_Killed):
        run("resumed")
    assert not (tmp_path / "resumed").exists()
    monkeypatch.setattr(Windows, "__getitem__", original)
    run("resumed")

    whole, resumed = (AutoModelForCausalLM.from_pretrained(tmp_path / name).state_dict() for name in ("whole", "resumed"))
    assert whole.keys() == resumed.keys()
    for name, weight in whole.items():
        assert torch.equal(weight, resumed[name]), name
    logs = [json.loads((tmp_path / name / "training.json").read_text()) for name in ("whole", "resumed")]
    assert logs[0]["held_out_nats_per_token"] == logs[1]["held_out_nats_per_token"]
    losses = [[entry["loss"] for entry in log["log"] if "loss" in entry] for log in logs]
    assert losses[0] == losses[1]
    assert len(losses[0]) == reference.steps
