"""What runs took: collected once, kept when the run files are gone."""

import json
from pathlib import Path

import pandas as pd
import pytest

from prunelib.lab import costs
from prunelib.lab import runs as results

ROOT = Path(__file__).resolve().parents[1]


def write(folder: Path, name: str, *, seconds: float = 61.26, code: str = "ab" * 32, peak: int | None = 5 * 2**20) -> Path:
    origin = {
        "source_sha256": code,
        "device": "cpu",
        "cpu": "a cpu",
        "threads": 1,
        "python": "3.11",
        "libraries": {"torch": "2"},
    }
    rows = [{"metric": "ppl", "value": 1.0}]
    return results.write_run(
        folder / name, experiment="x", parameters={}, rows=rows, provenance=origin, seconds=seconds, peak_bytes=peak
    )


def test_one_line_for_every_run(tmp_path):
    write(tmp_path / "depth", "b.json", peak=None)
    write(tmp_path / "depth", "a.json")
    table = costs.costs([tmp_path])
    assert table["run"].tolist() == ["depth/a", "depth/b"]
    first = table.loc[0].to_dict()
    assert (first["code"], first["seconds"], first["peak_mib"]) == ("abababababab", 61.3, 5)
    assert (first["device"], first["cpu"], first["threads"], first["python"], first["torch"]) == (
        "cpu",
        "a cpu",
        1,
        "3.11",
        "2",
    )
    assert table["peak_mib"].isna().tolist() == [False, True], "missing is missing"
    with pytest.raises(results.ResultError, match="another file is"):
        costs.costs([tmp_path, tmp_path / "depth" / "a.json"])
    with pytest.raises(results.ResultError, match="there is no run in any of these places"):
        costs.costs([])


def test_lines_of_runs_that_are_gone_stay_as_long_as_something_names_them(tmp_path):
    write(tmp_path / "depth", "a.json", seconds=10.0)
    write(tmp_path / "chapters", "01.json", code="cd" * 32)
    now = costs.costs([tmp_path])
    before = pd.concat(
        [
            now[now["run"] == "depth/a"].assign(seconds=99.0),
            now[now["run"] == "depth/a"].assign(run="depth/gone"),
            now[now["run"] == "depth/a"].assign(run="depth/named"),
            now[now["run"] == "chapters/01"].assign(code="old"),
            now[now["run"] == "chapters/01"].assign(run="chapters/02"),
        ]
    )
    both = costs.merged(now, before, {("depth/named", "abababababab")})
    assert both["run"].tolist() == ["chapters/01", "chapters/02", "depth/a", "depth/named"]
    assert both.set_index("run").loc["depth/a", "seconds"] == 10, "the newer time"
    assert both.set_index("run").loc["chapters/01", "code"] == "cdcdcdcdcdcd", "drawn again"
    assert costs.merged(now, None, set()) is now


def test_the_committed_table_is_of_the_committed_runs():
    """Times, memory and hardware of the runs whose files are in git are those of the files."""
    table = costs.read().set_index(["run", "code"])
    files = [path for place in costs.COMMITTED for path in sorted((ROOT / place).rglob("[!.]*.json"))]
    files = [path for path in files if "optimum" in path.parts or "speed" in path.parts or path.parent.name == "healing"]
    checked = 0
    for path in files:
        run = json.loads(path.read_text(encoding="utf-8"))
        key = results.run_id(path), run["provenance"]["source_sha256"][:12]
        if key in table.index:
            assert table.loc[key, "seconds"] == pytest.approx(run["seconds"], abs=0.051)
            assert table.loc[key, "device"] == run["provenance"]["device"]
            checked += 1
    assert checked > 40
    assert not table.index.duplicated().any()


def test_the_command_writes_the_table(tmp_path, monkeypatch, capsys):
    write(tmp_path / "depth", "a.json")
    write(tmp_path / "depth", "unnamed.json")
    monkeypatch.setattr(costs, "COSTS", str(tmp_path / "costs.csv"))
    monkeypatch.setattr(costs, "named", lambda: {("depth/a", "abababababab")})
    monkeypatch.setattr(costs, "read", lambda: None)
    assert costs.main([str(tmp_path / "depth")]) == 0
    assert pd.read_csv(tmp_path / "costs.csv")["run"].tolist() == ["depth/a"]
    assert "1 runs, 1 min" in capsys.readouterr().out
    assert costs.main(["--help"]) == 2
    assert costs.main([str(tmp_path / "costs.csv")]) == 1
    assert "is not JSON" in capsys.readouterr().err
