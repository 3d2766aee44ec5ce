"""Numbers that agree within their tolerances, and how those that do not are named."""

import subprocess

import pandas as pd
import pytest

from prunelib.lab import verify


def table(**changes) -> pd.DataFrame:
    rows = [
        {"run": "selection/m", "method": "dense", "size": 2, "metric": "nll", "value": 2.0, "n": 100, "stderr": None},
        {"run": "selection/m", "method": "random", "size": None, "metric": "accuracy", "value": 0.5, "n": 100, "stderr": 0.1},
        {"run": "statistics/m", "method": None, "size": 2, "metric": "mssd", "value": 40.0, "n": 64, "stderr": None},
        {"run": "tasks/m", "method": None, "size": 2, "metric": "acc", "value": 0.4, "n": 10, "stderr": 0.15},
    ]
    for place, (name, value) in changes.items():
        rows[int(place[1:])][name] = value
    return pd.DataFrame(rows)


def test_equal_numbers_and_numbers_within_tolerance_agree_in_any_order():
    assert verify.compare(table(), table()[::-1]) == []
    assert verify.compare(table(), table(_0=("value", 2.0015), _2=("value", 40.05), _3=("value", 0.5))) == []
    assert verify.compare(table(), table(_3=("stderr", 0.2))) == [], "the error of an answer moves with the answer"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"_0": ("value", 2.01)}, "selection/m, dense, 2, nll: value is 2.01, expected 2 ± 0.002 (+0.01)"),
        ({"_1": ("value", 0.49)}, "accuracy: value is 0.49, expected 0.5 ± 0.004 (-0.01)"),
        ({"_2": ("value", float("nan"))}, "mssd: value is nan"),
        ({"_0": ("n", 99)}, "n is 99, expected 100"),
        ({"_0": ("stderr", 0.1)}, "stderr is 0.1, expected nan"),
    ],
)
def test_other_numbers_are_named_with_what_was_expected(change, said):
    lines = verify.compare(table(), table(**change))
    assert len(lines) == 1
    assert said in lines[0]


def test_missing_and_new_rows_and_missing_columns_are_named():
    lines = verify.compare(table(), table(_1=("method", "deepest")))
    gone, new = (
        "no such row any more: selection/m, random, accuracy",
        "a row that was not there: selection/m, deepest, accuracy",
    )
    assert lines == [gone, new]
    assert verify.compare(table(), table().drop(columns="n")) == ["the table has no column n"]


def test_the_command_compares_the_tables_of_the_smoke_profile_but_for_times(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(verify, "at_root", lambda path: tmp_path / path)
    monkeypatch.setattr(verify, "SMOKE", ("-c", ""))
    for folder in (verify.TABLES, verify.EXPECTED):
        (tmp_path / folder).mkdir(parents=True)
    new = tmp_path / verify.TABLES / "a.csv"
    times = pd.DataFrame([{"run": "a", "metric": "seconds", "value": 9.0}])
    pd.concat([table(), times]).to_csv(tmp_path / verify.EXPECTED / "smoke_a.csv", index=False)
    pd.concat([times.assign(value=3.0), table()]).to_csv(new, index=False)
    assert verify.main([]) == 0
    assert "all 4 numbers agree" in capsys.readouterr().out
    table(_0=("value", 2.1)).to_csv(new, index=False)
    assert verify.main([]) == 1
    assert "smoke_a: selection/m, dense, 2, nll: value is 2.1, expected 2" in capsys.readouterr().err
    monkeypatch.setattr(verify, "write_table", lambda rows, path: rows.to_csv(path, index=False))
    assert verify.main(["--update"]) == verify.main([]) == 0
    assert verify.main(["old.csv", "nowhere.csv"]) == 2


@pytest.fixture
def clone(tmp_path, monkeypatch):
    """A project with one commit: a table of two runs, a figure, and a profile that makes both."""
    for name in ("at_root", "project_root"):
        monkeypatch.setattr(verify, name, lambda path="": tmp_path / path)
    monkeypatch.setattr(verify, "from_root", lambda path: path.relative_to(tmp_path).as_posix())
    for folder in ("data", "figures"):
        (tmp_path / folder).mkdir()
    (tmp_path / "p.yaml").write_text("tables: data\nfigures: figures\n")
    times = pd.DataFrame([{"run": "a", "metric": "seconds", "value": 9.0}])
    pd.concat([table(), times]).to_csv(tmp_path / "data/a.csv", index=False)
    (tmp_path / "data/a.runs.csv").write_text("run,seconds\na,9\n")
    table().to_csv(tmp_path / "figures/own_f.csv", index=False)
    (tmp_path / "figures/own_f.json").write_text('{"drawing_code_sha256": "a", "run_code": "1"}')
    (tmp_path / "figures/own_f.png").write_bytes(b"old")
    author = ("-c", "user.name=a", "-c", "user.email=a@b")
    for command in (["init", "-q"], ["add", "."], [*author, "commit", "-qm", "all"]):
        subprocess.run(["git", *command], cwd=tmp_path, check=True)
    return tmp_path


def status(clone) -> str:
    return subprocess.run(["git", "status", "--short"], cwd=clone, check=True, capture_output=True, text=True).stdout


def test_a_rerun_with_other_times_passes_and_leaves_nothing_to_commit(clone, capsys):
    times = pd.DataFrame([{"run": "a", "metric": "seconds", "value": 3.0}])
    pd.concat([table(_0=("value", 2.00001)), times]).to_csv(clone / "data/a.csv", index=False)
    (clone / "data/a.runs.csv").write_text("run,seconds\na,3\n")
    table(_0=("value", 2.00001)).to_csv(clone / "figures/own_f.csv", index=False)
    (clone / "figures/own_f.json").write_text('{"drawing_code_sha256": "a", "run_code": "2"}')
    (clone / "figures/own_f.png").write_bytes(b"new")
    made = (clone / "data/a.csv").stat().st_mtime_ns
    assert verify.main(["p.yaml"]) == 0
    assert capsys.readouterr().out.startswith("PASS")
    assert status(clone) == ""
    assert (clone / "data/a.csv").stat().st_mtime_ns == made, "else what is made of it would be made again"


def test_other_numbers_fail_and_stay(clone, capsys):
    table(_0=("value", 2.1)).to_csv(clone / "data/a.csv", index=False)
    table(_2=("value", 41.0)).to_csv(clone / "figures/own_f.csv", index=False)
    assert verify.main(["p.yaml"]) == 1
    *lines, last = capsys.readouterr().out.splitlines()
    assert last.startswith("FAIL")
    assert "data/a.csv: selection/m, dense, 2, nll: value is 2.1, expected 2" in lines[0]
    assert lines[1].startswith("figures/own_f: ")
    assert status(clone).split() == ["M", "data/a.csv", "M", "figures/own_f.csv"]


def test_a_figure_that_other_code_drew_stays(clone):
    (clone / "figures/own_f.json").write_text('{"drawing_code_sha256": "b"}')
    (clone / "figures/own_f.png").write_bytes(b"new")
    assert verify.main(["p.yaml"]) == 0
    assert status(clone).split() == ["M", "figures/own_f.json", "M", "figures/own_f.png"]
