"""What to remove, as data: small JSON files that stand between choosing layers and pruning a model."""

import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from prunelib.provenance import write_text


@dataclass(frozen=True)
class DropPlan:
    """Decoder layers to take out of a model.

    n_layers: decoder layers of the dense model. removed: indices of the layers that go, ascending. method: what chose them
    (a criterion's name, a paper's list). settings: whatever else is needed to choose them again; plain JSON values.

    Raises ValueError when `removed` is not ascending, unique and in range, when no layer would stay, or when `settings`
    cannot be written as JSON.
    """

    n_layers: int
    removed: tuple[int, ...]
    method: str
    settings: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        if self.n_layers < 1:
            raise ValueError(f"a model has at least one layer, got n_layers={self.n_layers}")
        wrong = [index for index in self.removed if not 0 <= index < self.n_layers]
        if wrong:
            raise ValueError(f"layers {wrong} do not exist in a model of {self.n_layers} layers (0 to {self.n_layers - 1})")
        if list(self.removed) != sorted(set(self.removed)):
            raise ValueError(f"removed layers must be ascending and unique, got {list(self.removed)}")
        if len(self.removed) == self.n_layers:
            raise ValueError(f"cannot remove {len(self.removed)} of {self.n_layers} layers: at least one must stay")
        try:
            json.dumps(self.settings, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise ValueError(f"settings of a plan must be plain JSON values: {error}; got {self.settings}") from error

    @property
    def kept(self) -> tuple[int, ...]:
        """Indices of the layers that stay, ascending."""
        return tuple(index for index in range(self.n_layers) if index not in self.removed)

    def to_json(self) -> str:
        """The plan as a JSON object, one field per line."""
        lines = (f"  {json.dumps(name)}: {json.dumps(value, allow_nan=False)}" for name, value in asdict(self).items())
        return "{\n" + ",\n".join(lines) + "\n}\n"

    @classmethod
    def from_json(cls, text: str) -> "DropPlan":
        """Inverse of `to_json`. Raises ValueError for anything that is not a plan."""
        try:
            record = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"not a drop plan, because not JSON: {error}") from error
        fields = {"n_layers": int, "removed": list, "method": str, "settings": dict}
        if not isinstance(record, dict) or set(record) != set(fields):
            found = sorted(record) if isinstance(record, dict) else type(record).__name__
            raise ValueError(f"a drop plan has the fields {', '.join(fields)}; found {found}")
        for name, kind in fields.items():
            if not isinstance(record[name], kind) or isinstance(record[name], bool):
                raise ValueError(f"{name} of a drop plan must be {kind.__name__}, got {record[name]!r}")
        if not all(type(index) is int for index in record["removed"]):
            raise ValueError(f"removed layers must be whole numbers, got {record['removed']}")
        return cls(record["n_layers"], tuple(record["removed"]), record["method"], record["settings"])

    def write(self, path: str | os.PathLike) -> None:
        """Write the plan as JSON, atomically: the file appears complete or not at all."""
        write_text(path, self.to_json())

    @classmethod
    def read(cls, path: str | os.PathLike) -> "DropPlan":
        """Inverse of `write`. Raises ValueError naming the file when it holds no plan."""
        try:
            return cls.from_json(Path(path).read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
