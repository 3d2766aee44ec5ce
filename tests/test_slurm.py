"""Batches on SLURM: sbatch, one node on loopback, GPUs that are only counted.

Starts daemons and writes /etc/slurm, for its own time, hence only with PRUNELIB_SLURM_TEST=1, as root, and where there is no
other SLURM. `.ci/run` installs it.
"""

import os
import re
import shutil
import socket
import subprocess
import time
from pathlib import Path

import psutil
import pytest
from lab_project import STATISTICS, TINY, Project, write_notebook

from prunelib.io import project_root
from prunelib.lab import profile as profiles

ROOT = project_root()
SETTINGS = Path("/etc/slurm")

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
MinJobAge=3600
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
SchedulerParameters=batch_sched_delay=0,sched_min_interval=0
GresTypes=gpu
NodeName={host} NodeAddr=127.0.0.1 CPUs={cpus} RealMemory={memory} Gres=gpu:1 State=UNKNOWN
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def _wait_for(command: list[str], wanted: str, log: Path) -> None:
    end = time.monotonic() + 60
    while wanted not in subprocess.run(command, capture_output=True, text=True, timeout=30).stdout:
        if time.monotonic() > end:
            pytest.skip(f"SLURM does not start here: {log.read_text(errors='replace')[-300:]}")
        time.sleep(0.5)


@pytest.fixture
def cluster(tmp_path_factory, monkeypatch):
    """A SLURM of one node while the test runs."""
    if os.environ.get("PRUNELIB_SLURM_TEST") != "1" or os.geteuid() != 0:
        pytest.skip("set PRUNELIB_SLURM_TEST=1 to let this test start a SLURM on this machine, as root")
    pytest.importorskip("snakemake_executor_plugin_slurm", reason="pip install -e '.[cluster]'")
    if (SETTINGS / "slurm.conf").exists() or "SLURM_CONF" in os.environ:
        pytest.skip("this machine belongs to a SLURM cluster, which is left alone")
    monkeypatch.setenv("PATH", f"{os.environ['PATH']}:/usr/sbin:/sbin")
    if missing := [tool for tool in ("slurmctld", "slurmd", "sbatch", "scontrol", "munged") if shutil.which(tool) is None]:
        pytest.skip(f"no {', '.join(missing)}: apt-get install slurmctld slurmd slurm-client munge")
    folder, new = tmp_path_factory.mktemp("slurm"), not SETTINGS.is_dir()
    daemons: list[subprocess.Popen] = []

    def start(*command: str, **options: object) -> Path:
        log = folder / f"{command[0]}.log"
        with open(log, "wb") as file:
            daemons.append(subprocess.Popen(command, stdout=file, stderr=file, **options))
        return log

    for name in ("state", "spool"):
        (folder / name).mkdir()
    host = socket.gethostname().partition(".")[0]
    memory = int(0.9 * psutil.virtual_memory().total / 2**20)
    with socket.create_server(("127.0.0.1", 0)) as one, socket.create_server(("127.0.0.1", 0)) as other:
        ports = {"controller": one.getsockname()[1], "node": other.getsockname()[1]}
    settings = {
        "slurm.conf": SLURM_CONF.format(host=host, folder=folder, cpus=os.cpu_count(), memory=memory, **ports),
        "gres.conf": f"NodeName={host} Name=gpu File=/dev/null\n",
    }
    try:
        SETTINGS.mkdir(exist_ok=True)
        for name, text in settings.items():
            (SETTINGS / name).write_text(text)
        if subprocess.run(["munge", "-n"], capture_output=True).returncode != 0:
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
            daemon.wait(30)
        for name in settings:
            (SETTINGS / name).unlink(missing_ok=True)
        if new:
            shutil.rmtree(SETTINGS, ignore_errors=True)


def submitted(root: Path) -> list[dict[str, str]]:
    """What SLURM still knows about the jobs submitted from `root`."""
    told = subprocess.run(["scontrol", "--oneliner", "show", "job"], capture_output=True, text=True, timeout=30, check=True)
    jobs = [dict(re.findall(r"(\S+?)=(\S*)", line)) for line in told.stdout.splitlines()]
    return [job for job in jobs if job.get("WorkDir") == str(root)]


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
    write_notebook(tmp_path / profiles.notebook_of("statistics"), STATISTICS | {"compute": FRAGILE + STATISTICS["compute"]})
    project.profile(
        resources={"gpu": 1}, models={"tiny": TINY, "other": TINY}, blocks={"some": {"models": ["tiny"], "sizes": [2]}}
    )
    options = ["--profile", str(ROOT / "profiles/slurm"), "--default-resources", "mem_mb=1000", "runtime=10"]
    options += ["--slurm-status-command", "squeue", "--slurm-no-account", "--slurm-init-seconds-before-status-checks", "12"]
    done = project.run(*options)
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
