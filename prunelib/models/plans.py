"""What to remove, as data: small JSON files that stand between choosing layers and pruning a model."""

import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar, TypeVar, get_origin

from prunelib.io import write_text
from prunelib.models.architectures import SUBLAYERS

P = TypeVar("P", bound="JsonPlan")


class JsonPlan:
    """A frozen dataclass of numbers, tuples of whole numbers, texts and plain settings as a JSON object."""

    _name: ClassVar[str]

    def to_json(self) -> str:
        """The plan as a JSON object, one field per line."""
        lines = (f"  {json.dumps(name)}: {json.dumps(value, allow_nan=False)}" for name, value in asdict(self).items())
        return "{\n" + ",\n".join(lines) + "\n}\n"

    @classmethod
    def from_json(cls: type[P], text: str) -> P:
        """Inverse of `to_json`. Raises ValueError for anything that is not a plan."""
        try:
            record = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"not a {cls._name}, because not JSON: {error}") from error
        declared = {part.name: get_origin(part.type) or part.type for part in fields(cls)}
        if not isinstance(record, dict) or set(record) != set(declared):
            found = sorted(record) if isinstance(record, dict) else type(record).__name__
            raise ValueError(f"a {cls._name} has the fields {', '.join(declared)}; found {found}")
        for name, kind in declared.items():
            value = record[name]
            if kind is tuple and isinstance(value, list):  # JSON has no tuples
                if not all(type(index) is int for index in value):
                    raise ValueError(f"{name} of a {cls._name}: layers must be whole numbers, got {value}")
                record[name] = tuple(value)
            elif type(value) is not kind:
                raise ValueError(f"{name} of a {cls._name} must be {kind.__name__}, got {value!r}")
        return cls(**record)

    def write(self, path: str | os.PathLike) -> None:
        """Write the plan as JSON, atomically: the file appears complete or not at all."""
        write_text(path, self.to_json())

    @classmethod
    def read(cls: type[P], path: str | os.PathLike) -> P:
        """Inverse of `write`. Raises ValueError naming the file when it holds no plan."""
        try:
            return cls.from_json(Path(path).read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error


@dataclass(frozen=True)
class DropPlan(JsonPlan):
    """Decoder layers to take out of a model.

    n_layers: decoder layers of the dense model. removed: indices of the layers that go, ascending. method: what chose them
    (a criterion's name, a paper's list). settings: whatever else is needed to choose them again; plain JSON values.

    Raises ValueError when `removed` is not ascending, unique and in range, when no layer would stay, or when `settings`
    cannot be written as JSON.
    """

    _name: ClassVar[str] = "drop plan"

    n_layers: int
    removed: tuple[int, ...]
    method: str
    settings: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        _check_layers(self.n_layers, self.removed, "removed layers")
        if len(self.removed) == self.n_layers:
            raise ValueError(f"cannot remove {len(self.removed)} of {self.n_layers} layers: at least one must stay")
        check_settings(self.settings)


@dataclass(frozen=True)
class SublayerPlan(JsonPlan):
    """Attention and MLP sublayers to take out of a model, each alone (BlockPruner, arXiv 2406.10594; EvoPress, 2410.14649).

    attention, mlp: indices of the layers whose attention, whose MLP goes, ascending; a layer in both goes as a whole. n_layers,
    method, settings, and ValueError: as in `DropPlan`. Searches and layer sets name a sublayer (layer, "attn" | "mlp"):
    `removed`, `from_units`.
    """

    _name: ClassVar[str] = "sublayer plan"

    n_layers: int
    attention: tuple[int, ...]
    mlp: tuple[int, ...]
    method: str
    settings: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        _check_layers(self.n_layers, self.attention, "layers without attention")
        _check_layers(self.n_layers, self.mlp, "layers without MLP")
        if len(self.layers) == self.n_layers:
            raise ValueError(f"cannot remove {2 * self.n_layers} of {2 * self.n_layers} sublayers: at least one must stay")
        check_settings(self.settings)

    @property
    def layers(self) -> tuple[int, ...]:
        """Layers that lose both sublayers, ascending: they go as a whole."""
        return tuple(index for index in self.attention if index in self.mlp)

    @property
    def removed(self) -> tuple[tuple[int, str], ...]:
        """The sublayers that go, ascending, such as ((3, "attn"), (3, "mlp"), (7, "mlp"))."""
        parts = zip((self.attention, self.mlp), SUBLAYERS, strict=True)
        return tuple(sorted((index, part) for layers, part in parts for index in layers))

    @classmethod
    def from_units(
        cls, n_layers: int, removed: Iterable[tuple[int, str]], method: str, settings: dict[str, Any] | None = None
    ) -> "SublayerPlan":
        """Inverse of `removed`; `removed` in any order. Raises ValueError for sublayers that do not exist or come twice."""
        gone = sorted(removed)
        wrong = [unit for unit in gone if unit[1] not in SUBLAYERS]
        if wrong:
            raise ValueError(f"sublayers {wrong} do not exist: a sublayer is (layer, {' or '.join(map(repr, SUBLAYERS))})")
        attention, mlp = (tuple(index for index, part in gone if part == name) for name in SUBLAYERS)
        return cls(n_layers, attention, mlp, method, settings or {})


def _check_layers(n_layers: int, layers: tuple[int, ...], what: str) -> None:
    if n_layers < 1:
        raise ValueError(f"a model has at least one layer, got n_layers={n_layers}")
    wrong = [index for index in layers if not 0 <= index < n_layers]
    if wrong:
        raise ValueError(f"layers {wrong} do not exist in a model of {n_layers} layers (0 to {n_layers - 1})")
    if list(layers) != sorted(set(layers)):
        raise ValueError(f"{what} must be ascending and unique, got {list(layers)}")


def check_settings(settings: dict[str, Any]) -> None:
    """Raise ValueError unless the settings of a plan are plain JSON values."""
    try:
        json.dumps(settings, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(f"settings of a plan must be plain JSON values: {error}; got {settings}") from error
