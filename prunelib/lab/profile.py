"""A profile (one YAML file of `profiles/`) → the runs it asks for, each with every parameter of its notebook.

A profile is checked before the first run: an unknown key, a value of the wrong type and a parameter that the profile leaves to
the notebook's default are errors.
"""

import functools
import json
import re
import shlex
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import MISSING, dataclass, field, fields

from prunelib.io import at_root
from prunelib.lab.run_notebook import Parameter, ParameterError, closest, parameters

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9.-]*(_[A-Za-z0-9.-]+)*")  # names of run files join these with `__`
EXPERIMENTS = ("statistics", "selection", "blocks", "slicing", "tasks", "optimum", "healing", "duplicates", "speed")
EXPERIMENTS += ("combining",)
"""Every experiment by its key in a profile: the name of its notebook, its rule, its table and the folder of its runs."""
READ_STATISTICS = ("selection", "blocks", "slicing")  # all of the model, as the parameter `statistics`
READ_CHOICES = ("tasks", "healing", "combining")  # sets of layers of a run of selection or blocks, the parameter `choices`
WRITE_ARRAYS = ("statistics", "optimum")  # a .safetensors beside the run file


class ProfileError(ValueError):
    """A profile that does not say what to run, or says something that nothing reads."""


@dataclass(frozen=True)
class Run:
    """One run. part: its entry in the profile. inputs: files of other runs. values: every parameter, but `output`."""

    path: str
    model: str
    part: str | None
    inputs: dict[str, list[str]]
    values: dict[str, object]


@dataclass(frozen=True)
class Profile:
    """The keys of a profile; those without a default must be there.

    runs, tables, figures: folders of the run files, the tables (`<experiment>.csv`) and the figures.
    models: short name → {model: path or hub name, dtype, device, batch_size, …}; parameters of the experiment notebooks.
    calibration, calibration_seeds: short name → {corpus (that name by default), split, n_samples, …}, of statistics.ipynb.
    statistics: its remaining parameters. selection, blocks, …: name → {models (all unless given), parameters of that notebook}.
        In those that start from choices, `choices` is a name below `selection` or `blocks`.
    chapters: notebook stem → its parameters besides tables, `figures` and `output`.
    figure_rules: whether every figure is a rule of its own; else its chapter draws it, in one process for all.
    threads, retries, resources: of every run (`resources: {gpu: 1}` where a scheduler counts them; drawing takes no GPU).
    """

    runs: str
    tables: str
    figures: str
    models: dict
    chapters: dict
    calibration: dict = field(default_factory=dict)
    calibration_seeds: list = field(default_factory=list)
    statistics: dict = field(default_factory=dict)
    selection: dict = field(default_factory=dict)
    blocks: dict = field(default_factory=dict)
    slicing: dict = field(default_factory=dict)
    tasks: dict = field(default_factory=dict)
    optimum: dict = field(default_factory=dict)
    healing: dict = field(default_factory=dict)
    duplicates: dict = field(default_factory=dict)
    speed: dict = field(default_factory=dict)
    combining: dict = field(default_factory=dict)
    figure_rules: bool = True
    threads: int = 1
    retries: int = 0
    resources: dict = field(default_factory=dict)

    def __post_init__(self) -> None:
        for key in ("models", "calibration", "chapters", *EXPERIMENTS[1:]):
            for name, entry in getattr(self, key).items():
                if key != "chapters" and not NAME.fullmatch(str(name)):
                    raise ProfileError(f"{key}: `{name}` cannot be part of a file name: letters, digits, `.`, `-`, single `_`")
                if not isinstance(entry, dict):
                    raise ProfileError(f"{key}.{name} must be a mapping of parameters, not {entry!r}")
        seeds = self.calibration_seeds
        if not all(type(seed) is int and seed >= 0 for seed in seeds) or len(set(seeds)) < len(seeds):
            raise ProfileError(f"calibration_seeds must be different whole numbers from 0 on, not {seeds!r}")
        if self.threads < 1 or self.retries < 0:
            raise ProfileError(f"threads = {self.threads!r} or retries = {self.retries!r} is too small")
        if both := self.selection.keys() & self.blocks.keys():
            raise ProfileError(f"`{min(both)}` is in both selection and blocks: `choices` could not say which of them it means")

    @functools.cached_property
    def experiments(self) -> dict[str, list[Run]]:
        """The experiments of this profile, each with its runs. Raises ProfileError naming the entry and the parameter."""
        found = {experiment: list(self._runs(experiment)) for experiment in EXPERIMENTS}
        return {experiment: runs for experiment, runs in found.items() if runs}

    def run(self, experiment: str, *names: str, suffix: str = ".json") -> str:
        """A file of an experiment, `<runs>/<experiment>/<model>__<part>.json`."""
        return f"{self.runs}/{experiment}/{'__'.join(names)}{suffix}"

    def table(self, experiment: str) -> str:
        """The table of all runs of an experiment."""
        return f"{self.tables}/{experiment}.csv"

    def outputs(self, experiment: str) -> dict[str, str]:
        """Files that a run of an experiment writes; `{run}` stands for the stem of its run file."""
        suffixes = {"run": ".json", "arrays": ".safetensors"} if experiment in WRITE_ARRAYS else {"run": ".json"}
        return {name: self.run(experiment, "{run}", suffix=suffix) for name, suffix in suffixes.items()}

    def _runs(self, experiment: str) -> Iterator[Run]:
        notebook = experiment_notebook(experiment)
        if experiment == "statistics":
            for model in self.models:
                for corpus, entry in self.calibration.items():
                    for seed in self.calibration_seeds:
                        point = {f"calibration.{corpus}": {"corpus": corpus, **entry}, "calibration_seeds": {"seed": seed}}
                        values = _complete(notebook, self._of_model(model, notebook) | point | {"statistics": self.statistics})
                        yield Run(self.run(experiment, model, corpus, f"s{seed}"), model, None, {}, values)
            return
        for part, entry in getattr(self, experiment).items():
            for model in self._models(experiment, part):
                inputs, given = {}, {key: value for key, value in entry.items() if key != "models"}
                if experiment in READ_STATISTICS:
                    names = [(model, corpus, f"s{seed}") for corpus in self.calibration for seed in self.calibration_seeds]
                    inputs["statistics"] = given["statistics"] = [self.run("statistics", *name) for name in names]
                    inputs["arrays"] = [self.run("statistics", *name, suffix=".safetensors") for name in names]
                if experiment in READ_CHOICES:
                    given["choices"] = self._choices(experiment, part, model)
                    inputs["choices"] = [given["choices"]]
                values = _complete(notebook, self._of_model(model, notebook) | {f"{experiment}.{part}": given})
                yield Run(self.run(experiment, model, part), model, part, inputs, values)

    def _models(self, experiment: str, part: str) -> list[str]:
        """The models that an entry is for."""
        models = getattr(self, experiment)[part].get("models", list(self.models))
        for model in models:
            if model not in self.models:
                raise ProfileError(f"{experiment}.{part}.models: there is no `{model}`{closest(str(model), self.models)}")
        return models

    def _of_model(self, model: str, notebook: str) -> dict[str, dict]:
        """The part of a model's entry that a notebook has parameters for."""
        return {f"models.{model}": {name: value for name, value in self.models[model].items() if name in _known(notebook)}}

    def _choices(self, experiment: str, part: str, model: str) -> str:
        """The run file that a run takes its sets of layers from."""
        source = getattr(self, experiment)[part].get("choices")
        chooser = "blocks" if source in self.blocks else "selection"
        if source not in getattr(self, chooser):
            known = ", ".join((*self.selection, *self.blocks)) or "none"
            raise ProfileError(f"{experiment}.{part}.choices must name an entry of selection or blocks; there are: {known}")
        if model not in self._models(chooser, source):
            raise ProfileError(f"{experiment}.{part}.choices: `{source}` is not run for the model `{model}`")
        return self.run(chooser, model, source)


def read(config: Mapping) -> Profile:
    """A checked profile from the mapping of a YAML file. Raises ProfileError naming the key.

    Besides the keys this looks at every parameter of every run, so that nothing is found out after hours.
    """
    kinds = {item.name: item for item in fields(Profile)}
    for key, value in config.items():
        if key not in kinds:
            raise ProfileError(f"unknown key `{key}` in the profile{closest(key, kinds)}")
        if type(value) is not kinds[key].type:  # true is no whole number
            raise ProfileError(f"`{key}` in the profile must be a {kinds[key].type.__name__}, not {value!r}")
    for key, item in kinds.items():
        if key not in config and item.default is MISSING and item.default_factory is MISSING:
            raise ProfileError(f"the profile has no `{key}`")
    profile = Profile(**config)
    used = [name for name in EXPERIMENTS if name == "statistics" or getattr(profile, name)]
    known = {name for experiment in used for name in _known(experiment_notebook(experiment))}
    for name, entry in profile.models.items():
        _refuse_unknown(entry, known, f"models.{name}", "the experiments that the profile runs")
    for chapter in profile.chapters:
        chapter_values(profile, chapter)
    _ = profile.experiments  # looks at every parameter of every run
    return profile


def chapter_values(profile: Profile, chapter: str) -> dict:
    """Every parameter of one chapter, but `output`. The places of tables and figures are those of the profile."""
    notebook = chapter_notebook(chapter)
    places = {"figures": profile.figures, **{experiment: profile.table(experiment) for experiment in profile.experiments}}
    known = {name: place for name, place in places.items() if name in _known(notebook)}
    return _complete(notebook, {"profile": known, f"chapters.{chapter}": profile.chapters[chapter]})


def experiment_notebook(experiment: str) -> str:
    return f"notebooks/experiments/{experiment}.ipynb"


def chapter_notebook(chapter: str) -> str:
    return f"notebooks/{chapter}.ipynb"


def arguments(values: Mapping[str, object]) -> str:
    """`name=value …` for a shell, in the form that the runner reads back to the same values."""
    texts = {
        name: json.dumps(value, ensure_ascii=False) if isinstance(value, list) else value for name, value in values.items()
    }
    return " ".join(shlex.quote(f"{name}={text}") for name, text in texts.items())


@functools.cache
def _known(notebook: str) -> dict[str, Parameter]:
    if not at_root(notebook).is_file():
        raise ProfileError(f"there is no notebook {notebook}")
    return {name: parameter for name, parameter in parameters(at_root(notebook)).items() if name != "output"}


def _complete(notebook: str, sources: Mapping[str, Mapping]) -> dict:
    """The values of all sources, checked against the parameters cell: none unknown, none twice, none left out."""
    known, values = _known(notebook), {}
    for place, entry in sources.items():
        _refuse_unknown(entry, known, place, notebook)
        for name, value in entry.items():
            if name in values:
                raise ProfileError(f"{place}.{name} sets a parameter of {notebook} that the profile has set already")
            try:
                values[name] = known[name].parse(value)  # YAML reads 1e-3 as text, hence the runner's own reading
            except ParameterError as error:
                raise ProfileError(f"{place}: {error}") from None
    for name in known:
        if name not in values:
            raise ProfileError(f"the profile sets no `{name}`, a parameter of {notebook}; batches do not run on defaults")
    return values


def _refuse_unknown(entry: Mapping, known: Iterable[str], place: str, notebook: str) -> None:
    for name in entry:
        if name not in known:
            raise ProfileError(f"{place}.{name} is not a parameter of {notebook}{closest(str(name), known)}")
