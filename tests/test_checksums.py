"""The hashes of data/: complete, current, and readable by the tool that everybody has."""

import shutil
import subprocess

import pytest

from prunelib.io import at_root, file_sha256, project_root
from prunelib.lab import checksums


def git(*arguments: str) -> str:
    try:
        done = subprocess.run(["git", *arguments], cwd=project_root(), capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a git clone")
    return done.stdout


def test_every_committed_file_has_its_hash():
    """Of a table that was made anew since, git's own copy counts."""
    committed = {path for path in git("ls-files", "-z", "data").split("\0") if path} - {checksums.SUMS}
    expected = checksums.read()
    assert expected.keys() >= committed, f"run `{checksums.UPDATE}` and commit {checksums.SUMS}"
    changed = {line[3:] for line in git("status", "--porcelain", "--", "data").splitlines()}
    settled = sorted(path for path in expected if path not in changed)
    differing = [path for path in settled if file_sha256(at_root(path)) != expected[path]]
    assert differing == [], f"run `{checksums.UPDATE}` and commit {checksums.SUMS}"


@pytest.mark.skipif(shutil.which("sha256sum") is None, reason="no sha256sum here")
def test_sha256sum_reads_the_list(tmp_path):
    small = [line for line in at_root(checksums.SUMS).read_text().splitlines() if "/plans/" in line or "/tasks/" in line]
    assert len(small) > 5
    (tmp_path / "list").write_text("\n".join(small) + "\n")
    command = ["sha256sum", "--check", "--strict", tmp_path / "list"]
    done = subprocess.run(command, cwd=project_root(), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_what_is_missing_altered_and_new_is_named():
    lines = checksums.compare({"a": "1" * 64, "b": "2" * 64}, {"b": "3" * 64, "c": "4" * 64})
    assert len(lines) == 3
    assert "a is missing" in lines[0]
    assert "c is not one" in lines[1]
    assert "b was altered" in lines[2]
    assert "222222222222" in lines[2]


def test_only_tables_beside_each_other_in_data_may_be_made_anew():
    old = dict.fromkeys(("data/results.csv", "data/published/published.csv", "data/plans/a.json", "data/speed.csv"), "1" * 64)
    new = dict.fromkeys(old, "2" * 64) | {"data/speed.csv": "1" * 64}
    assert checksums.remade(old, new) == ["data/results.csv"]


@pytest.mark.parametrize("line", ["abc  data/x", "0" * 64 + " data/x", "0" * 64 + "  data/x\n" + "0" * 64 + "  data/x"])
def test_a_damaged_list_is_refused_with_its_line(tmp_path, monkeypatch, line):
    (tmp_path / "SHA256SUMS").write_text(line + "\n")
    monkeypatch.setattr(checksums, "at_root", lambda _: tmp_path / "SHA256SUMS")
    with pytest.raises(ValueError, match=r"line \d is not"):
        checksums.read()


def test_outside_of_a_clone_the_list_is_not_made(tmp_path, monkeypatch):
    monkeypatch.setattr(checksums, "project_root", lambda: tmp_path)
    with pytest.raises(RuntimeError, match="run `make hashes` in a git clone"):
        checksums.update()
