"""States without pickle: everything comes back as it was, and what only pickle could write is refused."""

import random

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as some

from prunelib.healing import plainstate

NUMBERS = some.none() | some.booleans() | some.integers() | some.floats(allow_nan=False) | some.text(max_size=5)
ARRAYS = some.sampled_from(
    [torch.arange(6).view(2, 3), torch.tensor(1.5), torch.zeros(0), torch.eye(3, dtype=torch.bfloat16).T]
)
STATES = some.recursive(
    NUMBERS | ARRAYS,
    lambda inner: (
        some.lists(inner, max_size=3)
        | some.lists(inner, max_size=3).map(tuple)
        | some.dictionaries(some.integers() | some.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=8,
)


def same(one, two) -> bool:
    if isinstance(one, torch.Tensor):
        return one.dtype == two.dtype and torch.equal(one, two)
    if isinstance(one, dict):
        return list(one) == list(two) and all(same(one[key], two[key]) for key in one)
    if isinstance(one, list | tuple):
        return type(one) is type(two) and len(one) == len(two) and all(map(same, one, two))
    return type(one) is type(two) and one == two


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(state=STATES)
def test_every_state_comes_back(tmp_path, state):
    plainstate.save(tmp_path / "state", state)
    assert same(state, plainstate.load(tmp_path / "state"))


@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.SGD, torch.optim.Adafactor])
def test_an_optimizer_goes_on_as_if_it_had_not_stopped(tmp_path, optimizer):
    def trained(steps, load=None):
        torch.manual_seed(1)
        weight = torch.nn.Parameter(torch.randn(4, 3))
        own = optimizer([weight], lr=0.1)
        rate = torch.optim.lr_scheduler.LambdaLR(own, lambda step: 1 / (1 + step))
        if load:
            weight.data = load["weight"]
            own.load_state_dict(load["optimizer"])
            rate.load_state_dict(load["rate"])
        for _ in range(steps):
            own.zero_grad()
            (weight**3).sum().backward()
            own.step()
            rate.step()
        return {"weight": weight.data, "optimizer": own.state_dict(), "rate": rate.state_dict()}

    plainstate.save(tmp_path / "state", trained(3))
    assert torch.equal(trained(2, plainstate.load(tmp_path / "state"))["weight"], trained(5)["weight"])


def test_random_generators_go_on(tmp_path):
    def states():
        return random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002

    def drawn():
        return random.random(), np.random.rand(), torch.rand(1).item()  # noqa: NPY002

    plainstate.save(tmp_path / "state", states())
    expected = drawn()
    python, numpy, cpu = plainstate.load(tmp_path / "state")
    random.setstate(python)
    np.random.set_state(numpy)  # noqa: NPY002
    torch.set_rng_state(cpu)
    assert drawn() == expected


def test_shared_memory_is_no_obstacle(tmp_path):
    row = torch.arange(4.0)
    plainstate.save(tmp_path / "state", [row, row[1:], row])
    assert [part.tolist() for part in plainstate.load(tmp_path / "state")] == [[0, 1, 2, 3], [1, 2, 3], [0, 1, 2, 3]]


@pytest.mark.parametrize("thing", [{1, 2}, print, object()])
def test_what_only_pickle_could_write_is_refused_by_name(tmp_path, thing):
    with pytest.raises(TypeError, match=f"a state holds a {type(thing).__name__}"):
        plainstate.save(tmp_path / "state", {"a": [thing]})


def test_another_file_is_refused(tmp_path):
    torch.save({"a": 1}, tmp_path / "pickled")
    for name in ("pickled", "missing"):
        with pytest.raises(ValueError, match=rf"{name}' is missing, damaged, or no saved state"):
            plainstate.load(tmp_path / name)
