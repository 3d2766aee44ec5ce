"""Drop plans: what they accept, and that they survive being written and read."""

import json

import pytest

from prunelib.plans import DropPlan

PLAN = DropPlan(8, (2, 5, 6), "simdiff_masd", {"alpha": 0.25, "tokens": "all", "seeds": [1, 2], "note": "×"})


def test_kept_is_the_complement():
    assert PLAN.kept == (0, 1, 3, 4, 7)
    assert DropPlan(3, (), "none").kept == (0, 1, 2)


def test_round_trip(tmp_path):
    assert DropPlan.from_json(PLAN.to_json()) == PLAN
    path = tmp_path / "plans" / "plan.json"
    PLAN.write(path)
    assert DropPlan.read(path) == PLAN
    assert json.loads(path.read_text("utf-8"))["removed"] == [2, 5, 6]
    PLAN.write(path)
    assert [file.name for file in path.parent.iterdir()] == ["plan.json"]


def test_a_failed_write_leaves_the_old_plan(tmp_path, monkeypatch):
    path = tmp_path / "plan.json"
    PLAN.write(path)

    def full(*_):
        raise OSError("no space left")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(OSError, match="no space left"):
        DropPlan(8, (1,), "other").write(path)
    assert DropPlan.read(path) == PLAN
    assert [file.name for file in tmp_path.iterdir()] == ["plan.json"]


@pytest.mark.parametrize(
    ("n_layers", "removed", "message"),
    [
        (4, (0, 1, 2, 3), "cannot remove 4 of 4 layers"),
        (4, (1, 4), r"layers \[4\] do not exist in a model of 4 layers \(0 to 3\)"),
        (4, (-1,), r"layers \[-1\] do not exist"),
        (4, (2, 1), r"ascending and unique, got \[2, 1\]"),
        (4, (1, 1), r"ascending and unique, got \[1, 1\]"),
        (0, (), "at least one layer, got n_layers=0"),
    ],
)
def test_bad_plans(n_layers, removed, message):
    with pytest.raises(ValueError, match=message):
        DropPlan(n_layers, removed, "test")


@pytest.mark.parametrize("settings", [{"value": float("nan")}, {"value": object()}])
def test_settings_must_be_json(settings):
    with pytest.raises(ValueError, match="plain JSON values"):
        DropPlan(4, (1,), "test", settings)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("none | attn", "not JSON"),
        ("[1, 2]", "found list"),
        ('{"n_layers": 4, "removed": [1]}', "has the fields n_layers, removed, method, settings"),
        ('{"n_layers": "4", "removed": [1], "method": "x", "settings": {}}', "n_layers of a drop plan must be int, got '4'"),
        ('{"n_layers": 4, "removed": [1.0], "method": "x", "settings": {}}', "must be whole numbers"),
        ('{"n_layers": 4, "removed": [9], "method": "x", "settings": {}}', "do not exist"),
    ],
)
def test_bad_files_are_named(tmp_path, text, message):
    path = tmp_path / "bad.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=rf"bad\.json: .*{message}"):
        DropPlan.read(path)
