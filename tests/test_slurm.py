"""Batches on SLURM: sbatch, one node on loopback, GPUs that are only counted.

Starts daemons and writes /etc/slurm, for its own time, hence only with PRUNELIB_SLURM_TEST=1, as root, and where there is no
other SLURM. `.ci/run` installs it.
"""

import importlib.util
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from lab_project import STATISTICS, Project, write_notebook

from prunelib.io import project_root
from prunelib.lab import profile as profiles

ROOT = project_root()
SETTINGS = Path("/etc/slurm")
TOOLS = ("slurmctld", "slurmd", "sbatch", "squeue", "sinfo", "scontrol", "munged")

SLURM_CONF = """
ClusterName=loopback
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller}
SlurmdPort={node}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
ReturnToService=2
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
SchedulerParameters=batch_sched_delay=0,sched_min_interval=0
GresTypes=gpu
NodeName={host} NodeAddr=127.0.0.1 CPUs={cpus} RealMemory={memory} Gres=gpu:1 State=UNKNOWN
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def _wait_for(command: list[str], wanted: str, log: Path) -> None:
    end = time.monotonic() + 60
    while time.monotonic() < end:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
        if wanted in done.stdout:
            return
        time.sleep(0.5)
    words = log.read_text(errors="replace").splitlines() if log.is_file() else []
    pytest.skip(f"SLURM does not start here: {log.stem} says {words[-1] if words else 'nothing'}")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """A SLURM of one node while the tests of this file run."""
    if os.environ.get("PRUNELIB_SLURM_TEST") != "1":
        pytest.skip("set PRUNELIB_SLURM_TEST=1 to let this test start a SLURM on this machine (as root)")
    if not sys.platform.startswith("linux") or os.geteuid() != 0:
        pytest.skip("starting SLURM needs Linux and root")
    if importlib.util.find_spec("snakemake_executor_plugin_slurm") is None:
        pytest.skip("snakemake-executor-plugin-slurm is not installed: pip install -e '.[cluster]'")
    if (SETTINGS / "slurm.conf").exists() or "SLURM_CONF" in os.environ:
        pytest.skip("this machine belongs to a SLURM cluster, which is left alone")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", f"{os.environ['PATH']}:/usr/sbin:/sbin")
        if missing := [tool for tool in TOOLS if shutil.which(tool) is None]:
            pytest.skip(f"no {', '.join(missing)}: apt-get install slurmctld slurmd slurm-client munge")
        yield from _running(tmp_path_factory.mktemp("slurm"))


def _running(folder: Path) -> Iterator[None]:
    daemons: list[subprocess.Popen] = []
    new = not SETTINGS.is_dir()

    def start(*command: str, **options: object) -> Path:
        log = folder / f"{command[0]}.log"
        with open(log, "wb") as file:
            daemons.append(subprocess.Popen(command, stdout=file, stderr=file, **options))
        return log

    for name in ("state", "spool"):
        (folder / name).mkdir()
    host = socket.gethostname().partition(".")[0]
    megabytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2**20
    values = {"host": host, "folder": folder, "cpus": os.cpu_count(), "memory": int(0.9 * megabytes)}
    settings = {
        "slurm.conf": SLURM_CONF.format(controller=_free_port(), node=_free_port(), **values),
        "gres.conf": f"NodeName={host} Name=gpu File=/dev/null\n",
    }
    try:
        SETTINGS.mkdir(exist_ok=True)
        for name, text in settings.items():
            (SETTINGS / name).write_text(text)
        if subprocess.run(["munge", "-n"], capture_output=True, check=False).returncode != 0:
            sockets = Path("/run/munge")
            sockets.mkdir(mode=0o755, exist_ok=True)
            shutil.chown(sockets, "munge", "munge")
            log = start("munged", "--foreground", user="munge", group="munge", extra_groups=[])
            _wait_for(["sh", "-c", "munge -n | unmunge"], "Success", log)
        _wait_for(["scontrol", "ping"], "UP", start("slurmctld", "-D"))
        _wait_for(["sinfo", "--noheader", "--format=%t"], "idle", start("slurmd", "-D"))
        yield
    finally:
        for daemon in reversed(daemons):
            daemon.terminate()
        for daemon in daemons:
            daemon.wait(30)
        for name in settings:
            (SETTINGS / name).unlink(missing_ok=True)
        if new:
            shutil.rmtree(SETTINGS, ignore_errors=True)


def batch(root: Path, *, limit: float = 500, **environment: str) -> subprocess.CompletedProcess:
    """Snakemake on the cluster, which keeps no accounts."""
    command = [sys.executable, "-m", "snakemake", "--profile", str(ROOT / "profiles/slurm"), "--configfile", "profile.yaml"]
    command += ["--slurm-status-command", "squeue", "--slurm-no-account", "--slurm-init-seconds-before-status-checks", "12"]
    command += ["--default-resources", "mem_mb=1000", "runtime=10"]
    clean = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}
    clean |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)} | environment
    return subprocess.run(command, cwd=root, env=clean, capture_output=True, text=True, timeout=limit, check=False)


def submitted(root: Path) -> list[dict[str, str]]:
    """What SLURM still knows about the jobs submitted from `root`, in their order."""
    told = subprocess.run(["scontrol", "--oneliner", "show", "job"], capture_output=True, text=True, timeout=30, check=True)
    jobs = [dict(re.findall(r"(\S+?)=(\S*)", line)) for line in told.stdout.splitlines()]
    return sorted((job for job in jobs if job.get("WorkDir") == str(root)), key=lambda job: int(job["JobId"]))


FRAGILE = """
import os, signal
from pathlib import Path
log = Path(os.environ["BATCH_LOG"])
with open(log, "a") as lines:
    lines.write(f"seed {seed} in job {os.environ['SLURM_JOB_ID']} on GPU {os.environ['CUDA_VISIBLE_DEVICES']}\\n")
if seed == 1 and not log.with_name("failed").exists():
    log.with_name("failed").touch()
    os.kill(os.getpid(), signal.SIGKILL)
"""
"""Says where it runs; the first kernel of seed 1 is killed."""


@pytest.mark.slow
def test_runs_ask_for_gpus_short_ones_go_together_and_a_failed_one_is_tried_again(cluster, tmp_path):
    """Notebooks of a few lines, so that it is the way through SLURM that is tested."""
    project = Project(tmp_path)
    write_notebook(
        tmp_path / profiles.experiment_notebook("statistics"), STATISTICS | {"compute": FRAGILE + STATISTICS["compute"]}
    )
    project.profile(resources={"gpu": 1}, blocks={"some": {"models": ["tiny"], "sizes": [2]}})
    done = batch(tmp_path, BATCH_LOG=str(project.log))
    assert done.returncode == 0, done.stderr[-4000:]
    assert (tmp_path / "figures/own_sizes.png").is_file()
    lines = [re.fullmatch(r"seed (\d) in job (\d+) on GPU (\S+)", line) for line in project.started()]
    statistics = [line.groups() for line in lines if line]
    assert {gpu for _, _, gpu in statistics} == {"0"}
    assert sum(seed == "1" for seed, _, _ in statistics) == 3, "of two models, once more after the failure"
    jobs = submitted(tmp_path)
    assert "FAILED" in [job["JobState"] for job in jobs]
    asked = {job.get("TresPerJob") for job in jobs}
    assert asked == {"gres:gpu:1", None}, "figures and chapters need no GPU"
