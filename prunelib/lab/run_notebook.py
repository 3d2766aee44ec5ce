"""Run one notebook with checked parameters: `python -m prunelib.lab.run_notebook NOTEBOOK OUTPUT name=value …`

papermill alone runs a sweep with a misspelt parameter on its defaults and exits 0, and a killed kernel can leave an
executed notebook in which every cell says `completed`. Here parameters are checked before a kernel starts, and a run has
succeeded only when the notebook itself wrote OUTPUT. The executed copy stays beside OUTPUT with the suffix `.ipynb`; with
`--quiet`, as in batches, what the cells print goes to the suffix `.log` and one line is printed at the end.
"""

import ast
import contextlib
import difflib
import importlib.util
import io
import json
import logging
import math
import os
import re
import shutil
import signal
import symtable
import sys
import tempfile
import threading
import tokenize
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from prunelib.io import from_root
from prunelib.lab.runs import summary

KERNEL = "python3"
KERNEL_LOG = "kernel.log"
# Progress bars as text: as widgets they would leave no trace in a log, and their state in every executed copy.
PLAIN_BARS = "import sys, tqdm.std; sys.modules['tqdm.autonotebook'] = tqdm.std; del sys, tqdm"
MINIMUM_FREE_BYTES = 200 * 2**20  # below this a run would die while writing its result
TYPES = (bool, int, float, str, list)  # of a default, besides None


class NotebookError(RuntimeError):
    """A run that did not give its result: a cell raised, the kernel died, or OUTPUT was not written."""


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
    help: str

    @property
    def optional(self) -> bool:
        """Whether None is a value of this parameter."""
        return self.default is None or re.match(r"\w+ or None\b", self.help) is not None

    @property
    def kind(self) -> type:
        if self.default is not None:
            return type(self.default)
        first = self.help.split(":")[0].split("|")[0].split()
        return {kind.__name__: kind for kind in TYPES}.get(first[0] if first else "str", str)

    def parse(self, text: str) -> object:
        """The value that `text` from a command line means. Raises ParameterError."""
        if self.optional and text.strip().lower() in ("none", "null"):
            return None
        return self.check(self._read(text))

    def check(self, value: object) -> object:
        """`value` as plain data of this parameter's type. Raises ParameterError."""
        value = _plain(value)
        if value is None and self.optional:
            return None
        if self.kind is float and type(value) is int:
            value = float(value)
        if type(value) is not self.kind or (isinstance(value, float) and not math.isfinite(value)):
            raise self._wrong(value)
        if isinstance(value, list):
            try:
                return self._elements(value)
            except RecursionError:  # it holds itself, or is nested without end
                raise self._wrong("a list") from None
        return value

    def _elements(self, values: list) -> list:
        """Elements of the type of the first default; where the default has none, any plain data."""
        if isinstance(self.default, list) and self.default:
            element = Parameter(self.name, self.default[0], "")
            return [element.check(item) for item in values]
        found = [_plain(item) for item in values]
        for item in found:
            if item is not None and (type(item) not in TYPES or (type(item) is float and not math.isfinite(item))):
                raise self._wrong(values)
        return [self._elements(item) if isinstance(item, list) else item for item in found]

    def _read(self, text: str) -> object:
        if self.kind is str:
            return text
        if self.kind is bool:
            return {"true": True, "false": False}.get(text.strip().lower(), text)
        if self.kind is list:
            return self._read_list(text)
        try:
            return self.kind(text)  # int refuses "1e3" and "1.0": whole numbers are written as such
        except ValueError:
            raise self._wrong(text) from None

    def _read_list(self, text: str) -> list:
        """`[1, 2]` (Python or JSON), or `1,2` for short."""
        if text.strip().startswith("["):
            # JSON first: Python would read its escape of a rare character as two halves of one. Brackets without end exhaust
            # both parsers, and `[{[]: 1}]` is not even a literal.
            with contextlib.suppress(ValueError, RecursionError):
                return json.loads(text)
            with contextlib.suppress(ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
                return ast.literal_eval(text.strip())
            raise self._wrong(text)
        items = [item.strip() for item in text.split(",") if item.strip()]
        element = Parameter(self.name, self.default[0] if isinstance(self.default, list) and self.default else "", "")
        return [element.parse(item) for item in items]

    def _wrong(self, value: object) -> ParameterError:
        wanted = f"{self.kind.__name__} or None" if self.optional else self.kind.__name__
        return ParameterError(f"{self.name} = {value!r} is not of type {wanted} (the default is {self.default!r})")


def _plain(value: object) -> object:
    """Paths, tuples, numpy numbers and arrays as Python's own."""
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, tuple):
        return list(value)
    return value.tolist() if hasattr(value, "tolist") else value


# ---------------------------------------------------------------------------------------------- reading a notebook


def parameters(notebook: str | os.PathLike) -> dict[str, Parameter]:
    """Name → parameter of the one cell tagged `parameters`, which must be the first code cell.

    The cell holds plain lines `name = literal  # help` and nothing else: papermill does not see `a, b = 1, 2` or an
    annotation such as `x: int | None = 1`, and a derived value there would keep its default. Raises ParameterError.
    """
    cells = _code_cells(notebook)
    tagged = [index for index, (_, tags) in enumerate(cells) if "parameters" in tags]
    if len(tagged) != 1:
        raise ParameterError(f"{notebook} has {len(tagged)} cells tagged `parameters`; it needs exactly one")
    if tagged[0] != 0:
        raise ParameterError(f"{notebook}: the parameters cell must be the first code cell, it is number {tagged[0] + 1}")
    source = cells[0][0]
    try:
        tree = ast.parse(source)
    except SyntaxError as error:
        raise ParameterError(f"{notebook}: the parameters cell is not Python: {error}") from None
    helps = {
        token.start[0]: token.string.lstrip("# ").strip()
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT
    }
    found: dict[str, Parameter] = {}
    for statement in tree.body:
        line = source.splitlines()[statement.lineno - 1].strip()
        if not (isinstance(statement, ast.Assign) and len(statement.targets) == 1 and _is_name(statement.targets[0])):
            raise ParameterError(f"{notebook}: `{line}` is not a plain `name = literal  # help` line")
        name = statement.targets[0].id
        try:
            default = ast.literal_eval(statement.value)
        except ValueError:
            raise ParameterError(f"{notebook}: `{line}` is computed; derive values below the parameters cell") from None
        if default is not None and type(default) not in TYPES:
            raise ParameterError(f"{notebook}: `{line}` is a {type(default).__name__}; use {_names(TYPES)} or None")
        if name in found:
            raise ParameterError(f"{notebook}: `{name}` is set twice in the parameters cell")
        found[name] = Parameter(name, default, helps.get(statement.end_lineno, ""))
    return found


def unread(notebook: str | os.PathLike) -> list[str]:
    """Parameters that no later cell reads, or that a cell overwrites before anything reads them.

    Found by Python's own scoping: a function argument or a loop variable of the same name does not count as reading it.
    """
    open_names = list(parameters(notebook))
    state: dict[str, bool] = {}
    for number, (source, _) in enumerate(_code_cells(notebook)[1:], start=2):
        try:
            used = [_names_used(statement) for statement in ast.parse(_without_magics(source)).body]
        except SyntaxError as error:
            raise ParameterError(f"{notebook}: code cell {number} is not Python: {error}") from None
        for read, written in used:
            for name in open_names:
                if name in read:
                    state.setdefault(name, True)
                elif name in written:
                    state.setdefault(name, False)
    return [name for name in open_names if not state.get(name, False)]


def check(notebook: str | os.PathLike, values: Mapping[str, object], *, text: bool = False) -> dict[str, object]:
    """Typed `values` for `notebook`; with `text`, values are command-line texts to be parsed.

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
    never_read = unread(notebook)
    if never_read:
        raise ParameterError(f"{notebook} never reads its parameter `{never_read[0]}`: setting it would change nothing")
    try:
        return {
            name: known[name].parse(value) if text and isinstance(value, str) else known[name].check(value)
            for name, value in values.items()
        }
    except ParameterError as error:
        raise ParameterError(f"{notebook}: {error}") from None


def closest(name: str, known: Sequence[str] | Mapping) -> str:
    """A hint for a message about an unknown name."""
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"; did you mean `{near[0]}`?" if near else f"; there are {', '.join(sorted(known))}"


# ---------------------------------------------------------------------------------------------- running a notebook


def run_notebook(notebook: str | os.PathLike, output: str | os.PathLike, /, **values: object) -> Path:
    """Run `notebook` with `output` and typed parameters; return the path of the result it wrote.

    Raises ParameterError before a kernel starts, NotebookError when the run gave no result. The executed copy lies beside
    `output` with the suffix `.ipynb` either way. An earlier `output` stays until the notebook replaces it.
    """
    return _run(Path(notebook), Path(output), check(notebook, values))


def _run(notebook: Path, output: Path, values: Mapping[str, object]) -> Path:
    if "output" in values:
        raise ParameterError("`output` is the second argument, not a parameter to set beside it")
    output = output.absolute()
    executed = output.with_suffix(".ipynb")
    if output.suffix == ".ipynb" or executed.resolve() == notebook.resolve():
        raise ParameterError(f"{output} would overwrite a notebook: give the result another name or suffix")
    _check_place(output)
    _check_kernel()

    import papermill
    from nbclient.exceptions import DeadKernelError
    from papermill.exceptions import PapermillExecutionError

    before = _signature(output)
    label = from_root(notebook)
    copy = f"executed copy: {from_root(executed)}"
    with tempfile.TemporaryDirectory(prefix="prunelib-") as scratch:
        try:
            papermill.execute_notebook(
                str(notebook),
                str(executed),
                # Below the root, so that the record of the run does not name this machine.
                parameters={**values, "output": from_root(output)},
                kernel_name=KERNEL,
                kernel_manager_class=_kernel_manager(Path(scratch)),
                progress_bar=sys.stderr.isatty(),
                log_output=True,
            )
        except PapermillExecutionError as error:
            where = f"cell In [{error.exec_count}] (`{_first_line(error.source)}`)"
            first_line = str(error.evalue).strip().split("\n")[0]
            message = f"{error.ename}: {first_line}" if first_line else error.ename
            remedy = _remedy(message, _smaller(notebook, values), output)
            raise NotebookError(f"{label}, {where} raised {message}{remedy}; {copy}") from None
        except (DeadKernelError, RuntimeError) as error:
            if not isinstance(error, DeadKernelError) and "Kernel" not in str(error):
                raise
            where = _cell_in_progress(executed)
            words = _last_words(Path(scratch) / KERNEL_LOG)
            smaller = _smaller(notebook, values)
            smaller = f" then try {smaller}" if smaller else ""
            raise NotebookError(
                f"{label}: the kernel died{where} (killed, or out of memory?{smaller}{words}); no result was written; {copy}"
            ) from None
        except OSError as error:  # papermill writes the executed copy after every cell
            if _signature(output) == before:  # else the result is there, and complete
                reason = f"cannot write {from_root(executed)}: {error.strerror or error}"
                raise NotebookError(f"{label}: {reason}{_remedy(reason, '', output)}; no result was written") from None
    after = _signature(output)
    if after is None or after == before:
        what = "did not write" if after is None else "left the older file at"
        raise NotebookError(f"{label} ended but {what} {from_root(output)} (a cell that exits early?); {copy}")
    if output.suffix == ".json":
        try:
            json.loads(output.read_text(encoding="utf-8"))
        except ValueError as error:
            raise NotebookError(f"{label} wrote {from_root(output)}, which is not JSON: {error}; {copy}") from None
    return output


def _check_place(output: Path) -> None:
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=output.parent):
            pass
        free = shutil.disk_usage(output.parent).free
    except OSError as error:
        raise ParameterError(f"cannot write to {output.parent}: {error.strerror or error}") from None
    if free < MINIMUM_FREE_BYTES:
        raise ParameterError(
            f"only {free / 2**20:.0f} MiB are free at {output.parent}, a run needs {MINIMUM_FREE_BYTES / 2**20:.0f} MiB: "
            "make room and start again"
        )


def _check_kernel() -> None:
    missing = [name for name in ("papermill", "ipykernel") if importlib.util.find_spec(name) is None]
    if missing:
        raise ParameterError(
            f"{sys.executable} has no {' and no '.join(missing)}: install the lock (`pip install -r requirements.lock`)"
        )


def _kernel_manager(scratch: Path) -> type:
    """A kernel manager whose `python3` is this very interpreter, untouched by Jupyter or IPython settings of the user.

    A kernel spec called python3 found on the search path may belong to another environment.
    """
    from jupyter_client import AsyncKernelManager
    from jupyter_client.kernelspec import KernelSpec

    spec = KernelSpec(
        argv=[sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}", f"--IPKernelApp.exec_lines={PLAIN_BARS}"],
        display_name=KERNEL,
        language="python",
        env={
            "PYTHONPATH": os.pathsep.join(filter(None, [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH")])),
            "IPYTHONDIR": str(scratch),
            "PYTHONSTARTUP": "",
            "TQDM_MININTERVAL": os.environ.get("TQDM_MININTERVAL", "10"),  # a batch log is not a terminal
        },
    )

    class KernelManager(AsyncKernelManager):
        @property
        def kernel_spec(self) -> KernelSpec:
            return spec

        async def start_kernel(self, **options: object) -> object:
            # What the cells print comes as messages; this is the process itself, which complains at every interrupt.
            with open(scratch / KERNEL_LOG, "ab") as log:
                return await super().start_kernel(stderr=log, **options)

    connection = scratch / "kernel.json"
    defaults = {"connection_file": str(connection)}
    if sys.platform != "win32" and len(str(connection)) < 80:  # limit for the name of a socket
        # Many kernels starting at once race for TCP ports ("Address already in use"); files cannot collide.
        defaults["transport"] = "ipc"

    def __init__(self: AsyncKernelManager, **options: object) -> None:
        AsyncKernelManager.__init__(self, **{**defaults, **options})

    KernelManager.__init__ = __init__
    return KernelManager


DISK = ("No space left on device", "Disk quota exceeded", "Read-only file system")
MEMORY = re.compile(r"\w*OutOfMemory|\w*MemoryError|.*can't allocate memory|.*out of memory")


def _remedy(message: str, smaller: str, output: Path) -> str:
    """What to do about an error of the machine that a cell raised, where the error does not say so itself."""
    if any(words in message for words in DISK) and "start again" not in message:
        return f": make room at {from_root(output.parent)}, or give a result elsewhere, and start again; finished results stay"
    if MEMORY.match(message) and "batch_size=" not in message and smaller:
        return f": try {smaller}"
    return ""


def _smaller(notebook: Path, values: Mapping[str, object]) -> str:
    """Settings of a run that take less memory, as they are written on the command line; "" where it has none."""
    now = {name: parameter.default for name, parameter in parameters(notebook).items()} | dict(values)
    steps = [f"batch_size={now['batch_size'] // 2} instead of {now['batch_size']}"] if (now.get("batch_size") or 1) > 1 else []
    if now.get("stream") is False:
        steps.append("stream=true")
    if not steps and now.get("dtype") == "float32":
        steps.append("dtype=bfloat16")
    lengths = (name for name in ("seq_len", "report_seq_len") if now.get(name) is not None)
    return " or ".join(steps or [f"{name}={now[name] // 2} instead of {now[name]}" for name in lengths])


def _last_words(log: Path) -> str:
    """The last line that the kernel process itself wrote, such as the report of a crash in compiled code."""
    lines = log.read_text(errors="replace").splitlines() if log.is_file() else []
    return f"; its last words: {lines[-1].strip()[:200]}" if lines else ""


def _signature(path: Path) -> tuple | None:
    try:
        status = path.stat()
    except FileNotFoundError:
        return None
    return status.st_ino, status.st_mtime_ns, status.st_size


def _cell_in_progress(executed: Path) -> str:
    """The last cell that started, from the executed copy: papermill marks even that one `completed`."""
    with contextlib.suppress(OSError, ValueError, KeyError):
        cells = json.loads(executed.read_text(encoding="utf-8"))["cells"]
        started = [c for c in cells if c["cell_type"] == "code" and c["metadata"].get("papermill", {}).get("start_time")]
        if started:
            return f" in cell In [{len(started)}] (`{_first_line(''.join(started[-1]['source']))}`)"
    return ""


# ---------------------------------------------------------------------------------------------------------- helpers


def _code_cells(notebook: str | os.PathLike) -> list[tuple[str, list[str]]]:
    """Source and tags of every code cell."""
    try:
        cells = json.loads(Path(notebook).read_text(encoding="utf-8"))["cells"]
        code = [cell for cell in cells if cell["cell_type"] == "code"]
        return [("".join(cell["source"]), cell.get("metadata", {}).get("tags", [])) for cell in code]
    except (ValueError, KeyError, TypeError) as error:
        raise ParameterError(f"{notebook} is not a notebook: {type(error).__name__}: {error}") from None


def _without_magics(source: str) -> str:
    """IPython lines are not Python; a whole `%%` cell is another language."""
    if source.lstrip().startswith("%%"):
        return ""
    return "\n".join("pass" if line.startswith(("%", "!")) else line for line in source.splitlines())


def _names_used(statement: ast.stmt) -> tuple[set[str], set[str]]:
    """Global names that a top-level statement reads, and those that it sets."""
    table = symtable.symtable(ast.unparse(statement), "<cell>", "exec")
    read = {symbol.get_name() for symbol in table.get_symbols() if symbol.is_referenced()}
    written = {symbol.get_name() for symbol in table.get_symbols() if symbol.is_assigned() or symbol.is_imported()}
    if isinstance(statement, ast.AugAssign) and _is_name(statement.target):
        read.add(statement.target.id)
    inner = list(table.get_children())
    while inner:
        scope = inner.pop()
        inner += scope.get_children()
        read |= {symbol.get_name() for symbol in scope.get_symbols() if symbol.is_global() and symbol.is_referenced()}
    return read, written


def _is_name(node: ast.AST) -> bool:
    return isinstance(node, ast.Name)


def _names(kinds: Sequence[type]) -> str:
    return ", ".join(kind.__name__ for kind in kinds)


def _first_line(source: str) -> str:
    lines = [line.strip() for line in source.splitlines() if line.strip()]
    return lines[0][:80] if lines else ""


# -------------------------------------------------------------------------------------------------------- command


def _follow(parent: int) -> None:
    """End this run soon after the process `parent` that started it is gone.

    `kill -9` on a batch would leave its notebooks running, and a resumed batch would then compute them a second time.
    """

    def watch() -> None:
        while os.getppid() == parent:
            pause.wait(0.5)
        os.kill(os.getpid(), signal.SIGTERM)

    pause = threading.Event()
    threading.Thread(target=watch, daemon=True).start()


@contextlib.contextmanager
def _place_of_process(output: Path) -> Iterator[Path]:
    """Where this process writes its result: when ``accelerate launch`` started several for one run, only the first at `output`.

    Each of them then sees one GPU, its own.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield output
        return
    local = int(os.environ["LOCAL_RANK"])
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    gpus = visible.split(",") if visible is not None else [str(index) for index in range(local + 1)]
    if local < len(gpus):
        os.environ["CUDA_VISIBLE_DEVICES"] = gpus[local]
    if int(os.environ["RANK"]) == 0:
        yield output
        return
    with tempfile.TemporaryDirectory(prefix="prunelib-") as folder:
        yield Path(folder) / output.name


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    """SIGTERM takes the way of Ctrl-C, so that the kernel is shut down with the run."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _log_cells(log: Path | None = None) -> None:
    """What the cells print goes to stderr, or to a file, without papermill's own lines about each cell."""
    chatter = ("Executing Cell", "Ending Cell", "Input Notebook", "Output Notebook", "Executing notebook")

    def tidy(message: logging.LogRecord) -> bool:
        lines = [line.rpartition("\r")[2].rstrip() for line in message.getMessage().splitlines()]
        message.msg, message.args = "\n".join(filter(None, lines)), ()
        return bool(message.msg) and not message.msg.startswith(chatter)

    handler = logging.FileHandler(log, mode="w", encoding="utf-8") if log else logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(message)s"))
    handler.addFilter(tidy)
    logger = logging.getLogger("papermill")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False


def main(arguments: Sequence[str]) -> int:
    """Exit status: 0 done, 1 no result, 2 refused before a kernel started, 130 interrupted."""
    follow = [argument for argument in arguments if argument.startswith("--follow=")]
    quiet = "--quiet" in arguments
    arguments = [argument for argument in arguments if argument not in (*follow, "--quiet")]
    if len(arguments) < 2:
        print("usage: python -m prunelib.lab.run_notebook [--quiet] NOTEBOOK OUTPUT name=value …", file=sys.stderr)
        return 2
    notebook, output, *settings = arguments
    if follow:
        _follow(int(follow[-1].partition("=")[2]))
    try:
        texts: dict[str, object] = {}
        for setting in settings:
            name, equals, text = setting.partition("=")
            if not equals or not name.isidentifier():
                raise ParameterError(f"`{setting}` is not of the form name=value")
            if name in texts:
                raise ParameterError(f"`{name}` is given twice")
            texts[name] = text
        values = check(notebook, texts, text=True)
        with _place_of_process(Path(output)) as place, _terminable():
            if quiet:
                _check_place(place)
            _log_cells(place.with_suffix(".log") if quiet else None)
            done = _run(Path(notebook), place, values)
    except ParameterError as error:
        print(f"refused: {error}", file=sys.stderr)
        return 2
    except NotebookError as error:
        print(f"failed: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"interrupted: {notebook} has written no result to {output}", file=sys.stderr)
        return 130
    if done.is_file():  # not what a process wrote that only helped the first
        print(summary(done) if quiet else f"{from_root(done)}: written by {from_root(notebook)}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
