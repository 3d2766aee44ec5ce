"""The sets of layers that a run of selection.ipynb or blocks.ipynb has chosen, for the experiments that go on from there."""

import os
from collections.abc import Collection

from prunelib.lab.runs import read_run


class ChoiceError(ValueError):
    """A run file that does not hold the choices that were asked for."""


def read(
    path: str | os.PathLike, *, model: str, methods: Collection[str], sizes: Collection[int]
) -> dict[tuple[str, int], tuple[int, ...]]:
    """(method, K) → the removed layers, ascending; of several calibration draws in the run, those of the first.

    Pairs that the run does not have are left out, as long as every method has one.

    Raises:
        ChoiceError: the run is of another model, or has no choice of a method; names the methods it has.
        ResultError: no run file.
    """
    run = read_run(path)
    if run["parameters"]["model"] != model:
        raise ChoiceError(f"{path} holds choices for {run['parameters']['model']}, not for {model}")
    rows = [row for row in run["rows"] if row.get("role") == "choice" and row["metric"] == "nll" and "removed_layers" in row]
    draw = min((row["calibration_seed"] for row in rows if "calibration_seed" in row), default=None)
    found = {}
    for row in rows:
        size = row.get("layers_removed", row.get("size"))
        if row["method"] in methods and size in sizes and row.get("calibration_seed", draw) == draw:
            found[row["method"], size] = tuple(int(layer) for layer in row["removed_layers"].split())
    missing = [name for name in methods if not any(method == name for method, _ in found)]
    if missing:
        known = sorted({row["method"] for row in rows})
        raise ChoiceError(
            f"{path} has no choice of {missing[0]!r} with K in {sorted(sizes)}; its methods are: {', '.join(known)}"
        )
    return found
