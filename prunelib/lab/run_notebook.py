"""Run one notebook with checked parameters: `python -m prunelib.lab.run_notebook [--quiet] NOTEBOOK OUTPUT name=value …`

papermill alone runs a sweep with a misspelt parameter on its defaults and exits 0, and a killed kernel can leave an executed
notebook in which every cell says `completed`. Here parameters are checked before a kernel starts, and a run has succeeded only
when the notebook itself wrote OUTPUT. The executed copy stays beside OUTPUT with the suffix `.ipynb`; with `--quiet`, as in
batches, what the cells print goes to the suffix `.log`.
"""

import ast
import contextlib
import difflib
import json
import logging
import os
import re
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from prunelib.io import from_root
from prunelib.lab.runs import summary

MINIMUM_FREE_BYTES = 200 * 2**20  # below this a run would die while writing its result
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
        """`value` as plain data of this parameter's type; a text, as from a command line, is read. Raises ParameterError."""
        if isinstance(value, os.PathLike):
            value = os.fspath(value)
        elif hasattr(value, "tolist"):  # numpy's
            value = value.tolist()
        if self.optional and (value is None or (isinstance(value, str) and value.strip().lower() in ("none", "null"))):
            return None
        found = self._read(value.strip()) if isinstance(value, str) and self.kind is not str else value
        try:
            found = json.loads(json.dumps(found, allow_nan=False))
        except (TypeError, ValueError, RecursionError):
            found = None
        if self.kind is float and type(found) is int:
            found = float(found)
        if type(found) is not self.kind:
            wanted = f"{self.kind.__name__} or None" if self.optional else self.kind.__name__
            raise ParameterError(f"{self.name} = {value!r} is not of type {wanted} (the default is {self.default!r})")
        if self.kind is list and self.default:  # elements of the type of the first default
            return [Parameter(self.name, self.default[0]).parse(item) for item in found]
        return found

    def _read(self, text: str) -> object:
        """The value of a text; the text itself where it is not of this parameter's type."""
        with contextlib.suppress(ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
            if self.kind is bool:
                return {"true": True, "false": False}.get(text.lower(), text)
            if self.kind is not list:
                return self.kind(text)  # int refuses "1e3" and "1.0": whole numbers are written as such
            if not text.startswith("["):  # `1,2` for short
                return [item.strip() for item in text.split(",") if item.strip()]
            with contextlib.suppress(ValueError, RecursionError):
                return json.loads(text)
            return ast.literal_eval(text)
        return text


def parameters(notebook: str | os.PathLike) -> dict[str, Parameter]:
    """Name → parameter of the one cell tagged `parameters`, which must be the first code cell.

    The cell holds plain lines `name = literal  # help` and nothing else: papermill does not see others. Raises ParameterError.
    """
    from papermill import inspect_notebook

    cells = _code_cells(notebook)
    if [index for index, (_, tags) in enumerate(cells) if "parameters" in tags] != [0]:
        raise ParameterError(f"{notebook}: exactly one cell, the first with code, must be tagged `parameters`")
    try:
        lines = ast.parse(cells[0][0]).body
        found = {
            name: Parameter(name, ast.literal_eval(entry["default"]), entry["help"].lstrip("# "))
            for name, entry in inspect_notebook(str(notebook)).items()
        }
    except (ValueError, SyntaxError) as error:
        raise ParameterError(f"{notebook}: the parameters cell needs literals: {error}; derive values below it") from None
    for statement in lines:
        names = [node.id for node in getattr(statement, "targets", []) if isinstance(node, ast.Name)]
        line = ast.unparse(statement)
        if len(names) != 1 or names[0] not in found or len(lines) != len(found):
            raise ParameterError(f"{notebook}: `{line}` is not a plain `name = literal  # help` line, each name once")
        if found[names[0]].default is not None and type(found[names[0]].default) not in TYPES:
            raise ParameterError(f"{notebook}: `{line}` is not of type {', '.join(kind.__name__ for kind in TYPES)} or None")
    return found


def unread(notebook: str | os.PathLike) -> list[str]:
    """Parameters that no later cell reads; `runs.start(…, globals())` reads `output`, and `recorder.parameters` all of them."""
    read: set[str] = set()
    for number, (source, _) in enumerate(_code_cells(notebook)[1:], start=2):
        # IPython lines are not Python; a whole `%%` cell is another language.
        plain = "" if source.lstrip().startswith("%%") else re.sub(r"(?m)^(\s*)[%!].*", r"\1pass", source)
        try:
            nodes = list(ast.walk(ast.parse(plain)))
        except SyntaxError as error:
            raise ParameterError(f"{notebook}: code cell {number} is not Python: {error}") from None
        read |= {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)}
        read |= {"recorder.parameters" for node in nodes if isinstance(node, ast.Attribute) and node.attr == "parameters"}
    if "globals" in read:
        read.add("output")
    return [name for name in parameters(notebook) if name not in read and "recorder.parameters" not in read]


def check(notebook: str | os.PathLike, values: Mapping[str, object]) -> dict[str, object]:
    """Typed `values` for `notebook`; texts, as from a command line, are read.

    Raises ParameterError naming the first parameter that is unknown (with the closest one), ill-typed or never read.
    """
    notebook = Path(notebook)
    if not notebook.is_file():
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


def closest(name: str, known: Sequence[str] | Mapping) -> str:
    """A hint for a message about an unknown name."""
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"; did you mean `{near[0]}`?" if near else f"; there are {', '.join(sorted(known))}"


def _code_cells(notebook: str | os.PathLike) -> list[tuple[str, list[str]]]:
    """Source and tags of every code cell."""
    try:
        cells = json.loads(Path(notebook).read_text(encoding="utf-8"))["cells"]
        code = [cell for cell in cells if cell["cell_type"] == "code"]
        return [("".join(cell["source"]), cell.get("metadata", {}).get("tags", [])) for cell in code]
    except (ValueError, KeyError, TypeError) as error:
        raise ParameterError(f"{notebook} is not a notebook: {type(error).__name__}: {error}") from None


def _check_place(output: Path) -> None:
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=output.parent):
            free = shutil.disk_usage(output.parent).free
    except OSError as error:
        raise ParameterError(f"cannot write to {output.parent}: {error.strerror or error}") from None
    if free < MINIMUM_FREE_BYTES:
        mib, wanted = free // 2**20, MINIMUM_FREE_BYTES // 2**20
        raise ParameterError(f"only {mib} MiB are free at {output.parent}, a run needs {wanted} MiB: make room there")


def run_notebook(notebook: str | os.PathLike, output: str | os.PathLike, /, **values: object) -> Path:
    """Run `notebook` with `output` and typed parameters; return the path of the result it wrote.

    Raises ParameterError before a kernel starts, NotebookError when the run gave no result. The executed copy lies beside
    `output` with the suffix `.ipynb` either way. An earlier `output` stays until the notebook replaces it.
    """
    notebook, output = Path(notebook), Path(output).absolute()
    if "output" in values:
        raise ParameterError("`output` is the second argument, not a parameter to set beside it")
    values = check(notebook, values)
    executed = output.with_suffix(".ipynb")
    if output.suffix == ".ipynb" or executed.resolve() == notebook.resolve():
        raise ParameterError(f"{output} would overwrite a notebook: give the result another name or suffix")
    _check_place(output)
    before = _signature(output)
    label, copy = from_root(notebook), f"executed copy: {from_root(executed)}"
    try:
        # Below the root, so that the record of the run does not name this machine.
        _execute(notebook, executed, {**values, "output": from_root(output)})
    except NotebookError as error:
        settings = {name: parameter.default for name, parameter in parameters(notebook).items()} | values
        raise NotebookError(f"{label}{error}{_remedy(str(error), settings, output)}; no result was written; {copy}") from None
    except OSError as error:  # papermill writes the executed copy after every cell
        if _signature(output) == before:  # else the result is there, and complete
            reason = f"cannot write {from_root(executed)}: {error.strerror or error}"
            raise NotebookError(f"{label}: {reason}{_remedy(reason, {}, output)}; no result was written") from None
    after = _signature(output)
    if after is None or after == before:
        what = "did not write" if after is None else "left the older file at"
        raise NotebookError(f"{label} ended but {what} {from_root(output)} (a cell that exits early?); {copy}")
    return output


def _execute(notebook: Path, executed: Path, values: Mapping[str, object]) -> None:
    """Execute by papermill. Raises NotebookError with the cell and what happened there, and OSError."""
    from nbclient.exceptions import DeadKernelError
    from papermill import execute_notebook
    from papermill.exceptions import PapermillExecutionError

    with tempfile.TemporaryDirectory(prefix="prunelib-") as scratch:
        try:
            execute_notebook(
                str(notebook),
                str(executed),
                parameters=dict(values),
                kernel_name="python3",
                kernel_manager_class=_kernel_manager(Path(scratch)),
                progress_bar=sys.stderr.isatty(),
                log_output=True,
            )
        except PapermillExecutionError as error:
            said = [error.ename, *filter(None, [str(error.evalue).strip().split("\n")[0]])]
            where = _first_line(error.source)
            raise NotebookError(f", cell In [{error.exec_count}] (`{where}`) raised {': '.join(said)}") from None
        except (DeadKernelError, RuntimeError) as error:
            if not isinstance(error, DeadKernelError) and "Kernel" not in str(error):
                raise
            raise NotebookError(": the kernel died (killed, or out of memory?)") from None


def _kernel_manager(scratch: Path) -> type:
    """A kernel manager whose `python3` is this very interpreter, untouched by Jupyter or IPython settings of the user.

    A kernel spec called python3 found on the search path may belong to another environment.
    """
    from jupyter_client import AsyncKernelManager
    from jupyter_client.kernelspec import KernelSpec

    paths = [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH")]
    spec = KernelSpec(
        argv=[sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}", f"--IPKernelApp.exec_lines={PLAIN_BARS}"],
        display_name="python3",
        language="python",
        env={
            "PYTHONPATH": os.pathsep.join(filter(None, paths)),
            "IPYTHONDIR": str(scratch),
            "PYTHONSTARTUP": "",
            "TQDM_MININTERVAL": os.environ.get("TQDM_MININTERVAL", "10"),  # a batch log is not a terminal
        },
    )
    defaults = {"connection_file": str(scratch / "kernel.json")}
    if sys.platform != "win32" and len(defaults["connection_file"]) < 80:  # limit for the name of a socket
        # Many kernels starting at once race for TCP ports ("Address already in use"); files cannot collide.
        defaults["transport"] = "ipc"

    class KernelManager(AsyncKernelManager):
        kernel_spec = spec

        def __init__(self, **options: object) -> None:
            super().__init__(**{**defaults, **options})

    return KernelManager


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


def _first_line(source: str) -> str:
    return next((line.strip()[:80] for line in source.splitlines() if line.strip()), "")


@contextlib.contextmanager
def _place_of_process(output: Path) -> Iterator[Path]:
    """Where this process writes its result: of several that `accelerate launch` started, only the first at `output`.

    Each of them then sees one GPU, its own.
    """
    local = int(os.environ.get("LOCAL_RANK", "0"))
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(local + 1)))).split(",")
        os.environ["CUDA_VISIBLE_DEVICES"] = visible[local] if local < len(visible) else ",".join(visible)
    if int(os.environ.get("RANK", "0")) == 0:
        yield output
        return
    with tempfile.TemporaryDirectory(prefix="prunelib-") as folder:
        yield Path(folder) / output.name


def _log_cells(log: Path | None) -> None:
    """What the cells print goes to a file, or to stderr, without papermill's own lines about each cell."""
    chatter = ("Executing Cell", "Ending Cell", "Input Notebook", "Output Notebook", "Executing notebook")
    handler = logging.FileHandler(log, mode="w", encoding="utf-8") if log else logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(message)s"))
    handler.addFilter(lambda message: bool(message.getMessage().strip()) and not message.getMessage().startswith(chatter))
    logger = logging.getLogger("papermill")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False


def main(arguments: Sequence[str]) -> int:
    """Exit status: 0 done, 1 no result, 2 refused before a kernel started, 130 interrupted."""
    quiet = "--quiet" in arguments
    arguments = [argument for argument in arguments if argument != "--quiet"]
    if len(arguments) < 2:
        print("usage: python -m prunelib.lab.run_notebook [--quiet] NOTEBOOK OUTPUT name=value …", file=sys.stderr)
        return 2
    notebook, output, *settings = arguments
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: the kernel is shut down with the run
    try:
        values: dict[str, object] = {}
        for setting in settings:
            name, equals, text = setting.partition("=")
            if not equals or not name.isidentifier() or name in values:
                raise ParameterError(f"`{setting}` is not of the form name=value, or given twice")
            values[name] = text
        with _place_of_process(Path(output)) as place:
            if quiet:
                _check_place(place)
            _log_cells(place.with_suffix(".log") if quiet else None)
            done = run_notebook(notebook, place, **values)
            if place == Path(output):
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
