"""What a stranger waits for: seconds, CPU time and memory of every command of the README, from a fresh clone.

    make walkthrough                                                  # all steps; PYTHON=python3.12 as everywhere
    python3 benchmarks/walkthrough.py --folder DIR                    # the same, and DIR is kept: clone/, logs/, cache/
    python3 benchmarks/walkthrough.py --folder DIR --only verify test # some steps more, or anew, in the clone of DIR

Clones the committed HEAD into an empty folder and runs there, one after the other: the installation, `make figures`, the same
again (which should find nothing to do), `make verify`, `make report` without and with the PDF, the quickstart, `make test`. The
commands see no virtual environment, no variable that would change what they do, and empty caches of pip and of libraries. All
of it takes about 70 minutes of two cores, a network and 10 GB of disk; do it on an idle machine. Nothing but Python, make and
git is needed to start it. The time of the installation is as much one of the network, or of what pip is told to use instead.

A step's `seconds` are wall time, `cpu_seconds` its user and system time with that of all processes below it that were waited
for, `peak_mib` the largest of these processes. `load_before` is the load of the last minute, to which the step before it still
counts; `others_cpu_seconds` (Linux) is what the machine computed meanwhile beyond the step: near zero, or it was not idle (but
for `report_pdf`: nobody waits for some processes of a browser). `figures` names what came out different from what is committed.
Before it, all but the environment becomes as cloned: a step that is repeated is measured anew, not continued. Without --only, a
walk-through that was stopped goes on with what it lacks.

The result is written after every step. README.md's table of times («Measured on …») follows from it: data/numbers.yaml says
which step and which key each number is (`python -m prunelib.lab.prose README.md` writes them).
"""

import argparse
import contextlib
import json
import os
import platform
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

ROOT = Path(__file__).resolve().parents[1]
OUTPUT = ROOT / "data" / "benchmarks" / "walkthrough.json"
NEEDED_GB = 10  # environment, caches, runs of the reference profile
LAST_LINES = 15  # of a step that failed


@dataclass(frozen=True)
class Step:
    """One command, run in the clone. `needs`: a step without whose success this one would measure something else."""

    command: tuple[str, ...]
    needs: str | None = "installation"
    left_out: str | None = None  # how a line of the output begins that says why there was nothing to measure


STEPS = {
    "installation": Step(("make", ".venv/installed"), needs=None),
    "figures": Step(("make", "figures", "CORES={cores}")),
    "figures_again": Step(("make", "figures", "CORES={cores}"), needs="figures"),
    "verify": Step(("make", "verify")),
    "report": Step(("make", "report", "ARGS=--no-pdf")),
    "report_pdf": Step(("make", "report"), left_out="no PDF:"),
    "quickstart": Step(
        (".venv/bin/python", "-m", "prunelib.lab.run_notebook", "notebooks/00_quickstart.ipynb", "build/quickstart.json")
    ),
    "test": Step(("make", "test", "CORES={cores}")),
}

# What the caller's shell, a make around this, an environment or a git hook would change in the commands.
CHANGING = re.compile(
    r"GIT_\w+|MAKE\w+|MFLAGS|CORES|PROFILE|ARGS|PYTHON\w*|VIRTUAL_ENV\w*|__PYVENV_LAUNCHER__|\w+_NUM_THREADS|PRUNELIB_\w+|"
    r"HF_\w+|TRANSFORMERS_\w+|TOKENIZERS_\w+|MPL\w+|JUPYTER\w*|PYTEST_\w+|COVERAGE\w*"
)


class Refused(RuntimeError):
    """A walk-through that cannot start."""


# ------------------------------------------------------------------------------------------------------------ the place


def environment(folder: Path) -> dict[str, str]:
    """The variables of the steps: the caller's, without `CHANGING` and environments, and with caches below `folder`."""
    found = {name: value for name, value in os.environ.items() if not CHANGING.fullmatch(name)}
    own = Path(os.environ["VIRTUAL_ENV"], "bin") if os.environ.get("VIRTUAL_ENV") else None
    places = os.environ.get("PATH", os.defpath).split(os.pathsep)
    kept = [place for place in places if Path(place) != own and not (Path(place).parent / "pyvenv.cfg").is_file()]
    return found | {
        "PATH": os.pathsep.join(kept),
        # The Python that runs this; where that is one of an environment, the one that it was made with.
        "PYTHON": getattr(sys, "_base_executable", None) or sys.executable,
        "XDG_CACHE_HOME": str(folder / "cache"),
        "PIP_CACHE_DIR": str(folder / "cache" / "pip"),
    }


def git(place: Path, *arguments: str) -> str:
    """What git says in the repository at `place`, and in no other. Raises Refused with git's last words."""
    # Named, because git would look for a repository above a folder that is none.
    command = ["git", f"--git-dir={place / '.git'}", f"--work-tree={place}", *arguments]
    return _output(command, cwd=place)


def _output(command: Sequence[str], *, cwd: Path) -> str:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    done = subprocess.run(command, cwd=cwd, env=clean, capture_output=True, text=True, errors="replace")
    if done.returncode:
        raise Refused((done.stderr.strip().splitlines() or [f"{shlex.join(command)} failed"])[-1])
    return done.stdout


def uncommitted() -> int:
    """How many files of this repository are not as in HEAD, new ones that git does not ignore included."""
    # A worktree's .git is a file, so here git itself looks for the repository.
    return len(_output(["git", "status", "--porcelain"], cwd=ROOT).splitlines())


def restore(clone: Path) -> None:
    """Make all but the environment as it was cloned: what `make figures` made before would not be made again."""
    git(clone, "checkout", "--quiet", "--force", "HEAD", "--", ".")
    git(clone, "clean", "-xdffq", "--exclude=/.venv", "--exclude=/*.egg-info")


def changes(clone: Path) -> dict:
    """Committed files that are different now: how many, of which kind, the csv by name; and how many are new."""
    lines = git(clone, "status", "--porcelain", "--no-renames", "--untracked-files=all", "-z").split("\0")
    paths = {line[3:]: line[:2] for line in lines if line}
    committed = sorted(path for path, state in paths.items() if state != "??")
    return {
        "files": len(committed),
        "kinds": dict(sorted(Counter(Path(path).suffix or Path(path).name for path in committed).items())),
        "tables": [path for path in committed if path.startswith(("data/", "figures/")) and path.endswith(".csv")],
        "new_files": len(paths) - len(committed),
    }


def machine(cores: int) -> dict:
    """What computed: nothing that names the machine, its folders or its user."""
    cpu = None
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), None)
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "cpu": cpu or platform.processor() or platform.machine(),
        "cores_available": available,
        "cores": cores,
        "memory_gib": round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1),
        "python": platform.python_version(),
        "platform": platform.platform(),
    }


# -------------------------------------------------------------------------------------------------------------- one step


def measure(name: str, folder: Path, cores: int) -> dict:
    """Run one step to its end and record it. Raises KeyboardInterrupt, after the step's processes have gone."""
    step, clone, log = STEPS[name], folder / "clone", folder / "logs" / f"{name}.log"
    if name == "figures":
        restore(clone)
    command = [word.format(cores=cores) for word in step.command]
    load, busy, started = os.getloadavg()[0], busy_seconds(), time.perf_counter()
    with open(log, "wb") as file:
        status, usage = run(command, clone, environment(folder), file)
    seconds, busy_then = time.perf_counter() - started, busy_seconds()
    cpu = usage.ru_utime + usage.ru_stime
    lines = said(log, folder)
    record = {
        "step": name,
        "command": shlex.join(command),
        "exit_status": status,
        "seconds": round(seconds, 3),
        "cpu_seconds": round(cpu, 3),
        "peak_mib": round(usage.ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10), 1),  # macOS counts bytes
        "load_before": round(load, 2),
    }
    if busy is not None and busy_then is not None:
        record["others_cpu_seconds"] = round(max(0.0, busy_then - busy - cpu), 1)
    # The last of make's own lines only says that there was an error.
    record["last_line"] = next((line for line in reversed(lines) if not re.match(r"make(\[\d+\])?: ", line)), "")
    reason = next((line for line in lines if step.left_out and line.startswith(step.left_out)), None)
    if status == 0 and reason:
        return {"step": name, "command": record["command"], "left_out": reason}
    if status:
        record["last_lines"] = lines[-LAST_LINES:]
    if name == "figures":
        record["changed"] = changes(clone)
    return record


def run(command: Sequence[str], cwd: Path, env: Mapping[str, str], log: BinaryIO) -> tuple[int, resource.struct_rusage]:
    """Exit status (negative: the signal that ended it) and use of a command, in a session of its own."""
    process = subprocess.Popen(
        command,
        cwd=cwd,
        env=env,
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=subprocess.STDOUT,
        start_new_session=True,
        preexec_fn=_hearing_signals,
    )
    interrupts = 0
    while True:
        try:
            _, status, usage = os.wait4(process.pid, 0)
            break
        except KeyboardInterrupt:
            interrupts += 1  # the first one lets it end its work, the second does not
            _signal(process.pid, signal.SIGINT if interrupts == 1 else signal.SIGKILL)
    process.returncode = os.waitstatus_to_exitcode(status)  # wait4 took it from Popen, which would wait again
    if interrupts:
        _signal(process.pid, signal.SIGKILL)  # what outlived its parent
        raise KeyboardInterrupt
    return process.returncode, usage


def _hearing_signals() -> None:
    """As in a terminal: below `nohup`, or in the background of a script, interrupts would be ignored by every child."""
    for one in (signal.SIGINT, signal.SIGQUIT, signal.SIGHUP, signal.SIGTERM):
        signal.signal(one, signal.SIG_DFL)


def _signal(group: int, one: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):  # the second: macOS, when only zombies are left
        os.killpg(group, one)


def busy_seconds() -> float | None:
    """CPU seconds of this machine since it started, of all processes; None where there is no /proc/stat."""
    try:
        user, nice, system, _, _, irq, softirq, *_ = map(int, Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:])
    except (OSError, ValueError):
        return None
    return (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK")


def said(log: Path, folder: Path) -> list[str]:
    """The lines of an output that are not empty, without colors and without the folders of this machine."""
    text = re.sub(r"\x1b\[[0-9;]*[A-Za-z]", "", log.read_text(encoding="utf-8", errors="replace"))
    for place in (folder / "clone", folder, ROOT, Path.home()):
        for form in {str(place), str(place.resolve())} - {"/"}:
            text = re.sub(rf"(?<![\w.-]){re.escape(form)}/", "", text)
            text = re.sub(rf"(?<![\w.-]){re.escape(form)}(?![\w.-])", ".", text)
    # Of other absolute paths only the name stays.
    text = re.sub(r"(?<![\w.:/~-])/(?:[^\s/:'\",;()]+/)+", "…/", text)
    return [line.rstrip() for line in re.split(r"[\r\n]+", text) if line.strip()]


# ------------------------------------------------------------------------------------------------------------------ whole


def prepare(args: argparse.Namespace, folder: Path) -> tuple[dict, list[str]]:
    """The record so far and the steps to do, with the clone at its place. Raises Refused before any work is spent."""
    for tool in ("git", "make"):
        if shutil.which(tool, path=environment(folder)["PATH"]) is None:
            raise Refused(f"there is no {tool}: install it first")
    if args.cores < 1:
        raise Refused(f"--cores {args.cores}: at least one")
    if args.output.is_dir():
        raise Refused(f"--output {args.output} is a folder: name a file")
    old = folder / "walkthrough.json"
    record = json.loads(old.read_text(encoding="utf-8")) if old.is_file() and (folder / "clone" / ".git").is_dir() else None
    if record is None and folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise Refused(f"{folder} is neither empty nor the folder of a walk-through: name another one")
    parent = next(place for place in (folder, *folder.parents) if place.is_dir())
    free = shutil.disk_usage(parent).free / 1e9
    if free < NEEDED_GB:
        raise Refused(f"{free:.1f} GB are free at {parent}, {NEEDED_GB} GB are needed: make room, or name another --folder")
    here = machine(args.cores)
    if record is None:
        done, chosen = set(), args.only or list(STEPS)
    else:
        other = [name for name in here if here[name] != record["machine"].get(name)]
        if other:
            raise Refused(f"{folder} was walked with another {', '.join(other)}: name another one, such times do not compare")
        done = {one["step"] for one in record["steps"] if one.get("exit_status") == 0}
        chosen = args.only or [name for name in STEPS if name not in done]
        if not chosen:
            raise Refused(f"all steps are done in {folder}: --only repeats some, another --folder all")
    if "installation" in chosen and "installation" in done:
        raise Refused(f"it is installed in {folder}: an installation is timed in another --folder")
    if "installation" not in chosen and "installation" not in done:
        raise Refused("nothing is installed yet: add `installation` to --only")
    if record is None:
        folder.mkdir(parents=True, exist_ok=True)
        _output(["git", "clone", "--quiet", "--no-hardlinks", str(ROOT), str(folder / "clone")], cwd=folder)
        source = {"commit": git(folder / "clone", "rev-parse", "HEAD").strip(), "dirty": False}
        record = {"machine": here, "provenance": {"git": source, "uncommitted_files_left_out": uncommitted()}, "steps": []}
    (folder / "logs").mkdir(exist_ok=True)
    write(record, folder, args.output)
    return record, [name for name in STEPS if name in chosen]


def walk(record: dict, names: Sequence[str], folder: Path, output: Path, cores: int) -> bool:
    """Do the steps, write the record after each. Whether all of them succeeded, or had nothing to measure here."""
    well = True
    for name in names:
        print(f"{name:14s}", end="", flush=True)
        done = {one["step"] for one in record["steps"] if one.get("exit_status") == 0}
        missing = [needed for needed in ("installation", STEPS[name].needs) if STEPS[name].needs and needed not in done]
        reason = f"{missing[0]} has not succeeded" if missing else None
        one = {"step": name, "left_out": reason} if reason else measure(name, folder, cores)
        well = well and not reason and one.get("exit_status", 0) == 0
        steps = {old["step"]: old for old in record["steps"]} | {name: one}
        record["steps"] = [steps[known] for known in STEPS if known in steps]
        write(record, folder, output)
        print(line(one), flush=True)
    return well


def line(one: Mapping) -> str:
    """A step for the terminal, without its name."""
    if "left_out" in one:
        return f" left out: {one['left_out']}"
    others = f", others {one['others_cpu_seconds']:.0f} s" if "others_cpu_seconds" in one else ""
    result = "ok" if one["exit_status"] == 0 else f"FAILED ({one['exit_status']})"
    changed = f"; {one['changed']['files']} committed files came out different" if "changed" in one else ""
    return (
        f"{clock(one['seconds']):>14s}  CPU {one['cpu_seconds']:.0f} s{others}, {one['peak_mib']:.0f} MiB, load before "
        f"{one['load_before']:.2f}  {result}{changed}  logs/{one['step']}.log"
    )


def clock(seconds: float) -> str:
    """`1 h 10 min`, `1 min 40 s`, `2.3 s`."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def write(record: Mapping, folder: Path, output: Path) -> None:
    """Write the record to `output` and beside the clone, each complete or not at all."""
    for path in (folder / "walkthrough.json", output):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            with open(temporary, "w", encoding="utf-8") as file:
                file.write(json.dumps(record, indent=1, ensure_ascii=False) + "\n")
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


def _stop(*_) -> None:
    raise KeyboardInterrupt


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="empty, or of an earlier walk-through; without it a temporary one")
    parser.add_argument("--output", type=Path, default=OUTPUT, help="file for the numbers (data/benchmarks/walkthrough.json)")
    parser.add_argument("--cores", type=int, default=2, help="of `make figures` and `make test`")
    parser.add_argument("--only", nargs="+", choices=list(STEPS), metavar="STEP", help=f"some of {', '.join(STEPS)}")
    args = parser.parse_args()

    for one in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(one) is not signal.SIG_IGN:  # nohup
            signal.signal(one, _stop)
    temporary = Path(tempfile.mkdtemp(prefix="walkthrough-")) if args.folder is None else None
    folder = (temporary or args.folder).resolve()
    try:
        record, names = prepare(args, folder)
        commit, left = record["provenance"]["git"]["commit"], uncommitted()
        print(f"commit {commit[:12]} in {folder}; load {os.getloadavg()[0]:.2f}", flush=True)
        if left:
            print(f"not in it: {left} files of {ROOT} that are not committed", flush=True)
        if _output(["git", "rev-parse", "HEAD"], cwd=ROOT).strip() != commit:
            print("not in it: commits that were made since", flush=True)
        well = walk(record, names, folder, args.output, args.cores)
        print(args.output)
    except Refused as error:
        print(f"refused: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"\nstopped: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"\ninterrupted; the steps that had ended are in {args.output}", file=sys.stderr)
        return 130
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)
    return 0 if well else 1


if __name__ == "__main__":
    sys.exit(main())
