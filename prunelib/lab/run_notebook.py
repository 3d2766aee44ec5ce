"""Run one notebook with checked parameters: `python -m prunelib.lab.run_notebook [--quiet] NOTEBOOK OUTPUT name=value …`

papermill alone runs a sweep with a misspelt parameter on its defaults and exits 0, and a killed kernel can leave an executed
notebook in which every cell says `completed`. Here parameters are checked before a kernel starts, and a run has succeeded only
when the notebook itself wrote OUTPUT. The executed copy stays beside OUTPUT with the suffix `.ipynb`; with `--quiet`, as in
batches, what the cells print goes only there.
"""

import ast
import contextlib
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

from prunelib.io import first_line, from_root, plain
from prunelib.lab.runs import summary

MINIMUM_FREE_MIB = 200  # below this a run would die while writing its result
TYPES = (bool, int, float, str, list)  # of a default, besides None
# Progress bars as text: as widgets they would leave no trace in a log, and their state in every executed copy.
PLAIN_BARS = "import sys, tqdm.std; sys.modules['tqdm.autonotebook'] = tqdm.std; del sys, tqdm"
DISK = ("No space left on device", "Disk quota exceeded", "Read-only file system")
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
        first = re.match(r"\w*", self.help).group()
        return {kind.__name__: kind for kind in TYPES}.get(first, str)

    def parse(self, value: object) -> object:
        """`value` as plain data of this parameter's type. Raises ParameterError.

        A text, as from a command line, is read as JSON; a list may be given as `1,2`.
        """
        text = value.strip() if isinstance(value, str) else None
        found = value
        if text is not None and self.optional and text.lower() in ("none", "null"):
            found = None
        elif text is not None and self.kind is list and not text.startswith("["):
            found = [item.strip() for item in text.split(",") if item.strip()]
        elif text is not None and self.kind is not str:
            with contextlib.suppress(ValueError, RecursionError):
                found = json.loads(text.lower() if self.kind is bool else text)
        try:
            found = json.loads(json.dumps(found, allow_nan=False, default=plain))
            found = float(found) if self.kind is float and type(found) is int else found
        except (TypeError, ValueError, RecursionError, OverflowError):
            found = ...  # is of no parameter's type
        if type(found) is list and self.kind is list and self.default:  # elements of the type of the first default
            return [Parameter(self.name, self.default[0]).parse(item) for item in found]
        if type(found) is self.kind or (found is None and self.optional):
            return found
        wanted = f"{self.kind.__name__} or None" if self.optional else self.kind.__name__
        raise ParameterError(f"{self.name} = {value!r} is not of type {wanted} (the default is {self.default!r})")


def parameters(notebook: str | os.PathLike) -> dict[str, Parameter]:
    """Name → parameter of the one cell tagged `parameters`, which must be the first code cell.

    The cell holds plain lines `name = literal  # help` and nothing else: papermill does not see others. Raises ParameterError.
    """
    from papermill import inspect_notebook

    cells = _code_cells(notebook)
    if [index for index, (_, tags) in enumerate(cells) if "parameters" in tags] != [0]:
        raise ParameterError(f"{notebook}: exactly one cell, the first with code, must be tagged `parameters`")
    try:
        lines = [ast.unparse(line).partition(" = ")[0] for line in ast.parse(cells[0][0]).body]
        found = {
            name: Parameter(name, ast.literal_eval(entry["default"]), entry["help"].lstrip("# "))
            for name, entry in inspect_notebook(str(notebook)).items()
        }
    except (ValueError, SyntaxError) as error:
        raise ParameterError(f"{notebook}: the parameters cell needs literals: {error}; derive values below it") from None
    if lines != list(found):
        raise ParameterError(f"{notebook}: the parameters cell has lines that are not plain `name = literal  # help`: {lines}")
    for name, parameter in found.items():
        if parameter.default is not None and type(parameter.default) not in TYPES:
            raise ParameterError(f"{notebook}: the default of `{name}` is not of type bool, int, float, str, list or None")
    return found


def unread(notebook: str | os.PathLike) -> list[str]:
    """Parameters that no later cell reads; `runs.start(…, globals())` reads `output`, and `recorder.parameters` all of them."""
    from IPython.core.inputtransformer2 import TransformerManager

    read: set[str] = set()
    for number, (source, _) in enumerate(_code_cells(notebook)[1:], start=2):
        try:
            nodes = list(ast.walk(ast.parse(TransformerManager().transform_cell(source))))
        except SyntaxError as error:
            raise ParameterError(f"{notebook}: code cell {number} is not Python: {error}") from None
        read |= {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)}
        if any(isinstance(node, ast.Attribute) and ast.unparse(node) == "recorder.parameters" for node in nodes):
            return []
    if "globals" in read:
        read.add("output")
    return [name for name in parameters(notebook) if name not in read]


def check(notebook: str | os.PathLike, values: Mapping[str, object]) -> dict[str, object]:
    """Typed `values` for `notebook`; texts, as from a command line, are read.

    Raises ParameterError naming the first parameter that is unknown (with the closest one), ill-typed or never read.
    """
    if not Path(notebook).is_file():
        raise ParameterError(f"there is no notebook {notebook}")
    known = parameters(notebook)
    if "output" not in known:
        raise ParameterError(f"{notebook} has no parameter `output`: it could not say where its result goes")
    for name in values:
        if name not in known:
            raise ParameterError(f"{notebook} has no parameter `{name}`{closest(name, known)}")
    for name in unread(notebook):
        raise ParameterError(f"{notebook} never reads its parameter `{name}`: setting it would change nothing")
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
    before, failed, what = _signature(output), False, "ended without writing its result (a cell that exits early?)"
    try:
        # Below the root, so that the record of the run does not name this machine.
        _execute(notebook, executed, {**values, "output": from_root(output)}, quiet)
    except (NotebookError, OSError) as error:  # OSError: papermill writes the executed copy after every cell
        failed, what = isinstance(error, NotebookError), str(error)
    if not failed and _signature(output) not in (None, before):
        return output
    settings = {name: parameter.default for name, parameter in parameters(notebook).items()} | values
    copy = f"executed copy: {from_root(executed)}"
    raise NotebookError(f"{from_root(notebook)}: {what}{_remedy(what, settings, output)}; no result was written; {copy}")


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
        "PYTHONPATH": os.pathsep.join(filter(None, [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH")])),
        "IPYTHONDIR": str(scratch),
        "PYTHONSTARTUP": "",
        "TQDM_MININTERVAL": os.environ.get("TQDM_MININTERVAL", "10"),  # an executed copy is not a terminal
    }
    options = {"connection_file": str(scratch / "kernel.json")}
    if sys.platform != "win32":  # many kernels starting at once race for TCP ports; files cannot collide
        options["transport"] = "ipc"

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
    if any(words in message for words in DISK) and "start again" not in message:
        return f": make room at {from_root(output.parent)} and start again; finished results stay"
    smaller = [name for name in ("batch_size", "report_seq_len", "seq_len") if (settings.get(name) or 1) > 1]
    if not MEMORY.search(message) or "batch_size=" in message or not smaller:
        return ""
    return f": try {smaller[0]}={settings[smaller[0]] // 2} instead of {settings[smaller[0]]}"


def _signature(path: Path) -> tuple | None:
    status = path.stat() if path.exists() else None
    return status and (status.st_ino, status.st_mtime_ns, status.st_size)


def _code_cells(notebook: str | os.PathLike) -> list[tuple[str, list[str]]]:
    """Source and tags of every code cell."""
    try:
        cells = json.loads(Path(notebook).read_text(encoding="utf-8"))["cells"]
        code = [cell for cell in cells if cell["cell_type"] == "code"]
        return [("".join(cell["source"]), cell.get("metadata", {}).get("tags", [])) for cell in code]
    except (ValueError, KeyError, TypeError) as error:
        raise ParameterError(f"{notebook} is not a notebook: {type(error).__name__}: {error}") from None


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
            done = run_notebook(notebook, _place_of_process(output, scratch), quiet=quiet, **values)
            print(summary(done))
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
