"""What to remove, as data: small JSON files that stand between choosing layers and pruning a model."""

import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from prunelib.io import write_text
from prunelib.models.layerwise import LayerSet, check_layer_set

P = TypeVar("P", bound="JsonPlan")


class JsonPlan:
    """A frozen dataclass of numbers, tuples, texts and plain `settings` as a JSON object."""

    _name: ClassVar[str]
    settings: dict[str, Any]

    def __post_init__(self) -> None:
        try:
            json.dumps(self.settings, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise ValueError(f"settings of a plan must be plain JSON values: {error}; got {self.settings}") from error

    def to_json(self) -> str:
        """The plan as a JSON object, one field per line."""
        lines = (f"  {json.dumps(name)}: {json.dumps(value, allow_nan=False)}" for name, value in asdict(self).items())
        return "{\n" + ",\n".join(lines) + "\n}\n"

    @classmethod
    def from_json(cls: type[P], text: str) -> P:
        """Inverse of `to_json`. Raises ValueError for anything that is not a plan."""

        def tuples(value: object) -> object:  # JSON has none
            return tuple(map(tuples, value)) if isinstance(value, list) else value

        try:
            return cls(**{name: tuples(value) for name, value in json.loads(text).items()})
        except (ValueError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(f"not a {cls._name}: {error}") from error

    def write(self, path: str | os.PathLike) -> None:
        """Write the plan as JSON: the file appears complete or not at all."""
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
    """Decoder layers, or attention and MLP sublayers of them, to take out of a model.

    n_layers: decoder layers of the dense model. removed: what goes, ascending, as in a `LayerSet`. method: what chose it (a
    criterion's name, a paper's list). settings: whatever else is needed to choose it again; plain JSON values.

    Raises ValueError for a `removed` that `check_layer_set` refuses, and `settings` that cannot be written as JSON.
    """

    _name: ClassVar[str] = "drop plan"

    n_layers: int
    removed: LayerSet
    method: str
    settings: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        check_layer_set(self.n_layers, self.removed)
        super().__post_init__()
