"""A profile (one YAML file of `profiles/`) → the runs it asks for, each with every parameter of its notebook.

For the Snakefile; nothing here needs more than the standard library. A profile is checked before the first run: an unknown
key, a value of the wrong type and a parameter that the profile leaves to the notebook's default are errors.
"""

import functools
import json
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from pathlib import PurePosixPath

from prunelib.notebook import Parameter, ParameterError, closest, parameters
from prunelib.provenance import at_root

NOTEBOOKS = "notebooks"
STATISTICS = f"{NOTEBOOKS}/experiments/statistics.ipynb"
DEPTH = f"{NOTEBOOKS}/experiments/depth.ipynb"
SELECTION = f"{NOTEBOOKS}/experiments/selection.ipynb"
BLOCKS = f"{NOTEBOOKS}/experiments/blocks.ipynb"
TASKS = f"{NOTEBOOKS}/experiments/tasks.ipynb"
SLICING = f"{NOTEBOOKS}/experiments/slicing.ipynb"
OPTIMUM = f"{NOTEBOOKS}/experiments/optimum.ipynb"
HEALING = f"{NOTEBOOKS}/experiments/healing.ipynb"
DUPLICATES = f"{NOTEBOOKS}/experiments/duplicates.ipynb"
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9.-]*(_[A-Za-z0-9.-]+)*")  # file names join these with `__`
SOME_MODELS = ("slicing", "healing", "duplicates")  # experiments whose entries may be for some of the models alone
CHOOSING = ("tasks", "healing")  # experiments that go on from the layers which another one has chosen
# Experiments whose rows are not in `results`.
OWN_TABLE = ("selection", "blocks", "slicing", "tasks", "optimum", "healing", "duplicates")
STEM = re.compile(r"own_[a-z0-9_]+|[a-z][a-z0-9_]*_(?:fig|table)[a-z0-9]+_[a-z0-9_]+")


class ProfileError(ValueError):
    """A profile that does not say what to run, or says something that nothing reads."""


@dataclass(frozen=True)
class Profile:
    """The keys of a profile; those without a default must be there.

    runs, results, figures: folder of the run files, the table (CSV), folder of the figures.
    models: short name → {model: path or hub name, dtype, device, batch_size, …}; parameters of the experiment notebooks.
    calibration: short name → {corpus (that name by default), split, data_dir, n_samples, seq_len}, of statistics.ipynb.
    calibration_seeds, layers_removed: the other two axes.
    statistics, depth: the remaining parameters of these notebooks, the same for all of their runs.
    selection: name → parameters of selection.ipynb; a run for every model and calibration seed.
    blocks, optimum: name → parameters of these notebooks; a run for every model.
    slicing, healing, duplicates: name → {models: for which there is a run (all unless given), parameters of that notebook}.
    tasks: name → {parameters of tasks.ipynb}; a run for every model. In `tasks` and `healing`, `choices` is a name below
        `selection` (its first seed) or `blocks`. Each of these seven has a table of its own beside `results`, such as
        selection.csv.
    chapters: notebook stem → its parameters besides `results`, `figures` and `output`.
    threads, retries, resources: of every run (`resources: {gpu: 1}` where a scheduler counts them).
    """

    runs: str
    results: str
    figures: str
    models: dict
    calibration: dict
    calibration_seeds: list
    layers_removed: list
    chapters: dict
    statistics: dict = field(default_factory=dict)
    depth: dict = field(default_factory=dict)
    selection: dict = field(default_factory=dict)
    blocks: dict = field(default_factory=dict)
    slicing: dict = field(default_factory=dict)
    tasks: dict = field(default_factory=dict)
    optimum: dict = field(default_factory=dict)
    healing: dict = field(default_factory=dict)
    duplicates: dict = field(default_factory=dict)
    threads: int = 1
    retries: int = 0
    resources: dict = field(default_factory=dict)
    python: str = ""

    def __post_init__(self) -> None:
        for name in self._names():
            if not NAME.fullmatch(str(name)) or "__" in str(name):
                raise ProfileError(f"`{name}` cannot be part of a file name: use letters, digits, `.`, `-` and single `_`")
        for key in ("models", "calibration", "chapters", *OWN_TABLE):
            for name, entry in getattr(self, key).items():
                if entry is not None and not isinstance(entry, dict):
                    raise ProfileError(f"{key}.{name} must be a mapping of parameters, not {entry!r}")
        for key in ("calibration_seeds", "layers_removed"):
            values = getattr(self, key)
            if not all(type(value) is int and value >= 0 for value in values) or len(set(values)) < len(values):
                raise ProfileError(f"{key} must be different whole numbers from 0 on, not {values!r}")
        for key in SOME_MODELS:
            for name, entry in getattr(self, key).items():
                unknown = [model for model in (entry or {}).get("models", []) if model not in self.models]
                if unknown:
                    raise ProfileError(
                        f"{key}.{name}.models: there is no `{unknown[0]}` below models{closest(str(unknown[0]), self.models)}"
                    )
        both = set(self.selection) & set(self.blocks)
        if both:
            raise ProfileError(f"`{both.pop()}` is in both selection and blocks: tasks could not say which of them they read")
        for key in CHOOSING:
            for name, entry in getattr(self, key).items():
                if (entry or {}).get("choices") not in (*self.selection, *self.blocks):
                    known = ", ".join((*self.selection, *self.blocks)) or "none"
                    raise ProfileError(f"{key}.{name}.choices must name an entry of selection or blocks; there are: {known}")
        for key in ("threads", "retries"):
            if type(getattr(self, key)) is bool or getattr(self, key) < (key == "threads"):
                raise ProfileError(f"{key} = {getattr(self, key)!r} is too small")

    def _names(self) -> list[str]:
        """Every name that becomes part of a file name."""
        return [*self.models, *self.calibration, *(name for key in OWN_TABLE for name in getattr(self, key))]

    def statistics_run(self, model: str, corpus: str, seed: int, suffix: str = ".json") -> str:
        return f"{self.runs}/statistics/{model}__{corpus}__s{seed}{suffix}"

    def depth_run(self, model: str, layers_removed: int, suffix: str = ".json") -> str:
        return f"{self.runs}/depth/{model}__k{layers_removed}{suffix}"

    def selection_run(self, model: str, seed: int | str, name: str, suffix: str = ".json") -> str:
        return f"{self.runs}/selection/{model}__s{seed}__{name}{suffix}"

    def blocks_run(self, model: str, name: str, suffix: str = ".json") -> str:
        return f"{self.runs}/blocks/{model}__{name}{suffix}"

    def slicing_run(self, model: str, name: str, suffix: str = ".json") -> str:
        return f"{self.runs}/slicing/{model}__{name}{suffix}"

    def tasks_run(self, model: str, name: str, suffix: str = ".json") -> str:
        return f"{self.runs}/tasks/{model}__{name}{suffix}"

    def optimum_run(self, model: str, name: str, suffix: str = ".json") -> str:
        return f"{self.runs}/optimum/{model}__{name}{suffix}"

    def healing_run(self, model: str, name: str, suffix: str = ".json") -> str:
        return f"{self.runs}/healing/{model}__{name}{suffix}"

    def duplicates_run(self, model: str, name: str, suffix: str = ".json") -> str:
        return f"{self.runs}/duplicates/{model}__{name}{suffix}"

    def choices_of(self, experiment: str, model: str, name: str) -> str:
        """The run file that a run of tasks or healing takes its sets of layers from."""
        source = getattr(self, experiment)[name]["choices"]
        if source in self.blocks:
            return self.blocks_run(model, source)
        return self.selection_run(model, self.calibration_seeds[0], source)

    def models_of(self, experiment: str, name: str) -> list[str]:
        """The models that an entry is for."""
        if experiment not in SOME_MODELS:
            return list(self.models)
        return list((getattr(self, experiment)[name] or {}).get("models", self.models))

    def runs_of(self, experiment: str) -> list[str]:
        """All run files of one of the experiments that have a table of their own."""
        if experiment == "selection":
            return [
                self.selection_run(model, seed, name)
                for model in self.models
                for seed in self.calibration_seeds
                for name in self.selection
            ]
        run = {
            "blocks": self.blocks_run,
            "slicing": self.slicing_run,
            "tasks": self.tasks_run,
            "optimum": self.optimum_run,
            "healing": self.healing_run,
            "duplicates": self.duplicates_run,
        }[experiment]
        entries = getattr(self, experiment)
        return [run(model, name) for model in self.models for name in entries if model in self.models_of(experiment, name)]

    def table(self, experiment: str) -> str:
        """Where the table of one of these experiments lies."""
        return str(PurePosixPath(self.results).with_name(f"{experiment}.csv"))

    @property
    def tables(self) -> dict[str, list[str]]:
        """The tables this profile makes → the run files each is made of."""
        own = {self.table(experiment): self.runs_of(experiment) for experiment in OWN_TABLE}
        return {table: runs for table, runs in {self.results: self.experiment_runs(), **own}.items() if runs}

    def chapter_run(self, chapter: str, suffix: str = ".json") -> str:
        return f"{self.runs}/chapters/{chapter}{suffix}"

    def statistics_of(self, model: str, suffix: str = ".json") -> list[str]:
        """All statistics of one model: what its depth runs read."""
        return [
            self.statistics_run(model, corpus, seed, suffix) for corpus in self.calibration for seed in self.calibration_seeds
        ]

    def experiment_runs(self) -> list[str]:
        """Every run file that the table is made of."""
        depth = [self.depth_run(model, count) for model in self.models for count in self.layers_removed]
        return [run for model in self.models for run in self.statistics_of(model)] + depth

    def figure_files(self, chapter: str) -> list[str]:
        """The files a chapter draws, from the stems in its headings."""
        stems = figure_stems(chapter_notebook(chapter))
        return [f"{self.figures}/{stem}{suffix}" for stem in stems for suffix in figure_suffixes(stem)]


def read(config: Mapping) -> Profile:
    """A checked profile from the mapping of a YAML file. Raises ProfileError naming the key.

    Besides the keys this looks at every parameter of every run, so that nothing is found out after hours.
    """
    kinds = {item.name: item.type for item in fields(Profile)}
    for key, value in config.items():
        if key not in kinds:
            raise ProfileError(f"unknown key `{key}` in the profile{closest(key, kinds)}")
        if not isinstance(value, kinds[key]):
            raise ProfileError(f"`{key}` in the profile must be a {kinds[key].__name__}, not {value!r}")
    required = [item.name for item in fields(Profile) if item.default is MISSING and item.default_factory is MISSING]
    for key in required:
        if key not in config:
            raise ProfileError(f"the profile has no `{key}`")
    profile = Profile(**config)

    every = {name: known for notebook in (STATISTICS, DEPTH) for name, known in _known(notebook).items()}
    for name, entry in profile.models.items():
        _refuse_unknown(entry or {}, every, f"models.{name}", f"{STATISTICS} or {DEPTH}")
        for seed in profile.calibration_seeds:
            for part in profile.selection:
                selection_values(profile, name, seed, part)
        for experiment, values in VALUES.items():
            for part in getattr(profile, experiment):
                if name in profile.models_of(experiment, part):
                    values(profile, name, part)
        for count in profile.layers_removed:
            depth_values(profile, name, count)
        for corpus in profile.calibration:
            for seed in profile.calibration_seeds:
                statistics_values(profile, name, corpus, seed)
    drawn: dict[str, str] = {}
    for chapter in profile.chapters:
        chapter_values(profile, chapter)
        for stem in figure_stems(chapter_notebook(chapter)):
            if drawn.setdefault(stem, chapter) != chapter:
                raise ProfileError(f"figure `{stem}` is in the headings of both {drawn[stem]} and {chapter}")
    return profile


def statistics_values(profile: Profile, model: str, corpus: str, seed: int) -> dict:
    """Every parameter of one run of statistics.ipynb, but `output`."""
    sources = {
        f"models.{model}": _declared(STATISTICS, profile.models[model]),
        f"calibration.{corpus}": {"corpus": corpus, **(profile.calibration[corpus] or {})},
        "calibration_seeds": {"seed": seed},
        "statistics": profile.statistics,
    }
    return _complete(STATISTICS, sources)


def depth_values(profile: Profile, model: str, layers_removed: int) -> dict:
    """Every parameter of one run of depth.ipynb, but `output`."""
    sources = {
        f"models.{model}": _declared(DEPTH, profile.models[model]),
        "calibration": {"statistics": profile.statistics_of(model)},
        "layers_removed": {"layers_removed": layers_removed},
        "depth": profile.depth,
    }
    return _complete(DEPTH, sources)


def selection_values(profile: Profile, model: str, seed: int, name: str) -> dict:
    """Every parameter of one run of selection.ipynb, but `output`."""
    sources = {
        f"models.{model}": _declared(SELECTION, profile.models[model]),
        "calibration_seeds": {"seed": seed},
        f"selection.{name}": profile.selection[name] or {},
    }
    return _complete(SELECTION, sources)


def blocks_values(profile: Profile, model: str, name: str) -> dict:
    """Every parameter of one run of blocks.ipynb, but `output`."""
    sources = {
        f"models.{model}": _declared(BLOCKS, profile.models[model]),
        "calibration": {"statistics": profile.statistics_of(model)},
        f"blocks.{name}": profile.blocks[name] or {},
    }
    return _complete(BLOCKS, sources)


def slicing_values(profile: Profile, model: str, name: str) -> dict:
    """Every parameter of one run of slicing.ipynb, but `output`."""
    entry = {key: value for key, value in (profile.slicing[name] or {}).items() if key != "models"}
    sources = {
        f"models.{model}": _declared(SLICING, profile.models[model]),
        "calibration": {"statistics": profile.statistics_of(model)},
        f"slicing.{name}": entry,
    }
    return _complete(SLICING, sources)


def tasks_values(profile: Profile, model: str, name: str) -> dict:
    """Every parameter of one run of tasks.ipynb, but `output`."""
    sources = {
        f"models.{model}": _declared(TASKS, profile.models[model]),
        f"tasks.{name}": {**profile.tasks[name], "choices": profile.choices_of("tasks", model, name)},
    }
    return _complete(TASKS, sources)


def optimum_values(profile: Profile, model: str, name: str) -> dict:
    """Every parameter of one run of optimum.ipynb, but `output`."""
    sources = {
        f"models.{model}": _declared(OPTIMUM, profile.models[model]),
        f"optimum.{name}": profile.optimum[name] or {},
    }
    return _complete(OPTIMUM, sources)


def healing_values(profile: Profile, model: str, name: str) -> dict:
    """Every parameter of one run of healing.ipynb, but `output`."""
    entry = {key: value for key, value in profile.healing[name].items() if key != "models"}
    sources = {
        f"models.{model}": _declared(HEALING, profile.models[model]),
        f"healing.{name}": {**entry, "choices": profile.choices_of("healing", model, name)},
    }
    return _complete(HEALING, sources)


def duplicates_values(profile: Profile, model: str, name: str) -> dict:
    """Every parameter of one run of duplicates.ipynb, but `output`."""
    entry = {key: value for key, value in (profile.duplicates[name] or {}).items() if key != "models"}
    sources = {
        f"models.{model}": _declared(DUPLICATES, profile.models[model]),
        f"duplicates.{name}": entry,
    }
    return _complete(DUPLICATES, sources)


VALUES = {
    "blocks": blocks_values,
    "slicing": slicing_values,
    "tasks": tasks_values,
    "optimum": optimum_values,
    "healing": healing_values,
    "duplicates": duplicates_values,
}
"""Experiments with a run for every model and entry → the parameters of one of these runs."""


def chapter_values(profile: Profile, chapter: str) -> dict:
    """Every parameter of one chapter, but `output`. The places of tables and figures are those of the profile."""
    notebook = chapter_notebook(chapter)
    places = {"results": profile.results, "figures": profile.figures}
    places |= {experiment: profile.table(experiment) for experiment in OWN_TABLE if getattr(profile, experiment)}
    sources = {"profile": _declared(notebook, places), f"chapters.{chapter}": profile.chapters[chapter] or {}}
    return _complete(notebook, sources)


def chapter_notebook(chapter: str) -> str:
    return f"{NOTEBOOKS}/{chapter}.ipynb"


def arguments(values: Mapping[str, object]) -> str:
    """`name=value …` for a shell, in the form that the runner reads back to the same values."""
    return " ".join(shlex.quote(f"{name}={_text(value)}") for name, value in values.items())


def figure_stems(notebook: str) -> list[str]:
    """Stems of the figures and tables that a chapter draws: the names in backticks in its headings.

    `## Figure 4a: alpha, MSSD (`simdiff_fig4a_alpha_mssd`)` names one; other words in backticks are not of that form.
    """
    found = []
    for cell in json.loads(at_root(notebook).read_text(encoding="utf-8"))["cells"]:
        if cell["cell_type"] == "markdown":
            for line in "".join(cell["source"]).splitlines():
                if line.startswith("#"):
                    found += [name for name in re.findall(r"`([^`]+)`", line) if STEM.fullmatch(name)]
    return list(dict.fromkeys(found))


def figure_suffixes(stem: str) -> tuple[str, ...]:
    """A picture is png, pdf, the plotted numbers and their provenance; a table has no picture."""
    return (".csv", ".json") if re.match(r"[a-z0-9_]*_table", stem) else (".png", ".pdf", ".csv", ".json")


@functools.cache
def _known(notebook: str) -> dict[str, Parameter]:
    if not at_root(notebook).is_file():
        raise ProfileError(f"there is no notebook {notebook}")
    return parameters(at_root(notebook))


def _declared(notebook: str, entry: Mapping | None) -> dict:
    """The part of an entry shared by several notebooks that this one has parameters for."""
    return {name: value for name, value in (entry or {}).items() if name in _known(notebook)}


def _complete(notebook: str, sources: Mapping[str, Mapping]) -> dict:
    """The values of all sources, checked against the parameters cell: none unknown, none twice, none left out."""
    known = {name: parameter for name, parameter in _known(notebook).items() if name != "output"}
    values: dict[str, object] = {}
    for place, entry in sources.items():
        _refuse_unknown(entry, known, place, notebook)
        for name, value in entry.items():
            if name in values:
                raise ProfileError(f"{place}.{name} sets a parameter of {notebook} that the profile has set already")
            try:
                # YAML reads 1e-3 as text, hence the runner's own reading of texts.
                values[name] = known[name].parse(value) if isinstance(value, str) else known[name].check(value)
            except ParameterError as error:
                raise ProfileError(f"{place}: {error}") from None
    left_out = [name for name in known if name not in values]
    if left_out:
        raise ProfileError(f"the profile sets no `{left_out[0]}`, a parameter of {notebook}; batches do not run on defaults")
    return values


def _refuse_unknown(entry: Mapping, known: Sequence[str] | Mapping, place: str, notebook: str) -> None:
    for name in entry:
        if name not in known:
            raise ProfileError(f"{place}.{name} is not a parameter of {notebook}{closest(str(name), known)}")


def _text(value: object) -> str:
    return json.dumps(value) if isinstance(value, list) else str(value)
