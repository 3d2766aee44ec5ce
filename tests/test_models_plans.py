"""Drop plans: what they accept, and the published ones. That a plan survives its file: test_properties."""

import pytest

from prunelib.io import project_root
from prunelib.models.plans import DropPlan
from prunelib.models.sublayers import whole_layers


def test_settings_must_be_json_and_the_layers_possible():
    with pytest.raises(ValueError, match="plain JSON values"):
        DropPlan(4, (1,), "test", {"value": float("nan")})
    with pytest.raises(ValueError, match=r"removed \(1, 4\)"):
        DropPlan(4, (1, 4), "test")


@pytest.mark.parametrize(
    "text",
    ["none | attn", "[1, 2]", '{"n_layers": 4}', '{"n_layers": "4", "removed": [1], "method": "x", "settings": {}}'],
)
def test_bad_files_are_named(tmp_path, text):
    (tmp_path / "bad.json").write_text(text)
    with pytest.raises(ValueError, match=r"bad\.json: not a drop plan"):
        DropPlan.read(tmp_path / "bad.json")


def test_published_plans():
    read = {path.stem: DropPlan.read(path) for path in sorted((project_root() / "data" / "plans").glob("*.json"))}
    for name, plan in read.items():
        assert plan.to_json() == (project_root() / "data" / "plans" / f"{name}.json").read_text("utf-8")
        assert plan.settings["source"] and plan.n_layers == 32
    for name, whole in {
        "evopress_llama_3_1_8b_4": (10, 26),
        "evopress_mistral_7b_v0_3_4": (11, 12, 13, 27),
        "evopress_mistral_7b_v0_3_12": (8, 9, 10, 11, 13, 14, 21, 22, 24, 26, 28, 30),
    }.items():
        assert whole_layers(read[name].removed) == whole
        parts = [part for _, part in read[name].removed]
        assert parts.count("attn") == parts.count("mlp") == int(name.rpartition("_")[2])
    blocks = read["blockpruner_llama_2_7b_12"].removed
    assert len(blocks) == 12 and (25, "attn") in blocks and whole_layers(blocks) == ()
