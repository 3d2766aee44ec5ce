"""Faults produced on purpose, and the table of them in FAULTS.md: its messages are the real ones, its tests exist."""

import ast
import contextlib
import errno
import functools
import gzip
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import numpy as np
import papermill
import psutil
import pytest
import torch
from batch_project import Project, write_notebook
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertLMHeadModel

from prunelib import evaluation, io, models
from prunelib.criteria import statistics
from prunelib.depth import search
from prunelib.lab import batch, provenance
from prunelib.lab import run_notebook as notebook
from prunelib.lab import runs as results
from prunelib.models.memory import OutOfMemory
from prunelib.scale import offload as streaming
from prunelib.text import corpora
from prunelib.text import embedded as pydocs

ROOT = Path(__file__).resolve().parents[1]
FAULTS = (
    *("kernel killed", "machine killed mid-write", "disk full", "read-only results folder", "truncated safetensors"),
    *("corrupted corpus", "NaN weights", "wrong tokenizer", "model with unknown layers", "two batches on one folder"),
    *("Ctrl-C", "no network", "no GPU", "out of memory"),
)


def table() -> dict[str, tuple[list[str], list[str]]]:
    """Fault → its messages and its tests."""
    lines = [line for line in (ROOT / "FAULTS.md").read_text(encoding="utf-8").splitlines() if line.startswith("| ")][1:]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {fault: (re.findall(r"`([^`]+)`", said), tests.split()) for fault, _, said, tests in rows}


def says(message: object, fault: str, number: int) -> bool:
    """Whether a message is that of the table; there `…` stands for anything and code has no backticks."""
    wanted = ".*".join(map(re.escape, table()[fault][0][number].split("…")))
    found = str(message).strip().replace("`", "")
    assert re.fullmatch(wanted, found), f"FAULTS.md says\n{table()[fault][0][number]}\nbut it is\n{found}"
    return True


# ----------------------------------------------------------------------------------------------------------- the table


def test_the_table_covers_every_fault_and_names_tests_that_exist():
    rows = table()
    assert set(rows) == set(FAULTS)
    for fault, (messages, tests) in rows.items():
        assert messages, fault
        assert tests, fault
        for name in tests:
            file, _, test = name.partition("::")
            assert test in found_in(file), name


@functools.cache
def found_in(file: str) -> set[str]:
    tree = ast.parse((ROOT / "tests" / f"{file}.py").read_text(encoding="utf-8"))
    return {item.name for item in tree.body if isinstance(item, ast.FunctionDef) and item.name.startswith("test_")}


def test_every_message_of_the_table_is_held_against_the_real_one():
    source = Path(__file__).read_text(encoding="utf-8")
    used = {(fault, int(number)) for fault, number in re.findall(r'says\(.+, "([^"]+)", (\d)\)', source)}
    written = {(fault, number) for fault, (messages, _) in table().items() for number in range(len(messages))}
    assert written - used == {("machine killed mid-write", 0)}, "nobody is there to say it"
    assert used <= written
    own = {name for _, tests in table().values() for name in tests if name.startswith("test_faults::")}
    here = re.findall(r"^def (test_\w+)", source, re.MULTILINE)
    assert own == {f"test_faults::{name}" for name in here if not name.startswith(("test_the_table", "test_every_message"))}


# ------------------------------------------------------------------------------------------------------------- helpers

PARAMETERS = """
mode = "ok"  # how the run ends
batch_size = 8  # windows in one forward pass
stream = False  # layer by layer
output = "build/result.json"  # result
"""

WORK = """
import os, signal, time
print(batch_size, stream, flush=True)
if mode == "kill":
    os.kill(os.getpid(), signal.SIGKILL)
if mode == "sleep":
    time.sleep(100)
if mode == "memory":
    bytearray(10**15)
if mode == "full":
    with open("/dev/full", "w") as file:
        file.write("x")
if mode == "fill":
    with open(os.path.join(os.path.dirname(output), "fill.bin"), "wb") as file:
        while True:
            file.write(bytes(10**6))
"""

WRITE = """
from prunelib.lab.runs import write_run
rows = [{"metric": "one", "value": 1.0}]
_ = write_run(output, experiment="test", parameters={}, rows=rows, provenance={}, seconds=0.1)
"""

ARGUMENTS = {"experiment": "test", "parameters": {}, "provenance": {}, "seconds": 0.1}


@pytest.fixture
def nb(tmp_path):
    return write_notebook(tmp_path / "nb.ipynb", {"parameters": PARAMETERS, "work": WORK, "write": WRITE})


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


@contextlib.contextmanager
def mounted(folder: Path, options: str):
    """A small disk of its own, where this user may mount one."""
    folder.mkdir(exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("only an administrator may mount a disk")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def dead_process() -> int:
    """The number of a process that has ended."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def left_behind(path: Path, suffix: str) -> Path:
    """The name under which a process that is dead now began to write `path`."""
    prefix = provenance.temporary_prefix(path).replace(f"-{os.getpid()}.", f"-{dead_process()}.")
    return path.parent / f"{prefix}x{suffix}"


def wait_for(condition, seconds=60.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.1)


# ------------------------------------------------------------------------------------------------------- kernel killed


def test_a_killed_kernel_says_what_takes_less(nb, older, capfd):
    assert notebook.main([str(nb), str(older), "mode=kill"]) == 1
    error = capfd.readouterr().err.splitlines()[-1]
    assert says(error, "kernel killed", 0)
    assert is_older(older)


# --------------------------------------------------------------------------------------------- machine killed mid-write

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
    being_written = tmp_path / f"{provenance.temporary_prefix(path)}y.tmp"
    elsewhere = tmp_path / f".stats.safetensors.zzzzzz-{dead_process()}.x.tmp"
    for file in (gone, other, being_written, elsewhere):
        file.write_bytes(b"half")
    assert provenance.leftovers(path) == [gone]
    states = torch.randn(1, 3, 4, 8)
    statistics.from_states(states).save(path, {})
    assert sorted(tmp_path.iterdir()) == sorted([path, other, being_written, elsewhere])
    assert np.array_equal(statistics.LayerStats.load(path).norm, statistics.from_states(states).norm)


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


def test_a_journal_killed_in_its_first_line_starts_anew(tmp_path, monkeypatch):
    journal = tmp_path / "journal.jsonl"
    monkeypatch.setattr(os, "replace", lambda *_: os._exit(9))  # in a child alone
    child = os.fork()
    if child == 0:
        try:
            search._read_journal(journal, {"key": "a"})
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    monkeypatch.undo()
    assert not journal.exists(), "no half of a header, which the next call would refuse"
    assert search._read_journal(journal, {"key": "a"}) == {}
    assert [path.name for path in tmp_path.iterdir()] == ["journal.jsonl"]


# ----------------------------------------------------------------------------------------------------------- disk full


def test_a_disk_that_is_full_before_the_run(nb, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: types.SimpleNamespace(free=2**20))
    assert notebook.main([str(nb), str(tmp_path / "runs" / "a.json")]) == 2
    assert says(capsys.readouterr().err, "disk full", 0)
    monkeypatch.setattr(batch, "project_root", lambda: tmp_path)
    (tmp_path / "profile.yaml").write_text("{}")
    assert batch.main([str(tmp_path / "profile.yaml")]) == 2, "before Snakemake starts, and once instead of for every run"
    assert says(capsys.readouterr().err, "disk full", 0)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no device that is always full")
def test_a_disk_that_fills_during_the_run(nb, older, capfd):
    assert notebook.main([str(nb), str(older), "mode=full"]) == 1
    assert says(capfd.readouterr().err.splitlines()[-1], "disk full", 2)
    assert is_older(older)


def test_a_disk_without_room_for_the_executed_copy(nb, older, monkeypatch, capfd):
    """papermill writes it after every cell; a result that was written before counts."""

    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(papermill, "execute_notebook", full)
    assert notebook.main([str(nb), str(older)]) == 1
    assert says(capfd.readouterr().err, "disk full", 3)
    assert is_older(older)

    def full_in_the_end(*_, **__):
        results.write_run(older, rows=[], **ARGUMENTS)
        full()

    monkeypatch.setattr(papermill, "execute_notebook", full_in_the_end)
    assert notebook.main([str(nb), str(older)]) == 0
    assert results.read_run(older)["rows"] == []


def test_a_full_disk_keeps_the_older_file_whatever_is_written(tmp_path, monkeypatch):
    import pandas

    writers = {
        "a.json": lambda path, value: provenance.write_json(path, {"value": value}),
        "a.csv": lambda path, value: results.write_table(pandas.DataFrame({"value": [value]}), path),
        "a.safetensors": lambda path, value: statistics.from_states(torch.full((1, 3, 4, 8), float(value))).save(path, {}),
    }
    for name, write in writers.items():
        write(tmp_path / name, 1)
    before = {name: (tmp_path / name).read_bytes() for name in writers}

    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    for name, write in writers.items():
        with pytest.raises(OSError, match="No space left") as caught:
            write(tmp_path / name, 2)
        assert says(caught.value, "disk full", 1)
        assert caught.value.filename == str(tmp_path / name)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_real_disk_that_fills(nb, tmp_path, capfd):
    with mounted(tmp_path / "disk", "size=210m") as disk:
        kept = results.write_run(disk / "a.json", rows=[{"metric": "older", "value": 1.0}], **ARGUMENTS)
        assert notebook.main([str(nb), str(kept), "mode=fill"]) == 1
        error = capfd.readouterr().err.splitlines()[-1]
        assert "No space left on device: make room at" in error
        assert is_older(kept)
        assert (disk / "fill.bin").stat().st_size > 200 * 2**20
        with pytest.raises(OSError, match="make room on this disk, then start again; what was there is unchanged"):
            results.write_run(kept, rows=[], **ARGUMENTS | {"extra": {"long": "x" * 10**6}})
        assert is_older(kept)
        assert not list(disk.glob(".*")), "what did not fit is gone"


# ------------------------------------------------------------------------------------------------------------ read-only


@contextlib.contextmanager
def frozen(folder: Path):
    """A folder that nobody may write to. An administrator may write everywhere but on a disk mounted for reading."""
    folder.chmod(0o555)
    try:
        if not os.access(folder, os.W_OK):
            yield folder
            return
    finally:
        folder.chmod(0o755)
    bound = subprocess.run(["mount", "--bind", str(folder), str(folder)], capture_output=True).returncode == 0
    if not bound:
        pytest.skip("an administrator who may not mount can write everywhere")
    try:
        subprocess.run(["mount", "-o", "remount,bind,ro", str(folder)], check=True, capture_output=True)
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def test_a_read_only_folder(nb, older, monkeypatch, capsys):
    monkeypatch.setattr(papermill, "execute_notebook", lambda *_, **__: pytest.fail("a kernel was started"))
    with frozen(older.parent) as folder:
        assert notebook.main([str(nb), str(older)]) == 2
        assert says(capsys.readouterr().err, "read-only results folder", 0)
        with pytest.raises(OSError, match="then start again; what was there is unchanged") as caught:
            results.write_run(older, rows=[], **ARGUMENTS)
        assert str(older) in str(caught.value)
        assert list(folder.iterdir()) == [older]
    assert is_older(older)


def test_a_batch_in_a_read_only_folder(tmp_path, monkeypatch, capsys):
    (tmp_path / "project").mkdir()
    profile = tmp_path / "profile.yaml"
    profile.write_text("{}")
    monkeypatch.setattr(batch, "project_root", lambda: tmp_path / "project")
    with frozen(tmp_path / "project"), monkeypatch.context() as patch:
        patch.setattr(batch.subprocess, "Popen", lambda *_, **__: pytest.fail("Snakemake was started"))
        assert batch.main([str(profile)]) == 2
    assert says(capsys.readouterr().err, "read-only results folder", 1)


# -------------------------------------------------------------------------------------------------------- damaged input


def test_truncated_safetensors(saved, tmp_path):
    weights = saved / "model.safetensors"
    os.truncate(weights, weights.stat().st_size - 1000)
    for load in (models.load, lambda folder: streaming.Streamed(folder, dtype="float32")):
        with pytest.raises(models.CheckpointError) as caught:
            load(saved)
        assert says(caught.value, "truncated safetensors", 0)
    sums = tmp_path / "stats.safetensors"
    statistics.from_states(torch.randn(1, 3, 4, 8)).save(sums, {})
    os.truncate(sums, sums.stat().st_size - 8)
    with pytest.raises(ValueError, match="safetensors") as caught:
        statistics.LayerStats.load(sums)
    assert says(caught.value, "truncated safetensors", 1)


@pytest.fixture
def embedded(tmp_path, monkeypatch):
    """An embedded corpus of four lines."""
    path = tmp_path / "pydocs.jsonl"
    lines = [{"name": f"n{index}", "split": "calibration", "text": "words " * 50} for index in range(4)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    monkeypatch.setattr(pydocs, "corpus_path", lambda corpus: path)
    return path


@pytest.mark.parametrize("damage", [b"{", b"[]", b"{}", b'"n2"', b'{"name": "n2", "split": "calibration"}', b"\xff\xfe"])
def test_a_corpus_with_a_damaged_line(embedded, damage):
    lines = embedded.read_bytes().splitlines()
    embedded.write_bytes(b"\n".join([*lines[:2], damage, lines[3]]) + b"\n")
    with pytest.raises(ValueError, match="line 3") as caught:
        corpora.load("pydocs", "calibration")
    assert says(caught.value, "corrupted corpus", 0)


def test_a_corpus_with_flipped_bytes(tmp_path):
    path = tmp_path / "a.txt.gz"
    whole = gzip.compress(" ".join(map(str, range(5000))).encode())
    for place in range(20, len(whole), 997):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0xFF]) + whole[place + 1 :])
        with pytest.raises(ValueError, match="damaged") as caught:
            corpora.load(path)
        assert says(caught.value, "corrupted corpus", 1)
    pytest.importorskip("datasets")
    (tmp_path / "a.parquet").write_bytes(b"PAR1" + bytes(100) + b"PAR1")
    with pytest.raises(ValueError, match=r"a\.parquet is damaged or not Parquet"):
        corpora.load(tmp_path / "a.parquet")


def test_a_corpus_with_another_letter(embedded):
    with pytest.warns(pydocs.ManifestMismatch) as caught:
        corpora.load("pydocs", "calibration")
    assert says(caught[0].message, "corrupted corpus", 2)


def test_nan_weights(saved):
    weights = load_file(saved / "model.safetensors")
    weights["model.layers.3.mlp.up_proj.weight"][2] = float("nan")
    save_file(weights, saved / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(models.CheckpointError) as caught:
        models.load(saved)
    assert says(caught.value, "NaN weights", 0)
    streamed = streaming.Streamed(saved, dtype="float32")
    with pytest.raises(RuntimeError) as caught:
        streaming.collect(streamed, torch.randint(3, 97, (4, 8)), batch_size=2, progress=False)
    assert says(caught.value, "NaN weights", 1)


def test_the_tokenizer_of_another_model(saved, tiny_llama):
    windows = torch.tensor([[3, 500]])
    streamed = streaming.Streamed(saved, dtype="float32")
    for work in (
        lambda: statistics.collect(tiny_llama, windows, progress=False),
        lambda: evaluation.perplexity(tiny_llama, windows),
        lambda: streaming.collect(streamed, windows, progress=False),
    ):
        with pytest.raises(ValueError, match="token ids") as caught:
            work()
        assert says(caught.value, "wrong tokenizer", 0)
    with pytest.raises(models.CheckpointError) as caught:
        models.load_tokenizer(saved)
    assert says(caught.value, "wrong tokenizer", 1)
    with torch.no_grad():
        tiny_llama.lm_head.weight *= 100  # sure of itself, and wrong, as a trained model is on another one's tokens
    with pytest.warns(UserWarning, match="chance") as caught:
        evaluation.layer_set_perplexity(tiny_llama, torch.randint(3, 97, (2, 8)), [(), (1,)], progress=False)
    assert says(caught[0].message, "wrong tokenizer", 2)


def test_a_model_with_unknown_layers(saved):
    encoder = BertLMHeadModel(BertConfig(vocab_size=97, hidden_size=32, num_hidden_layers=2, num_attention_heads=4))
    with pytest.raises(models.UnsupportedModel) as caught:
        models.remove_layers(encoder, (0,))
    assert says(caught.value, "model with unknown layers", 0)
    config = json.loads((saved / "config.json").read_text())
    (saved / "config.json").write_text(json.dumps(config | {"model_type": "llamma"}))
    with pytest.raises(models.CheckpointError) as caught:
        models.load(saved)
    assert says(caught.value, "model with unknown layers", 1)


# --------------------------------------------------------------------------------------------------- batches and Ctrl-C

HOLDS = """
import sys, time
from pathlib import Path
from prunelib.lab import batch
with batch._only_here(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(100)
"""


def test_two_batches_on_one_folder(tmp_path, monkeypatch, capsys):
    """From the first moment on: Snakemake takes its own lock seconds later."""
    profile = tmp_path / "profile.yaml"
    profile.write_text("{}")
    monkeypatch.setattr(batch, "project_root", lambda: tmp_path)
    started = []

    class Snakemake:
        pid, stderr = os.getpid(), ()

        def __init__(self, command, **_):
            started.append(command)

        def __enter__(self):
            return self

        def __exit__(self, *_):
            """Nothing was started, nothing is to be waited for."""

        def wait(self):
            return 0

    with subprocess.Popen([sys.executable, "-c", HOLDS, str(tmp_path)], stdout=subprocess.PIPE, text=True) as first:
        try:
            assert first.stdout.readline() == "held\n"
            owner = tmp_path / ".snakemake" / "batch.json"
            owner.write_text("that of the first")
            monkeypatch.setattr(batch.subprocess, "Popen", Snakemake)
            monkeypatch.setattr(batch.signal, "signal", lambda *_: None)
            assert batch.main([str(profile)]) == 2
            assert says(capsys.readouterr().err, "two batches on one folder", 0)
            assert not started
            assert batch.main([str(profile), "-n"]) == 0, "looking is allowed"
            assert len(started) == 1
            assert owner.read_text() == "that of the first"
        finally:
            first.kill()
    assert batch.main([str(profile)]) == 0, "a killed batch keeps nobody out"
    assert len(started) == 2


def _interruptible() -> None:
    """What is started in the background of a shell ignores interrupts, and so would its children: the tests themselves, too."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def test_ctrl_c_in_a_run(nb, older):
    command = [sys.executable, "-m", "prunelib.lab.run_notebook", str(nb), str(older), "mode=sleep"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, preexec_fn=_interruptible) as process:
        assert process.stderr.readline() == "8 False\n", "the kernel works"
        kernels = psutil.Process(process.pid).children(recursive=True)
        assert kernels
        process.send_signal(signal.SIGINT)
        error = process.communicate(timeout=60)[1]
    assert process.returncode == 130
    assert says(error.splitlines()[-1], "Ctrl-C", 0)
    assert "Traceback" not in error
    assert not psutil.wait_procs(kernels, timeout=10)[1], "the kernel ended with its run"
    assert is_older(older)


def test_ctrl_c_in_a_batch(tmp_path):
    project = Project(tmp_path)
    project.profile(calibration_seeds=[0], layers_removed=[2], chapters={})
    wanted = "data/runs/test/statistics/tiny__pydocs__s0.json"
    command = [sys.executable, "-m", "prunelib.lab.batch", "profile.yaml", wanted]
    environment = project.environment(BATCH_SLEEP="100")
    process = subprocess.Popen(
        command,
        cwd=tmp_path,
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=_interruptible,
    )
    wait_for(project.log.exists)
    running = psutil.Process(process.pid).children(recursive=True)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    error = process.communicate(timeout=60)[1]
    assert process.returncode != 0
    assert "Traceback" not in error
    assert not psutil.wait_procs(running, timeout=10)[1], "runs and kernels ended with the batch"
    assert not list((tmp_path / "data/runs").rglob("*.json"))
    project.started()
    done = subprocess.run(command, cwd=tmp_path, env=project.environment(), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert len(project.started()) == 1
    assert (tmp_path / wanted).is_file()


# ------------------------------------------------------------------------------------------------- what a machine lacks


def test_no_network(monkeypatch):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")  # nobody answers there
    assert io.hub_unreachable()
    for number, load in enumerate((models.load, models.load_tokenizer)):
        with pytest.raises(models.CheckpointError) as caught:
            load("nobody/model")
        if number == 0:
            assert says(caught.value, "no network", 0)
        else:
            assert says(caught.value, "no network", 1)
    pytest.importorskip("datasets")
    with pytest.raises(RuntimeError) as caught:
        corpora.load("c4", "train")
    assert says(caught.value, "no network", 2)


def test_no_gpu(saved, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(models, "_check_files", lambda _: pytest.fail("a file was opened"))
    for load in (models.load, lambda folder, device: streaming.Streamed(folder, dtype="float32", device=device)):
        with pytest.raises(ValueError, match="cuda") as caught:
            load(saved, device="cuda")
        assert says(caught.value, "no GPU", 0)


def test_out_of_memory_in_a_run(nb, older, capfd):
    assert notebook.main([str(nb), str(older), "mode=memory"]) == 1
    assert says(capfd.readouterr().err.splitlines()[-1], "out of memory", 0)
    assert is_older(older)


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
        assert says(str(caught.value).replace("memory:", "memory ():"), "out of memory", 1)
        assert "\n" not in str(caught.value)
        with pytest.raises(OutOfMemory) as caught:
            evaluation.perplexity(tiny_llama, windows, batch_size=1)
        assert says(str(caught.value).replace("memory:", "memory ():"), "out of memory", 2)
        hook.remove()
    statistics.collect(tiny_llama, windows, progress=False)  # nothing is left over


def test_a_plan_that_does_not_fit(saved):
    streamed = streaming.Streamed(saved, dtype="float32")
    streamed.host_limit = streamed.plan(16, 50, batch_size=8, states=True)[1].host_peak
    with pytest.raises(streaming.DoesNotFit) as caught:
        streaming.collect(streamed, torch.randint(3, 97, (400, 50)), windows_at_once=400, progress=False)
    assert says(caught.value, "out of memory", 3)
