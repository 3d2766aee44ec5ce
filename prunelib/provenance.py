"""Who, what and where of a number: files by hash, the code, the libraries, the machine.

Nothing here imports torch: a chapter that only draws figures stays light. The record of a run holds no
wall clock and no machine path, so that the same run on the same machine gives the same bytes.
"""

import contextlib
import errno
import glob
import hashlib
import importlib.metadata
import json
import os
import platform
import re
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import psutil

LIBRARIES = (
    "torch",
    "transformers",
    "tokenizers",
    "safetensors",
    "numpy",
    "scipy",
    "pandas",
    "matplotlib",
    "datasets",
    "accelerate",
    "peft",
    "lm-eval",
    "papermill",
    "snakemake",
)

HASHED_BYTES = 200 * 2**20

# What decides a result; data/ and figures/ are left out because the batch itself rewrites them.
CODE = ("prunelib", "notebooks", "profiles", "Snakefile", "pyproject.toml", "requirements.lock")


def project_root() -> Path:
    """Folder of the clone (or of the unpacked archive) that this package was imported from.

    Raises RuntimeError when the package was installed away from its clone: there are no notebooks then.
    """
    root = Path(__file__).resolve().parents[1]
    if not (root / "pyproject.toml").is_file():
        raise RuntimeError(f"{root} is not a clone of the project: install it there with `pip install --no-deps -e .`")
    return root


def at_root(path: str | os.PathLike) -> Path:
    """`path` as it is when absolute, else below the project root: notebooks find their files from any folder."""
    path = Path(path)
    return path if path.is_absolute() else project_root() / path


def from_root(path: str | os.PathLike) -> str:
    """The inverse of `at_root`, with forward slashes: what a record may hold without naming the machine."""
    path = Path(path).absolute()
    try:
        return path.relative_to(project_root()).as_posix()
    except ValueError:
        return str(path)


def file_sha256(path: str | os.PathLike) -> str:
    """sha256 of the bytes of one file, read in blocks."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def model_source(name: str) -> str:
    """Where to load a model from: the folder, absolute, when `name` is one (below the project root or anywhere), else the
    hub name as it is.
    """
    folder = at_root(name)
    return str(folder) if folder.is_dir() else name


def model_fingerprint(name: str) -> str:
    """Hash that changes with the weights of a local model folder; a hub name stands for itself.

    Folders above `HASHED_BYTES` are told apart by the names and sizes of their files alone.
    """
    folder = at_root(name)
    if not folder.is_dir():
        return name
    files = sorted(path for path in folder.iterdir() if path.suffix in (".json", ".safetensors"))
    small = sum(path.stat().st_size for path in files) <= HASHED_BYTES
    lines = [f"{path.name} {file_sha256(path) if small else path.stat().st_size}" for path in files]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:12]


def source_sha256(folder: str | os.PathLike | None = None) -> str:
    """One sha256 over names and bytes of all Python files in `folder` (default: this package)."""
    folder = Path(folder) if folder is not None else Path(__file__).resolve().parent
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        name = path.relative_to(folder).as_posix()
        # Line endings are normalised: a checkout with autocrlf is the same code.
        content = hashlib.sha256(path.read_bytes().replace(b"\r\n", b"\n")).hexdigest()
        digest.update(f"{name}\0{content}\n".encode())
    return digest.hexdigest()


def notebook_source_sha(path: str | os.PathLike) -> str:
    """sha256 over the code cells of a notebook, tags included, outputs and metadata left out.

    Saving a notebook after running it by hand keeps this hash; editing its code changes it. Cells that papermill
    injected are left out, so a notebook and its executed copy agree.
    """
    notebook = json.loads(Path(path).read_text(encoding="utf-8"))
    cells = []
    for cell in notebook["cells"]:
        tags = cell.get("metadata", {}).get("tags", [])
        if cell["cell_type"] == "code" and "injected-parameters" not in tags:
            source = cell["source"]  # a string or a list of lines: nbformat allows both
            cells.append([source if isinstance(source, str) else "".join(source), "parameters" in tags])
    return hashlib.sha256(json.dumps(cells).encode()).hexdigest()


def write_json(path: str | os.PathLike, obj: object) -> Path:
    """Write `obj` so that the file is there complete or not at all: temporary file beside it, fsync, rename.

    Raises ValueError on NaN or infinity (JSON has neither; a missing value is left out) and TypeError on objects that
    are not plain data; then, as on a full disk, an older file stays as it was.
    """
    path = Path(path)
    try:
        text = json.dumps(obj, indent=1, ensure_ascii=False, allow_nan=False, default=_plain)
    except ValueError as error:
        raise ValueError(f"{path}: {error} (leave a missing value out; store the logarithm of one that overflows)") from None
    return write_text(path, text + "\n")


def write_text(path: str | os.PathLike, text: str) -> Path:
    """Write `text` as UTF-8 so that the file is there complete or not at all: temporary file beside it, fsync, rename."""
    path = Path(path)
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="\n")
    return path


@contextlib.contextmanager
def replacing(path: str | os.PathLike) -> Iterator[Path]:
    """A file beside `path` to write to; in the end it is flushed to the disk and takes the place of `path`.

    Whatever happens, an older file stays whole until then, and the temporary one goes: after `kill -9` with the next write to
    `path`. Raises OSError naming `path` and the remedy when it cannot be written.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        for left in leftovers(path):
            left.unlink(missing_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=temporary_prefix(path), suffix=".tmp")
        os.close(handle)
        temporary = Path(name)
        try:
            yield temporary
            flush(temporary)
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
    except OSError as error:
        if error.errno not in REMEDIES:
            raise
        what = f"{os.strerror(error.errno)}: {REMEDIES[error.errno]}, then start again; what was there is unchanged"
        raise OSError(error.errno, what, str(path)) from error


REMEDIES = {
    errno.ENOSPC: "make room on this disk",
    errno.EDQUOT: "make room within your quota",
    errno.EFBIG: "raise the limit on the size of a file (ulimit -f)",
    errno.EROFS: "choose another folder, or mount it for writing",
    errno.EACCES: "choose another folder, or allow yourself to write there",
    errno.EPERM: "choose another folder, or allow yourself to write there",
}
"""What to do when a file cannot be written, by the number of the error."""


def flush(path: str | os.PathLike) -> None:
    """Bring a finished file, or all in a folder, to the disk (a rename may get there before what it renames), readable.

    Temporary files, and those of safetensors, have the mode 0600, which would hide results on a shared machine.
    """
    path, mode = Path(path), 0o666 & ~_umask()
    for file in filter(Path.is_file, path.rglob("*")) if path.is_dir() else [path]:
        os.chmod(file, mode)
        with open(file, "rb") as opened:
            os.fsync(opened.fileno())


def temporary_prefix(path: str | os.PathLike) -> str:
    """How the name of something begins that becomes `path` when it is complete: hidden, with its machine and process."""
    return f".{Path(path).name}.{_machine()}-{os.getpid()}."


def leftovers(path: str | os.PathLike) -> list[Path]:
    """What began to become `path` in processes of this machine that were killed before it was complete."""
    path = Path(path)
    pattern = re.compile(rf"\.{re.escape(path.name)}\.{_machine()}-(\d+)\..+")
    names = [(place, pattern.fullmatch(place.name)) for place in path.parent.glob(f".{glob.escape(path.name)}.*")]
    return sorted(place for place, match in names if match and not psutil.pid_exists(int(match[1])))


def _machine() -> str:
    return hashlib.sha256(socket.gethostname().encode()).hexdigest()[:6]


def record(*, data: Mapping[str, str] | None = None, model: Mapping | None = None, device: str = "cpu") -> dict:
    """Everything but the parameters that a result depends on.

    `data` maps the name of each corpus or file to its sha256, `model` describes the model (name, revision, hash), `device`
    is the torch device that computed. What cannot be found out (no git, library not installed) is None.
    """
    return {
        "git": _git(),
        "source_sha256": source_sha256(),
        "python": platform.python_version(),
        "libraries": {name: _version(name) for name in LIBRARIES},
        "platform": platform.platform(),
        "cpu": cpu_name(),
        "device": device_name(device),
        "threads": _threads(),
        "data": dict(data or {}),
        "model": dict(model or {}),
    }


def cpu_name() -> str | None:
    """The processor as its maker calls it."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine() or None


def device_name(device: str) -> str:
    """`cpu`, or the device with the name of the accelerator behind it, as in `cuda (NVIDIA H200)`."""
    if device.startswith("cuda"):
        import torch  # only a caller that computed with it comes here

        if torch.cuda.is_available():
            return f"{device} ({torch.cuda.get_device_name(device)})"
    return device


def peak_bytes(device: str = "cpu") -> int:
    """Largest memory in bytes so far: of the process on a CPU, of the allocator on an accelerator ("auto": on all together)."""
    if device == "auto":
        import torch

        if torch.cuda.is_available():
            return sum(torch.cuda.max_memory_allocated(index) for index in range(torch.cuda.device_count()))
    if device.startswith("cuda"):
        import torch

        return torch.cuda.max_memory_allocated(device)
    import resource  # not on Windows, hence here

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes, Linux KiB


def _git() -> dict | None:
    """Commit and whether the code differs from it; None without git, or when the clone is an unpacked archive."""
    root = project_root()
    # Inside a git hook, GIT_DIR and its kind point at another place than `root`.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(root), *arguments]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=30, check=True)
        return done.stdout.strip()

    try:
        # An archive unpacked inside some other repository must not take that repository's commit.
        if Path(git("rev-parse", "--show-toplevel")).resolve() != root:
            return None
        commit = git("rev-parse", "HEAD")
        dirty = bool(git("status", "--porcelain", "--", *CODE))
    except (OSError, subprocess.SubprocessError):
        return None
    return {"commit": commit, "dirty": dirty}


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _threads() -> int | None:
    """Threads of torch where it is loaded: sums depend on their number in the last digits."""
    torch = sys.modules.get("torch")
    return torch.get_num_threads() if torch is not None else None


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _plain(value: object) -> object:
    """numpy scalars and arrays, paths, tuples of them: as plain JSON data."""
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if hasattr(value, "tolist"):
        return value.tolist()
    raise TypeError(f"{type(value).__name__} is not plain data: {value!r}")
