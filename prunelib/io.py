"""Files written whole or not at all, and paths relative to the project root."""

import contextlib
import errno
import glob
import hashlib
import json
import os
import platform
from collections.abc import Iterator
from pathlib import Path

import psutil

REMEDIES = dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EFBIG), "make room on this disk")
REMEDIES |= dict.fromkeys((errno.EROFS, errno.EACCES, errno.EPERM), "choose another folder, or allow yourself to write there")

CONVERTED = "build/models"  # folder of the models that were made from GGUF files


def project_root() -> Path:
    """Folder of the clone that this package was imported from. Raises RuntimeError when it was installed away from it."""
    root = Path(__file__).resolve().parents[1]
    if not (root / "pyproject.toml").is_file():
        raise RuntimeError(f"{root} is not a clone of the project: install it there with `pip install --no-deps -e .`")
    return root


def at_root(path: str | os.PathLike) -> Path:
    """`path` below the project root, or as it is when absolute."""
    return project_root() / path


def found(path: str | os.PathLike) -> Path:
    """Where an input is read: in the working directory where it is there, else below the project root."""
    here = Path(path).expanduser()
    return here if here.is_absolute() or here.exists() else at_root(here)


def from_root(path: str | os.PathLike) -> str:
    """The inverse of `at_root`, with forward slashes: what a record may hold without naming the machine."""
    path = Path(path).absolute()
    return path.relative_to(project_root()).as_posix() if path.is_relative_to(project_root()) else str(path)


def file_sha256(path: str | os.PathLike) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_json(path: str | os.PathLike, obj: object) -> Path:
    """Write JSON, complete or not at all. Raises ValueError on NaN or infinity and TypeError on what `plain` does not know."""
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

    What `kill -9` leaves is removed by the next write. Raises OSError naming `path` and the remedy when it cannot be written.
    """
    path = Path(path)
    temporary = path.with_name(f"{temporary_prefix(path)}tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        for left in leftovers(path):
            left.unlink(missing_ok=True)
        yield temporary
        flush(temporary)
        os.replace(temporary, path)
    except OSError as error:
        if error.errno not in REMEDIES:
            raise
        what = f"{os.strerror(error.errno)}: {REMEDIES[error.errno]}, then start again; what was there is unchanged"
        raise OSError(error.errno, what, str(path)) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def flush(path: str | os.PathLike) -> None:
    """Bring a finished file, or all in a folder, to the disk before it is renamed, with the mode of an ordinary new file."""
    path, mask = Path(path), os.umask(0)
    os.umask(mask)
    for file in filter(Path.is_file, path.rglob("*")) if path.is_dir() else [path]:
        os.chmod(file, 0o666 & ~mask)  # safetensors writes files that nobody else can read
        with open(file, "rb") as opened:
            os.fsync(opened.fileno())


def temporary_prefix(path: str | os.PathLike) -> str:
    """How the name of something begins that becomes `path` when it is complete: hidden, with its machine and process."""
    return f".{Path(path).name}.{platform.node()}-{os.getpid()}."


def leftovers(path: str | os.PathLike) -> list[Path]:
    """What processes of this machine left that were killed before `path` was complete."""
    start = temporary_prefix(path).rpartition("-")[0] + "-"
    processes = {left: left.name.removeprefix(start).split(".")[0] for left in Path(path).parent.glob(glob.escape(start) + "*")}
    return sorted(left for left, number in processes.items() if number.isdigit() and not psutil.pid_exists(int(number)))


def hub_unreachable() -> str | None:
    """Why the hub does not answer, None when it does or is not to be asked; its client retries for 20 s for every file."""
    import huggingface_hub

    if not huggingface_hub.constants.HF_HUB_OFFLINE:
        try:
            huggingface_hub.get_session().head(huggingface_hub.constants.ENDPOINT, timeout=5)
        except Exception as error:  # httpx or requests, depending on the client's version
            return f"{type(error).__name__}: {error}"
    return None


def first_line(error: BaseException) -> str:
    """The first line of an error's message, its type where it has none; a line that only announces goes with the next one."""
    lines = [*filter(None, map(str.strip, str(error).splitlines())), ""]
    return " ".join(lines[: 2 if lines[0].endswith(":") else 1]).strip() or type(error).__name__
