"""Drop plans: what they accept, and that they survive being written and read."""

import json
from dataclasses import fields
from pathlib import Path

import pytest

from prunelib.models.plans import DropPlan, SublayerPlan


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


# --- sublayers


@pytest.mark.parametrize(
    ("attention", "mlp", "message"),
    [
        ((0, 1, 2, 3), (0, 1, 2, 3), "cannot remove 8 of 8 sublayers: at least one must stay"),
        ((4,), (), r"layers \[4\] do not exist"),
        ((), (2, 1), r"layers without MLP must be ascending and unique, got \[2, 1\]"),
        ((1, 1), (), "layers without attention must be ascending and unique"),
    ],
)
def test_bad_sublayer_plans(attention, mlp, message):
    with pytest.raises(ValueError, match=message):
        SublayerPlan(4, attention, mlp, "test")
    assert SublayerPlan(4, (0, 1, 2, 3), (), "test").layers == ()  # every layer may lose one


@pytest.mark.parametrize(
    ("units", "message"),
    [([(4, "mlp")], r"layers \[4\] do not exist"), ([(3, "mlp"), (3, "mlp")], "unique"), ([(3, "head")], "'attn' or 'mlp'")],
)
def test_bad_units(units, message):
    with pytest.raises(ValueError, match=message):
        SublayerPlan.from_units(4, units, "test")


def test_published_plans():
    """Every committed plan reads as the one kind whose fields it has, is written as it stands, and names its source."""
    read = {}
    for path in sorted((Path(__file__).parents[1] / "data" / "plans").glob("*.json")):
        names = set(json.loads(path.read_text("utf-8")))
        (kind,) = (kind for kind in (DropPlan, SublayerPlan) if {part.name for part in fields(kind)} == names)
        read[path.stem] = kind.read(path)
        assert read[path.stem].to_json() == path.read_text("utf-8")
        assert read[path.stem].settings["source"]
    for name, whole in {
        "evopress_llama_3_1_8b_4": (10, 26),
        "evopress_mistral_7b_v0_3_4": (11, 12, 13, 27),
        "evopress_mistral_7b_v0_3_12": (8, 9, 10, 11, 13, 14, 21, 22, 24, 26, 28, 30),
    }.items():
        plan, count = read[name], int(name.rpartition("_")[2])
        assert plan.layers == whole
        assert (plan.n_layers, len(plan.attention), len(plan.mlp)) == (32, count, count)
    blocks = read["blockpruner_llama_2_7b_12"]
    assert (len(blocks.removed), len(blocks.attention), blocks.layers) == (12, 10, ())
    assert 25 in blocks.attention
