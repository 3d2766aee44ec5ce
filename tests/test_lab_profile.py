"""Profiles, and the real Snakefile on notebooks without torch: faults, resuming, what makes a run again, one figure alone."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import psutil
import pytest
import yaml
from lab_project import BLOCKS, CHAPTER, PROFILE, STATISTICS, TINY, Project, write_notebook
from snakemake.utils import update_config

from prunelib.lab import profile as profiles

ROOT = Path(__file__).resolve().parents[1]
RUNS = "data/runs/test"


@pytest.fixture(autouse=True)
def fresh_notebooks():
    """Parameters cells are remembered for the life of a batch; here many projects share one process."""
    profiles._known.cache_clear()


def edit(notebook, change):
    """Change the cell that computes."""
    content = json.loads(notebook.read_text())
    change(content["cells"][1])
    notebook.write_text(json.dumps(content))


def jobs(done):
    """How many runs of each rule a dry run lists."""
    assert done.returncode == 0, done.stdout + done.stderr
    lines = re.findall(r"^(\w+) +(\d+)$", (done.stdout + done.stderr).partition("Job stats:")[2].partition("total")[0], re.M)
    return {rule: int(count) for rule, count in lines if rule != "all"}


def planned(project, *arguments):
    return jobs(project.run("-n", *arguments))


@pytest.mark.slow
def test_ctrl_c_faults_resume_and_reruns(tmp_path):
    """One project through its life: interrupted, a crash, a repair, nothing to do, what reruns and what does not."""
    project = Project(tmp_path)
    runs, statistics = tmp_path / RUNS, tmp_path / "notebooks/experiments/statistics.ipynb"
    interrupt(project, f"{RUNS}/statistics/tiny__pydocs__s0.json")

    # The kernel of one seed is killed; the others go on, nothing downstream of it is made.
    project.profile(statistics={"crash": [1]})
    done = project.run()
    assert done.returncode != 0
    assert "statistics.ipynb: the kernel died (killed, or out of memory?)" in done.stdout + done.stderr
    names = [f"tiny__pydocs__{end}" for end in ("s0.ipynb", "s0.json", "s0.safetensors", "s1.ipynb")]
    assert sorted(path.name for path in (runs / "statistics").iterdir()) == names, "the failed run keeps its executed notebook"
    assert not (tmp_path / "data/statistics.csv").exists()
    assert len(project.started()) == 2

    # Repaired in the profile: a parameter of all statistics changed, so all of them are made; then everything else.
    project.profile()
    done = project.run()
    assert done.returncode == 0, done.stdout + done.stderr
    assert Counter(line.split()[0] for line in project.started()) == {"statistics": 2, "blocks": 2, "chapter": 1}
    table = (tmp_path / "data/blocks.csv").read_text()
    expected = [("more", 4, 5), ("some", 2, 3)]
    assert table.splitlines()[1:] == [
        f"blocks/tiny__{part},data/tiny float32,{size},ppl,{ppl},1," for part, size, ppl in expected
    ]
    head, line = (tmp_path / "data/blocks.runs.csv").read_text().splitlines()[:2]
    assert head == "run,experiment,dtype,model,seconds,peak_mib,code"
    assert re.fullmatch(r"blocks/tiny__more,blocks,float32,data/tiny,[\d.]+,\d+,[0-9a-f]{12}", line)
    figure = json.loads((tmp_path / "figures/own_sizes.json").read_text())
    assert figure["runs"] == ["blocks/tiny__some"], "the first model and the part that it reads; its chapter drew the same"
    assert str(tmp_path) not in table + (runs / "blocks/tiny__some.json").read_text()

    # A notebook saved with outputs, an edit of the library: nothing to do.
    edit(statistics, lambda cell: cell.update(outputs=[{"output_type": "stream"}], execution_count=3))
    (tmp_path / "prunelib" / "criteria.py").write_text("# a comment\n")
    assert planned(project) == {}
    # Another model and a setting of one part: their runs, and what is made of them. An edit of the code, new weights: all.
    more = {"models": ["tiny"], "sizes": [8]}
    project.profile(models={"tiny": TINY, "other": TINY}, blocks=PROFILE["blocks"] | {"more": more})
    downstream = {"table_statistics": 1, "table_blocks": 1, "chapter_01_chapter": 1}
    assert planned(project) == {"statistics": 2, "blocks": 1} | downstream
    project.profile()
    everything, code = {"statistics": 2, "blocks": 2, "figure_own_sizes": 1} | downstream, statistics.read_bytes()
    edit(statistics, lambda cell: cell.update(source="import os\n" + "".join(cell["source"])))
    assert planned(project) == everything
    statistics.write_bytes(code)
    (tmp_path / "data/tiny/model.safetensors").write_bytes(b"others")
    assert planned(project) == everything


def interrupt(project, wanted):
    """Ctrl-C in a batch whose kernel computes: everything that it started ends with it."""
    process = subprocess.Popen(
        project.command(wanted),
        cwd=project.root,
        env=project.environment(BATCH_SLEEP="100"),
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs ignore it
    )
    end = time.monotonic() + 60
    while not project.started():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.1)
    running = psutil.Process(process.pid).children(recursive=True)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    assert process.wait(60) != 0
    assert not psutil.wait_procs(running, timeout=10)[1], "runs and kernels ended with the batch"


@pytest.fixture
def notebooks(tmp_path, monkeypatch):
    monkeypatch.setattr(profiles, "at_root", lambda path: tmp_path / path)
    write_notebook(tmp_path / profiles.notebook_of("statistics"), STATISTICS)
    write_notebook(tmp_path / profiles.notebook_of("blocks"), BLOCKS)
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
    assert some.path == f"{RUNS}/blocks/tiny__some.json"
    assert some.values["statistics"] == some.inputs["statistics"]
    assert some.inputs["statistics"] == [f"{RUNS}/statistics/tiny__pydocs__s{seed}.json" for seed in (0, 1)]
    expected = {"blocks": "data/blocks.csv", "figures": "figures", "live": "data"}
    assert profiles.chapter_values(profile, "01_chapter") == expected
    everywhere = profiles.read(PROFILE | {"everywhere": {"n_samples": 2}})
    assert everywhere.experiments["statistics"][0].values == first.values | {"n_samples": 2}
    with pytest.raises(profiles.ProfileError, match=r"everywhere\.n_sample is not a parameter of .* did you mean `?n_samples"):
        profiles.read(PROFILE | {"everywhere": {"n_sample": 2}})
    committed = profiles.read(PROFILE | {"chapters": {"01_chapter": {"blocks": "data/pretrained/blocks.csv"}}})
    assert profiles.chapter_values(committed, "01_chapter") == expected | {"blocks": "data/pretrained/blocks.csv"}
    assert profiles.arguments({"a b": "it's", "seeds": [1, 2], "x": None}) == "'a b=it'\"'\"'s' 'seeds=[1, 2]' x=None"


def test_a_part_says_better_than_its_model(notebooks):
    profile = profiles.read(PROFILE | {"blocks": {"some": {"sizes": [1], "dtype": "float16"}}})
    assert {run.part: run.values["dtype"] for run in profile.experiments["blocks"]} == {"some": "float16"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"calibration_sed": [0]}, "unknown key `calibration_sed` in the profile; did you mean `calibration_seeds`"),
        ({"models": {"tiny": {"model": "x", "dtpye": "float32"}}}, "models.tiny.dtpye is not a parameter of .* `dtype`"),
        ({"models": {"tiny": {"model": "x"}}, "blocks": {}}, "sets no `dtype`, a parameter of notebooks/experiments/"),
        ({"models": {"a__b": {"model": "x", "dtype": "float32"}}}, "`a__b` cannot be part of a file name"),
        ({"runs": None}, "the profile has no `runs`"),
        ({"models": ["tiny"]}, "`models` in the profile must be a dict"),
        ({"calibration": {"pydocs": {"n_samples": "4.5"}}}, "calibration.pydocs: n_samples"),
        ({"calibration": {"pydocs": 4}}, "calibration.pydocs must be a mapping"),
        ({"calibration_seeds": [0, 0]}, "calibration_seeds must be different whole numbers"),
        ({"statistics": {"seed": 3}}, "statistics.seed sets a parameter .* already"),
        ({"blocks": {"some": {"sizes": [1], "szes": 1}}}, "blocks.some.szes is not a parameter"),
        ({"blocks": {"some": {}}}, "sets no `sizes`"),
        ({"blocks": {"a": {"models": ["tny"], "sizes": [1]}}}, "blocks.a.models: there is no `tny`; did you mean `tiny`"),
        ({"chapters": {"01_chapter": {"style": 1}}}, "chapters.01_chapter.style is not a parameter"),
        ({"chapters": {"02_absent": {}}}, "there is no notebook notebooks/02_absent.ipynb"),
        ({"threads": 0}, "threads = 0"),
        ({"tasks": {"all": {"choices": "rules"}}}, "tasks.all.choices must name an entry .*; there are: some, more"),
        (
            {"models": {"tiny": TINY, "other": TINY}, "tasks": {"a": {"choices": "more", "sizes": [1]}}},
            "`more` is not run for .* `other`",
        ),
        ({"selection": {"some": {}}}, "`some` is in both selection and blocks"),
    ],
)
def test_a_wrong_profile_is_an_error_that_names_the_key(notebooks, changes, message):
    cell = BLOCKS["parameters"].replace("statistics", "choices")
    write_notebook(profiles.at_root("notebooks/experiments/tasks.ipynb"), {"parameters": cell, "read": "choices"})
    with pytest.raises(profiles.ProfileError, match=message):
        profiles.read({key: value for key, value in (PROFILE | changes).items() if value is not None})


@pytest.mark.parametrize("path", sorted((ROOT / "profiles").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_profile_can_be_read(path):
    config = {}
    for name in ["pretrained"] * (path.stem == "hub_small") + [path.stem]:  # as its first lines say
        update_config(config, yaml.safe_load((path.parent / f"{name}.yaml").read_text()))
    assert profiles.read(config).experiments


def test_make_figures_names_the_offline_profile_where_the_packaged_model_cannot_be_installed(tmp_path):
    for name in ("Makefile", "profiles/smollm2.yaml", "profiles/reference.yaml", "requirements.lock"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    (tmp_path / ".venv/bin").mkdir(parents=True)
    for name, does in (("python", "echo no matching distribution >&2; exit 1"), ("snakemake", 'echo started "$@"')):
        (tmp_path / ".venv/bin" / name).write_text(f"#!/bin/sh\n{does}\n")
        (tmp_path / ".venv/bin" / name).chmod(0o755)

    def figures(*arguments):
        command = ["make", "-s", "-o", ".venv/installed", "figures", *arguments]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)

    refused = figures()
    assert refused.returncode != 0
    offline = "make figures PROFILE=profiles/reference.yaml"
    assert refused.stdout.splitlines() == [
        f"SmolLM2-135M-Instruct cannot be installed (build/smollm2.log says why). Go on with the offline profile: {offline}"
    ]
    assert "no matching distribution" in (tmp_path / "build/smollm2.log").read_text()
    assert "started --cores 2 --configfile profiles/reference.yaml" in figures(offline.split()[-1]).stdout
    (tmp_path / "build/models/smollm2-135m-instruct").mkdir(parents=True)  # converted before
    assert "started --cores 2 --configfile profiles/smollm2.yaml" in figures().stdout


@pytest.mark.slow
def test_a_dry_run_lists_every_run_of_the_papers():
    """Also for models, data and devices that this machine does not have."""
    config = ROOT / "profiles/paper.yaml"
    command = [sys.executable, "-m", "snakemake", "-n", "--forceall", "--nolock"]
    command += ["--configfile", str(config), "--workflow-profile", "none"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    profile = profiles.read(yaml.safe_load(config.read_text()))
    rules = [f"rule chapter_{chapter}:" for chapter in profile.chapters]
    wanted = [run.path for found in profile.experiments.values() for run in found] + rules
    assert [one for one in wanted if one not in done.stdout] == []


@pytest.mark.slow
def test_the_hub_profile_has_the_runs_of_the_pretrained_one_on_texts_of_the_hub():
    command = [sys.executable, "-m", "snakemake", "-n", "--forceall", "--nolock", "-p", "--workflow-profile", "none"]
    command += ["--configfile", "profiles/pretrained.yaml", "profiles/hub_small.yaml"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    for model, name in (("gemma-3-270m", "google/gemma-3-270m"), ("qwen2.5-0.5b", "Qwen/Qwen2.5-0.5B")):
        assert re.search(rf"data/runs/hub_small/selection/{model}__rules.json model={name} .*data_dir=None", done.stdout), model
    assert "build/texts" not in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    ("profile", "figure", "needed"),
    [
        ("reference", "simdiff_fig5a_perplexity", {"statistics": 6, "selection": 1}),
        ("smollm2", "simdiff_fig5a_perplexity", {}),
        ("smollm2", "own_live_vs_committed", {"statistics": 3, "selection": 1, "table_statistics": 1, "table_selection": 1}),
    ],
)
def test_one_figure_needs_only_its_runs(profile, figure, needed):
    """Those of the offline profile; of the default one nothing where it is drawn from committed tables."""
    folder = {"reference": "data/runs/reference/figures", "smollm2": "figures"}[profile]
    command = [sys.executable, "-m", "snakemake", "-n", "--forceall", f"{folder}/{figure}.png", "--nolock"]
    command += ["--configfile", f"profiles/{profile}.yaml"]
    found = jobs(subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120))
    assert found == needed | {f"figure_{figure}": 1}
