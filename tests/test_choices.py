"""Choices of earlier runs."""

import pytest

from prunelib.lab import choices
from prunelib.lab import runs as results


def _row(method, size, layers, metric="nll", role="choice", **more):
    layers = {} if layers is None else {"removed_layers": layers}
    return {"method": method, "size": size, **layers, "metric": metric, "role": role, "value": 1.0, **more}


@pytest.fixture
def run(tmp_path):
    return results.write_run(
        tmp_path / "blocks.json",
        experiment="blocks",
        parameters={"model": "some/model"},
        rows=[
            _row("dense", 0, None),
            _row("angular", 2, "4 5", calibration_seed=1),
            _row("angular", 2, "6 7", calibration_seed=0),
            _row("angular", 2, "0 1", metric="accuracy", calibration_seed=0),
            _row("angular", 3, "5 6 7", calibration_seed=0),
            _row("angular", 4, "1 2 3 4", role="every_block"),
            _row("deepest", 2, "7 8"),
        ],
        provenance={},
        seconds=0.0,
    )


def test_the_first_draw_is_taken_and_missing_sizes_are_left_out(run):
    found = choices.read(run, model="some/model", methods=["angular", "deepest"], sizes=[2, 3, 4])
    assert found == {("angular", 2): (6, 7), ("angular", 3): (5, 6, 7), ("deepest", 2): (7, 8)}


def test_another_model_and_an_unknown_method_are_errors(run):
    with pytest.raises(choices.ChoiceError, match="some/model, not for other"):
        choices.read(run, model="other", methods=["angular"], sizes=[2])
    with pytest.raises(choices.ChoiceError, match=r"'greedy' with K in .2.*angular, deepest"):
        choices.read(run, model="some/model", methods=["greedy"], sizes=[2])
    with pytest.raises(choices.ChoiceError, match=r"no choice of 'deepest' with K in .5."):
        choices.read(run, model="some/model", methods=["deepest"], sizes=[5])
