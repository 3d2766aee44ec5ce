"""What a new user waits for: seconds, CPU time and memory of the README's commands, from a fresh clone.

    python3 benchmarks/walkthrough.py                       all steps, on an idle machine; data/benchmarks/walkthrough.json
    python3 benchmarks/walkthrough.py --only figures test   some steps; the others in that file stay

Clones the committed HEAD into an empty folder and runs there, one after the other, with empty caches, no virtual environment.
Nothing but Python, make and git is needed. `seconds` is wall time, `cpu_seconds` user and system time of the step with all its
processes, `peak_mib` the largest of them. `changed` counts the committed files that came out different. The installation takes
as long as the network, or what pip is told to use instead.
"""

import argparse
import json
import os
import platform
import re
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
OUTPUT = ROOT / "data" / "benchmarks" / "walkthrough.json"
STEPS = {
    "installation": "make .venv/installed",
    "figures": "make figures CORES={cores}",
    "figures_again": "make figures CORES={cores}",
    "verify": "make verify",
    "report": "make report ARGS=--no-pdf",
    "quickstart": ".venv/bin/python -m prunelib.lab.run_notebook notebooks/00_quickstart.ipynb build/quickstart.json",
    "test": "make test CORES={cores}",
}
# What the caller's shell, a make around this, an environment or a git hook would change in the commands.
CHANGING = re.compile(
    r"(GIT|MAKE|PYTHON|VIRTUAL_ENV|PRUNELIB|HF|MPL|JUPYTER|PYTEST)\w*|MFLAGS|CORES|PROFILE|ARGS|\w+_NUM_THREADS"
)


def environment(folder: Path) -> dict[str, str]:
    """The variables of the steps: the caller's, without `CHANGING` and environments, and with caches below `folder`."""
    found = {name: value for name, value in os.environ.items() if not CHANGING.fullmatch(name)}
    places = [Path(place) for place in os.environ.get("PATH", os.defpath).split(os.pathsep)]
    kept = [str(place) for place in places if not (place.parent / "pyvenv.cfg").is_file()]
    own = {"PATH": os.pathsep.join(kept), "PYTHON": getattr(sys, "_base_executable", None) or sys.executable}
    return found | own | {"XDG_CACHE_HOME": str(folder / "cache"), "PIP_CACHE_DIR": str(folder / "cache/pip")}


def git(place: Path, *arguments: str) -> str:
    """What git says in the repository at `place`."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    done = subprocess.run(["git", "-C", str(place), *arguments], env=clean, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def measure(name: str, folder: Path, cores: int) -> dict:
    """Run one step to its end and record it; what it printed is in `folder`."""
    command = STEPS[name].format(cores=cores)
    clone, log = folder / "clone", folder / f"{name}.log"
    started = time.perf_counter()
    with open(log, "wb") as output:
        streams = {"stdin": subprocess.DEVNULL, "stdout": output, "stderr": output}
        process = subprocess.Popen(shlex.split(command), cwd=clone, env=environment(folder), **streams)
        _, status, usage = os.wait4(process.pid, 0)
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    record = {
        "step": name,
        "command": command,
        "exit_status": os.waitstatus_to_exitcode(status),
        "seconds": round(time.perf_counter() - started, 1),
        "cpu_seconds": round(usage.ru_utime + usage.ru_stime, 1),
        "peak_mib": round(usage.ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)),  # macOS counts bytes
        "last_line": lines[-1].replace(str(folder), "…") if lines else "",
    }
    if name == "figures":
        record["changed"] = len(git(clone, "status", "--porcelain").splitlines())
    return record


def machine(cores: int) -> dict:
    """What computed: nothing that names the machine, its folders or its user."""
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").is_file() else ""
    cpu = re.search(r"model name\s*: (.*)", info)
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    about = {"cpu": cpu[1] if cpu else platform.processor(), "cores": cores, "memory_gib": round(memory, 1)}
    return about | {"python": platform.python_version(), "platform": platform.platform()}


def main() -> int:
    """Run the steps and write the file after each. Exit status 1 when a step failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=STEPS, default=list(STEPS), help="steps; the installation is always made")
    parser.add_argument("--cores", type=int, default=2)
    parser.add_argument("--output", type=Path, default=OUTPUT)
    given = parser.parse_args()
    before = json.loads(given.output.read_text())["steps"] if given.output.is_file() else []
    done = {record["step"]: record for record in before if record["step"] in STEPS}
    with tempfile.TemporaryDirectory(prefix="walkthrough-") as name:
        folder = Path(name)
        git(ROOT, "clone", "--quiet", "--no-hardlinks", str(ROOT), str(folder / "clone"))
        provenance = {"git": {"commit": git(folder / "clone", "rev-parse", "HEAD"), "dirty": False}}
        for step in dict.fromkeys(["installation", *given.only]):
            done[step] = measure(step, folder, given.cores)
            print(f"{step}: exit status {done[step]['exit_status']}, {done[step]['seconds']} s, {done[step]['peak_mib']} MiB")
            records = [done[step] for step in STEPS if step in done]
            report = {"machine": machine(given.cores), "provenance": provenance, "steps": records}
            given.output.write_text(json.dumps(report, indent=1) + "\n")
    return int(any(done[step]["exit_status"] for step in {"installation", *given.only}))


if __name__ == "__main__":
    sys.exit(main())
