"""Planned peaks: exact where the published counts are known, monotonic, and the same in the committed table."""

import csv
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from prunelib.scale.footprint import _FIELDS, GIB, SHAPES, planned, sizes, what_fits_where, windows_that_fit

ROOT = Path(__file__).resolve().parents[1]
LLAMA = sizes(dict(zip(_FIELDS, SHAPES["Llama-3.1-8B"], strict=True)))
SETTING = {"batch_size": 4, "seq_len": 2048, "states": True, "logits": False, "accelerator": True}


@pytest.mark.parametrize(
    ("name", "layer", "total"),
    [
        ("Llama-2-7B", 202_383_360, 6_738_415_616),
        ("Llama-3.1-8B", 218_112_000, 8_030_261_248),
        ("Llama-2-13B", 317_204_480, 13_015_864_320),
    ],
)
def test_sizes_are_the_published_parameter_counts(name, layer, total):
    found = sizes(dict(zip(_FIELDS, SHAPES[name], strict=True)))
    assert found.layer_bytes == 2 * layer
    final_norm = found.hidden
    assert found.weights == 2 * (total - final_norm)


def test_an_8b_model_is_planned_within_four_gib_of_a_gpu_and_six_of_a_processor():
    assert planned(LLAMA, **SETTING, windows_at_once=32).device_peak < 4 * GIB
    assert planned(LLAMA, **(SETTING | {"states": False, "logits": True}), windows_at_once=64).device_peak < 4 * GIB
    processor = SETTING | {"accelerator": False, "batch_size": 1}
    for kind in ({"states": True, "logits": False}, {"states": False, "logits": True}):
        assert planned(LLAMA, **(processor | kind), windows_at_once=1).host_peak < 6 * GIB


def test_peaks_grow_with_everything():
    smallest = planned(LLAMA, **SETTING, windows_at_once=4)
    for change in ({"batch_size": 8}, {"seq_len": 4096}):
        assert planned(LLAMA, **(SETTING | change), windows_at_once=4).device_peak > smallest.device_peak
    assert planned(LLAMA, **SETTING, windows_at_once=5).host_peak > smallest.host_peak
    assert planned(LLAMA, **SETTING, windows_at_once=5).device_peak == smallest.device_peak
    converted = replace(LLAMA, stored_layer_bytes=2 * LLAMA.layer_bytes)
    assert planned(converted, **SETTING, windows_at_once=4).device_peak > smallest.device_peak + 2 * LLAMA.layer_bytes
    assert "GiB on the device" in smallest.describe()
    assert "on the device" not in planned(LLAMA, **(SETTING | {"accelerator": False}), windows_at_once=4).describe()


@pytest.mark.parametrize("host", [2, 6, 32, 200])
@pytest.mark.parametrize("accelerator", [True, False])
def test_the_windows_that_fit_fit_and_one_batch_more_does_not(host, accelerator):
    setting = SETTING | {"accelerator": accelerator}
    found = windows_that_fit(LLAMA, host * GIB, **setting)
    assert found % 4 == 0
    assert found == 0 or planned(LLAMA, **setting, windows_at_once=found).host_peak <= host * GIB
    assert planned(LLAMA, **setting, windows_at_once=found + 4).host_peak > host * GIB


def test_the_committed_table_is_what_the_command_writes():
    done = subprocess.run(
        [sys.executable, "-m", "prunelib.scale.footprint"], capture_output=True, text=True, cwd=ROOT, check=True
    )
    assert done.stdout == (ROOT / "data/footprint.csv").read_text()
    assert [row["model"] for row in csv.DictReader(done.stdout.splitlines())] == [row["model"] for row in what_fits_where()]


def test_the_table_needs_no_torch():
    script = (
        "import sys; import prunelib.scale.footprint; assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True)
