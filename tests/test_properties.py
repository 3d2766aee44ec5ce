"""Properties: plans, schedules, parameters and results, on inputs that nobody would have thought of."""

import itertools
import json
import math
import shlex
import string
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.configuration import set_hypothesis_home_dir

from prunelib.lab import profile as grid
from prunelib.lab import runs as results
from prunelib.lab.parameters import Parameter, ParameterError
from prunelib.models.plans import DropPlan
from prunelib.slicing import schedules
from prunelib.slicing.schedules import SlicePlan

set_hypothesis_home_dir(tempfile.gettempdir())  # nothing in the tree

# The same examples in every run; the seed follows from the test itself.
always = settings(derandomize=True, deadline=None, max_examples=60, database=None)

numbers = st.floats(allow_nan=False, allow_infinity=False)
scalars = st.none() | st.booleans() | st.integers() | numbers | st.text()
plain = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4), max_leaves=8
)
json_objects = st.dictionaries(st.text(max_size=8), plain, max_size=4)


# Arguments of plans: made within a strategy they would be checked there by beartype, which draws random numbers.
@st.composite
def drop_plans(draw):
    n_layers = draw(st.integers(1, 80))
    units = draw(st.sampled_from([tuple(range(n_layers)), tuple(itertools.product(range(n_layers), ("attn", "mlp")))]))
    removed = draw(st.sets(st.sampled_from(units), max_size=len(units) - 1))
    return n_layers, tuple(sorted(removed)), draw(st.text()), draw(json_objects)


@st.composite
def slice_plans(draw):
    hidden_size = draw(st.integers(1, 10**5))
    widths = draw(st.lists(st.integers(1, hidden_size), min_size=1, max_size=80))
    return hidden_size, tuple(widths), draw(st.text()), draw(json_objects)


KINDS = {DropPlan: drop_plans(), SlicePlan: slice_plans()}


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_a_plan_is_what_its_json_says_and_anything_else_is_one_value_error(kind, tmp_path):
    """Of any text, any JSON, and a plan with any one field replaced: a plan that says the same, or a ValueError."""

    def refused_or_the_same(text):
        try:
            plan = kind.from_json(text)
        except ValueError:
            return
        assert kind.from_json(plan.to_json()) == plan

    @always
    @given(st.text() | plain.map(json.dumps))
    def any_text(text):
        refused_or_the_same(text)

    @always
    @given(KINDS[kind], st.integers(0, 4), plain | st.lists(st.integers(-2, 90)) | st.just(math.nan))
    def any_field(about, place, value):
        plan = kind(*about)
        plan.write(tmp_path / "plan.json")
        again = kind.read(tmp_path / "plan.json")
        assert again == plan and again.to_json() == plan.to_json()
        record = json.loads(plan.to_json())
        record[sorted(record)[place % len(record)]] = value
        refused_or_the_same(json.dumps(record))

    any_text()
    any_field()
    refused_or_the_same("[" * 100_000)
    refused_or_the_same('{"n_layers": ' + "9" * 5000 + "}")


redundancies = st.lists(st.floats(0, 1), min_size=1, max_size=40).map(np.array)


@always
@given(redundancies, st.floats(0, 0.8), st.floats(0, 1), st.sampled_from([160, 512]), st.sampled_from([1, 2, 8, 16]))
def test_a_more_redundant_layer_is_never_wider(redundancy, percentage, part, hidden_size, multiple):
    plan = schedules.dynamic(redundancy, hidden_size, percentage, part * percentage, multiple=multiple)
    assert all(width % multiple == 0 and multiple <= width <= hidden_size for width in plan.widths)
    along = np.argsort(-redundancy, kind="stable")
    widths = np.array(plan.widths)[along]
    slices = schedules.final_slices(redundancy, percentage, part * percentage)[along]
    equal = np.isclose(np.diff(slices), 0, rtol=0, atol=1e-12)  # these may differ by the unit that was left over
    assert (np.diff(widths) >= np.where(equal, -multiple, 0)).all()
    inverted = schedules.dynamic(1 - redundancy, hidden_size, percentage, part * percentage, multiple=multiple)
    assert sum(inverted.widths) == sum(plan.widths)


names = st.text(string.ascii_lowercase, min_size=1, max_size=8)
LITERALS = {"bool": st.booleans(), "int": st.integers(), "float": numbers, "str": st.text()}
kinds = st.sampled_from(sorted(LITERALS))


@st.composite
def parameters_and_values(draw):
    """A parameter as a cell may declare it, and a value that it may be given."""
    kind = draw(kinds)
    if draw(st.booleans()):
        default = draw(st.lists(LITERALS[kind], min_size=1, max_size=3))
        return Parameter(draw(names), default, "some"), draw(st.lists(LITERALS[kind], max_size=5))
    value = LITERALS[kind]
    if not draw(st.booleans()):
        return Parameter(draw(names), draw(value), "a setting"), draw(value)
    if kind == "str":  # on a command line this text is None itself
        value = value.filter(lambda text: text.strip().lower() not in ("none", "null"))
    default, told = draw(st.sampled_from([(None, f"{kind}: a setting"), (draw(value), f"{kind} or None: a setting")]))
    return Parameter(draw(names), default, told), draw(st.none() | value)


@always
@given(parameters_and_values())
def test_a_value_survives_the_command_line_of_a_batch(case):
    """What the Snakefile hands to a shell is what the runner gives to the notebook, type and all."""
    parameter, value = case
    (word,) = shlex.split(grid.arguments({parameter.name: value}))
    name, _, text = word.partition("=")
    assert name == parameter.name
    assert same(parameter.parse(text), value)
    assert same(parameter.parse(value), value)


def same(found, value) -> bool:
    """Equal, with the same types all the way down."""
    if isinstance(value, list):
        return type(found) is list and len(found) == len(value) and all(map(same, found, value))
    return type(found) is type(value) and found == value


anything = st.recursive(
    scalars | st.floats() | st.binary() | st.complex_numbers(),
    lambda inner: st.lists(inner) | st.tuples(inner) | st.dictionaries(st.text(), inner),
    max_leaves=6,
)
declared = st.one_of(
    st.booleans(), st.integers(), numbers, st.text(), st.none(), st.lists(st.integers()), st.lists(st.lists(st.text()))
)
helps = st.sampled_from(["", "str: a text", "int: a number", "int or None: a number", "list: some", "float | None", "bool x"])


@always
@given(declared, helps, anything | st.text() | st.sampled_from(["[", "[" * 5000, "[{[]: 1}]", "9" * 5000, "1e999", "[1e999]"]))
def test_what_is_not_of_a_parameters_type_is_refused(default, told, value):
    """Nothing but ParameterError; what is accepted is plain data of the type, as JSON can hold it."""
    parameter = Parameter("x", default, told)
    try:
        found = parameter.parse(value)
    except ParameterError as error:
        assert "x = " in str(error) and "is not of type" in str(error)
        return
    assert parameter.optional if found is None else type(found) is parameter.kind
    assert same(parameter.parse(found), found)
    assert same(json.loads(json.dumps(found, allow_nan=False)), found)


texts = st.text(max_size=20).filter(lambda text: "\r" not in text)
words = texts.filter(bool)
moderate = st.floats(-1e300, 1e300)  # the last float of all, cut to ten digits, is none any more
cells = st.booleans() | st.integers() | moderate | texts
RESERVED = {*results.VALUES, *results.COSTS, *results.RESERVED, *results.PATHS}
columns = words.filter(lambda name: name not in RESERVED)


@st.composite
def runs(draw):
    parameters = draw(st.dictionaries(columns, cells | st.lists(cells, max_size=3) | st.none(), max_size=4))
    free = columns.filter(lambda name: name not in parameters)
    rows = []
    for _ in range(draw(st.integers(0, 4))):
        row = {"metric": draw(words), "value": draw(moderate | st.integers()), **draw(st.dictionaries(free, cells, max_size=3))}
        row |= draw(st.sampled_from([{}, {"n": draw(st.integers(1)), "stderr": abs(draw(moderate))}]))
        rows.append(row)
    return parameters, rows


def written(folder: Path, parameters, rows) -> Path:
    about = {"experiment": "depth", "provenance": {"source_sha256": "a" * 64}, "seconds": 1.5}
    return results.write_run(folder / "runs" / "a.json", parameters=parameters, rows=rows, **about)


@always
@given(runs())
def test_a_run_is_read_as_it_was_written(run):
    parameters, rows = run
    with tempfile.TemporaryDirectory() as folder:
        found = results.read_run(written(Path(folder), parameters, rows))
    assert same([[*map(list, row.items())] for row in found["rows"]], [[*map(list, row.items())] for row in rows])
    assert found["parameters"] == parameters


@always
@given(runs(), st.data())
def test_what_is_not_finite_is_never_written(run, data):
    parameters, rows = run
    assume(rows)
    bad = data.draw(st.sampled_from([math.nan, math.inf, -math.inf]))
    row = data.draw(st.sampled_from(rows))
    row[data.draw(st.sampled_from(["value", "stderr", *(row.keys() - {"metric"})]))] = bad
    with tempfile.TemporaryDirectory() as folder:
        with pytest.raises(results.ResultError, match=r"row \d"):
            written(Path(folder), parameters, rows)
        assert not any(Path(folder).iterdir())
