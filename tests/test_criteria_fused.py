"""The Triton kernel of the layer statistics against the plain path: interpreted on any machine, for real on a CUDA device."""

import importlib.util
import os
import subprocess
import sys
import textwrap
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from model_helpers import ARRAYS, assert_close

from prunelib.criteria import statistics
from prunelib.criteria.statistics import from_states

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="needs Triton, which comes with the CUDA builds of PyTorch"
)
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def assert_equal(fused: statistics.LayerStats, plain: statistics.LayerStats) -> None:
    """Both are float64 all the way. Near-zero angles (1e-8) are the arccos of cosines that round to 1 or not."""
    for name in ARRAYS:
        tolerance = 1e-7 * plain.count.max() if name == "angle" else 1e-12
        np.testing.assert_allclose(getattr(fused, name), getattr(plain, name), rtol=1e-9, atol=tolerance, err_msg=name)


@contextmanager
def without_kernel():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(statistics, "_fused", lambda device: None)
        yield


@needs_triton
def test_interpreted_kernel_gives_the_plain_sums():
    """In a process of its own, as the interpreter is chosen on import."""
    script = """
        import torch
        from prunelib.criteria import fused
        from prunelib.criteria.statistics import _Plain, _subset_weights, token_sums

        torch.manual_seed(0)
        for tokens, n_states, width in ((9, 7, 160), (4, 7, 50), (5, 33, 200), (3, 2, 64), (1, 70, 40)):
            states = torch.randn(tokens, 1, width) + 0.05 * torch.randn(tokens, n_states, width).cumsum(1)
            states[:, 1] = states[:, 0]
            states = states.to(torch.bfloat16 if tokens % 2 else torch.float32)
            weights = _subset_weights(1, tokens)
            found, expected = (token_sums(*products(states), weights) for products in (fused.products, _Plain()))
            for name in expected:
                torch.testing.assert_close(found[name], expected[name], rtol=1e-12, atol=1e-12, msg=name)
            # As the states of a model larger than memory lie: state by state.
            apart = fused.products(states.transpose(0, 1).contiguous().transpose(0, 1))
            assert all(torch.equal(a, b) for a, b in zip(apart, fused.products(states)))
        refused = [torch.randn(2, 3, 8).half(), torch.randn(2, 130, 8), torch.randn(2, 8, 3).mT, torch.ones(2, 3, 7).bfloat16()]
        assert not any(map(fused.usable, refused))
        assert fused.problem(torch.device("cpu")) is None
        spoilt = torch.randn(2, 3, 8)
        spoilt[1, 2, 3] = float("nan")
        gram, step, absolute = fused.products(spoilt)
        assert gram[0].isfinite().all() and gram[1, 2, 2].isnan() and step[1, 1].isnan() and absolute[1, 1].isnan()
    """
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", textwrap.dedent(script)]
    root = Path(__file__).resolve().parents[1]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=root, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize("moved", [False, True])
def test_states_may_lie_state_by_state(moved):
    """The layout in which the states of a streamed model wait; chunks are copied state by state (here from CPU to CPU)."""
    states = torch.randn(7, 3, 5, 16).cumsum(0)
    device = torch.device("cpu", 0) if moved else None  # not the same device as "cpu" to torch
    found = from_states(states.permute(1, 2, 0, 3), device)
    assert_close(found, from_states(states.permute(1, 2, 0, 3).contiguous()), rtol=1e-12, atol=1e-12)


def test_a_kernel_that_does_not_work_is_reported_and_not_used(monkeypatch):
    broken = type(sys)("prunelib.criteria.fused")
    broken.problem = lambda device: "RuntimeError: no compiler"
    monkeypatch.setitem(sys.modules, "prunelib.criteria.fused", broken)
    monkeypatch.setattr("prunelib.criteria.fused", broken, raising=False)
    statistics._fused.cache_clear()
    with pytest.warns(UserWarning, match=r"without the Triton kernel, more slowly: RuntimeError: no compiler"):
        assert statistics._fused(torch.device("cuda", 0)) is None
    statistics._fused.cache_clear()


@needs_cuda
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("n_states", "width"), [(7, 160), (33, 4096), (81, 1024), (127, 512)])
def test_cuda_kernel_gives_the_plain_sums(dtype, n_states, width):
    assert statistics._fused(torch.device("cuda", 0)) is not None
    # Steps of 2 % of the length: the angles are as small as those of neighboring layers in a deep model.
    states = torch.randn(2, 50, 1, width, device="cuda") + 0.02 * torch.randn(2, 50, n_states, width, device="cuda").cumsum(2)
    states[:, :, 1] = states[:, :, 0]
    states = states.to(dtype)
    with without_kernel():
        expected = from_states(states)
    assert_equal(from_states(states), expected)
    apart = states.permute(2, 0, 1, 3).cpu().permute(1, 2, 0, 3)
    assert_equal(from_states(apart, states.device), expected)
