"""Named rules for the importance of layers, and the registries that hold them.

A rule is one function of data and keyword options, under one of three decorators: `criterion` (of layer statistics),
`block_criterion` (of a contiguous block) or `ablation` (of a model and calibration windows).
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Rule:
    """A named rule for importance, called as ``rule(*data, **options)``; importance has one sign, higher = keep.

    title: label in plots. protect_first, protect_last: how many layers at either end the published method never removes;
    callers pass them on to `prunelib.depth.lowest`. data: how many leading arguments of `importance` are no options.
    """

    kind: str
    name: str
    title: str
    source: str
    protect_first: int
    protect_last: int
    importance: Callable[..., np.ndarray]
    data: int

    @property
    def options(self) -> dict[str, Any]:
        """Names and defaults of the options."""
        parameters = list(inspect.signature(self.importance).parameters.values())[self.data :]
        return {parameter.name: parameter.default for parameter in parameters}

    def __call__(self, *data: Any, **options: Any) -> np.ndarray:
        """Importance in float64; raises ValueError for options the rule does not have, RuntimeError for NaN or infinity."""
        if unknown := sorted(set(options) - set(self.options)):
            known = ", ".join(self.options) or "none"
            raise ValueError(f"{self.kind} {self.name} has no option {', '.join(unknown)}; its options are: {known}")
        importance = np.asarray(self.importance(*data, **options), dtype=np.float64)
        if bad := np.flatnonzero(~np.isfinite(importance)).tolist():
            raise RuntimeError(f"importance by {self.name} is NaN or infinite at {bad}; check the weights, or use float32")
        return importance


class Rules(dict[str, Rule]):
    """Rules by name; an unknown name raises ValueError listing the known ones."""

    def __init__(self, kind: str, *, data: int):
        super().__init__()
        self.kind, self.data = kind, data

    def __missing__(self, name: str) -> Rule:
        raise ValueError(f"unknown {self.kind} {name!r}; there are: {', '.join(sorted(self))}")

    def register(
        self, *, title: str, source: str, protect_first: int = 0, protect_last: int = 0
    ) -> Callable[[Callable[..., np.ndarray]], Rule]:
        """Decorator that turns a function into a rule under its own name, which must be new, except in cells of a notebook."""

        def add(importance: Callable[..., np.ndarray]) -> Rule:
            name = importance.__name__
            if name in self and {importance.__module__, self[name].importance.__module__} != {"__main__"}:
                raise ValueError(f"{self.kind} {name!r} exists already; give the function another name")
            self[name] = Rule(self.kind, name, title, source, protect_first, protect_last, importance, self.data)
            return self[name]

        return add


CRITERIA = Rules("criterion", data=1)
"""Criteria by name, each called as ``criterion(stats, **options)`` for the importance of every layer."""

BLOCK_CRITERIA = Rules("criterion of blocks", data=2)
"""Criteria of contiguous blocks, each called as ``criterion(stats, n, **options)``: element l is for layers l .. l+n-1."""

ABLATIONS = Rules("ablation", data=2)
"""Ablations by name, called as ``ablation(model, windows, **options)``; the model is left as it was, gradients included."""

criterion = CRITERIA.register
block_criterion = BLOCK_CRITERIA.register
ablation = ABLATIONS.register
