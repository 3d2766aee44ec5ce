"""Run one notebook with checked parameters: `python -m prunelib.lab.run_notebook [--quiet] NOTEBOOK OUTPUT name=value …`

papermill alone runs a sweep with a misspelt parameter on its defaults and exits 0, and a killed kernel can leave an executed
notebook in which every cell says `completed`. Here parameters are checked before a kernel starts, and a run has succeeded only
when the notebook itself wrote OUTPUT. The executed copy stays beside OUTPUT with the suffix `.ipynb`; with `--quiet`, as in
batches, what the cells print goes only there.
"""

import ast
import difflib
import json
import os
import re
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import ConfigDict, JsonValue, TypeAdapter

from prunelib.io import first_line, from_root, plain, project_root
from prunelib.lab.provenance import code_cells
from prunelib.lab.runs import summary

MINIMUM_FREE_MIB = 200  # below this a run would die while writing its result
TYPES = (bool, int, float, str, list)  # of a default, besides None
# Progress bars as text: as widgets they would leave no trace in a log, and their state in every executed copy.
PLAIN_BARS = "import sys, tqdm.std; sys.modules['tqdm.autonotebook'] = tqdm.std; del sys, tqdm"
DISK = re.compile(r"No space left on device|Disk quota exceeded|Read-only file system")
MEMORY = re.compile(r"OutOfMemory|MemoryError|can't allocate memory|out of memory")


class NotebookError(RuntimeError):
    """A run without a result: a cell raised, the kernel died, or OUTPUT was not written."""


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


def parameters(notebook: str | os.PathLike) -> dict[str, Parameter]:
    """Name → parameter of the one cell tagged `parameters`, which must be the first code cell.

    The cell holds plain lines `name = literal  # help` and nothing else: papermill does not see others. Raises ParameterError.
    """
    found: dict[str, Parameter] = {}
    try:
        cells = code_cells(notebook)
        if [index for index, (_, tags) in enumerate(cells) if "parameters" in tags] != [0]:
            raise ValueError(f"{notebook}: exactly one cell, the first with code, must be tagged `parameters`")
        lines = cells[0][0].encode().splitlines()  # `ast` counts bytes
        for node in ast.parse(cells[0][0]).body:
            name, equals, _ = ast.unparse(node).partition(" = ")
            if not isinstance(node, ast.Assign) or not equals or not name.isidentifier() or name in found:
                raise ValueError(f"`{ast.unparse(node)}` is no plain line `name = literal  # help`, each name once")
            default = ast.literal_eval(node.value)
            if default is not None and type(default) not in TYPES:
                raise ValueError(f"the default of `{name}` is not of type bool, int, float, str, list or None")
            found[name] = Parameter(name, default, lines[node.end_lineno - 1][node.end_col_offset :].decode().lstrip("# "))
    except (ValueError, SyntaxError) as error:
        raise ParameterError(f"{error} (the parameters cell of {notebook} needs literals; derive values below it)") from None
    return found


def check(notebook: str | os.PathLike, values: Mapping[str, object]) -> dict[str, object]:
    """Typed `values` for `notebook`; texts, as from a command line, are read.

    Raises ParameterError naming the first parameter that is unknown (with the closest one) or ill-typed.
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
        return {name: known[name].parse(value) for name, value in values.items()}
    except ParameterError as error:
        raise ParameterError(f"{notebook}: {error}") from None


def closest(name: str, known: Iterable[str]) -> str:
    """A hint for a message about an unknown name."""
    near = difflib.get_close_matches(name, known := list(known), n=1, cutoff=0.5)
    return f"; did you mean `{near[0]}`?" if near else f"; there are {', '.join(sorted(known))}"


def run_notebook(notebook: str | os.PathLike, output: str | os.PathLike, /, *, quiet: bool = True, **values: object) -> Path:
    """Run `notebook` with `output` and typed parameters; return the path of the result it wrote.

    Raises ParameterError before a kernel starts, NotebookError when the run gave no result. The executed copy lies beside
    `output` with the suffix `.ipynb` either way. An earlier `output` stays until the notebook replaces it.
    """
    notebook, output = Path(notebook), Path(output).absolute()
    if "output" in values:
        raise ParameterError("`output` is the second argument, not a parameter to set beside it")
    values = check(notebook, values)
    executed = output.with_suffix(".ipynb")
    if executed in (output, notebook.absolute()):
        raise ParameterError(f"{output} would overwrite a notebook: give the result another name or suffix")
    _check_place(output.parent)
    before, what = output.exists() and output.stat().st_ino, None  # a result that was written is another file
    try:
        # Below the root, so that the record of the run does not name this machine.
        _execute(notebook, executed, {**values, "output": from_root(output)}, quiet)
    except (NotebookError, OSError) as error:  # OSError: papermill writes the executed copy after every cell
        what = error
    if not isinstance(what, NotebookError) and output.exists() and output.stat().st_ino != before:
        return output
    what = str(what or "ended without writing its result (a cell that exits early?)")
    settings = {name: parameter.default for name, parameter in parameters(notebook).items()} | values
    what += f"{_remedy(what, settings, output)}; no result was written; executed copy: {from_root(executed)}"
    raise NotebookError(f"{from_root(notebook)}: {what}")


def _execute(notebook: Path, executed: Path, values: Mapping[str, object], quiet: bool) -> None:
    """Execute by papermill. Raises NotebookError with the cell and what happened there, and OSError."""
    from nbclient.exceptions import DeadKernelError
    from papermill import execute_notebook
    from papermill.exceptions import PapermillExecutionError

    printed = None if quiet else sys.stderr
    with tempfile.TemporaryDirectory(prefix="prunelib-") as scratch:
        try:
            execute_notebook(
                str(notebook),
                str(executed),
                parameters=dict(values),
                kernel_name="python3",
                kernel_manager_class=_kernel_manager(Path(scratch)),
                progress_bar=False,
                stdout_file=printed,
                stderr_file=printed,
            )
        except PapermillExecutionError as error:
            cell = next(filter(None, map(str.strip, error.source.splitlines())), "")
            said = first_line(NotebookError(f"{error.ename}: {error.evalue}".strip(": ")))
            raise NotebookError(f"cell In [{error.exec_count}] (`{cell[:80]}`) raised {said}") from None
        except (DeadKernelError, RuntimeError) as error:
            if not isinstance(error, DeadKernelError) and "Kernel" not in str(error):
                raise
            raise NotebookError("the kernel died (killed, or out of memory?)") from None


def _kernel_manager(scratch: Path) -> type:
    """A kernel manager whose `python3` is this very interpreter, untouched by Jupyter or IPython settings of the user.

    A kernel spec called python3 found on the search path may belong to another environment.
    """
    from ipykernel.kernelspec import get_kernel_dict
    from jupyter_client import AsyncKernelManager
    from jupyter_client.kernelspec import KernelSpec

    environment = {
        "PYTHONPATH": os.pathsep.join(filter(None, [str(project_root()), os.environ.get("PYTHONPATH")])),
        "IPYTHONDIR": str(scratch),
        "PYTHONSTARTUP": "",
        "TQDM_MININTERVAL": os.environ.get("TQDM_MININTERVAL", "10"),  # an executed copy is not a terminal
    }
    # Many kernels starting at once race for TCP ports; files cannot collide.
    options = {"connection_file": str(scratch / "kernel.json"), "transport": "tcp" if sys.platform == "win32" else "ipc"}

    class KernelManager(AsyncKernelManager):
        kernel_spec = KernelSpec(**get_kernel_dict([f"--IPKernelApp.exec_lines={PLAIN_BARS}"]) | {"env": environment})

        def __init__(self, **given: object) -> None:
            super().__init__(**options | given)

    return KernelManager


def _check_place(folder: Path) -> None:
    """Refuse a folder that cannot be written to, or has no room."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            free = shutil.disk_usage(folder).free // 2**20
    except OSError as error:
        raise ParameterError(f"cannot write to {folder}: {error.strerror or error}") from None
    if free < MINIMUM_FREE_MIB:
        raise ParameterError(f"only {free} MiB are free at {folder}, a run needs {MINIMUM_FREE_MIB} MiB: make room there")


def _remedy(message: str, settings: Mapping[str, object], output: Path) -> str:
    """What to do when the disk is full, or which setting to reduce when memory ran out, unless the message says so."""
    if DISK.search(message) and "start again" not in message:
        return f": make room at {from_root(output.parent)} and start again; finished results stay"
    smaller = [name for name in ("batch_size", "report_seq_len", "seq_len") if (settings.get(name) or 1) > 1]
    if not MEMORY.search(message) or "batch_size=" in message or not smaller:
        return ""
    return f": try {smaller[0]}={settings[smaller[0]] // 2} instead of {settings[smaller[0]]}"


def _place_of_process(output: str, scratch: str) -> Path:
    """Where this process writes its result: of several that `accelerate launch` started, only the first at `output`.

    Each of them then sees one GPU, its own.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        local = int(os.environ.get("LOCAL_RANK", "0"))
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(local + 1)))).split(",")
        os.environ["CUDA_VISIBLE_DEVICES"] = visible[local] if local < len(visible) else ",".join(visible)
    return Path(output) if int(os.environ.get("RANK", "0")) == 0 else Path(scratch) / Path(output).name


def main(arguments: Sequence[str]) -> int:
    """Exit status: 0 done, 1 no result, 2 refused before a kernel started, 130 interrupted."""
    quiet = arguments[:1] == ["--quiet"]
    if len(arguments) < 2 + quiet:
        print("usage: python -m prunelib.lab.run_notebook [--quiet] NOTEBOOK OUTPUT name=value …", file=sys.stderr)
        return 2
    notebook, output, *settings = arguments[quiet:]
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: the kernel is shut down with the run
    try:
        values = dict(setting.partition("=")[::2] for setting in settings)
        if len(values) < len(settings) or not all("=" in setting for setting in settings):
            raise ParameterError(f"settings are of the form name=value, each name once; got {' '.join(settings)}")
        with tempfile.TemporaryDirectory(prefix="prunelib-") as scratch:
            print(summary(run_notebook(notebook, _place_of_process(output, scratch), quiet=quiet, **values)))
    except ParameterError as error:
        print(f"refused: {error}", file=sys.stderr)
        return 2
    except NotebookError as error:
        print(f"failed: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"interrupted: {notebook} has written no result to {output}", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
