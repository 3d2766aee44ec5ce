"""The graph: notebooks → run files → table → figures.

    snakemake --cores 2                                     the reference profile (what `make figures` runs)
    snakemake --cores 2 --configfile profiles/smoke.yaml    another profile
    snakemake --cores 2 figures/<stem>.png                  one figure and what it needs (--forceall: even if it is there)
    snakemake -n --configfile profiles/paper.yaml           list the runs of the papers' own settings

A run is made again when its parameters, the code cells of its notebook, its weights or its inputs change. Saving a
notebook with outputs reruns nothing. Neither does editing prunelib/: a comment there must not cost a week of GPU. Its
hash is in every run file and the table warns when hashes mix; rerun on purpose with
    --forcerun statistics depth selection blocks slicing tasks healing duplicates
"""

import re
import sys
from glob import glob
from pathlib import Path

from snakemake.exceptions import WorkflowError

workdir: workflow.basedir

sys.path.insert(0, workflow.basedir)

from prunelib import grid
from prunelib.provenance import model_fingerprint, notebook_source_sha

if "models" not in config:  # no --configfile; as a plain directive it would be merged into every other profile
    configfile: "profiles/reference.yaml"

try:
    PROFILE = grid.read(config)
except ValueError as error:
    raise WorkflowError(str(error))

PYTHON = PROFILE.python or sys.executable
CHAPTERS = {chapter: PROFILE.figure_files(chapter) for chapter in PROFILE.chapters}
TABLES = PROFILE.tables
FIGURES = [file for files in CHAPTERS.values() for file in files]

# `source` in the params below is a plain value: a function of the input would be no reason to run again (Snakemake 9).
# `exec`: Snakemake is then the parent of the runner itself, which ends when that parent is killed.
RUN = (
    "exec env OMP_NUM_THREADS={threads} {PYTHON:q} -m prunelib.notebook --quiet --follow=$PPID"
    " {input.notebook:q} {output.run:q} {params.arguments}"
)


wildcard_constraints:
    model="|".join(map(re.escape, PROFILE.models)),
    corpus="|".join(map(re.escape, PROFILE.calibration)),
    seed=r"\d+",
    layers_removed=r"\d+",
    part="|".join(map(re.escape, (name for experiment in grid.OWN_TABLE for name in getattr(PROFILE, experiment)))) or "none",


localrules: all


rule all:
    input: PROFILE.experiment_runs(), TABLES, [PROFILE.chapter_run(chapter) for chapter in CHAPTERS], FIGURES


rule statistics:
    input: notebook=ancient(grid.STATISTICS)
    output:
        run=PROFILE.statistics_run("{model}", "{corpus}", "{seed}"),
        arrays=PROFILE.statistics_run("{model}", "{corpus}", "{seed}", ".safetensors"),
    log: notebook=PROFILE.statistics_run("{model}", "{corpus}", "{seed}", ".ipynb")
    params:
        source=notebook_source_sha(grid.STATISTICS),
        weights=lambda wildcards: model_fingerprint(PROFILE.models[wildcards.model]["model"]),
        arguments=lambda wildcards: grid.arguments(
            grid.statistics_values(PROFILE, wildcards.model, wildcards.corpus, int(wildcards.seed))
        ),
    threads: PROFILE.threads
    retries: PROFILE.retries
    resources: **PROFILE.resources
    shell: RUN


rule depth:
    input:
        notebook=ancient(grid.DEPTH),
        statistics=lambda wildcards: PROFILE.statistics_of(wildcards.model),
        arrays=lambda wildcards: PROFILE.statistics_of(wildcards.model, ".safetensors"),
    output: run=PROFILE.depth_run("{model}", "{layers_removed}")
    log: notebook=PROFILE.depth_run("{model}", "{layers_removed}", ".ipynb")
    params:
        source=notebook_source_sha(grid.DEPTH),
        weights=lambda wildcards: model_fingerprint(PROFILE.models[wildcards.model]["model"]),
        arguments=lambda wildcards: grid.arguments(
            grid.depth_values(PROFILE, wildcards.model, int(wildcards.layers_removed))
        ),
    threads: PROFILE.threads
    retries: PROFILE.retries
    resources: **PROFILE.resources
    shell: RUN


if PROFILE.selection:

    rule selection:
        input: notebook=ancient(grid.SELECTION)
        output: run=PROFILE.selection_run("{model}", "{seed}", "{part}")
        log: notebook=PROFILE.selection_run("{model}", "{seed}", "{part}", ".ipynb")
        params:
            source=notebook_source_sha(grid.SELECTION),
            weights=lambda wildcards: model_fingerprint(PROFILE.models[wildcards.model]["model"]),
            arguments=lambda wildcards: grid.arguments(
                grid.selection_values(PROFILE, wildcards.model, int(wildcards.seed), wildcards.part)
            ),
        threads: PROFILE.threads
        retries: PROFILE.retries
        resources: **PROFILE.resources
        shell: RUN


if PROFILE.blocks:

    rule blocks:
        input:
            notebook=ancient(grid.BLOCKS),
            statistics=lambda wildcards: PROFILE.statistics_of(wildcards.model),
            arrays=lambda wildcards: PROFILE.statistics_of(wildcards.model, ".safetensors"),
        output: run=PROFILE.blocks_run("{model}", "{part}")
        log: notebook=PROFILE.blocks_run("{model}", "{part}", ".ipynb")
        params:
            source=notebook_source_sha(grid.BLOCKS),
            weights=lambda wildcards: model_fingerprint(PROFILE.models[wildcards.model]["model"]),
            arguments=lambda wildcards: grid.arguments(grid.blocks_values(PROFILE, wildcards.model, wildcards.part)),
        threads: PROFILE.threads
        retries: PROFILE.retries
        resources: **PROFILE.resources
        shell: RUN


if PROFILE.slicing:

    rule slicing:
        input:
            notebook=ancient(grid.SLICING),
            statistics=lambda wildcards: PROFILE.statistics_of(wildcards.model),
            arrays=lambda wildcards: PROFILE.statistics_of(wildcards.model, ".safetensors"),
        output: run=PROFILE.slicing_run("{model}", "{part}")
        log: notebook=PROFILE.slicing_run("{model}", "{part}", ".ipynb")
        params:
            source=notebook_source_sha(grid.SLICING),
            weights=lambda wildcards: model_fingerprint(PROFILE.models[wildcards.model]["model"]),
            arguments=lambda wildcards: grid.arguments(grid.slicing_values(PROFILE, wildcards.model, wildcards.part)),
        threads: PROFILE.threads
        retries: PROFILE.retries
        resources: **PROFILE.resources
        shell: RUN


if PROFILE.tasks:

    rule tasks:
        input:
            notebook=ancient(grid.TASKS),
            choices=lambda wildcards: PROFILE.choices_of("tasks", wildcards.model, wildcards.part),
        output: run=PROFILE.tasks_run("{model}", "{part}")
        log: notebook=PROFILE.tasks_run("{model}", "{part}", ".ipynb")
        params:
            source=notebook_source_sha(grid.TASKS),
            weights=lambda wildcards: model_fingerprint(PROFILE.models[wildcards.model]["model"]),
            arguments=lambda wildcards: grid.arguments(grid.tasks_values(PROFILE, wildcards.model, wildcards.part)),
        threads: PROFILE.threads
        retries: PROFILE.retries
        resources: **PROFILE.resources
        shell: RUN


if PROFILE.healing:

    rule healing:
        input:
            notebook=ancient(grid.HEALING),
            choices=lambda wildcards: PROFILE.choices_of("healing", wildcards.model, wildcards.part),
        output: run=PROFILE.healing_run("{model}", "{part}")
        log: notebook=PROFILE.healing_run("{model}", "{part}", ".ipynb")
        params:
            source=notebook_source_sha(grid.HEALING),
            weights=lambda wildcards: model_fingerprint(PROFILE.models[wildcards.model]["model"]),
            arguments=lambda wildcards: grid.arguments(grid.healing_values(PROFILE, wildcards.model, wildcards.part)),
        threads: PROFILE.threads
        retries: PROFILE.retries
        resources: **PROFILE.resources
        shell: RUN


if PROFILE.duplicates:

    rule duplicates:
        input: notebook=ancient(grid.DUPLICATES)
        output: run=PROFILE.duplicates_run("{model}", "{part}")
        log: notebook=PROFILE.duplicates_run("{model}", "{part}", ".ipynb")
        params:
            source=notebook_source_sha(grid.DUPLICATES),
            weights=lambda wildcards: model_fingerprint(PROFILE.models[wildcards.model]["model"]),
            arguments=lambda wildcards: grid.arguments(grid.duplicates_values(PROFILE, wildcards.model, wildcards.part)),
        threads: PROFILE.threads
        retries: PROFILE.retries
        resources: **PROFILE.resources
        shell: RUN


if PROFILE.optimum:

    rule optimum:
        input: notebook=ancient(grid.OPTIMUM)
        output:
            run=PROFILE.optimum_run("{model}", "{part}"),
            arrays=PROFILE.optimum_run("{model}", "{part}", ".safetensors"),
        log: notebook=PROFILE.optimum_run("{model}", "{part}", ".ipynb")
        params:
            source=notebook_source_sha(grid.OPTIMUM),
            weights=lambda wildcards: model_fingerprint(PROFILE.models[wildcards.model]["model"]),
            arguments=lambda wildcards: grid.arguments(grid.optimum_values(PROFILE, wildcards.model, wildcards.part)),
        threads: PROFILE.threads
        retries: PROFILE.retries
        resources: **PROFILE.resources
        shell: RUN


for table, runs in TABLES.items():

    rule:
        name: f"table_{Path(table).stem}"
        input: runs
        output: table
        localrule: True
        shell: "{PYTHON:q} -m prunelib.results {input:q} {output:q}"


for chapter, files in CHAPTERS.items():

    rule:
        name: f"chapter_{chapter}"
        input:
            notebook=ancient(grid.chapter_notebook(chapter)),
            tables=[table for table in TABLES if table in grid.chapter_values(PROFILE, chapter).values()],
            # Yardsticks that the profile makes itself; the committed ones are not remade.
            truths=PROFILE.runs_of("optimum") if "truths" in grid.chapter_values(PROFILE, chapter) else [],
            published=sorted(glob("data/published/*.csv")),
        output: files, run=PROFILE.chapter_run(chapter)
        log: notebook=PROFILE.chapter_run(chapter, ".ipynb")
        params:
            source=notebook_source_sha(grid.chapter_notebook(chapter)),
            arguments=grid.arguments(grid.chapter_values(PROFILE, chapter)),
        threads: PROFILE.threads
        retries: PROFILE.retries
        resources: **PROFILE.resources
        shell: RUN
