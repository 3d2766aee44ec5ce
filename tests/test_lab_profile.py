"""Profiles, and the real Snakefile on notebooks without torch: faults, resuming, what makes a run again, one figure alone."""

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
import yaml
from lab_project import BLOCKS, CHAPTER, PROFILE, STATISTICS, Project, write_notebook

from prunelib.lab import profile as profiles

ROOT = Path(__file__).resolve().parents[1]
RUNS = "data/runs/test"


@pytest.fixture(autouse=True)
def fresh_notebooks():
    """Parameters cells are remembered for the life of a batch; here many projects share one process."""
    profiles._known.cache_clear()


def edit(notebook, change):
    content = json.loads(notebook.read_text())
    change(content)
    notebook.write_text(json.dumps(content))


def planned(project, *arguments):
    """How many runs of each rule a dry run lists."""
    done = project.run("-n", *arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = re.findall(r"^(\w+) +(\d+)$", (done.stdout + done.stderr).partition("Job stats:")[2].partition("total")[0], re.M)
    return {rule: int(count) for rule, count in lines if rule != "all"}


@pytest.mark.slow
def test_faults_resume_and_reruns(tmp_path):
    """One project through its life: a crash, resuming, a repair, nothing to do, what reruns and what does not."""
    project = Project(tmp_path)
    runs, statistics = tmp_path / RUNS, tmp_path / "notebooks/experiments/statistics.ipynb"

    # The kernel of one seed is killed; the others go on, nothing downstream of it is made.
    project.profile(statistics={"crash": [1]})
    done = project.run()
    assert done.returncode != 0
    assert "statistics.ipynb: the kernel died (killed, or out of memory?)" in done.stdout + done.stderr
    names = sorted(path.name for path in (runs / "statistics").iterdir() if path.name.startswith("tiny"))
    assert names == [
        "tiny__pydocs__s0.ipynb",
        "tiny__pydocs__s0.json",
        "tiny__pydocs__s0.safetensors",
        "tiny__pydocs__s1.ipynb",
    ], "the failed run keeps its executed notebook and has no result"
    assert not (tmp_path / "data/statistics.csv").exists()
    assert len(project.started()) == 4

    # Repaired in the profile: a parameter of all statistics changed, so all of them are made; then everything else.
    project.profile()
    done = project.run()
    assert done.returncode == 0, done.stdout + done.stderr
    assert Counter(line.split()[0] for line in project.started()) == {"statistics": 4, "blocks": 3, "chapter": 1}
    table = (tmp_path / "data/blocks.csv").read_text()
    expected = [("other__some", 2, 3), ("tiny__more", 4, 5), ("tiny__some", 2, 3)]
    assert table.splitlines()[1:] == [f"blocks/{run},data/tiny float32,{size},ppl,{ppl},1," for run, size, ppl in expected]
    head, line = (tmp_path / "data/blocks.runs.csv").read_text().splitlines()[:2]
    assert head == "run,experiment,dtype,model,seconds,peak_mib,code"
    assert re.fullmatch(r"blocks/other__some,blocks,float32,data/tiny,[\d.]+,\d+,[0-9a-f]{12}", line)
    figure = json.loads((tmp_path / "figures/own_sizes.json").read_text())
    assert figure["runs"] == ["blocks/tiny__some"], "the first model and the part that it reads; its chapter drew the same"
    assert str(tmp_path) not in table + (runs / "blocks/tiny__some.json").read_text()

    # A second call, a notebook saved with outputs, an edit of the library: nothing to do.
    edit(statistics, lambda content: content["cells"][1].update(outputs=[{"output_type": "stream"}], execution_count=3))
    (tmp_path / "prunelib" / "criteria.py").write_text("# a comment\n")
    done = project.run()
    assert "Nothing to be done" in done.stdout + done.stderr
    assert project.started() == []

    # New weights, an edit of the code, a setting, another model's run: what depends on it is made, and only that.
    weights, profile = tmp_path / "data/tiny/model.safetensors", tmp_path / "profile.yaml"
    before = {path: path.read_bytes() for path in (statistics, weights, profile)}
    drawn = {"table_blocks": 1, "figure_own_sizes": 1, "chapter_01_chapter": 1}
    all_of_it = {"statistics": 4, "blocks": 3, "table_statistics": 1} | drawn

    def code(content):
        content["cells"][1]["source"] = "import os\n" + content["cells"][1]["source"]

    for change, expected in (
        (lambda: weights.write_bytes(b"others"), all_of_it),
        (lambda: edit(statistics, code), all_of_it),
        (lambda: project.profile(blocks={**PROFILE["blocks"], "some": {"sizes": [3]}}), {"blocks": 2} | drawn),
        (lambda: project.profile(blocks={**PROFILE["blocks"], "more": {"models": ["tiny"], "sizes": [8]}}),
         {"blocks": 1, "table_blocks": 1, "chapter_01_chapter": 1}),
    ):  # fmt: skip
        change()
        assert planned(project) == expected
        for path, content in before.items():
            path.write_bytes(content)
    # One figure: the runs of its part and model, their statistics, and no table.
    assert planned(project, "--forceall", "figures/own_sizes.png") == {"statistics": 2, "blocks": 1, "figure_own_sizes": 1}
    assert planned(project, "--forcerun", "blocks") == {"blocks": 3} | drawn


@pytest.mark.slow
def test_ctrl_c_in_a_batch_ends_its_kernels_and_a_second_call_resumes(tmp_path):
    project = Project(tmp_path)
    wanted = f"{RUNS}/statistics/tiny__pydocs__s0.json"
    process = subprocess.Popen(
        project.command(wanted),
        cwd=tmp_path,
        env=project.environment(BATCH_SLEEP="100"),
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs ignore it
    )
    end = time.monotonic() + 60
    while not project.log.exists():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.1)
    running = psutil.Process(process.pid).children(recursive=True)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    process.communicate(timeout=60)
    assert process.returncode != 0
    assert not psutil.wait_procs(running, timeout=10)[1], "runs and kernels ended with the batch"
    project.started()
    done = project.run(wanted)
    assert done.returncode == 0, done.stderr
    assert len(project.started()) == 1


@pytest.fixture
def notebooks(tmp_path, monkeypatch):
    monkeypatch.setattr(profiles, "at_root", lambda path: tmp_path / path)
    write_notebook(tmp_path / profiles.experiment_notebook("statistics"), STATISTICS)
    write_notebook(tmp_path / profiles.experiment_notebook("blocks"), BLOCKS)
    write_notebook(tmp_path / "notebooks/01_chapter.ipynb", CHAPTER)


def test_every_experiment_has_a_notebook():
    assert {path.stem for path in (ROOT / "notebooks/experiments").glob("*.ipynb")} == set(profiles.EXPERIMENTS)


def test_every_parameter_of_a_run_comes_from_the_profile(notebooks):
    profile = profiles.read(PROFILE)
    first = profile.experiments["statistics"][0]
    assert first.path == f"{RUNS}/statistics/tiny__pydocs__s0.json"
    expected = {"model": "data/tiny", "dtype": "float32", "corpus": "pydocs", "n_samples": 4, "seed": 0, "crash": []}
    assert first.values == expected
    some = profile.experiments["blocks"][0]
    assert (some.model, some.part, some.path) == ("tiny", "some", f"{RUNS}/blocks/tiny__some.json")
    assert some.values["statistics"] == some.inputs["statistics"]
    assert some.inputs["statistics"] == [f"{RUNS}/statistics/tiny__pydocs__s{seed}.json" for seed in (0, 1)]
    assert profiles.chapter_values(profile, "01_chapter") == {"blocks": "data/blocks.csv", "figures": "figures"}
    assert profiles.arguments({"a b": "it's", "seeds": [1, 2], "x": None}) == "'a b=it'\"'\"'s' 'seeds=[1, 2]' x=None"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"calibration_sed": [0]}, "unknown key `calibration_sed` in the profile; did you mean `calibration_seeds`"),
        ({"models": {"tiny": {"model": "x", "dtpye": "float32"}}}, "models.tiny.dtpye is not a parameter of .* `dtype`"),
        ({"models": {"tiny": {"model": "x"}}, "blocks": {}}, "sets no `dtype`, a parameter of notebooks/experiments/"),
        ({"models": {"a__b": {"model": "x", "dtype": "float32"}}}, "`a__b` cannot be part of a file name"),
        ({"models": ["tiny"]}, "`models` in the profile must be a dict"),
        ({"calibration": {"pydocs": {"n_samples": "4.5"}}}, "calibration.pydocs: n_samples"),
        ({"calibration": {"pydocs": 4}}, "calibration.pydocs must be a mapping"),
        ({"calibration_seeds": [0, 0]}, "calibration_seeds must be different whole numbers"),
        ({"blocks": {"some": {"sizes": [1], "dtype": "float16"}}}, "blocks.some.dtype sets a parameter .* already"),
        ({"blocks": {"some": {"sizes": [1], "szes": 1}}}, "blocks.some.szes is not a parameter"),
        ({"blocks": {"some": {}}}, "sets no `sizes`"),
        ({"blocks": {"a": {"models": ["tny"], "sizes": [1]}}}, "blocks.a.models: there is no `tny`; did you mean `tiny`"),
        ({"chapters": {"01_chapter": {"style": 1}}}, "chapters.01_chapter.style is not a parameter"),
        ({"chapters": {"02_absent": {}}}, "there is no notebook notebooks/02_absent.ipynb"),
        ({"threads": 0}, "threads = 0"),
        ({"tasks": {"all": {"choices": "rules"}}}, "tasks.all.choices must name an entry .*; there are: some, more"),
        ({"tasks": {"all": {"choices": "more", "sizes": [1]}}}, "tasks.all.choices: `more` is not run for the model `other`"),
        ({"selection": {"some": {}}}, "`some` is in both selection and blocks"),
    ],
)
def test_a_wrong_profile_is_an_error_that_names_the_key(notebooks, changes, message):
    with pytest.raises(profiles.ProfileError, match=message):
        cell = BLOCKS["parameters"].replace("statistics", "choices")
        write_notebook(profiles.at_root("notebooks/experiments/tasks.ipynb"), {"parameters": cell, "read": "choices"})
        profiles.read(PROFILE | changes)


def test_a_profile_without_a_required_key(notebooks):
    with pytest.raises(profiles.ProfileError, match="the profile has no `runs`"):
        profiles.read({key: value for key, value in PROFILE.items() if key != "runs"})


@pytest.mark.slow
@pytest.mark.parametrize("name", ["smoke", "reference", "optimum", "healing", "speed", "paper"])
def test_a_dry_run_lists_every_run_of_a_profile(name, tmp_path):
    """Also for models, data and devices that this machine does not have."""
    config = ROOT / "profiles" / f"{name}.yaml"
    profile = profiles.read(yaml.safe_load(config.read_text()))
    command = [sys.executable, "-m", "snakemake", "-n", "--forceall", "-s", str(ROOT / "Snakefile"), "--directory", str(ROOT)]
    command += ["--configfile", str(config), "--nolock", "--workflow-profile", "none", "--rerun-incomplete"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    runs = [run for found in profile.experiments.values() for run in found]
    assert [run.path for run in runs if run.path not in done.stdout] == []
    for chapter in profile.chapters:
        assert f"rule chapter_{chapter}:" in done.stdout


@pytest.mark.slow
def test_one_figure_of_the_reference_profile_needs_only_its_runs(tmp_path):
    command = [sys.executable, "-m", "snakemake", "-n", "--forceall", "figures/simdiff_fig5a_perplexity.png", "--nolock"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = re.findall(r"^(\w+) +(\d+)$", (done.stdout + done.stderr).partition("Job stats:")[2].partition("total")[0], re.M)
    assert dict(lines) == {"statistics": "6", "selection": "1", "figure_simdiff_fig5a_perplexity": "1"}
