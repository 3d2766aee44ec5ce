"""Faults produced on purpose (docs/faults.md): what was finished stays, and the error names the value and the remedy."""

import errno
import gzip
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pandas
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertLMHeadModel

from prunelib import io, models
from prunelib.criteria import statistics
from prunelib.evaluation import layer_set_perplexity, perplexity
from prunelib.lab import runs as results
from prunelib.models.memory import OutOfMemory
from prunelib.scale import offload
from prunelib.text import corpora, embedded

ARGUMENTS = {"experiment": "test", "parameters": {}, "provenance": {}, "seconds": 0.1}


@pytest.fixture
def older(tmp_path):
    """A finished result where the next run writes."""
    return results.write_run(tmp_path / "runs" / "a.json", rows=[{"metric": "older", "value": 1.0}], **ARGUMENTS)


def is_older(path: Path) -> bool:
    return results.read_run(path)["rows"] == [{"metric": "older", "value": 1.0}]


@pytest.fixture
def saved(tiny_llama, tmp_path):
    models.save(tiny_llama, None, tmp_path / "model")
    return tmp_path / "model"


def left_behind(path: Path, suffix: str) -> Path:
    """The name under which a process that is dead now began to write `path`."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return path.parent / io.temporary_prefix(path).replace(f"-{os.getpid()}.", f"-{process.pid}.x{suffix}")


KILLED = """
import os, signal, sys
from prunelib.lab import runs as results
os.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
rows = [{"metric": "new", "value": 2.0}]
results.write_run(sys.argv[1], experiment="test", parameters={}, rows=rows, provenance={}, seconds=1.0)
"""


def test_a_writer_killed_before_its_rename_leaves_the_older_file(older):
    done = subprocess.run([sys.executable, "-c", KILLED, str(older)], capture_output=True, text=True, timeout=60)
    assert done.returncode == -signal.SIGKILL, done.stderr
    (left,) = set(older.parent.iterdir()) - {older}
    assert json.loads(left.read_text())["rows"] == [{"metric": "new", "value": 2.0}], "everything but the rename was done"
    assert is_older(older)
    assert results.collect(older.parent)["metric"].tolist() == ["older"], "what is half done is no result"
    results.write_run(older, rows=[], **ARGUMENTS)
    assert list(older.parent.iterdir()) == [older], "the next write has cleaned up"


def test_what_killed_processes_left_is_told_from_what_is_being_written(tmp_path):
    path = tmp_path / "stats.safetensors"
    gone, other = left_behind(path, ".tmp"), left_behind(tmp_path / "stats.safetensors.json", ".tmp")
    being_written = tmp_path / f"{io.temporary_prefix(path)}y.tmp"
    elsewhere = gone.with_name(gone.name.replace(platform.node(), "zzzzzz"))
    for file in (gone, other, being_written, elsewhere):
        file.write_bytes(b"half")
    assert io.leftovers(path) == [gone]
    io.write_text(path, "whole")
    assert sorted(tmp_path.iterdir()) == sorted([path, other, being_written, elsewhere])


def test_a_model_moved_aside_comes_back(saved, tiny_llama, tmp_path):
    """Killed between the two renames of a save that replaces a folder: the old one had gone, the new one had not come."""
    left = left_behind(saved, "")
    left.mkdir()
    saved.rename(left / "old")
    shutil.copytree(left / "old", left / "new")
    again = models.load(saved)
    assert torch.equal(again.lm_head.weight, tiny_llama.lm_head.weight)
    models.save(tiny_llama, None, saved, overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["model"], "what was left is gone"


@pytest.mark.parametrize(
    ("number", "remedy"), [(errno.ENOSPC, "make room on this disk"), (errno.EROFS, "choose another folder")]
)
def test_a_disk_that_takes_no_more_keeps_the_older_file_whatever_is_written(tmp_path, monkeypatch, number, remedy):
    writers = {
        "a.json": lambda path, value: io.write_json(path, {"value": value}),
        "a.csv": lambda path, value: results.write_table(pandas.DataFrame({"value": [value]}), path),
        "a.safetensors": lambda path, value: statistics.from_states(torch.full((1, 3, 4, 8), float(value))).save(path, {}),
    }
    for name, write in writers.items():
        write(tmp_path / name, 1)
    before = {name: (tmp_path / name).read_bytes() for name in writers}

    def fails(_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", fails)
    for name, write in writers.items():
        with pytest.raises(OSError, match=f"{remedy}.*then start again; what was there is unchanged") as caught:
            write(tmp_path / name, 2)
        assert caught.value.filename == str(tmp_path / name)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_truncated_safetensors(saved, tmp_path):
    weights, sums = saved / "model.safetensors", tmp_path / "stats.safetensors"
    statistics.from_states(torch.randn(1, 3, 4, 8)).save(sums, {})
    for file in (weights, sums):
        os.truncate(file, file.stat().st_size - 8)
    with pytest.raises(models.CheckpointError, match="truncated or damaged"):
        offload.OffloadedModel(saved, dtype="float32")
    with pytest.raises(ValueError, match="is not a complete safetensors file"):
        statistics.LayerStats.load(sums)


@pytest.fixture
def corpus(tmp_path, monkeypatch):
    """An embedded corpus of four lines."""
    path = tmp_path / "embedded.jsonl"
    lines = [{"name": f"n{index}", "split": "calibration", "text": "words " * 50} for index in range(4)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    monkeypatch.setattr(embedded, "corpus_path", lambda _: path)
    return path


@pytest.mark.parametrize("damage", [b"{", b"[]", b"{}", b'"n2"', b'{"name": "n2", "split": "calibration"}', b"\xff\xfe"])
def test_a_corpus_with_a_damaged_line(corpus, damage):
    lines = corpus.read_bytes().splitlines()
    corpus.write_bytes(b"\n".join([*lines[:2], damage, lines[3]]) + b"\n")
    with pytest.raises(ValueError, match="delete the file, it is rebuilt"):
        corpora.load("pydocs", "calibration")


def test_a_corpus_with_flipped_bytes(tmp_path):
    path = tmp_path / "a.txt.gz"
    whole = gzip.compress(" ".join(map(str, range(5000))).encode())
    for place in range(20, len(whole), 997):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0xFF]) + whole[place + 1 :])
        with pytest.raises(ValueError, match="fetch or convert it again"):
            corpora.load(path)
    pytest.importorskip("datasets")
    (tmp_path / "a.parquet").write_bytes(b"PAR1" + bytes(100) + b"PAR1")
    with pytest.raises(ValueError, match=r"a\.parquet is damaged or not Parquet"):
        corpora.load(tmp_path / "a.parquet")


def test_a_corpus_with_another_letter(corpus):
    with pytest.warns(embedded.ManifestMismatch) as caught:
        corpora.load("pydocs", "calibration")
    assert "pip install -r requirements.lock and delete" in str(caught[0].message)


def test_nan_weights(saved):
    weights = load_file(saved / "model.safetensors")
    weights["model.layers.3.mlp.up_proj.weight"][2] = float("nan")
    save_file(weights, saved / "model.safetensors", metadata={"format": "pt"})
    streamed = offload.OffloadedModel(saved, dtype="float32")
    with pytest.raises(RuntimeError, match="in the output of layer 3, batch 0"):
        offload.collect(streamed, torch.randint(3, 97, (4, 8)), batch_size=2, progress=False)


def test_the_tokenizer_of_another_model(saved, tiny_llama):
    windows = torch.tensor([[3, 500]])
    streamed = offload.OffloadedModel(saved, dtype="float32")
    for work in (
        lambda: statistics.collect(tiny_llama, windows, progress=False),
        lambda: perplexity(tiny_llama, windows),
        lambda: offload.collect(streamed, windows, progress=False),
    ):
        with pytest.raises(ValueError, match="token ids") as caught:
            work()
        assert "token ids 3 to 500, but the model knows 0 to 96" in str(caught.value)
    with pytest.raises(models.CheckpointError, match="cannot load a tokenizer from"):
        models.load_tokenizer(saved)
    with torch.no_grad():
        tiny_llama.lm_head.weight *= 100  # sure of itself, and wrong, as a trained model is on another one's tokens
    with pytest.warns(UserWarning, match="chance") as caught:
        layer_set_perplexity(tiny_llama, torch.randint(3, 97, (2, 8)), [(), (1,)], progress=False)
    assert "another model's tokenizer, or damaged weights?" in str(caught[0].message)


def test_a_model_with_unknown_layers(saved):
    encoder = BertLMHeadModel(BertConfig(vocab_size=97, hidden_size=32, num_hidden_layers=2, num_attention_heads=4))
    with pytest.raises(models.UnsupportedModel, match=r"add its path to prunelib\.models\.architectures\.PATHS"):
        models.remove_layers(encoder, (0,))
    config = json.loads((saved / "config.json").read_text())
    (saved / "config.json").write_text(json.dumps(config | {"model_type": "llamma"}))
    with pytest.raises(models.CheckpointError, match="cannot read the configuration of"):
        models.load(saved)


def test_no_network(monkeypatch):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")  # nobody answers there
    assert io.hub_unreachable()
    for load in (models.load, models.load_tokenizer):
        with pytest.raises(models.CheckpointError, match="hf download nobody/model --local-dir FOLDER"):
            load("nobody/model")
    pytest.importorskip("datasets")
    with pytest.raises(RuntimeError, match="hf download"):
        corpora.load("c4", "train")


def test_no_gpu(saved, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for load in (models.load, lambda folder, device: offload.OffloadedModel(folder, dtype="float32", device=device)):
        with pytest.raises(ValueError, match="use device='cpu'"):
            load(saved, device="cuda")


def test_out_of_memory_in_the_package(tiny_llama):
    """The real error of a processor, the one of an accelerator, and Python's own."""
    windows = torch.randint(3, 97, (2, 8))

    def on_a_device(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nMore words")

    def in_python(*_):
        bytearray(10**15)

    for fails in (lambda *_: torch.empty(10**15), on_a_device, in_python):
        hook = tiny_llama.model.layers[2].register_forward_hook(fails)
        with pytest.raises(OutOfMemory) as caught:
            statistics.collect(tiny_llama, windows, progress=False)
        assert "take batch_size=4 instead of 8" in str(caught.value)
        assert "\n" not in str(caught.value)
        with pytest.raises(OutOfMemory, match="take shorter windows or a smaller dtype"):
            perplexity(tiny_llama, windows, batch_size=1)
        hook.remove()
    statistics.collect(tiny_llama, windows, progress=False)  # nothing is left over
