"""Run a whole profile: `python -m prunelib.lab.batch profiles/reference.yaml [--cores N] [arguments of snakemake …]`

This is Snakemake with three habits added: failed runs do not stop the others, an interrupted batch resumes, and the lock that a
killed batch (`kill -9`, power cut) leaves behind needs no hand work. A lock is removed only when this module took it on this
machine, the process that took it is gone, and no other Snakemake works in this folder; otherwise it is left alone, because
the owner may be alive on another machine that shares the disk.
"""

import contextlib
import fcntl
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import psutil

from prunelib.io import at_root, project_root, write_json
from prunelib.lab.run_notebook import MINIMUM_FREE_BYTES

HABITS = ("--keep-going", "--rerun-incomplete", "--quiet", "host", "reason", "rules")

# Snakemake's talk to itself. One line per finished run, the count of steps and everything about failures remain.
CHATTER = re.compile(
    r"Assuming unrestricted|Building DAG|Using shell|Provided cores|Rules claiming|Select jobs|Execute \d+ job|Finished job|"
    r"\[\w{3} \w{3} +\d+ [\d:]+ \d{4}\]$|Complete log|Storing output|Job stats|-+ +-+$|job +count$|$"
)


class BatchError(RuntimeError):
    """A batch that cannot start."""


def run(profile: str | os.PathLike, arguments: Sequence[str] = (), *, root: Path | None = None) -> int:
    """Run Snakemake on a profile in the project root; return its exit status. Raises BatchError when it cannot start."""
    root = root or project_root()
    profile = Path(profile)
    if not profile.is_file():
        profile = at_root(profile)
    if not profile.is_file():
        there = ", ".join(sorted(f"profiles/{path.name}" for path in (root / "profiles").glob("*.yaml")))
        raise BatchError(f"there is no profile {profile}; there are {there}")
    dry = bool({"-n", "--dry-run"} & set(arguments))  # it only looks: a batch may be at work beside it
    with contextlib.nullcontext() if dry else _only_here(root):
        return _run(profile, arguments, root, dry)


def _run(profile: Path, arguments: Sequence[str], root: Path, dry: bool) -> int:
    snakemake, configuration = [sys.executable, "-m", "snakemake"], ["--configfile", str(profile.absolute())]
    if not dry and release_stale_lock(root):
        subprocess.run([*snakemake, "--unlock", *configuration, "--quiet", "all"], cwd=root, check=True)
    cores = [] if any(argument.startswith(("--cores", "-c", "-j", "--jobs")) for argument in arguments) else ["--cores", "2"]
    owner = _owner_file(root)
    # The caller's arguments first: --configfile and --quiet would take a figure that follows them for one of theirs.
    command = [*snakemake, *arguments, *configuration, *cores, *HABITS]
    with subprocess.Popen(command, cwd=root, stderr=subprocess.PIPE, text=True, errors="replace") as process:
        if not dry:
            write_json(owner, {"host": socket.gethostname(), "pid": process.pid, "started": _started(process.pid)})
        # Ctrl-C reaches Snakemake too, which ends its runs first; a SIGTERM to us alone is passed on.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, lambda *_: process.terminate())
        for line in process.stderr or ():
            if not CHATTER.match(line):
                print(line, end="", file=sys.stderr, flush=True)
        status = process.wait()
    if status >= 0 and not dry:  # it ended by itself and has taken its lock away, if the lock was its own
        owner.unlink(missing_ok=True)
    return status if status >= 0 else 128 - status


@contextlib.contextmanager
def _only_here(root: Path) -> Iterator[None]:
    """While this lasts no other batch starts in `root`. Snakemake's own lock is taken some seconds later.

    Raises BatchError when another batch is at work there, or nothing can be written.
    """
    try:
        (root / ".snakemake").mkdir(exist_ok=True)
        with tempfile.TemporaryFile(dir=root / ".snakemake") as probe:
            probe.write(bytes(4096))
        free = shutil.disk_usage(root).free
        lock = open(root / ".snakemake" / "batch.lock", "w")  # noqa: SIM115 (for as long as this lasts)
    except OSError as error:
        raise BatchError(
            f"cannot write to {root / '.snakemake'} ({error.strerror}): a batch keeps its record there; make room, or give "
            "yourself a copy of the folder that you may write to"
        ) from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BatchError(f"a batch is already running in {root}: wait for it, or end it first") from None
        except OSError:  # a disk without such locks
            pass
        if free < MINIMUM_FREE_BYTES:  # every run would be refused
            raise BatchError(
                f"only {free / 2**20:.0f} MiB are free at {root}, a run needs {MINIMUM_FREE_BYTES / 2**20:.0f} MiB: "
                "make room and start again"
            )
        yield


def release_stale_lock(root: Path) -> bool:
    """Whether the lock in `root` may be removed: see the module. Raises BatchError when a batch is running there."""
    locks = root / ".snakemake" / "locks"
    if not locks.is_dir() or not any(locks.iterdir()):
        return False
    running = live_snakemake(root)
    if running:
        raise BatchError(f"a batch is already running in {root} (process {running[0]}): wait for it, or end it first")
    try:
        owner = json.loads(_owner_file(root).read_text())
    except (OSError, ValueError):
        owner = {}
    if owner.get("host") != socket.gethostname() or _started(owner.get("pid")) == owner.get("started"):
        raise BatchError(
            f"{root} is locked by a Snakemake that was not started from here; "
            "if you know that it has ended, run `snakemake --unlock`"
        )
    return True


def live_snakemake(root: Path) -> list[int]:
    """Processes of this machine that run Snakemake in `root`, or whose folder cannot be seen (another user's)."""
    found = []
    for process in psutil.process_iter(["cmdline", "pid"]):
        words = [Path(word).name for word in process.info["cmdline"] or []]
        # `snakemake …`, `python -m snakemake …`, `python …/snakemake/__main__.py …`
        packages = [Path(word).parent.name for word in process.info["cmdline"] or [] if word.endswith("__main__.py")]
        if "snakemake" not in (*words[:4], *packages):
            continue
        try:
            if Path(process.cwd()) == root.resolve() and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process.info["pid"])
        except psutil.AccessDenied:
            found.append(process.info["pid"])
        except psutil.NoSuchProcess:
            continue
    return found


def _owner_file(root: Path) -> Path:
    return root / ".snakemake" / "batch.json"


def _started(pid: int | None) -> float | None:
    """When a process started: with its number this names it, numbers alone are used again."""
    try:
        process = psutil.Process(pid) if pid is not None else None
        return process.create_time() if process is not None and process.status() != psutil.STATUS_ZOMBIE else None
    except psutil.NoSuchProcess:
        return None


def main(arguments: Sequence[str]) -> int:
    if not arguments or arguments[0].startswith("-"):
        print("usage: python -m prunelib.lab.batch PROFILE [--cores N] [arguments of snakemake …]", file=sys.stderr)
        return 2
    try:
        return run(arguments[0], arguments[1:])
    except BatchError as error:
        print(f"refused: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
