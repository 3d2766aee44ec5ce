"""The graph: notebooks → run files → table → figures.

    snakemake --cores 2                                     the reference profile (what `make figures` runs)
    snakemake --cores 2 --configfile profiles/smoke.yaml    another profile
    snakemake --cores 2 figures/<stem>.png                  one figure and what it needs (--forceall: even if it is there)
    snakemake -n --configfile profiles/paper.yaml           list the runs of the papers' own settings

A run is made again when its parameters, the code cells of its notebook, its weights or its inputs change. Saving a
notebook with outputs reruns nothing. Neither does editing prunelib/: a comment there must not cost a week of GPU. Its
hash is in every run file and the table warns when hashes mix; rerun on purpose with
    --forcerun statistics depth selection blocks slicing tasks healing duplicates combining speed
"""

import re
import sys
from glob import glob
from pathlib import Path

from snakemake.exceptions import WorkflowError

workdir: workflow.basedir

sys.path.insert(0, workflow.basedir)

from prunelib.lab import profile as grid
from prunelib.lab.provenance import model_fingerprint, notebook_source_sha
from prunelib.lab.runs import runs_table

if "models" not in config:  # no --configfile; as a plain directive it would be merged into every other profile
    configfile: "profiles/reference.yaml"

try:
    PROFILE = grid.read(config)
except ValueError as error:
    raise WorkflowError(str(error))

PYTHON = PROFILE.python or sys.executable
CHAPTERS = {chapter: PROFILE.figure_files(chapter) for chapter in PROFILE.chapters}
CHAPTER_RUNS = [PROFILE.chapter_run(chapter) for chapter in CHAPTERS]
TABLES = PROFILE.tables
FIGURES = [file for files in CHAPTERS.values() for file in files]

# `source` in the params below is a plain value: a function of the input would be no reason to run again (Snakemake 9).
# `exec`: Snakemake is then the parent of the runner itself, which ends when that parent is killed.
RUN = (
    "exec env OMP_NUM_THREADS={threads} {PYTHON:q} -m prunelib.lab.run_notebook --quiet --follow=$PPID"
    " {input.notebook:q} {output.run:q} {params.arguments}"
)


wildcard_constraints:
    model="|".join(map(re.escape, PROFILE.models)),
    corpus="|".join(map(re.escape, PROFILE.calibration)),
    seed=r"\d+",
    layers_removed=r"\d+",
    part="|".join(map(re.escape, (name for experiment in grid.OWN_TABLE for name in getattr(PROFILE, experiment)))) or "none",


localrules: all


# The runs too, although the tables are made of them: a clone has the tables and would make nothing again.
rule all:
    input: [run for runs in TABLES.values() for run in runs], TABLES, [runs_table(table) for table in TABLES], CHAPTER_RUNS, FIGURES, PROFILE.costs or []


# Functions that make functions: one that used the loop's variable would see its last value.
def inputs(experiment):
    return lambda wildcards: PROFILE.inputs(experiment, **dict(wildcards.items()))


def arguments(experiment):
    return lambda wildcards: grid.arguments(grid.values(PROFILE, experiment, **dict(wildcards.items())))


for experiment in PROFILE.experiments:

    rule:
        name: experiment
        input:
            unpack(inputs(experiment)),
            notebook=ancient(grid.experiment_notebook(experiment)),
        output: **PROFILE.outputs(experiment)
        log: notebook=PROFILE.pattern(experiment, ".ipynb")
        params:
            source=notebook_source_sha(grid.experiment_notebook(experiment)),
            weights=lambda wildcards: model_fingerprint(PROFILE.models[wildcards.model]["model"]),
            arguments=arguments(experiment),
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


for chapter, files in CHAPTERS.items():

    rule:
        name: f"chapter_{chapter}"
        input:
            notebook=ancient(grid.chapter_notebook(chapter)),
            tables=[table for table in TABLES if table in grid.chapter_values(PROFILE, chapter).values()],
            # Yardsticks that the profile makes itself; the committed ones are not remade.
            optimum_runs=PROFILE.runs_of("optimum") if "optimum_runs" in grid.chapter_values(PROFILE, chapter) else [],
            published=sorted(glob("data/published/*.csv")),
            claims=[path for name, path in grid.chapter_values(PROFILE, chapter).items() if name == "claims"],
        output: files, run=PROFILE.chapter_run(chapter)
        log: notebook=PROFILE.chapter_run(chapter, ".ipynb")
        params:
            source=notebook_source_sha(grid.chapter_notebook(chapter)),
            arguments=grid.arguments(grid.chapter_values(PROFILE, chapter)),
        threads: PROFILE.threads
        retries: PROFILE.retries or None  # else as --retries says
        resources: **PROFILE.resources_without_gpu
        shell: RUN


if PROFILE.costs:

    rule costs:
        input: [run for runs in TABLES.values() for run in runs], CHAPTER_RUNS
        output: update(PROFILE.costs)  # not deleted first: it keeps lines of runs that are not here
        localrule: True
        params:
            runs=PROFILE.runs,
        shell: "{PYTHON:q} -m prunelib.lab.costs {params.runs:q}"
