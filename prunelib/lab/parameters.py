"""Parameters of a notebook: one cell of plain lines, read without running it, and every value that can be seen to be wrong."""

import ast
import difflib
import json
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from pydantic import ConfigDict, JsonValue, TypeAdapter

from prunelib.io import CONVERTED, at_root, found, plain
from prunelib.lab.provenance import code_cells

TYPES = (bool, int, float, str, list)  # of a default, besides None
# What all notebooks mean by a name: the values it takes, the least one (0 for all others), and lists that hold something.
PATTERNS = {"dtype": r"float(16|32|64)|bfloat16", "device": r"auto|cpu|(cuda|mps|xpu)(:\d+)?", "keep_of": "layers|parameters"}
LEAST = dict.fromkeys(("batch_size", "report_windows", "windows", "limit", "tasks_limit", "max_documents", "batch"), 1)
LEAST |= dict.fromkeys(("report_seq_len", "rounds", "segments", "multiple", "settings", "report_texts", "report_corpora"), 1)
LEAST |= dict.fromkeys(("corpora", "seeds", "recipes", "repairs", "modules", "ranks", "learning_rates", "deduplicated"), 1)
LEAST |= {"stages": 1}
WRITTEN = ("output", "folder", "pruned_folder", "healed_folder", "figures")  # places of results, which need not be there
FREE = ("prompt", "base_model", "push_to", "revision")  # texts that name no file
FOLDERS = ("data_dir", "task_data_dir")
FILES = (".txt", ".raw", ".jsonl", ".json", ".csv", ".parquet", ".gguf", ".gz", ".xz")
LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")  # what a config.json calls their number
LEFT_OUT = ("tasks", "healing")  # notebooks that leave out sizes which their choices do not have


class ParameterError(ValueError):
    """A run that was refused before a kernel started."""


@dataclass(frozen=True)
class Parameter:
    """One line of the parameters cell: `name = default  # help`.

    A default of None may be given a text, or another type when its help starts with it: `limit = None  # int: …`. Another
    default may be given None where its help starts with that: `limit = 64  # int or None: …`.
    """

    name: str
    default: object
    help: str = ""

    @property
    def optional(self) -> bool:
        """Whether None is a value of this parameter."""
        return self.default is None or re.match(r"\w+ or None\b", self.help) is not None

    @property
    def kind(self) -> type:
        if self.default is not None:
            return type(self.default)
        return {kind.__name__: kind for kind in TYPES}.get(re.match(r"\w*", self.help).group(), str)

    def parse(self, value: object) -> object:
        """`value` as plain data of this parameter's type. Raises ParameterError.

        A text, as from a command line, is read as JSON; a list may be given as `1,2`.
        """
        elements = type(self.default[0]) if self.kind is list and self.default else JsonValue
        kind = list[elements] if self.kind is list else self.kind
        adapter = TypeAdapter(kind | None if self.optional else kind, config=ConfigDict(strict=True, allow_inf_nan=False))
        try:
            text = value.strip() if isinstance(value, str) else json.dumps(value, default=plain)
            if isinstance(value, str) and self.optional and text.lower() == "none":
                text = "null"
            elif isinstance(value, str) and self.kind is str:
                text = json.dumps(value)
            elif isinstance(value, str) and self.kind is list and not text.startswith("["):
                items = [item.strip() for item in text.split(",") if item.strip()]
                text = json.dumps(items) if elements in (str, JsonValue) else f"[{','.join(items)}]"
            return adapter.validate_json(text.lower() if self.kind is bool else text)
        except (TypeError, ValueError, RecursionError):
            wanted = f"{self.kind.__name__} or None" if self.optional else self.kind.__name__
            raise ParameterError(f"{self.name} = {value!r} is not of type {wanted} (the default is {self.default!r})") from None

    def checked(self, value: object) -> object:
        """`parse`, which must give a value that can be meant, whatever the other parameters are. Raises ParameterError."""
        parsed = self.parse(value)
        if problem := self._problem(parsed):
            raise ParameterError(f"{self.name} = {value!r} {problem} (the default is {self.default!r})")
        return parsed

    def _problem(self, value: object) -> str | None:
        least, some = LEAST.get(self.name, 0), value if isinstance(value, list) else [value]
        if self.kind is list and value is not None and len(value) < least:
            return "is empty: name at least one"
        if self.kind is not list and any(_is_number(one) and one < least for one in some):
            return f"is below {least}"
        if any(_is_number(one) and one < 0 for one in some):
            return "holds a negative number"
        if self.kind is list and not self.name.endswith("splits") and len({*map(repr, some)}) < len(some):
            return "holds an entry twice"
        if not all(one.strip() and "\0" not in one for one in some if isinstance(one, str)) and self.default != "":
            return "is an empty text" if self.kind is str else "holds an empty text"
        if self.kind is str and value == "null" and not self.optional:
            return "is no text, and this one cannot be left out"
        if self.name in PATTERNS and isinstance(value, str) and not re.fullmatch(PATTERNS[self.name], value):
            return f"is not one of {PATTERNS[self.name]}"
        return None


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def parameters(notebook: str | os.PathLike) -> dict[str, Parameter]:
    """Name → parameter of the one cell tagged `parameters`, which must be the first code cell.

    The cell holds plain lines `name = literal  # help` and nothing else: papermill does not see others. Raises ParameterError.
    """
    known: dict[str, Parameter] = {}
    try:
        cells = code_cells(notebook)
        if [index for index, (_, tags) in enumerate(cells) if "parameters" in tags] != [0]:
            raise ValueError(f"{notebook}: exactly one cell, the first with code, must be tagged `parameters`")
        lines = cells[0][0].encode().splitlines()  # `ast` counts bytes
        for node in ast.parse(cells[0][0]).body:
            name, equals, _ = ast.unparse(node).partition(" = ")
            if not isinstance(node, ast.Assign) or not equals or not name.isidentifier() or name in known:
                raise ValueError(f"`{ast.unparse(node)}` is no plain line `name = literal  # help`, each name once")
            default = ast.literal_eval(node.value)
            if default is not None and type(default) not in TYPES:
                raise ValueError(f"the default of `{name}` is not of type bool, int, float, str, list or None")
            known[name] = Parameter(name, default, lines[node.end_lineno - 1][node.end_col_offset :].decode().lstrip("# "))
    except (ValueError, SyntaxError) as error:
        raise ParameterError(f"{error} (the parameters cell of {notebook} needs literals; derive values below it)") from None
    return known


def check(notebook: str | os.PathLike, values: Mapping[str, object]) -> dict[str, object]:
    """Typed `values` for `notebook`; texts, as from a command line, are read.

    Raises ParameterError naming the first parameter that is unknown (with the closest one), ill-typed, or that cannot be meant.
    """
    if not Path(notebook).is_file():
        raise ParameterError(f"there is no notebook {notebook}")
    known = parameters(notebook)
    if "output" not in known:
        raise ParameterError(f"{notebook} has no parameter `output`: it could not say where its result goes")
    for name in values:
        if name not in known:
            raise ParameterError(f"{notebook} has no parameter `{name}`{closest(name, known)}")
    try:
        return {name: known[name].checked(value) for name, value in values.items()}
    except ParameterError as error:
        raise ParameterError(f"{notebook}: {error}") from None


def check_places(notebook: str | os.PathLike, values: Mapping[str, object]) -> None:
    """Raise ParameterError for an input that is not there, a result where there is something else, and as `check_sizes`."""
    for name, value in values.items():
        for text in value if isinstance(value, list) else [value]:
            if isinstance(text, str) and (problem := _place_problem(name, text)):
                raise ParameterError(f"{notebook}: {name} = {text!r} {problem}")
    check_sizes(Path(notebook).stem, {"model": parameters(notebook).get("model", Parameter("model", "")).default} | values)


def _place_problem(name: str, text: str) -> str | None:
    """What is wrong with a place in the file system, where a text is one."""
    path = found(text)
    if name in WRITTEN:
        wrong = path.is_dir() if name == "output" else path.is_file()
        return f"is a {'folder' if name == 'output' else 'file'}: give another place" if wrong else None
    if name in FOLDERS:
        return None if path.is_dir() else "is no folder"
    looks = text.startswith((os.sep, "~", "./", "../")) or path.suffix in FILES or (name == "model" and text.count("/") > 1)
    if name in FREE or not looks or path.exists() or found(text.rpartition(":")[0] or text).is_file():
        return None
    return f"does not exist (working directory {str(Path.cwd())!r})"


def check_sizes(notebook: str, settings: Mapping[str, object]) -> None:
    """Raise ParameterError where more layers are to go than the model has, as far as a local folder says how many that are."""
    model = str(settings.get("model") or "")
    config = next((path for path in (found(model), at_root(CONVERTED) / model) if (path / "config.json").is_file()), None)
    if notebook in LEFT_OUT or config is None:
        return
    try:
        said = json.loads((config / "config.json").read_text(encoding="utf-8"))
        said = said | said.get("text_config", {})
        layers = next((said[name] for name in LAYERS if name in said), None)
    except (ValueError, TypeError, AttributeError):  # the model's loader says what is wrong
        return
    evolved = any("evolutionary" in one for one in settings.get("searches") or ())
    for name, value in settings.items():
        if name == "evolved_sizes" and not evolved:
            continue
        asked = value if name.endswith("sizes") and isinstance(value, list) else [value] if name == "layers_removed" else []
        if isinstance(layers, int) and any(_is_number(size) and not size < layers for size in asked):
            raise ParameterError(f"{name} = {value!r}: the model has {layers} layers, and at least one must stay")


def closest(name: str, known: Iterable[str]) -> str:
    """A hint for a message about an unknown name."""
    near = difflib.get_close_matches(name, known := list(known), n=1, cutoff=0.5)
    return f"; did you mean `{near[0]}`?" if near else f"; there are {', '.join(sorted(known))}"
