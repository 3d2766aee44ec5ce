"""The graph: notebooks → run files → tables → figures → chapters.

    snakemake                                      the default profile (what `make figures` runs)
    snakemake --configfile profiles/smoke.yaml     another profile
    snakemake figures/<stem>.png                   one figure and the runs its numbers need (--forceall: even if they are there)
    snakemake -n --configfile profiles/paper.yaml  list the runs of the papers' own settings

profiles/default/config.yaml holds the settings of Snakemake itself. A run is made again when its parameters, the code cells of
its notebook, its weights or its inputs change. Saving a notebook with outputs reruns nothing. Neither does editing prunelib/: a
comment there must not cost a week of GPU. Its hash is in every run file and the table warns when hashes mix; rerun on purpose
with `--forcerun selection blocks …`.
"""

import json
import shlex
import sys
from glob import glob
from pathlib import Path

from snakemake.exceptions import WorkflowError

workdir: workflow.basedir

sys.path.insert(0, workflow.basedir)

from prunelib.figures.save import figure_stems, figure_suffixes, registry
from prunelib.lab import profile as profiles
from prunelib.lab.provenance import model_fingerprint, notebook_source_sha
from prunelib.lab.runs import runs_table

if "models" not in config:  # no --configfile; as a plain directive it would be merged into every other profile
    configfile: "profiles/smollm2.yaml"

try:
    PROFILE = profiles.read(config)
except ValueError as error:
    raise WorkflowError(str(error))

PYTHON = sys.executable
RUNS = {run.path: run for runs in PROFILE.experiments.values() for run in runs}
TABLES = {PROFILE.table(experiment): [run.path for run in runs] for experiment, runs in PROFILE.experiments.items()}
CHAPTERS = {chapter: profiles.chapter_values(PROFILE, chapter) for chapter in PROFILE.chapters}
# Figures that need a table are drawn by a rule each, the others by their chapter; none where the first table is null.
FIGURES = {stem: entry for stem, entry in registry().items() if entry.chapter in CHAPTERS}
NOT_DRAWN = [stem for stem, entry in FIGURES.items() if any(CHAPTERS[entry.chapter][name] is None for name in [*entry.reads][:1])]
OWN_RULE = {stem: entry for stem, entry in FIGURES.items() if entry.reads and stem not in NOT_DRAWN}
DRAWN = OWN_RULE if PROFILE.figure_rules else {}
DRAWING = {name: value for name, value in PROFILE.resources.items() if name not in ("gpu", "gpu_model", "gres")}

# `source` in the params below is a plain value: a function of the input would be no reason to run again (Snakemake 9).
# `exec`: Snakemake is then the parent of the runner itself.
RUN = "exec env OMP_NUM_THREADS={threads} {PYTHON:q} -m prunelib.lab.run_notebook --quiet {input.notebook:q} {output.run:q} {params.arguments}"


def files(stem):
    return [f"{PROFILE.figures}/{stem}{suffix}" for suffix in figure_suffixes(stem)]


def shown(entry):
    """Names of the models that a figure shows."""
    names = list(PROFILE.models)
    if entry.models is None:
        return names
    like, index = entry.models if isinstance(entry.models, tuple) else (None, entry.models)
    return [next((name for name in names if like and like in name.lower()), names[index])]


def sources(entry):
    """The parameters of a chapter that a figure reads, tables of this profile replaced by the run files its numbers need."""
    values, models = dict(CHAPTERS[entry.chapter]), shown(entry)
    for name, parts in entry.reads.items():
        if values.get(name) == PROFILE.table(name):
            values[name] = [
                run.path
                for run in PROFILE.experiments[name]
                if (parts is None or run.part in parts) and run.model in models
            ]
    return {name: value for name, value in values.items() if name != "figures"}


def inputs(entry):
    """The files among them: runs of this profile and tables. Folders of committed runs are plain values."""
    found = []
    for name, parts in entry.reads.items():
        value = sources(entry)[name]
        if isinstance(value, list):
            found += value
        elif str(value).endswith(".csv"):
            found.append(value)
        else:  # a folder: of tables, whose names are the parts, or of runs
            found += [f"{value}/{part}.csv" for part in parts] if parts and value else below(value)
    return found


def below(folder):
    return [path for path in RUNS if path.startswith(f"{folder}/")]


# The runs too, although the tables are made of them: a clone has the tables and would make nothing again.
rule all:
    input:
        list(RUNS),
        TABLES,
        [runs_table(table) for table in TABLES],
        [file for stem in DRAWN for file in files(stem)],
        [f"{PROFILE.runs}/chapters/{chapter}.json" for chapter in CHAPTERS],


localrules: all


# Functions that make functions: one that used the loop's variable would see its last value.
def run_of(experiment, get):
    return lambda wildcards: get(RUNS[PROFILE.run(experiment, wildcards.run)])


for experiment, runs in PROFILE.experiments.items():

    rule:
        name: experiment
        input:
            unpack(run_of(experiment, lambda run: run.inputs)),
            notebook=ancient(profiles.notebook_of(experiment)),
        output: **PROFILE.outputs(experiment)
        log: notebook=PROFILE.run(experiment, "{run}", suffix=".ipynb")
        params:
            source=notebook_source_sha(profiles.notebook_of(experiment)),
            weights=run_of(experiment, lambda run: model_fingerprint(run.values["model"])),
            arguments=run_of(experiment, lambda run: profiles.arguments(run.values)),
        wildcard_constraints: run="|".join(Path(run.path).stem for run in runs).replace(".", r"\.")
        threads: PROFILE.threads
        retries: PROFILE.retries or None  # else as --retries says
        resources: **PROFILE.resources
        shell: RUN


for table, runs in TABLES.items():

    rule:
        name: f"table_{Path(table).stem}"
        input: runs
        output: table=table, runs=runs_table(table)
        localrule: True
        shell: "{PYTHON:q} -m prunelib.lab.runs {input:q} {output.table:q}"


for stem, entry in DRAWN.items():

    rule:
        name: f"figure_{stem}"
        input: runs=inputs(entry), published=sorted(glob("data/published/*.csv"))
        output: files(stem)
        params:
            arguments=" ".join(shlex.quote(f"{name}={json.dumps(value)}") for name, value in sources(entry).items()),
            stem=stem,  # a value, bound now: the shell command is read when the loop has ended
            folder=PROFILE.figures,
        retries: PROFILE.retries or None
        resources: **DRAWING
        shell: "{PYTHON:q} -m prunelib.figures {params.stem} {params.folder:q} {params.arguments}"


for chapter, values in CHAPTERS.items():

    rule:
        name: f"chapter_{chapter}"
        input:
            notebook=ancient(profiles.notebook_of(chapter)),
            tables=[value for value in values.values() if str(value).endswith(".csv")],
            runs=[path for value in values.values() for path in below(value)],
            figures=[file for stem, entry in DRAWN.items() if entry.chapter == chapter for file in files(stem)],
        output:
            [file for stem in figure_stems(profiles.notebook_of(chapter)) if stem not in [*DRAWN, *NOT_DRAWN] for file in files(stem)],
            run=f"{PROFILE.runs}/chapters/{chapter}.json",
        log: notebook=f"{PROFILE.runs}/chapters/{chapter}.ipynb"
        params:
            source=notebook_source_sha(profiles.notebook_of(chapter)),
            arguments=profiles.arguments(values),
        threads: PROFILE.threads
        retries: PROFILE.retries or None
        resources: **DRAWING
        shell: RUN
