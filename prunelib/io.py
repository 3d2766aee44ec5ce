"""Files written whole or not at all, and paths relative to the project root."""

import contextlib
import errno
import glob
import hashlib
import json
import os
import re
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil


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


HUB_TIMEOUT_SECONDS = 5


def hub_unreachable() -> str | None:
    """Why the hub does not answer, None when it does or is not to be asked (``HF_HUB_OFFLINE=1``).

    Without a network its client alone would try again for more than 20 s, for every file.
    """
    import huggingface_hub

    if huggingface_hub.constants.HF_HUB_OFFLINE:
        return None  # the client then reads its cache, and fails at once where that is empty
    try:
        huggingface_hub.get_session().head(huggingface_hub.constants.ENDPOINT, timeout=HUB_TIMEOUT_SECONDS)
    except Exception as error:  # httpx or requests, depending on the client's version
        return f"{type(error).__name__}: {error}"
    return None


def first_line(error: BaseException) -> str:
    """The first line of an error's message, its type where it has none."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
