"""What `make verify` notices: altered weights, altered text, other numbers."""

import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

from prunelib.io import project_root
from prunelib.lab import checksums, verify
from prunelib.text import embedded as pydocs


def flip(path: Path, where: int) -> None:
    """Change one byte of a file."""
    data = bytearray(path.read_bytes())
    data[where] ^= 1
    path.write_bytes(bytes(data))


@pytest.fixture
def part_of_a_clone(tmp_path) -> Path:
    """What `verify` needs before its first run, with the small reference model alone."""
    root = tmp_path / "clone"
    model = "data/reference/ref-neox-24l"
    for name in ("prunelib", "profiles", model):
        shutil.copytree(project_root() / name, root / name)
    shutil.copy(project_root() / "pyproject.toml", root)
    (root / "data/results.csv").write_text("a table of another run\n")
    lines = (project_root() / checksums.SUMS).read_text().splitlines(keepends=True)
    kept = [line for line in lines if model in line or line.endswith("  data/results.csv\n")]
    assert len(kept) > 5
    (root / checksums.SUMS).write_text("".join(kept))
    return root


def verified(root: Path) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", "prunelib.lab.verify"], cwd=root, capture_output=True, text=True, timeout=120)


def test_one_flipped_bit_of_a_weight_fails_verification_before_any_run(part_of_a_clone):
    weights = part_of_a_clone / "data/reference/ref-neox-24l/model.safetensors"
    flip(weights, weights.stat().st_size - 1)
    done = verified(part_of_a_clone)
    assert done.returncode == 1
    assert "data/reference/ref-neox-24l/model.safetensors was altered" in done.stderr
    assert "git checkout -- data/reference/ref-neox-24l/model.safetensors" in done.stderr
    assert not (part_of_a_clone / "build").exists()
    # A table that `make figures` made anew is named, and is no difference.
    assert "made anew here, not compared with the committed ones: data/results.csv" in done.stdout
    assert "results.csv" not in done.stderr


def test_a_file_beside_a_model_that_was_not_committed_fails_verification(part_of_a_clone):
    (part_of_a_clone / "data/reference/ref-neox-24l/adapter_config.json").write_text("{}")
    done = verified(part_of_a_clone)
    assert done.returncode == 1
    assert "data/reference/ref-neox-24l/adapter_config.json is not one of the committed files" in done.stderr


@pytest.fixture
def copied_corpora(tmp_path, monkeypatch):
    folder = tmp_path / "corpora"
    for corpus in pydocs.EMBEDDED:
        pydocs.build(corpus)
    shutil.copytree(pydocs.folder(), folder)
    monkeypatch.setattr(pydocs, "folder", lambda: folder)
    return folder


def test_unaltered_corpora_are_those_of_the_manifest(copied_corpora):
    assert verify.compare_corpora(fresh=False) == []


def test_one_altered_letter_of_a_corpus_is_reported_with_its_split(copied_corpora):
    path = copied_corpora / "pycomments.jsonl"
    text = path.read_text()
    line = next(line for line in text.splitlines() if '"split": "evaluation"' in line)
    start = text.index(line) + line.index('"text": "') + len('"text": "')
    path.write_text(text[:start] + chr(ord(text[start]) + 1) + text[start + 1 :])
    lines = verify.compare_corpora(fresh=False)
    assert len(lines) == 1
    assert "pycomments/evaluation" in lines[0]
    assert "was altered" in lines[0]


def test_a_damaged_line_of_a_corpus_is_reported_with_its_number(copied_corpora):
    path = copied_corpora / "pyreadmes.jsonl"
    lines = path.read_text().splitlines()
    lines[2] = lines[2][: len(lines[2]) // 2]
    path.write_text("\n".join(lines) + "\n")
    assert any("line 3" in line and "delete the file" in line for line in verify.compare_corpora(fresh=False))


def table(**changes) -> pd.DataFrame:
    rows = [
        {"run": "depth/m__k2", "method": "dense", "metric": "nll", "value": 2.0, "n": 100, "code": "abc"},
        {"run": "depth/m__k2", "method": "random", "metric": "accuracy", "value": 0.5, "n": 100, "code": "abc"},
        {"run": "statistics/m", "method": None, "metric": "mssd", "value": 40.0, "n": 64, "code": "abc"},
    ]
    for place, (name, value) in changes.items():
        rows[int(place[1:])][name] = value
    return pd.DataFrame(rows)


def test_equal_numbers_and_numbers_within_tolerance_agree_whatever_the_code():
    assert verify.compare_tables(table(), table(_0=("code", "def"))) == []
    assert verify.compare_tables(table(), table(_0=("value", 2.0015), _2=("value", 40.05))) == []


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"_0": ("value", 2.01)}, "nats: value is 2.01, expected 2 ± 0.002"),
        ({"_1": ("value", 0.49)}, "accuracy: value is 0.49, expected 0.5"),
        ({"_2": ("value", 40.2)}, "mssd: value is 40.2, expected 40"),
        ({"_2": ("value", float("nan"))}, "mssd: value is nan"),
        ({"_0": ("n", 99)}, "n is 99, expected 100"),
    ],
)
def test_other_numbers_are_named_with_what_was_expected(change, said):
    lines = verify.compare_tables(table(), table(**change))
    assert len(lines) == 1
    assert said in lines[0]


def test_missing_and_new_rows_are_named():
    lines = verify.compare_tables(table(), table(_1=("method", "deepest")))
    assert len(lines) == 2
    assert "no such row any more: depth/m__k2, random, accuracy" in lines[0]
    assert "a row that was not there: depth/m__k2, deepest, accuracy" in lines[1]


def test_other_columns_are_named():
    assert verify.compare_tables(table(), table().drop(columns="n")) == ["the table has other columns: n missing, none new"]


def test_tables_of_two_runs_are_compared_but_for_times(tmp_path, capsys):
    rows = [
        {"run": "a", "method": "x", "metric": "nll", "value": 1.5, "code": "1"},
        {"run": "a", "method": "y", "metric": "nll", "value": 2.5, "code": "1"},
        {"run": "a", "method": "x", "metric": "seconds", "value": 9.0, "code": "1"},
    ]
    other = [row | {"code": "2"} | ({"value": 3.0} if row["metric"] == "seconds" else {}) for row in rows]
    old, new = tmp_path / "old.csv", tmp_path / "new.csv"
    pd.DataFrame(rows).to_csv(old, index=False)
    pd.DataFrame(other).to_csv(new, index=False)
    assert verify.main([str(old), str(new)]) == 0
    assert "all 2 numbers agree, 2 of them in every digit" in capsys.readouterr().out
    other[0]["value"] = 1.5000001
    pd.DataFrame(other[::-1]).to_csv(new, index=False)
    assert verify.main([str(old), str(new)]) == 0
    assert "all 2 numbers agree, 1 of them in every digit" in capsys.readouterr().out
    other[0]["value"] = 1.6
    pd.DataFrame(other).to_csv(new, index=False)
    assert verify.main([str(old), str(new)]) == 1
    assert "nats: value is 1.6, expected 1.5" in capsys.readouterr().err


def test_other_arguments_are_refused(capsys):
    assert verify.main(["data/results.csv", "nowhere.csv"]) == 2
    assert "OLD.csv NEW.csv" in capsys.readouterr().err
