"""Files written whole or not at all, and paths relative to the project root."""

import contextlib
import errno
import glob
import hashlib
import json
import os
import platform
import re
from collections.abc import Iterator
from pathlib import Path

import psutil

REMEDIES = dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EFBIG), "make room on this disk")
REMEDIES |= dict.fromkeys((errno.EROFS, errno.EACCES, errno.EPERM), "choose another folder, or allow yourself to write there")


def project_root() -> Path:
    """Folder of the clone that this package was imported from. Raises RuntimeError when it was installed away from it."""
    root = Path(__file__).resolve().parents[1]
    if not (root / "pyproject.toml").is_file():
        raise RuntimeError(f"{root} is not a clone of the project: install it there with `pip install --no-deps -e .`")
    return root


def at_root(path: str | os.PathLike) -> Path:
    """`path` as it is when absolute, else below the project root: notebooks find their files from any folder."""
    return Path(path) if os.path.isabs(path) else project_root() / path


def from_root(path: str | os.PathLike) -> str:
    """The inverse of `at_root`, with forward slashes: what a record may hold without naming the machine."""
    path = Path(path).absolute()
    return path.relative_to(project_root()).as_posix() if path.is_relative_to(project_root()) else str(path)


def file_sha256(path: str | os.PathLike) -> str:
    """sha256 of the bytes of one file, read in blocks."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_json(path: str | os.PathLike, obj: object) -> Path:
    """Write `obj` as JSON, complete or not at all.

    Raises ValueError on NaN or infinity (JSON has neither: leave a missing value out) and TypeError on objects that `plain`
    does not know, before an older file is touched.
    """
    return write_text(path, json.dumps(obj, indent=1, ensure_ascii=False, allow_nan=False, default=plain) + "\n")


def plain(value: object) -> object:
    """A path, numpy scalar or array as plain data, for `json.dumps`. Raises TypeError on anything else."""
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if hasattr(value, "tolist"):
        return value.tolist()
    raise TypeError(f"{type(value).__name__} is not plain data: {value!r}")


def write_text(path: str | os.PathLike, text: str) -> Path:
    """Write `text` as UTF-8, complete or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="\n")
    return Path(path)


@contextlib.contextmanager
def replacing(path: str | os.PathLike) -> Iterator[Path]:
    """A file beside `path` to write to; in the end it is flushed to the disk and renamed to `path`.

    An older file stays whole until then. The temporary file is removed, after `kill -9` by the next write to `path`. Raises
    OSError naming `path` and the remedy when it cannot be written.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        for left in leftovers(path):
            left.unlink(missing_ok=True)
        temporary = path.with_name(f"{temporary_prefix(path)}tmp")
        try:
            yield temporary
            flush(temporary)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        if error.errno not in REMEDIES:
            raise
        what = f"{os.strerror(error.errno)}: {REMEDIES[error.errno]}, then start again; what was there is unchanged"
        raise OSError(error.errno, what, str(path)) from error


def flush(path: str | os.PathLike) -> None:
    """Bring a finished file, or all in a folder, to the disk, because a rename may get there before what it renames.

    The mode becomes that of an ordinary new file: those of safetensors can be read by nobody else.
    """
    path, mask = Path(path), os.umask(0)
    os.umask(mask)
    for file in filter(Path.is_file, path.rglob("*")) if path.is_dir() else [path]:
        os.chmod(file, 0o666 & ~mask)
        with open(file, "rb") as opened:
            os.fsync(opened.fileno())


def temporary_prefix(path: str | os.PathLike) -> str:
    """How the name of something begins that becomes `path` when it is complete: hidden, with its machine and process."""
    return f".{Path(path).name}.{platform.node()}-{os.getpid()}."


def leftovers(path: str | os.PathLike) -> list[Path]:
    """What processes of this machine left that were killed before `path` was complete."""
    path = Path(path)
    pattern = re.compile(rf"\.{re.escape(path.name)}\.{re.escape(platform.node())}-(\d+)\..+")
    names = [(place, pattern.fullmatch(place.name)) for place in path.parent.glob(f".{glob.escape(path.name)}.*")]
    return sorted(place for place, match in names if match and not psutil.pid_exists(int(match[1])))


def hub_unreachable() -> str | None:
    """Why the hub does not answer, None when it does or is not to be asked; its client retries for 20 s for every file."""
    import huggingface_hub

    if huggingface_hub.constants.HF_HUB_OFFLINE:
        return None  # the client then reads its cache, and fails at once where that is empty
    try:
        huggingface_hub.get_session().head(huggingface_hub.constants.ENDPOINT, timeout=5)
    except Exception as error:  # httpx or requests, depending on the client's version
        return f"{type(error).__name__}: {error}"
    return None


def first_line(error: BaseException) -> str:
    """The first line of an error's message, its type where it has none."""
    return next(filter(None, map(str.strip, str(error).splitlines())), type(error).__name__)
