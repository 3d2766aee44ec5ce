"""Run files and the long table: what may become a number, and that every number can be traced."""

import csv
import json
import math

import numpy as np
import pandas
import pytest

from prunelib.lab import runs as results


def write(path, rows=({"metric": "ppl", "value": 9.5, "n": 4},), *, parameters=None, code="a" * 64, **changes):
    parameters = {"model": "m", "layers_removed": 2} if parameters is None else parameters
    arguments = {"experiment": "blocks", "provenance": {"source_sha256": code}, "seconds": 1.5} | changes
    return results.write_run(path, parameters=parameters, rows=list(rows), **arguments)


def test_round_trip(tmp_path):
    rows = [{"metric": "ppl", "value": np.float32(9.5), "n": np.int64(4), "criterion": "deepest", "stderr": 0.25}]
    path = write(tmp_path / "blocks" / "m__k2.json", rows, peak_bytes=2**20, extra={"plan": [1, 2]})
    run = results.read_run(path)
    assert run["schema"] == results.SCHEMA
    assert run["rows"] == [{"metric": "ppl", "value": 9.5, "n": 4, "criterion": "deepest", "stderr": 0.25}]
    assert run["parameters"] == {"model": "m", "layers_removed": 2}
    assert run["extra"] == {"plan": [1, 2]}
    assert results.summary(path) == "blocks/m__k2: 1 rows, 1.5 s, 1 MiB"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"value": 1.0}, "row 1 has no `metric`"),
        ({"metric": "ppl"}, r"row 1 \(ppl\) has no `value`"),
        ({"metric": "ppl", "value": None}, "has no `value`"),
        ({"metric": "ppl", "value": math.nan}, "has the value nan"),
        ({"metric": "ppl", "value": np.float32("inf")}, "only finite numbers"),
        ({"metric": "ppl", "value": "9.5"}, "has the value '9.5'"),
        ({"metric": "ppl", "value": True}, "has the value True"),
        ({"metric": "ppl", "value": 1.0, "n": 0}, "n = 0"),
        ({"metric": "ppl", "value": 1.0, "stderr": -1.0}, "stderr = -1.0"),
        ({"metric": "ppl", "value": 1.0, "removed": [1, 2]}, "`removed` is a list"),
        ({"metric": "ppl", "value": 1.0, "alpha": math.nan}, "`alpha` is nan"),
        ({"metric": "ppl", "value": 1.0, "run": "x"}, "column name `run`"),
        ({"metric": "ppl", "value": 1.0, "layers_removed": 4}, "`layers_removed` is 4 but the parameter"),
    ],
)
def test_a_bad_row_is_an_error_and_writes_nothing(tmp_path, row, message):
    with pytest.raises(results.ResultError, match=message):
        write(tmp_path / "blocks" / "a.json", [{"metric": "ok", "value": 0.0}, row])
    assert not (tmp_path / "depth").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seconds": math.nan}, "`seconds`"),
        ({"peak_bytes": 0}, "`peak_bytes`"),
        ({"parameters": {"value": 3}}, "parameter cannot be called `value`"),
        ({"parameters": {"seconds": 3}}, "parameter cannot be called `seconds`"),
    ],
)
def test_a_bad_run_is_an_error(tmp_path, changes, message):
    with pytest.raises(results.ResultError, match=message):
        write(tmp_path / "a.json", **changes)


def test_an_absolute_path_inside_the_project_is_recorded_relative(tmp_path, monkeypatch):
    monkeypatch.setattr(results, "from_root", lambda path: str(path).removeprefix("/clone/"))
    run = results.read_run(write(tmp_path / "a.json", parameters={"model": "/clone/data/reference/x", "other": "/mnt/y"}))
    assert run["parameters"] == {"model": "data/reference/x", "other": "/mnt/y"}


def test_table_is_long_sorted_and_traceable(tmp_path):
    runs = tmp_path / "runs"
    write(runs / "blocks" / "m__k4.json", parameters={"model": "m", "layers_removed": 4, "grid": [1, 2], "output": "x"})
    write(
        runs / "blocks" / "m__k2.json", [{"metric": "ppl", "value": 9, "alpha": 0.5}, {"metric": "acc", "value": 0.25, "n": 8}]
    )
    write(runs / "statistics" / "m__s0.json", parameters={"model": "m", "seed": 0, "limit": None}, experiment="statistics")
    table = results.collect(runs)
    expected = ["run", "experiment", "alpha", "layers_removed", "model", "seed", "metric", "value", "n", "stderr", "code"]
    assert list(table.columns) == expected, "lists, paths and columns without a value stay in the run files"
    assert list(table["run"]) == ["blocks/m__k2", "blocks/m__k2", "blocks/m__k4", "statistics/m__s0"]
    assert list(table["metric"]) == ["ppl", "acc", "ppl", "ppl"]
    assert table["layers_removed"].isna().tolist() == [False, False, False, True], "missing is missing, never 0"
    assert table["seed"].dropna().tolist() == [0]
    assert table["stderr"].isna().all()

    out, again = tmp_path / "a.csv", tmp_path / "b.csv"
    results.write_table(table, out)
    files = [runs / "statistics" / "m__s0.json", runs / "blocks" / "m__k4.json", runs / "blocks" / "m__k2.json"]
    results.write_table(results.collect(files), again)
    assert out.read_bytes() == again.read_bytes(), "whatever the order of the files"
    assert out.read_text().splitlines()[1] == "blocks/m__k2,blocks,0.5,2,m,,ppl,9,,," + "a" * 12


@pytest.mark.parametrize("value", [1 / 3 + 1e-9, 123456.78901, 2.5e-17, 9.0])
def test_ten_digits_survive_the_table_and_all_of_them_the_run_file(value, tmp_path):
    file = write(tmp_path / "runs" / "a.json", [{"metric": "ppl", "value": value}])
    results.write_table(results.collect(tmp_path / "runs"), tmp_path / "t.csv")
    with open(tmp_path / "t.csv", newline="") as table:
        assert float(next(csv.DictReader(table))["value"]) == pytest.approx(value, rel=5e-10, abs=0)
    assert json.loads(file.read_text())["rows"][0]["value"] == value


def test_a_table_is_read_as_it_was_collected_and_says_once_what_a_run_says_of_all_its_rows(tmp_path):
    runs, table = tmp_path / "runs", tmp_path / "t.csv"
    rows = [{"metric": "ppl", "value": 9.5, "seed": 7, "n": 4}, {"metric": "acc", "value": 0.25, "seed": 8, "text": "1,2"}]
    write(runs / "x" / "a.json", rows, parameters={"model": "m", "layers_removed": 4, "whole": True}, peak_bytes=2**21)
    write(runs / "x" / "b.json", [{"metric": "ppl", "value": 3, "seed": 2}], parameters={"seed": 2, "limit": None})
    write(runs / "y" / "c.json", [{"metric": "ppl", "value": 1, "layers_removed": 1}], parameters={}, experiment="y")
    write(runs / "y" / "empty.json", [], parameters={"model": "n"})
    collected = results.write_runs(runs, table)
    pandas.testing.assert_frame_equal(collected, results.collect(runs))
    assert collected["seed"].tolist()[:3] == [7, 8, 2], "a coordinate in one run, a parameter in the other"
    assert collected["layers_removed"].tolist() == [4, 4, pandas.NA, 1]
    flat = tmp_path / "flat.csv"
    results.write_table(collected, flat)
    pandas.testing.assert_frame_equal(results.read_table(table), pandas.read_csv(flat))
    pandas.testing.assert_frame_equal(results.read_table(flat), pandas.read_csv(flat))
    assert table.read_text().splitlines()[:2] == ["run,layers_removed,seed,text,metric,value,n,stderr", "x/a,,7,,ppl,9.5,4,"]
    assert (tmp_path / "t.runs.csv").read_text().splitlines()[1] == "x/a,blocks,4,m,,True,1.5,2," + "a" * 12


def test_files_that_do_not_belong_together_are_no_table(tmp_path):
    table = tmp_path / "t.csv"
    write(tmp_path / "runs" / "a.json")
    results.write_runs(tmp_path / "runs", table)
    lines = (tmp_path / "t.runs.csv").read_text().splitlines()
    (tmp_path / "t.runs.csv").write_text("\n".join([lines[0], lines[1].replace("runs/a", "runs/b")]) + "\n")
    with pytest.raises(results.ResultError, match=r"t\.runs\.csv lacks the run runs/a: it belongs to another"):
        results.read_table(table)
    (tmp_path / "t.runs.csv").write_text("\n".join([*lines, lines[1]]) + "\n")
    with pytest.raises(results.ResultError, match=r"t\.runs\.csv names a run twice"):
        results.read_table(table)
    (tmp_path / "t.runs.csv").unlink()
    with pytest.raises(results.ResultError, match=r"t\.runs\.csv is missing, which holds the parameters"):
        results.read_table(table)


def test_mixed_library_versions_warn(tmp_path):
    write(tmp_path / "runs" / "a.json")
    write(tmp_path / "runs" / "b.json", code="b" * 64)
    with pytest.warns(UserWarning, match="2 versions of the library"):
        results.collect(tmp_path / "runs")


def test_collect_refuses_what_is_not_a_run(tmp_path):
    with pytest.raises(results.ResultError, match="no run in"):
        results.collect(tmp_path)
    (tmp_path / "a.json").write_text('{"a": 1}')
    with pytest.raises(results.ResultError, match=r"a\.json is not a run file"):
        results.collect(tmp_path)
    (tmp_path / "a.json").write_text('{"schema": 1')
    with pytest.raises(results.ResultError, match="is not JSON"):
        results.collect(tmp_path)
    run = json.loads(write(tmp_path / "a.json").read_text()) | {"schema": 99}
    (tmp_path / "a.json").write_text(json.dumps(run))
    with pytest.raises(results.ResultError, match="schema 99"):
        results.collect(tmp_path)
    write(tmp_path / "x" / "blocks" / "a.json")
    write(tmp_path / "y" / "blocks" / "a.json")
    (tmp_path / "a.json").unlink()
    with pytest.raises(results.ResultError, match="two run files are called blocks/a"):
        results.collect(tmp_path)


def test_command_line(tmp_path, capsys):
    write(tmp_path / "runs" / "a.json")
    assert results.main([str(tmp_path / "runs"), str(tmp_path / "t.csv")]) == 0
    assert (tmp_path / "t.csv").read_text().count("\n") == 2
    (tmp_path / "runs" / "b.json").write_text("{")
    assert results.main([str(tmp_path / "runs"), str(tmp_path / "t.csv")]) == 1
    assert "b.json is not JSON" in capsys.readouterr().err
    assert (tmp_path / "t.csv").read_text().count("\n") == 2, "the older table stays"
    assert results.main([]) == 2


def test_a_recorder_takes_the_parameters_of_its_notebook(tmp_path, capsys):
    output = str(tmp_path / "blocks" / "a.json")
    namespace = {
        "In": [],
        "Out": {},
        "_hidden": 1,
        "os": json,
        "sizes": [1, 2],
        "limit": None,
        "device": "cpu",
        "output": output,
    }
    recorder = results.start("blocks", namespace)
    run = results.read_run(recorder.write([{"metric": "ppl", "value": 2.0}], data={"text": "ab"}, extra={"plan": 1}))
    assert run["parameters"] == plain
    assert (run["experiment"], run["extra"], run["provenance"]["data"]) == ("blocks", {"plan": 1}, {"text": "ab"})
    assert run["peak_bytes"] > 0
    assert capsys.readouterr().out.startswith("blocks/a: 1 rows, ")


def _choice(method, size, layers, metric="nll", role="choice", **more):
    layers = {} if layers is None else {"removed_layers": layers}
    return {"method": method, "size": size, **layers, "metric": metric, "role": role, "value": 1.0, **more}


@pytest.fixture
def choices(tmp_path):
    rows = [
        _choice("dense", 0, None),
        _choice("angular", 2, "4 5", calibration_seed=1),
        _choice("angular", 2, "6 7", calibration_seed=0),
        _choice("angular", 2, "0 1", metric="accuracy", calibration_seed=0),
        _choice("angular", 3, "5 6 7", calibration_seed=0),
        _choice("angular", 4, "1 2 3 4", role="every_block"),
        _choice("deepest", 2, "7 8"),
    ]
    return write(tmp_path / "blocks.json", rows, parameters={"model": "some/model"})


def test_choices_are_those_of_the_first_draw_and_missing_sizes_are_left_out(choices):
    found = results.read_choices(choices, model="some/model", methods=["angular", "deepest"], sizes=[2, 3, 4])
    assert found == {("angular", 2): (6, 7), ("angular", 3): (5, 6, 7), ("deepest", 2): (7, 8)}


def test_choices_of_another_model_and_of_an_unknown_method_are_errors(choices):
    with pytest.raises(results.ResultError, match="some/model, not for other"):
        results.read_choices(choices, model="other", methods=["angular"], sizes=[2])
    with pytest.raises(results.ResultError, match=r"'greedy' with K in .2.*angular, deepest"):
        results.read_choices(choices, model="some/model", methods=["greedy"], sizes=[2])
    with pytest.raises(results.ResultError, match=r"no choice of 'deepest' with K in .5."):
        results.read_choices(choices, model="some/model", methods=["deepest"], sizes=[5])


def test_committed_tables_have_the_runs_of_their_rows_with_seconds_and_memory():
    for name in ("statistics", "selection", "blocks", "slicing", "tasks", "healing", "duplicates", "speed", "combining"):
        table = results.read_table(f"data/{name}.csv")
        runs = pandas.read_csv(results.at_root(f"data/{name}.runs.csv"))
        assert set(table["run"]) <= set(runs["run"])
        assert (runs["seconds"] > 0).all()
        assert (runs["peak_mib"] > 0).all()
        assert not {"seconds", "peak_mib"} & set(table)
