"""A profile (one YAML file of `profiles/`) → the runs it asks for, each with every parameter of its notebook.

For the Snakefile; nothing here needs more than the standard library. A profile is checked before the first run: an unknown
key, a value of the wrong type and a parameter that the profile leaves to the notebook's default are errors.
"""

import functools
import itertools
import json
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from pathlib import PurePosixPath

from prunelib.io import at_root
from prunelib.lab.run_notebook import Parameter, ParameterError, closest, parameters

NOTEBOOKS = "notebooks"
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9.-]*(_[A-Za-z0-9.-]+)*")  # file names join these with `__`
STEM = re.compile(r"own_[a-z0-9_]+|[a-z][a-z0-9_]*_(?:fig|table)[a-z0-9]+_[a-z0-9_]+")

AXES = {"model": "{}", "corpus": "{}", "seed": "s{}", "layers_removed": "k{}", "part": "{}"}
"""Axes of a grid → how they stand in the name of a run file. `part` is an entry of the profile below the experiment."""


class ProfileError(ValueError):
    """A profile that does not say what to run, or says something that nothing reads."""


@dataclass(frozen=True)
class Experiment:
    """A notebook of `notebooks/experiments/` as a batch runs it.

    axes: those of its runs besides the model.
    statistics: whether a run reads all statistics of its model, as the parameter `statistics`.
    choices: whether a run goes on from the sets of layers in a run of selection or blocks, the parameter `choices`.
    arrays: whether a run writes a .safetensors beside its run file.
    """

    axes: tuple[str, ...] = ("part",)
    statistics: bool = False
    choices: bool = False
    arrays: bool = False


EXPERIMENTS = {
    "statistics": Experiment(axes=("corpus", "seed"), arrays=True),
    "depth": Experiment(axes=("layers_removed",), statistics=True),
    "selection": Experiment(axes=("seed", "part")),
    "blocks": Experiment(statistics=True),
    "slicing": Experiment(statistics=True),
    "tasks": Experiment(choices=True),
    "optimum": Experiment(arrays=True),
    "healing": Experiment(choices=True),
    "duplicates": Experiment(),
    "speed": Experiment(),
    "combining": Experiment(choices=True),
}
"""Every experiment by its key in a profile, which is also the name of its notebook, its rule and the folder of its runs."""

OWN_TABLE = tuple(name for name, experiment in EXPERIMENTS.items() if "part" in experiment.axes)
"""Experiments with entries in a profile; each has a table of its own beside `results`."""


@dataclass(frozen=True)
class Profile:
    """The keys of a profile; those without a default must be there.

    runs, results, figures: folder of the run files, the table (CSV), folder of the figures.
    models: short name → {model: path or hub name, dtype, device, batch_size, …}; parameters of the experiment notebooks.
    calibration: short name → {corpus (that name by default), split, data_dir, n_samples, seq_len}, of statistics.ipynb.
    calibration_seeds, layers_removed: the other two axes.
    statistics, depth: the remaining parameters of these notebooks, the same for all of their runs.
    selection, blocks, …: name → {models: for which there is a run (all unless given), parameters of that notebook}; a run for
        every model, in selection also for every calibration seed. In those that go on from choices, `choices` is a name below
        `selection` (its first seed) or `blocks`. Each has a table of its own beside `results`, such as selection.csv.
    chapters: notebook stem → its parameters besides `results`, `figures` and `output`.
    costs: data/costs.csv in the profile whose runs it holds (`prunelib.lab.costs`), made when all of them are; else empty.
    threads, retries, resources: of every run (`resources: {gpu: 1}` where a scheduler counts them; chapters take no GPU).
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
    speed: dict = field(default_factory=dict)
    combining: dict = field(default_factory=dict)
    costs: str = ""
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
        both = set(self.selection) & set(self.blocks)
        if both:
            raise ProfileError(f"`{both.pop()}` is in both selection and blocks: tasks could not say which of them they read")
        for key in OWN_TABLE:
            for name, entry in getattr(self, key).items():
                self._check_entry(key, name, entry or {})
        for key in ("threads", "retries"):
            if type(getattr(self, key)) is bool or getattr(self, key) < (key == "threads"):
                raise ProfileError(f"{key} = {getattr(self, key)!r} is too small")

    def _names(self) -> list[str]:
        """Every name that becomes part of a file name."""
        return [*self.models, *self.calibration, *(name for key in OWN_TABLE for name in getattr(self, key))]

    def _check_entry(self, experiment: str, part: str, entry: Mapping) -> None:
        for model in entry.get("models", []):
            if model not in self.models:
                raise ProfileError(
                    f"{experiment}.{part}.models: there is no `{model}` below models{closest(str(model), self.models)}"
                )
        if not EXPERIMENTS[experiment].choices:
            return
        source = entry.get("choices")
        if source not in (*self.selection, *self.blocks):
            known = ", ".join((*self.selection, *self.blocks)) or "none"
            raise ProfileError(f"{experiment}.{part}.choices must name an entry of selection or blocks; there are: {known}")
        there = self.models_of(self._chooser(source), source)
        missing = [model for model in self.models_of(experiment, part) if model not in there]
        if missing:
            raise ProfileError(f"{experiment}.{part}.choices: `{source}` is not run for the model `{missing[0]}`")

    @property
    def experiments(self) -> list[str]:
        """The experiments that this profile runs."""
        return [name for name in EXPERIMENTS if name not in OWN_TABLE or getattr(self, name)]

    def run(self, experiment: str, suffix: str = ".json", **point: object) -> str:
        """The run file of an experiment at a point: the model and a value of each of its axes."""
        name = "__".join(AXES[axis].format(point[axis]) for axis in ("model", *EXPERIMENTS[experiment].axes))
        return f"{self.runs}/{experiment}/{name}{suffix}"

    def pattern(self, experiment: str, suffix: str = ".json") -> str:
        """`run` at every point, with the axes as wildcards of Snakemake."""
        return self.run(experiment, suffix, **{axis: f"{{{axis}}}" for axis in AXES})

    def outputs(self, experiment: str) -> dict[str, str]:
        """Patterns of the files that a run of an experiment writes."""
        arrays = {"arrays": self.pattern(experiment, ".safetensors")} if EXPERIMENTS[experiment].arrays else {}
        return {"run": self.pattern(experiment), **arrays}

    def inputs(self, experiment: str, **point: object) -> dict[str, list[str]]:
        """Files of other runs that a run of an experiment reads."""
        found = {}
        if EXPERIMENTS[experiment].statistics:
            found["statistics"] = self.statistics_of(point["model"])
            found["arrays"] = self.statistics_of(point["model"], ".safetensors")
        if EXPERIMENTS[experiment].choices:
            found["choices"] = [self.choices_of(experiment, point["model"], point["part"])]
        return found

    def points(self, experiment: str) -> list[dict[str, object]]:
        """Where an experiment is run: model and a value of each axis."""
        known = {
            "corpus": list(self.calibration),
            "seed": self.calibration_seeds,
            "layers_removed": self.layers_removed,
            "part": list(getattr(self, experiment)),
        }
        axes = EXPERIMENTS[experiment].axes
        every = itertools.product(self.models, *(known[axis] for axis in axes))
        found = [dict(zip(("model", *axes), point, strict=True)) for point in every]
        return [point for point in found if "part" not in point or point["model"] in self.models_of(experiment, point["part"])]

    def runs_of(self, experiment: str) -> list[str]:
        """All run files of an experiment."""
        return [self.run(experiment, **point) for point in self.points(experiment)]

    def models_of(self, experiment: str, part: str) -> list[str]:
        """The models that an entry is for."""
        return list((getattr(self, experiment)[part] or {}).get("models", self.models))

    def _chooser(self, part: str) -> str:
        """The experiment that an entry named by `choices` belongs to."""
        return "blocks" if part in self.blocks else "selection"

    def choices_of(self, experiment: str, model: str, part: str) -> str:
        """The run file that a run takes its sets of layers from: of a selection, that of the first seed."""
        source = getattr(self, experiment)[part]["choices"]
        return self.run(self._chooser(source), model=model, seed=next(iter(self.calibration_seeds), 0), part=source)

    def table(self, experiment: str) -> str:
        """Where the table of one of these experiments lies."""
        return str(PurePosixPath(self.results).with_name(f"{experiment}.csv"))

    @property
    def tables(self) -> dict[str, list[str]]:
        """The tables this profile makes → the run files each is made of."""
        own = {self.table(experiment): self.runs_of(experiment) for experiment in OWN_TABLE}
        common = [run for experiment in EXPERIMENTS if experiment not in OWN_TABLE for run in self.runs_of(experiment)]
        return {table: runs for table, runs in {self.results: common, **own}.items() if runs}

    @property
    def resources_without_gpu(self) -> dict[str, object]:
        """What a chapter asks for: it draws."""
        return {name: value for name, value in self.resources.items() if name not in ("gpu", "gpu_model", "gres")}

    def chapter_run(self, chapter: str, suffix: str = ".json") -> str:
        return f"{self.runs}/chapters/{chapter}{suffix}"

    def statistics_of(self, model: str, suffix: str = ".json") -> list[str]:
        """All statistics of one model."""
        return [self.run("statistics", suffix, **point) for point in self.points("statistics") if point["model"] == model]

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

    shared = [name for experiment in profile.experiments for name in _known(experiment_notebook(experiment))]
    for name, entry in profile.models.items():
        _refuse_unknown(entry or {}, shared, f"models.{name}", "the experiments that the profile runs")
    for experiment in profile.experiments:
        for point in profile.points(experiment):
            values(profile, experiment, **point)
    drawn: dict[str, str] = {}
    for chapter in profile.chapters:
        chapter_values(profile, chapter)
        for stem in figure_stems(chapter_notebook(chapter)):
            if drawn.setdefault(stem, chapter) != chapter:
                raise ProfileError(f"figure `{stem}` is in the headings of both {drawn[stem]} and {chapter}")
    return profile


def values(profile: Profile, experiment: str, *, model: str, part: str | None = None, **axes: object) -> dict:
    """Every parameter of the notebook of one run, but `output`.

    axes: the other axes of the experiment; those that are numbers may be texts, as Snakemake's wildcards are.
    """
    notebook = experiment_notebook(experiment)
    sources: dict[str, Mapping] = {f"models.{model}": _declared(notebook, profile.models[model])}
    if EXPERIMENTS[experiment].statistics:
        sources["calibration"] = {"statistics": profile.statistics_of(model)}
    if "corpus" in axes:
        corpus = axes["corpus"]
        sources[f"calibration.{corpus}"] = {"corpus": corpus, **(profile.calibration[corpus] or {})}
    if "seed" in axes:
        sources["calibration_seeds"] = {"seed": int(axes["seed"])}
    if "layers_removed" in axes:
        sources["layers_removed"] = {"layers_removed": int(axes["layers_removed"])}
    if part is None:
        sources[experiment] = getattr(profile, experiment)
    else:
        entry = {key: value for key, value in (getattr(profile, experiment)[part] or {}).items() if key != "models"}
        chosen = {"choices": profile.choices_of(experiment, model, part)} if EXPERIMENTS[experiment].choices else {}
        sources[f"{experiment}.{part}"] = {**entry, **chosen}
    return _complete(notebook, sources)


def chapter_values(profile: Profile, chapter: str) -> dict:
    """Every parameter of one chapter, but `output`. The places of tables and figures are those of the profile."""
    notebook = chapter_notebook(chapter)
    places = {"results": profile.results, "figures": profile.figures}
    places |= {experiment: profile.table(experiment) for experiment in OWN_TABLE if getattr(profile, experiment)}
    sources = {"profile": _declared(notebook, places), f"chapters.{chapter}": profile.chapters[chapter] or {}}
    return _complete(notebook, sources)


def experiment_notebook(experiment: str) -> str:
    return f"{NOTEBOOKS}/experiments/{experiment}.ipynb"


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
    return json.dumps(value, ensure_ascii=False) if isinstance(value, list) else str(value)
