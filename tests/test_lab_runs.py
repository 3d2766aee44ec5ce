"""Run files and the long table: what may become a number, and that every number can be traced."""

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


def test_numpy_numbers_become_plain_and_a_run_has_a_summary(tmp_path):
    rows = [{"metric": "ppl", "value": np.float32(9.5), "n": np.int64(4), "criterion": "deepest", "stderr": 0.25}]
    path = write(tmp_path / "blocks" / "m__k2.json", rows, peak_bytes=2**20)
    assert results.read_run(path)["rows"] == [{"metric": "ppl", "value": 9.5, "n": 4, "criterion": "deepest", "stderr": 0.25}]
    assert results.summary(path) == "blocks/m__k2: 1 rows, 1.5 s, 1 MiB"


@pytest.mark.parametrize(
    ("row", "named"),
    [
        ({"value": 1.0}, "`metric`"),
        *(({"metric": "ppl", "value": bad}, "finite") for bad in (None, np.float32("inf"), "9.5", True)),
        ({"metric": "ppl", "value": 1.0, "n": 0}, "n = 0"),
        ({"metric": "ppl", "value": 1.0, "stderr": -1.0}, "stderr = -1.0"),
        ({"metric": "ppl", "value": 1.0, "removed": [1, 2]}, "`removed`"),
        ({"metric": "ppl", "value": 1.0, "alpha": math.nan}, "`alpha` = nan"),
        ({"metric": "ppl", "value": 1.0, "text": "a\rb"}, "`text`"),
        ({"metric": "ppl", "value": 1.0, "run": "x"}, "`run`"),
        ({"metric": "ppl", "value": 1.0, "layers_removed": 4}, "`layers_removed` = 4, but the parameter"),
    ],
)
def test_a_bad_row_is_an_error_and_writes_nothing(tmp_path, row, named):
    with pytest.raises(results.ResultError, match=f"row 1 .*{named}"):
        write(tmp_path / "blocks" / "a.json", [{"metric": "ok", "value": 0.0}, row])
    assert not (tmp_path / "blocks").exists()


def test_a_bad_run_is_an_error(tmp_path):
    for changes, named in (
        ({"seconds": math.nan}, "`seconds`"),
        ({"peak_bytes": -1}, "`peak_bytes`"),
        ({"parameters": {"value": 3}}, "`value`"),
    ):
        with pytest.raises(results.ResultError, match=named):
            write(tmp_path / "a.json", **changes)


def test_an_absolute_path_inside_the_project_is_recorded_relative(tmp_path):
    inside = str(results.at_root("data/reference/x"))
    run = results.read_run(write(tmp_path / "a.json", parameters={"model": inside, "other": "/mnt/y"}))
    assert run["parameters"] == {"model": "data/reference/x", "other": "/mnt/y"}


def test_table_is_long_sorted_traceable_and_the_same_from_files_and_from_its_csv(tmp_path):
    runs, path = tmp_path / "runs", tmp_path / "t.csv"
    write(runs / "blocks" / "m__k4.json", parameters={"model": "m", "layers_removed": 4, "grid": [1, 2], "output": "x"})
    rows = [{"metric": "ppl", "value": 9, "alpha": 0.5, "seed": 7}, {"metric": "acc", "value": 1 / 3, "n": 8}]
    write(runs / "blocks" / "m__k2.json", rows, peak_bytes=2**21)
    write(runs / "statistics" / "m__s0.json", parameters={"model": "m", "seed": 0, "limit": None}, experiment="statistics")
    write(runs / "statistics" / "empty.json", [], parameters={"whole": True}, experiment="statistics")
    table = results.write_runs(runs, path)
    expected = ["run", "experiment", "alpha", "layers_removed", "model", "seed", "metric", "value", "n", "stderr", "code"]
    assert list(table.columns) == expected, "lists, paths and columns without a value stay in the run files"
    assert list(table["run"]) == ["blocks/m__k2", "blocks/m__k2", "blocks/m__k4", "statistics/m__s0"]
    assert table["layers_removed"].isna().tolist() == [False, False, False, True], "missing is missing, never 0"
    assert table["seed"].dropna().tolist() == [7, 0], "a coordinate in one run, a parameter in the other"
    assert table["value"].tolist() == [9, 0.3333333333, 9.5, 9.5], "ten digits, all of them in the run file"
    assert path.read_text().splitlines()[:2] == ["run,alpha,seed,metric,value,n,stderr", "blocks/m__k2,0.5,7,ppl,9,,"]
    head, line = (tmp_path / "t.runs.csv").read_text().splitlines()[:2]
    assert head == "run,experiment,layers_removed,model,seed,whole,seconds,peak_mib,code"
    assert line == "blocks/m__k2,blocks,2,m,,,1.5,2," + "a" * 12
    files = [*sorted((runs / "statistics").iterdir()), runs / "blocks" / "m__k4.json", runs / "blocks" / "m__k2.json"]
    for again in (results.collect(runs), results.collect(files)):
        pandas.testing.assert_frame_equal(again, table)


def test_files_that_do_not_belong_together_are_no_table(tmp_path):
    table, beside = tmp_path / "t.csv", tmp_path / "t.runs.csv"
    write(tmp_path / "runs" / "a.json")
    results.write_runs(tmp_path / "runs", table)
    head, line = beside.read_text().splitlines()
    for lines in ([head, line.replace("runs/a", "runs/b")], [head, line, line]):
        beside.write_text("\n".join(lines) + "\n")
        with pytest.raises(results.ResultError, match="name different runs"):
            results.read_table(table)


def test_collect_refuses_what_is_not_a_run(tmp_path):
    with pytest.raises(results.ResultError, match="no run in"):
        results.collect(tmp_path)
    for text, said in (('{"a": 1}', "is not a run file"), ('{"schema": 1', "is not JSON"), ('{"schema": 99}', "schema")):
        (tmp_path / "a.json").write_text(text)
        with pytest.raises(results.ResultError, match=rf"a\.json {said}" if said != "schema" else said):
            results.collect(tmp_path)
    for folder in ("x", "y"):
        write(tmp_path / folder / "blocks" / "a.json")
    (tmp_path / "a.json").unlink()
    with pytest.raises(results.ResultError, match="two run files of one name"):
        results.collect(tmp_path)
    write(tmp_path / "x" / "blocks" / "b.json", code="b" * 64)
    with pytest.warns(UserWarning, match="2 versions of the library"):
        results.collect(tmp_path / "x")


def test_a_table_that_cannot_be_made_leaves_the_older_one(tmp_path, capsys):
    first, second, table = write(tmp_path / "runs" / "a.json"), tmp_path / "runs" / "b.json", tmp_path / "t.csv"
    assert results.main([str(first), str(table)]) == 0
    second.write_text("{")
    assert results.main([str(first), str(second), str(table)]) == 1
    assert "b.json is not JSON" in capsys.readouterr().err
    assert table.read_text().count("\n") == 2


def test_a_recorder_takes_the_parameters_of_its_notebook(tmp_path, capsys):
    given = {"sizes": [1, 2], "limit": None, "device": "cpu"}
    output = str(tmp_path / "blocks" / "a.json")
    namespace = {"In": [], "Out": {}, "_hidden": 1, "os": json, **given, "output": output}
    recorder = results.start("blocks", namespace)
    run = results.read_run(recorder.write([{"metric": "ppl", "value": 2.0}], data={"text": "ab"}, extra={"plan": 1}))
    assert run["parameters"] == given
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


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "other"}, "some/model, not for other"),
        ({"methods": ["greedy"]}, r"'greedy' with K in .2.*angular, deepest"),
        ({"sizes": [5]}, r"no choice of 'deepest' with K in .5."),
    ],
)
def test_choices_of_another_model_and_of_an_unknown_method_are_errors(choices, changes, message):
    with pytest.raises(results.ResultError, match=message):
        results.read_choices(choices, **{"model": "some/model", "methods": ["deepest"], "sizes": [2]} | changes)


def test_committed_tables_have_the_runs_of_their_rows_with_seconds_and_memory():
    for name in ("statistics", "selection", "blocks", "slicing", "tasks", "healing", "duplicates", "speed", "combining"):
        table = results.read_table(f"data/{name}.csv")
        runs = pandas.read_csv(results.at_root(f"data/{name}.runs.csv"))
        assert set(table["run"]) <= set(runs["run"])
        assert (runs["seconds"] > 0).all()
        assert (runs["peak_mib"] > 0).all()
        assert not {"seconds", "peak_mib"} & set(table)
