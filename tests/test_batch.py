"""The real Snakefile on notebooks without torch: faults, resuming, what makes a run again, and the profiles."""

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import psutil
import pytest
from batch_project import CHAPTER, DEPTH, PROFILE, STATISTICS, Project, write_notebook

from prunelib.lab import batch
from prunelib.lab import profile as grid

ROOT = Path(__file__).resolve().parents[1]
RUNS = "data/runs/test"


@pytest.fixture(autouse=True)
def fresh_notebooks():
    """grid remembers parameters cells for the life of a batch; here many projects share one process."""
    grid._known.cache_clear()


def wait_for(condition, seconds=60.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.1)


def children_alive(root):
    """Runners and kernels of this project that still run."""
    alive = []
    for process in psutil.process_iter(["cmdline", "environ", "status"]):
        words = " ".join(process.info["cmdline"] or [])
        ours = (process.info["environ"] or {}).get("BATCH_LOG") == str(root / "log.txt")
        if ours and process.info["status"] != psutil.STATUS_ZOMBIE and ("ipykernel" in words or "prunelib" in words):
            alive.append(process.pid)
    return alive


def edit(notebook, change):
    content = json.loads(notebook.read_text())
    change(content)
    notebook.write_text(json.dumps(content))


# ---------------------------------------------------------------------------------------------- the life of a batch


def test_faults_resume_and_reruns(tmp_path):
    """One project through its life: a crash, going on, a repair, nothing to do, what reruns and what does not."""
    project = Project(tmp_path)
    runs, statistics = tmp_path / RUNS, tmp_path / "notebooks/experiments/statistics.ipynb"

    # The kernel of one run is killed; the others go on, nothing downstream of it is made.
    project.profile(calibration_seeds=[0, 1], layers_removed=[2], statistics={"crash": [1]})
    done = project.run("--keep-going", "--quiet", "host", "reason", "rules")
    assert done.returncode != 0
    assert "the kernel died in cell In [3] (`import os, signal, time`)" in done.stderr
    assert sorted(path.name for path in (runs / "statistics").iterdir() if path.suffix != ".log") == [
        "tiny__pydocs__s0.ipynb",
        "tiny__pydocs__s0.json",
        "tiny__pydocs__s0.safetensors",
        "tiny__pydocs__s1.ipynb",
    ], "the failed run keeps its executed notebook and has no result"
    assert not (tmp_path / "data/results.csv").exists()
    assert len(project.started()) == 2
    finished = (runs / "statistics/tiny__pydocs__s0.json").stat().st_mtime_ns

    # Repaired in the profile: a parameter of all statistics changed, so all of them are made; then everything else.
    project.profile(calibration_seeds=[0, 1], layers_removed=[2])
    (tmp_path / "data/costs.csv").write_text("run,code,seconds,peak_mib,device\nchapters/02_other,cccccccccccc,1.5,,cpu\n")
    done = project.run()
    assert done.returncode == 0, done.stderr
    assert project.started() == [
        "chapter",
        "depth data/tiny float32 2",
        "statistics data/tiny pydocs calibration None 4 float32 0",
        "statistics data/tiny pydocs calibration None 4 float32 1",
    ]
    assert (runs / "statistics/tiny__pydocs__s0.json").stat().st_mtime_ns > finished
    assert (tmp_path / "figures/simdiff_fig1_perplexity.png").read_text() == "5 rows"
    table = (tmp_path / "data/results.csv").read_text()
    assert table.count("\n") == 6
    assert str(tmp_path) not in table
    assert str(tmp_path) not in (runs / "depth/tiny__k2.json").read_text()
    costs = [line.split(",")[0] for line in (tmp_path / "data/costs.csv").read_text().splitlines()[1:]]
    made = ["depth/tiny__k2", "statistics/tiny__pydocs__s0", "statistics/tiny__pydocs__s1"]
    assert costs == ["chapters/01_chapter", "chapters/02_other", *made], "what was there, of a run that is not here, stays"

    # A second call, a notebook saved with outputs, an edit of the library: nothing to do.
    edit(statistics, lambda content: content["cells"][1].update(outputs=[{"output_type": "stream"}], execution_count=3))
    (tmp_path / "prunelib" / "criteria.py").write_text("# a comment\n")
    done = project.run()
    assert "Nothing to be done" in done.stderr
    assert project.started() == []

    # New weights, an edit of the code, a longer axis, another setting: what depends on it is made, and only that.
    axes = {"calibration_seeds": [0, 1], "layers_removed": [2]}
    weights, profile = tmp_path / "data/tiny/model.safetensors", tmp_path / "profile.yaml"
    before = {path: path.read_bytes() for path in (statistics, weights, profile)}
    chapter = {"table_results": 1, "chapter_01_chapter": 1, "costs": 1}

    def code(content):
        content["cells"][1]["source"] = "import os\n" + content["cells"][1]["source"]

    for change, expected in (
        (lambda: weights.write_bytes(b"others"), {"statistics": 2, "depth": 1} | chapter),
        (lambda: edit(statistics, code), {"statistics": 2, "depth": 1} | chapter),
        (lambda: project.profile(**axes | {"layers_removed": [2, 4]}), {"depth": 1} | chapter),
        (lambda: project.profile(**axes, depth={"alphas": [0.25]}), {"depth": 1} | chapter),
    ):
        change()
        assert planned(project) == expected
        for path, content in before.items():
            path.write_bytes(content)


def planned(project):
    """How many runs of each rule a dry run lists."""
    done = project.run("-n")
    assert done.returncode == 0, done.stderr
    rules = re.findall(r"^(?:local)?rule (\w+):$", done.stdout, re.MULTILINE)
    return {rule: count for rule, count in Counter(rules).items() if rule != "all"}


def test_kill_9_and_resume(tmp_path):
    """The batch is killed in mid-run: its runs end with it, the next call removes the lock, redoes nothing, completes."""
    project = Project(tmp_path)
    project.profile(calibration_seeds=[0, 1], layers_removed=[2])
    assert project.run(f"{RUNS}/statistics/tiny__pydocs__s0.json").returncode == 0
    project.started()
    command = [sys.executable, "-m", "prunelib.lab.batch", "profile.yaml"]

    environment = project.environment(BATCH_SLEEP="100")
    process = subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait_for(project.log.exists)
        second = subprocess.run(command, cwd=tmp_path, env=project.environment(), capture_output=True, text=True, timeout=60)
        assert second.returncode == 2
        assert "a batch is already running" in second.stderr, "a live batch keeps its lock"
        assert not list((tmp_path / RUNS).rglob("*s1.json"))
    finally:
        snakemake = psutil.Process(process.pid).children()[0]
        os.kill(snakemake.pid, signal.SIGKILL)
    assert process.wait(30) == 128 + signal.SIGKILL
    wait_for(lambda: not children_alive(tmp_path))
    assert any((tmp_path / ".snakemake/locks").iterdir())
    assert len(project.started()) == 1

    done = subprocess.run(command, cwd=tmp_path, env=project.environment(), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert project.started() == [
        "chapter",
        "depth data/tiny float32 2",
        "statistics data/tiny pydocs calibration None 4 float32 1",
    ], "the finished run is not made again"
    assert not (tmp_path / ".snakemake/batch.json").exists()


def test_a_lock_of_unknown_origin_stays(tmp_path):
    locks = tmp_path / ".snakemake" / "locks"
    assert not batch.release_stale_lock(tmp_path)
    locks.mkdir(parents=True)
    assert not batch.release_stale_lock(tmp_path)
    (locks / "0.input.lock").write_text("")
    with pytest.raises(batch.BatchError, match="not started from here"):
        batch.release_stale_lock(tmp_path)
    owner = tmp_path / ".snakemake" / "batch.json"
    owner.write_text(json.dumps({"host": "elsewhere", "pid": 1, "started": 0.0}))
    with pytest.raises(batch.BatchError, match="not started from here"):
        batch.release_stale_lock(tmp_path)
    own = {"host": batch.socket.gethostname(), "pid": os.getpid(), "started": psutil.Process().create_time()}
    owner.write_text(json.dumps(own))
    with pytest.raises(batch.BatchError, match="not started from here"):
        batch.release_stale_lock(tmp_path)
    owner.write_text(json.dumps(own | {"started": 1.0}))  # the number was given to another process since
    assert batch.release_stale_lock(tmp_path)


def test_batch_names_the_profiles_it_has(tmp_path, capsys):
    assert batch.main(["profiles/papr.yaml"]) == 2
    assert "profiles/paper.yaml" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------------- profiles


@pytest.fixture
def notebooks(tmp_path, monkeypatch):
    """The fixture notebooks, found by grid."""
    monkeypatch.setattr(grid, "at_root", lambda path: tmp_path / path)
    write_notebook(tmp_path / grid.experiment_notebook("statistics"), STATISTICS)
    write_notebook(tmp_path / grid.experiment_notebook("depth"), DEPTH)
    write_notebook(tmp_path / "notebooks/01_chapter.ipynb", CHAPTER)
    return tmp_path


def test_every_experiment_has_a_notebook_and_a_key_in_profiles():
    assert {path.stem for path in (ROOT / "notebooks/experiments").glob("*.ipynb")} == set(grid.EXPERIMENTS)
    assert set(grid.EXPERIMENTS) <= {field.name for field in dataclasses.fields(grid.Profile)}


def test_every_parameter_of_a_run_comes_from_the_profile(notebooks):
    profile = grid.read(PROFILE)
    values = grid.values(profile, "statistics", model="tiny", corpus="pydocs", seed=2)
    assert values == {
        "model": "data/tiny",
        "dtype": "float32",
        "corpus": "pydocs",
        "split": "calibration",
        "data_dir": None,
        "n_samples": 4,
        "seed": 2,
        "crash": [],
    }
    assert grid.arguments({"a b": "it's", "seeds": [1, 2], "x": None}) == "'a b=it'\"'\"'s' 'seeds=[1, 2]' x=None"
    assert grid.values(profile, "depth", model="tiny", layers_removed="2")["statistics"] == [
        f"data/runs/test/statistics/tiny__pydocs__s{seed}.json" for seed in (0, 1, 2)
    ]
    assert profile.figure_files("01_chapter") == [
        f"figures/simdiff_fig1_perplexity{suffix}" for suffix in (".png", ".pdf", ".csv", ".json")
    ], "`layers_removed` in the same heading is not a figure"
    assert grid.read(PROFILE | {"resources": {"gpu": 1, "mem_mb": 5}}).resources_without_gpu == {"mem_mb": 5}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers_remove": [0]}, "unknown key `layers_remove` in the profile; did you mean `layers_removed`"),
        ({"models": {"tiny": {"model": "x", "dtpye": "float32"}}}, "models.tiny.dtpye is not a parameter of .* `dtype`"),
        ({"models": {"tiny": {"model": "x"}}}, "sets no `dtype`, a parameter of notebooks/experiments/"),
        ({"models": {"a__b": {"model": "x", "dtype": "float32"}}}, "`a__b` cannot be part of a file name"),
        ({"models": ["tiny"]}, "`models` in the profile must be a dict"),
        ({"calibration": {"pydocs": {"split": "x", "data_dir": None, "n_samples": "4.5"}}}, "calibration.pydocs: n_samples"),
        ({"calibration": {"pydocs": 4}}, "calibration.pydocs must be a mapping"),
        ({"calibration_seeds": [0, 0]}, "calibration_seeds must be different whole numbers"),
        ({"layers_removed": [0, 2.5]}, "layers_removed must be different whole numbers"),
        ({"depth": {}}, "sets no `alphas`, a parameter of notebooks/experiments/depth.ipynb"),
        ({"depth": {"alphas": [0.5], "dtype": "float16"}}, "depth.dtype sets a parameter .* already"),
        ({"depth": {"alphas": [0.5], "aplha": 1}}, "depth.aplha is not a parameter"),
        ({"chapters": {"01_chapter": {"style": 1}}}, "chapters.01_chapter.style is not a parameter"),
        ({"chapters": {"02_absent": {}}}, "there is no notebook notebooks/02_absent.ipynb"),
        ({"threads": 0}, "threads = 0 is too small"),
        (
            {"tasks": {"all": {"choices": "rules"}}},
            "tasks.all.choices must name an entry of selection or blocks; there are: none",
        ),
        ({"selection": {"a": {}}, "blocks": {"a": {}}}, "`a` is in both selection and blocks"),
        ({"selection": {"a__b": {}}}, "`a__b` cannot be part of a file name"),
        ({"blocks": {"a": {"models": ["tny"]}}}, "blocks.a.models: there is no `tny` below models; did you mean `tiny`"),
        (
            {"blocks": {"a": {"models": []}}, "tasks": {"all": {"choices": "a"}}},
            "tasks.all.choices: `a` is not run for the model `tiny`",
        ),
        ({"blocks": {"a": {"stp": 1}}}, "there is no notebook notebooks/experiments/blocks.ipynb"),
    ],
)
def test_a_wrong_profile_is_an_error_that_names_the_key(notebooks, changes, message):
    with pytest.raises(grid.ProfileError, match=message):
        grid.read(PROFILE | changes)


def test_a_profile_without_a_required_key(notebooks):
    with pytest.raises(grid.ProfileError, match="the profile has no `runs`"):
        grid.read({key: value for key, value in PROFILE.items() if key != "runs"})


def test_two_chapters_cannot_draw_one_figure(notebooks):
    write_notebook(notebooks / "notebooks/02_chapter.ipynb", CHAPTER)
    with pytest.raises(grid.ProfileError, match="`simdiff_fig1_perplexity` is in the headings of both"):
        grid.read(PROFILE | {"chapters": {"01_chapter": {}, "02_chapter": None}})


def test_snakemake_reports_a_wrong_profile_in_one_line(tmp_path):
    project = Project(tmp_path)
    project.profile(models={"tiny": {"model": "x", "dtpye": "float32"}})
    done = project.run()
    assert done.returncode != 0
    assert "models.tiny.dtpye is not a parameter of" in done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    assert project.started() == []


# ------------------------------------------------------------------------------------------ the profiles of the project

CHAPTERS = sorted(path.stem for path in (ROOT / "notebooks").glob("[0-9][0-9]_*.ipynb"))


@pytest.mark.parametrize("name", ["smoke", "reference", "optimum", "healing", "paper"])
def test_a_dry_run_lists_every_run(name, tmp_path):
    """Also for models, data and devices that this machine does not have."""
    import yaml

    profile = yaml.safe_load((ROOT / "profiles" / f"{name}.yaml").read_text())
    command = [sys.executable, "-m", "snakemake", "-n", "--forceall", "-s", str(ROOT / "Snakefile"), "--directory", str(ROOT)]
    command += ["--configfile", str(ROOT / "profiles" / f"{name}.yaml"), "--nolock"]
    command += ["--rerun-incomplete"]  # also where a batch was interrupted
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    models, corpora = profile["models"], profile["calibration"]
    for model in models:
        for corpus in corpora:
            for seed in profile["calibration_seeds"]:
                assert f"{profile['runs']}/statistics/{model}__{corpus}__s{seed}.json" in done.stdout
        for count in profile["layers_removed"]:
            assert f"{profile['runs']}/depth/{model}__k{count}.json" in done.stdout
        for part in profile.get("tasks", {}):
            assert f"{profile['runs']}/tasks/{model}__{part}.json" in done.stdout
        for part in profile.get("selection", {}):
            assert f"{profile['runs']}/selection/{model}__s0__{part}.json" in done.stdout
    for chapter in profile["chapters"]:
        assert f"rule chapter_{chapter}:" in done.stdout
