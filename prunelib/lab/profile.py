"""A profile (one YAML file of `profiles/`) → the runs it asks for, each with every parameter of its notebook.

A profile is checked before the first run: an unknown key, a value of the wrong type and a parameter that the profile leaves to
the notebook's default are errors.
"""

import functools
import itertools
import json
import re
import shlex
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from prunelib.io import at_root
from prunelib.lab.parameters import Parameter, ParameterError, check_sizes, closest, parameters

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9.-]*(_[A-Za-z0-9.-]+)*")  # names of run files join these with `__`
EXPERIMENTS = ("statistics", "selection", "blocks", "slicing", "tasks", "optimum", "healing", "duplicates", "speed")
EXPERIMENTS += ("combining",)
"""Every experiment by its key in a profile: the name of its notebook, its rule, its table and the folder of its runs."""
READ_STATISTICS = ("selection", "blocks", "slicing")  # all of the model, as the parameter `statistics`
READ_CHOICES = ("tasks", "healing", "combining")  # sets of layers of a run of selection or blocks, the parameter `choices`
WRITE_ARRAYS = ("statistics", "optimum")  # a .safetensors beside the run file
REQUIRED = {"runs": str, "tables": str, "figures": str, "models": dict, "chapters": dict}
OPTIONAL = {"calibration": {}, "calibration_seeds": [], "figure_rules": True, "threads": 1, "retries": 0, "resources": {}}
OPTIONAL |= {key: {} for key in ("everywhere", *EXPERIMENTS)}


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


class Profile:
    """The keys of a profile as attributes; `REQUIRED` must be there, the others have the default of `OPTIONAL`.

    runs, tables, figures: folders of the run files, the tables (`<experiment>.csv`) and the figures.
    models: short name → {model: path or hub name, dtype, device, batch_size, …}; parameters of the experiment notebooks.
    calibration, calibration_seeds: short name → {corpus (that name by default), split, n_samples, …}, of statistics.ipynb.
    statistics: its remaining parameters. selection, blocks, …: name → {models (all unless given), parameters of that notebook}.
        In those that start from choices, `choices` is a name below `selection` or `blocks`.
    everywhere: values of these parameters in every run of an experiment that has them, whatever its entries say.
    chapters: notebook stem → its parameters besides tables, `figures` and `output`.
    figure_rules: whether every figure is a rule of its own; else its chapter draws it, in one process for all.
    threads, retries, resources: of every run (`resources: {gpu: 1}` where a scheduler counts them; drawing takes no GPU).
    """

    def __init__(self, config: Mapping) -> None:
        kinds = REQUIRED | {key: type(value) for key, value in OPTIONAL.items()}
        for key, value in config.items():
            if key not in kinds:
                raise ProfileError(f"unknown key `{key}` in the profile{closest(key, kinds)}")
            if type(value) is not kinds[key]:  # true is no whole number
                raise ProfileError(f"`{key}` in the profile must be a {kinds[key].__name__}, not {value!r}")
        if missing := REQUIRED.keys() - config:
            raise ProfileError(f"the profile has no `{min(missing)}`")
        vars(self).update(OPTIONAL | config)
        for key in ("models", "calibration", *EXPERIMENTS[1:]):
            for name, entry in getattr(self, key).items():
                if not NAME.fullmatch(str(name)):
                    raise ProfileError(f"{key}: `{name}` cannot be part of a file name: letters, digits, `.`, `-`, single `_`")
                if not isinstance(entry, dict):
                    raise ProfileError(f"{key}.{name} must be a mapping of parameters, not {entry!r}")
        seeds = self.calibration_seeds
        if not all(type(seed) is int and seed >= 0 for seed in seeds) or len(set(seeds)) < len(seeds):
            raise ProfileError(f"calibration_seeds must be different whole numbers from 0 on, not {seeds!r}")
        if self.calibration and not seeds:
            raise ProfileError("calibration_seeds is empty: the texts of `calibration` need at least one draw")
        if self.threads < 1 or self.retries < 0:
            raise ProfileError(f"threads = {self.threads!r} or retries = {self.retries!r} is too small")
        if both := self.selection.keys() & self.blocks.keys():
            raise ProfileError(f"`{min(both)}` is in both selection and blocks: `choices` could not say which of them it means")

    @functools.cached_property
    def experiments(self) -> dict[str, list[Run]]:
        """The experiments of this profile, each with its runs. Raises ProfileError naming the entry and the parameter."""
        found = {"statistics": self._statistics()} | {experiment: self._runs(experiment) for experiment in EXPERIMENTS[1:]}
        return {experiment: runs for experiment, planned in found.items() if (runs := list(planned))}

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

    def _draws(self, model: str, suffix: str = ".json") -> dict[str, tuple[str, int]]:
        """The statistics files of a model → text and seed."""
        found = itertools.product(self.calibration, self.calibration_seeds)
        return {self.run("statistics", model, corpus, f"s{seed}", suffix=suffix): (corpus, seed) for corpus, seed in found}

    def _statistics(self) -> Iterator[Run]:
        for model in self.models:
            for path, (corpus, seed) in self._draws(model).items():
                text = {f"calibration.{corpus}": {"corpus": corpus, **self.calibration[corpus]}}
                entries = text | {"calibration_seeds": {"seed": seed}, "statistics": self.statistics}
                yield Run(path, model, None, {}, self._values("statistics", model, entries))

    def _runs(self, experiment: str) -> Iterator[Run]:
        for part, entry in getattr(self, experiment).items():
            for model in self._models(experiment, part):
                inputs, given = {}, {key: value for key, value in entry.items() if key != "models"}
                if experiment in READ_STATISTICS:
                    inputs["statistics"] = given["statistics"] = list(self._draws(model))
                    inputs["arrays"] = list(self._draws(model, ".safetensors"))
                if experiment in READ_CHOICES:
                    given["choices"] = self._choices(experiment, part, model)
                    inputs["choices"] = [given["choices"]]
                values = self._values(experiment, model, {f"{experiment}.{part}": given})
                yield Run(self.run(experiment, model, part), model, part, inputs, values)

    def _models(self, experiment: str, part: str) -> list[str]:
        """The models that an entry is for."""
        models = getattr(self, experiment)[part].get("models", list(self.models))
        for model in models:
            if model not in self.models:
                raise ProfileError(f"{experiment}.{part}.models: there is no `{model}`{closest(str(model), self.models)}")
        return models

    def _values(self, experiment: str, model: str, entries: dict[str, Mapping]) -> dict:
        """Every parameter of a run: those of its entries, and for the rest those of the model's entry that its notebook has."""
        notebook = notebook_of(experiment)
        given = set().union(*entries.values())  # a part may say better than its model, such as a batch_size for short texts
        known = {name: value for name, value in self.models[model].items() if name in _known(notebook) and name not in given}
        values = _complete(notebook, {f"models.{model}": known} | entries)
        return values | {name: _known(notebook)[name].parse(self.everywhere[name]) for name in values.keys() & self.everywhere}

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
    profile = Profile(config)
    used = ["statistics", *(name for name in EXPERIMENTS[1:] if getattr(profile, name))]
    known = {name for experiment in used for name in _known(notebook_of(experiment))}
    for name, entry in profile.models.items():
        _refuse_unknown(entry, known, f"models.{name}", "the experiments that the profile runs")
    _refuse_unknown(profile.everywhere, known, "everywhere", "the experiments that the profile runs")
    _ = profile.experiments, [chapter_values(profile, chapter) for chapter in profile.chapters]
    return profile


def chapter_values(profile: Profile, chapter: str) -> dict:
    """Every parameter of one chapter, but `output`. Tables and figures: the profile's, unless its entry names others."""
    notebook = notebook_of(chapter)
    places, entry = {"figures": profile.figures, "live": profile.tables}, profile.chapters[chapter]
    places |= {experiment: profile.table(experiment) for experiment in profile.experiments}
    known = {name: place for name, place in places.items() if name in _known(notebook) and name not in entry}
    return _complete(notebook, {"profile": known, f"chapters.{chapter}": entry})


def notebook_of(name: str) -> str:
    return f"notebooks/{'experiments/' * (name in EXPERIMENTS)}{name}.ipynb"


def arguments(values: Mapping[str, object]) -> str:
    """`name=value …` for a shell, in the form that the runner reads back to the same values."""
    texts = [(name, json.dumps(value, ensure_ascii=False) if type(value) is list else value) for name, value in values.items()]
    return " ".join(shlex.quote(f"{name}={text}") for name, text in texts)


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
                values[name] = known[name].checked(value)  # YAML reads 1e-3 as text, hence the runner's own reading
            except ParameterError as error:
                raise ProfileError(f"{place}: {error}") from None
    try:
        check_sizes(Path(notebook).stem, values)
    except ParameterError as error:
        raise ProfileError(f"{', '.join(sources)}: {error}") from None
    if values.get("calibration_corpus") and not values.get("calibration_seeds", True):
        raise ProfileError(f"{', '.join(sources)}: calibration_corpus without calibration_seeds")
    if missing := known.keys() - values:
        raise ProfileError(f"the profile sets no `{min(missing)}`, a parameter of {notebook}; batches do not run on defaults")
    return values


def _refuse_unknown(entry: Mapping, known: Iterable[str], place: str, notebook: str) -> None:
    for name in entry:
        if name not in known:
            raise ProfileError(f"{place}.{name} is not a parameter of {notebook}{closest(str(name), known)}")
