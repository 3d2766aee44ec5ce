"""Run one notebook with checked parameters: `python -m prunelib.lab.run_notebook [--quiet] NOTEBOOK OUTPUT name=value …`

papermill alone runs a sweep with a misspelt parameter on its defaults and exits 0, and a killed kernel can leave an executed
notebook in which every cell says `completed`. Here parameters are checked before a kernel starts, and a run has succeeded only
when the notebook itself wrote OUTPUT. The executed copy stays beside OUTPUT with the suffix `.ipynb`; with `--quiet`, as in
batches, what the cells print goes only there.
"""

import os
import re
import shutil
import signal
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from prunelib.io import first_line, from_root, project_root
from prunelib.lab.parameters import ParameterError, check, check_places, parameters
from prunelib.lab.runs import summary

MINIMUM_FREE_MIB = 200  # below this a run would die while writing its result
START_TIMEOUT = int(os.environ.get("PRUNELIB_START_TIMEOUT", "600"))  # seconds in which a kernel must have started
# Progress bars as text: as widgets they would leave no trace in a log, and their state in every executed copy.
PLAIN_BARS = "import sys, tqdm.std; sys.modules['tqdm.autonotebook'] = tqdm.std; del sys, tqdm"
DISK = re.compile(r"No space left on device|Disk quota exceeded|Read-only file system")
MEMORY = re.compile(r"OutOfMemory|MemoryError|can't allocate memory|out of memory")


class NotebookError(RuntimeError):
    """A run without a result: a cell raised, the kernel died, or OUTPUT was not written."""


def run_notebook(notebook: str | os.PathLike, output: str | os.PathLike, /, *, quiet: bool = True, **values: object) -> Path:
    """Run `notebook` with `output` and typed parameters; return the path of the result it wrote.

    Raises ParameterError before a kernel starts, NotebookError when the run gave no result. The executed copy lies beside
    `output` with the suffix `.ipynb` either way. An earlier `output` stays until the notebook replaces it.
    """
    notebook, output = Path(notebook), Path(output).absolute()
    if "output" in values:
        raise ParameterError("`output` is the second argument, not a parameter to set beside it")
    values = check(notebook, values)
    check_places(notebook, values)
    executed = output.with_suffix(".ipynb")
    if executed in (output, notebook.absolute()):
        raise ParameterError(f"{output} would overwrite a notebook: give the result another name or suffix")
    for place in (output, executed, output.with_suffix(".safetensors")):
        if place.is_dir():
            raise ParameterError(f"{place} is a folder: give the result another name")
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
                start_timeout=START_TIMEOUT,
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
            if "respond in" in str(error):
                why = "a busy machine, or a slow disk?"
                raise NotebookError(
                    f"the kernel had not started after {START_TIMEOUT} s ({why}): wait, or set PRUNELIB_START_TIMEOUT=SECONDS"
                ) from None
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
