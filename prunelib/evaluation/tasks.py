"""Tasks through lm-eval on a model in memory, and paired tests between two models on the same items.

lm-eval's official tasks, the YAML tasks in ``data/tasks`` and the embedded ones run with the prompts, metrics and item order of
the ``lm_eval`` command; BOS, few-shot examples and seeds are stated. Two tasks decide averages by a constant answer (BoolQ
62.2 % "yes", WSC 63.5 % "no"): every average is also given without them.
"""

import contextlib
import copy
import hashlib
import importlib.metadata
import itertools
import json
import logging
import random
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float64
from transformers import PreTrainedModel, set_seed

from prunelib.evaluation import embedded_tasks
from prunelib.evaluation.intervals import Interval, McNemar, bootstrap_draws, interval, mcnemar
from prunelib.evaluation.layer_sets import Answer, Continuation, LayerSetResults, layer_set_likelihoods
from prunelib.io import first_line, found, project_root
from prunelib.models import decoder_layers, memory
from prunelib.models.layerwise import LayerSet, check_layer_set
from prunelib.text import corpora

# A text of the corpus is scored, or the name of an answer, which small models learn later: an average of both says nothing.
EMBEDDED = ("pydocs_next_line", "pydocs_summary", "pydocs_parameter")
EMBEDDED_PROMPTS = ("pydocs_letters", "pydocs_yes_no")
# SimDiff, Tables 2, 3 and 5: plain acc, 0 shots.
ZERO_SHOT = ("boolq", "piqa", "hellaswag", "winogrande", "arc_easy", "arc_challenge", "openbookqa", "mathqa")
# SimDiff, Table 1 (there through OpenCompass); its "CoQA" is CommonsenseQA; lm-eval's `race` is the high-school part.
NLU = ("cmnli", "hellaswag", "piqa", "wsc", "commonsense_qa", "boolq", "race_middle", "race", "xsum", "c3")
TASK_SETS = {"embedded": EMBEDDED, "embedded_prompts": EMBEDDED_PROMPTS, "simdiff_zero_shot": ZERO_SHOT, "simdiff_nlu": NLU}

# Where lm-eval keeps the tasks above. An index of these folders takes a quarter of a second, of everything over ten.
OFFICIAL_FOLDERS = ("arc", "commonsense_qa", "gsm8k", "hellaswag", "lambada", "mathqa", "mmlu/default", "openbookqa", "piqa")
OFFICIAL_FOLDERS += ("race", "super_glue/boolq", "super_glue/wsc", "winogrande", "wsc273")
PROMPT_KEYS = ("doc_to_text", "doc_to_choice", "doc_to_target")  # of an absent column lm-eval would score the name
SPLIT_KEYS = ("training_split", "validation_split", "test_split", "fewshot_split")
WITHOUT = {"average": (), "average_without_wsc": ("wsc", "wsc273"), "average_without_boolq": ("boolq",)}
WITHOUT["average_without_wsc_boolq"] = ("wsc", "wsc273", "boolq")
COLUMNS = "an offline copy needs the columns of the official data set"


@dataclass(frozen=True)
class TaskResult:
    """One task on one model, item by item.

    scores: metric → one number per item: ``acc`` and ``acc_norm`` are 0 or 1, ``rouge1`` lies between, ``log_likelihood``
    (LAMBADA) is in nats; a filter of lm-eval stands behind a comma. items: their names; two of the embedded tasks may share a
    docstring. chance: expected ``acc`` of a uniform guess; None, `predicted` and `answers` (indices) empty, without choices.
    choices: the texts where every item has the same, else empty. items_sha256: over every prompt, continuation and answer.
    settings: dataset, split, shots and version, without any machine path.
    """

    task: str
    scores: Mapping[str, tuple[float, ...]] = field(repr=False)
    items: tuple[str, ...] = field(repr=False)
    chance: float | None
    predicted: tuple[int, ...] = field(repr=False)
    answers: tuple[int, ...] = field(repr=False)
    choices: tuple[str, ...]
    items_sha256: str
    settings: Mapping

    @property
    def n(self) -> int:
        return len(self.items)

    @property
    def metric(self) -> str:
        """The metric that averages are taken over: ``acc``, as SimDiff reports, or the task's first where it has none."""
        return "acc" if "acc" in self.scores else next(iter(self.scores))

    def value(self, metric: str | None = None) -> float:
        """Mean over the items."""
        return float(np.mean(self.scores[metric or self.metric]))

    def stderr(self, metric: str | None = None) -> float | None:
        """Standard error of the mean over items (ddof 1, as lm-eval's); None for one item."""
        return float(np.std(self.scores[metric or self.metric], ddof=1) / np.sqrt(self.n)) if self.n > 1 else None

    @property
    def at_chance(self) -> bool:
        """Whether a uniform guess lies within the 95 % interval of the accuracy, or above it: differences then say nothing."""
        return self.chance is not None and self.value() - 1.96 * (self.stderr() or 0) <= self.chance

    @property
    def constant_share(self) -> float | None:
        """Share of the model's most frequent answer, near 1: the score says nothing else; None where choices differ by item."""
        return max(Counter(self.predicted).values()) / self.n if self.choices else None

    @property
    def best_constant(self) -> float | None:
        """The accuracy of the best constant answer."""
        return max(Counter(self.answers).values()) / self.n if self.choices else None

    def rows(self) -> list[dict]:
        """Rows for a run file: one per metric, then chance and the two facts about constant answers."""
        found = [(metric, self.value(metric), self.stderr(metric)) for metric in self.scores]
        found += [(name, getattr(self, name), None) for name in ("chance", "best_constant", "constant_share")]
        return [
            {"task": self.task, "metric": metric, "value": value, "n": self.n} | ({} if error is None else {"stderr": error})
            for metric, value, error in found
            if value is not None
        ]


@dataclass(frozen=True)
class TaskResults:
    """Results by task, in the order asked for, and the settings they share."""

    tasks: Mapping[str, TaskResult]
    settings: Mapping

    def __getitem__(self, task: str) -> TaskResult:
        return self.tasks[task]

    def averages(self) -> dict[str, Interval]:
        """Unweighted means of the tasks' main metrics over all tasks, and without WSC, without BoolQ and without both.

        With the bootstrap interval over items, each task resampled by itself; `Interval.n` counts tasks.
        """
        found: dict[tuple[str, ...], str] = {}
        averages = {}
        for label, without in WITHOUT.items():
            kept = {name: result for name, result in self.tasks.items() if name not in without}
            if kept and found.setdefault(tuple(kept), label) == label:
                draws = [_draws(one.scores[one.metric], one.items, seed, 2000) for seed, one in enumerate(kept.values())]
                mean = float(np.mean([one.value() for one in kept.values()]))
                averages[label] = interval(mean, np.mean(draws, axis=0), len(kept))
        return averages

    def rows(self) -> list[dict]:
        """Rows for a run file: every task's, then the averages with the ends of their intervals."""
        rows = [row for result in self.tasks.values() for row in result.rows()]
        for label, average in self.averages().items():
            for name, end in ((label, "value"), (f"{label}_low", "low"), (f"{label}_high", "high")):
                rows.append({"task": "all", "metric": name, "value": getattr(average, end), "n": average.n})
        return rows


def _draws(values: Sequence[float] | np.ndarray, items: Sequence[str], seed: int, n: int) -> Float64[np.ndarray, " draw"]:
    """Bootstrap means over items; of one item it is all that can be drawn."""
    return bootstrap_draws(values, groups=items, seed=seed, n=n) if len(set(items)) > 1 else np.full(n, np.mean(values))


@dataclass(frozen=True)
class Comparison:
    """Two models on one task (``task`` "average": all of them); McNemar's test only for metrics that are right or wrong."""

    task: str
    metric: str
    n: int
    difference: Interval
    mcnemar: McNemar | None


def compare(a: TaskResults, b: TaskResults, *, seed: int = 0, n: int = 10_000) -> tuple[Comparison, ...]:
    """a − b, by its main metric, on every task that both have, then on their average (each task resampled by itself).

    Raises ValueError without a task in common, or for different items or prompts (another limit, corpus, BOS, number of shots).
    """
    shared = [name for name in a.tasks if name in b.tasks]
    if not shared or a.settings.get("bos") != b.settings.get("bos"):
        named = (f"tasks {', '.join(one.tasks)} (bos={one.settings.get('bos')})" for one in (a, b))
        raise ValueError(f"{' and '.join(named)}: a paired test needs a task in common and the same prompts")
    found, drawn = [], []
    for i, name in enumerate(shared):
        left, right = a[name], b[name]
        if left.items_sha256 != right.items_sha256:
            raise ValueError(f"task {name!r}: not on the same items and prompts ({left.n} and {right.n} items, other sha256)")
        x, y = np.array(left.scores[left.metric]), np.array(right.scores[left.metric])
        drawn.append(_draws(x - y, left.items, seed + i, n))
        difference = interval(float(np.mean(x - y)), drawn[-1], len(set(left.items)))
        test = mcnemar(x, y) if np.isin([x, y], (0, 1)).all() else None
        found.append(Comparison(name, left.metric, left.n, difference, test))
    mean = float(np.mean([one.difference.value for one in found]))
    average = interval(mean, np.mean(drawn, axis=0), sum(one.difference.n for one in found))
    return (*found, Comparison("average", "main", sum(one.n for one in found), average, None))


def task_names(task_set: str | Sequence[str]) -> tuple[str, ...]:
    """The tasks of a named set (`TASK_SETS`), or the given names as they are: any name of lm-eval's is allowed."""
    entries = [task_set] if isinstance(task_set, str) else task_set
    names = tuple(name for entry in entries for name in TASK_SETS.get(entry, (entry,)))
    twice = [name for name, count in Counter(names).items() if count > 1]
    if not names or twice:
        raise ValueError(f"tasks {task_set!r}: {f'{twice[0]} is named twice' if twice else 'name at least one'}")
    return names


def evaluate_tasks(model: PreTrainedModel, tokenizer, task_set: str | Sequence[str], **settings) -> TaskResults:
    """Run tasks through lm-eval on a model as it is in memory, pruned or not.

    Settings and errors are those of `evaluate_layer_sets`; here tasks that generate text (GSM8K, XSum) run too.
    """
    return evaluate_layer_sets(model, tokenizer, task_set, None, **settings)[()]


@memory.says_what_fits("batch_size", "a smaller dtype")
def evaluate_layer_sets(
    model: PreTrainedModel,
    tokenizer,
    task_set: str | Sequence[str],
    layer_sets: Iterable[LayerSet] | None,
    *,
    bos: bool,
    limit: int | None = None,
    num_fewshot: int | None = 0,
    batch_size: int = 16,
    seed: int = 1234,
    data_dir: str | Path | None = None,
    progress: bool = True,
) -> LayerSetResults:
    """`evaluate_tasks` on the model without each of the given sets of layers: set → `TaskResults`.

    What lm-eval asks is answered for all sets in one walk (`layer_sets.layer_set_likelihoods`). Log-likelihoods agree with
    ``evaluate_tasks(remove_layers(model, removed), …)`` to float tolerance, so an item can differ only where two choices tie.

    Args:
        task_set: a key of `TASK_SETS` or names of tasks.
        bos: whether the beginning-of-text token precedes every prompt, whatever the tokenizer does by itself; an empty prompt
            is always scored after it.
        limit: the first so many items of every task (of every subject of MMLU).
        num_fewshot: examples before every item, None for the task's own default.
        seed: of the few-shot examples and of the global generators, which are left as they were.
        data_dir: folder, below the project root, of ``<task>/<split>.jsonl`` with the official columns (``mmlu/test.jsonl``
            and ``dev.jsonl`` with a column ``subject``); None reads the hub, or its cache under ``HF_HUB_OFFLINE=1``.

    Raises ValueError for a bad argument, a damaged copy, few-shot examples from the evaluated items themselves, and a task that
    does not compare likelihoods of given texts; FileNotFoundError where a copy is absent; RuntimeError where the hub is.
    """
    names, sets = task_names(task_set), None if layer_sets is None else list(dict.fromkeys(map(tuple, layer_sets)))
    for removed in sets or ():
        check_layer_set(len(decoder_layers(model)), removed)
    for name, value, least in (("limit", limit, 1), ("batch_size", batch_size, 1), ("num_fewshot", num_fewshot, 0)):
        if value is not None and value < least:
            raise ValueError(f"{name}={value}: from {least}")
    if data_dir is not None and not (data_dir := found(data_dir)).is_dir():
        raise FileNotFoundError(f"data_dir={str(data_dir)!r} is no folder")
    with _seeded(seed):
        loaded, leaves, sources = _loaded(names, data_dir, num_fewshot)
        for name, task in loaded["tasks"].items():
            if sets is not None and task.OUTPUT_TYPE not in ("multiple_choice", "loglikelihood"):
                remedy = "take evaluate_tasks(remove_layers(model, removed), …)"
                raise ValueError(f"task {name!r} asks for {task.OUTPUT_TYPE}, layer sets share likelihoods only: {remedy}")
            _check_items(name, task, limit)
        lm = _language_model(model, tokenizer, [()] if sets is None else sets, bos, batch_size, progress)
        results = {removed: _run(lm, removed, loaded, leaves, sources, limit, seed) for removed in lm.sets}
    shared = {
        "lm_eval": importlib.metadata.version("lm_eval"),
        "bos": bos,
        "limit": limit,
        "num_fewshot": "task default" if num_fewshot is None else num_fewshot,
        "seeds": dict.fromkeys(("random", "numpy", "torch", "fewshot"), seed),
        "batch_size": batch_size,
        "dtype": str(model.dtype).removeprefix("torch."),
        "max_length": lm.max_length,
        "truncated_requests": lm.truncated,
    }
    cost = (0, 0) if lm.answers is None else (lm.answers.layer_forwards, lm.answers.layer_forwards_alone)
    return LayerSetResults({removed: TaskResults(result, shared) for removed, result in results.items()}, *cost)


def _run(lm, removed: LayerSet, loaded: dict, leaves: Mapping, sources: Mapping, limit: int | None, seed: int) -> dict:
    """Results by task of one set."""
    from lm_eval import evaluator

    lm.removed = removed
    for task in loaded["tasks"].values():
        task.set_fewshot_seed(seed=seed)  # the same examples for every set
    try:
        output = evaluator.evaluate(lm=lm, task_dict=loaded, limit=limit, bootstrap_iters=0, log_samples=True)
    except AssertionError as error:  # such as no room for what is to be generated
        raise ValueError(f"tasks {', '.join(leaves)}: {first_line(error)}") from error
    parts = {leaf: _result(leaf, task, output["samples"][leaf], sources[leaf]) for leaf, task in loaded["tasks"].items()}
    return {name: _merged(name, [parts[leaf] for leaf in members]) for name, members in leaves.items()}


def _language_model(model: PreTrainedModel, tokenizer, sets: Sequence[LayerSet], bos: bool, batch_size: int, progress: bool):
    from lm_eval.models.huggingface import HFLM

    class InMemory(HFLM):
        """HFLM that answers for the model without the layers ``removed``: the first questions are answered for all sets.

        Of requests that read the same tokens and score more or fewer of them, lm-eval 0.4 scores the shorter at the wrong
        positions; `layer_set_likelihoods` does not.
        """

        removed: LayerSet = ()
        answers: LayerSetResults | None = None
        truncated = 0

        def loglikelihood(self, requests, disable_tqdm=False) -> list[Answer]:
            if self.answers is None:
                super().loglikelihood(requests, disable_tqdm=True)
                self.answers = self.latest
            return self.answers[self.removed]

        def _loglikelihood_tokens(self, requests, disable_tqdm=False, override_bs=None) -> list[Answer]:
            texts = [(context + continuation, continuation) for _, context, continuation in requests]
            self.truncated += sum(len(text) > self.max_length + 1 for text, _ in texts)
            longest = max((scored for _, scored in texts), key=len, default=[])
            if len(longest) > self.max_length:
                answer = f"{self.tok_decode(longest)[:40]}…"
                raise ValueError(f"the answer {answer!r} has {len(longest)} tokens, the model reads {self.max_length}")
            asked = [Continuation(tuple(text[-(self.max_length + 1) : -1]), tuple(scored)) for text, scored in texts]
            self.latest = layer_set_likelihoods(self.model, asked, sets, batch_size=batch_size, progress=progress)
            return self.latest[self.removed]

        def tok_batch_encode(self, strings, *arguments, left_truncate_len=None, **options):  # of texts to be continued
            ids, mask = super().tok_batch_encode(strings, *arguments, **options)
            room = left_truncate_len or ids.shape[1]
            self.truncated += int((mask.sum(dim=1) > room).sum())
            return ids[:, -room:], mask[:, -room:]

        def generate_until(self, requests, disable_tqdm=False):
            return super().generate_until(requests, disable_tqdm=disable_tqdm or not progress)

    # A copy of the tokenizer: lm-eval gives it a pad token and turns its padding side around.
    copied = _with_bos(tokenizer) if bos else copy.deepcopy(tokenizer)
    positions = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    options = {} if positions is None else {"max_length": positions}  # lm-eval looks for it beside the text's configuration
    lm = InMemory(pretrained=model, tokenizer=copied, batch_size=batch_size, add_bos_token=bos, **options)
    lm.sets = list(sets)
    return lm


def _with_bos(tokenizer):
    """A copy that puts the BOS token before a text: some tokenizers never do by themselves."""
    from tokenizers.processors import TemplateProcessing

    first, copied = tokenizer.bos_token, copy.deepcopy(tokenizer)
    if first is not None and getattr(copied, "backend_tokenizer", None) is not None:
        template = TemplateProcessing(single=[first, "$A"], special_tokens=[(first, tokenizer.bos_token_id)])
        copied.backend_tokenizer.post_processor = template
    if copied("a").input_ids != [tokenizer.bos_token_id, *tokenizer("a", add_special_tokens=False).input_ids]:
        raise ValueError(f"bos=True, but {type(tokenizer).__name__} puts no BOS token before a text: take bos=False")
    return copied


@contextlib.contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Seed the global generators that lm-eval draws from, and put them back; keep it from warning of our settings."""
    from lm_eval.utils import env

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    python, array = random.getstate(), np.random.get_state()  # noqa: NPY002
    env.from_string = lru_cache(env.from_string)  # it would compile the prompt of a task for every item of every set
    try:
        with torch.random.fork_rng():
            set_seed(seed)
            yield
    finally:
        del env.from_string
        random.setstate(python)
        np.random.set_state(array)  # noqa: NPY002


@lru_cache(maxsize=2)
def task_manager(*, everything: bool = False):
    """lm-eval's index of the task sets above and data/tasks; of everything that lm-eval knows it takes over ten seconds."""
    import lm_eval.tasks

    official = [] if everything else [Path(lm_eval.tasks.__file__).parent / name for name in OFFICIAL_FOLDERS]
    return lm_eval.tasks.TaskManager(include_defaults=everything, include_path=[*official, project_root() / "data" / "tasks"])


def leaf_tasks(name: str, index: Mapping) -> tuple[str, ...]:
    """The tasks below a group or a tag (the 57 subjects of MMLU); a task is its own leaf."""
    entry = index[name]
    if entry.kind.name == "TAG":
        return tuple(sorted(entry.tags))
    if entry.kind.name != "GROUP":
        return (name,)
    members = [member if isinstance(member, str) else member.get("task") or member.get("group") for member in entry.cfg["task"]]
    return tuple(leaf for member in members for leaf in leaf_tasks(member, index))


def _loaded(
    names: Sequence[str], data_dir: Path | None, num_fewshot: int | None
) -> tuple[dict, dict[str, tuple[str, ...]], dict[str, str]]:
    """lm-eval's task objects; name → its leaf tasks; where every leaf's items come from, in words."""
    manager = task_manager()
    if not set(names) <= set(manager.task_index):
        manager = task_manager(everything=True)
    for name in names:
        if name not in manager.task_index:
            raise ValueError(f"unknown task {name!r}: neither a set ({', '.join(TASK_SETS)}) nor a task of lm-eval's")
    leaves = {name: leaf_tasks(name, manager.task_index) for name in names}
    specs, sources = [], {}
    for name, leaf in ((name, leaf) for name, members in leaves.items() for leaf in members):
        config = manager.task_index[leaf].cfg
        if leaf in embedded_tasks.BUILDERS:
            override, sources[leaf] = _embedded(leaf, fewshot=bool(num_fewshot)), "pydocs/evaluation"
        elif data_dir is not None:
            override, sources[leaf] = _local(name, leaf, config, data_dir), "offline copy"
        else:
            override, sources[leaf] = {}, "/".join(filter(None, (config.get("dataset_path"), config.get("dataset_name"))))
        specs.append({"task": leaf, **override})
    what = f"the data of {', '.join(names)}"
    remedy = "give data_dir, a folder with <task>/<split>.jsonl, or take the tasks 'embedded'."
    if any("custom_dataset" not in spec for spec in specs):
        corpora.require_hub(what, remedy)
    try:
        # Only members of an inline group are merged with the official configuration.
        loaded = manager.load([{"group": "prunelib", "task": specs}])
    except KeyError as error:  # lm-eval tries its prompts on the first item
        raise ValueError(f"{what}: a record lacks {error}; {COLUMNS}") from error
    except OSError as error:
        raise RuntimeError(f"{what} could not be read ({type(error).__name__}: {first_line(error)}): {remedy}") from error
    for task in loaded["tasks"].values():
        if num_fewshot is not None or task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=num_fewshot or 0)
        _check_fewshot(task)
        # lm-eval prepares all items whenever it looks at them: the ten thousand of HellaSwag several times for every set.
        task.validation_docs, task.test_docs = lru_cache(task.validation_docs), lru_cache(task.test_docs)
    return loaded, leaves, sources


def _embedded(task: str, *, fewshot: bool) -> dict:
    """What to override of an embedded task."""
    import datasets

    splits = {"test": "evaluation"} | ({"fewshot": "calibration"} if fewshot else {})
    found = {name: embedded_tasks.items(task, split) for name, split in splits.items()}
    read = {name: datasets.Dataset.from_list(list(map(asdict, items))) for name, items in found.items()}
    # lm-eval reads the examples even for 0 shots.
    return {"custom_dataset": lambda **_: read, **({} if fewshot else {"fewshot_split": None})}


def _local(name: str, leaf: str, config: Mapping, data_dir: Path) -> dict:
    """Overrides that make an official task read ``<data_dir>/<task>/<split>.jsonl``."""
    import datasets
    from jinja2 import meta
    from lm_eval.utils import env

    folder = data_dir / (leaf if (data_dir / leaf).is_dir() else name)
    wanted = {key: config[key] for key in SPLIT_KEYS if config.get(key)}
    files = {split: folder / f"{split}.jsonl" for split in dict.fromkeys(wanted.values())}
    evaluated = wanted.get("test_split") or wanted.get("validation_split")
    if evaluated is None or not files[evaluated].is_file():
        raise FileNotFoundError(f"task {leaf!r}: {folder.name}/{evaluated}.jsonl is not in data_dir={str(data_dir)!r}")
    subject, read = config.get("dataset_name") if folder.name != leaf else None, {}
    texts = [text for key in PROMPT_KEYS if isinstance(text := config.get(key), str)]
    named = [{text} if text.isidentifier() else meta.find_undeclared_variables(env.parse(text)) for text in texts]
    columns = None if config.get("process_docs") else set().union(*named)  # it makes columns of its own
    for split, path in files.items():
        if path.is_file():
            records = _records(path, path.stat().st_mtime_ns)
            rows = {where: row for where, row in records if subject in (None, row.get("subject"))}
            if not rows:
                raise ValueError(f"{path} holds no record" + (f" whose subject is {subject!r}" if subject else ""))
            _check_columns(leaf, rows, columns)
            read[split] = datasets.Dataset.from_list([*rows.values()])
    # lm-eval reads the few-shot pool even for 0 shots: a split without a file must not be configured.
    unread = {key: None for key, split in wanted.items() if split not in read}
    return {"custom_dataset": lambda **_: read, "dataset_kwargs": None, **unread}


def _check_columns(leaf: str, rows: Mapping[str, Mapping], columns: set[str] | None) -> None:
    """Raise ValueError naming the first record, by its place, that lacks one of `columns` (None: of the first record's), or
    holds another type than the others: lm-eval would score the text "None"."""
    kinds: dict[str, type] = {}
    for where, row in rows.items():
        lacking = min(
            (name for name in columns or kinds or row if name not in row or (columns and row[name] is None)), default=None
        )
        if lacking is not None:
            raise ValueError(f"{where}: task {leaf!r} reads the column {lacking!r}, which it lacks: {COLUMNS}")
        for name, value in row.items():
            kind = float if type(value) is int else type(value)
            if value is not None and kinds.setdefault(name, kind) is not kind:
                raise ValueError(f"{where}: {name!r} is {value!r}, of another type than in the records before it: {COLUMNS}")


def _check_items(leaf: str, task, limit: int | None) -> None:
    """Raise ValueError naming the first evaluated item that its task cannot read, or whose answer is none of its choices."""
    for number, doc in enumerate(itertools.islice(task.eval_docs, limit), 1):
        problem = None
        try:
            text, target = task.doc_to_text(doc), task.doc_to_target(doc)
            choices = task.doc_to_choice(doc) if task.OUTPUT_TYPE == "multiple_choice" else None
            if choices and not task.multiple_input and not isinstance(text, int):
                given = int(target) if str(target).lstrip("-").isdigit() else choices.index(target)
                problem = "a choice is empty" if "" in choices else None if 0 <= given < len(choices) else f"no choice {given}"
        except Exception as error:  # whatever a template or a function of the task raises
            problem = f"{type(error).__name__}: {first_line(error)}"
        if problem:
            raise ValueError(f"item {number} of task {leaf!r}: {problem}")


@lru_cache(maxsize=4)
def _records(path: Path, modified: int) -> list[tuple[str, dict]]:
    """The records of a file and their places; `modified` makes the cache forget a file that changed."""
    return list(corpora.read_records(path))


def _check_fewshot(task) -> None:
    """Refuse few-shot examples from the evaluated items: without a train split lm-eval would take those, and warn."""
    shots = task.get_config("num_fewshot")
    if not shots or task.fewshot_cfg.samples is not None:
        return
    split = task.fewshot_cfg.split or task.get_config("training_split")
    evaluated = task.get_config("test_split") or task.get_config("validation_split")
    if (split or task.get_config("validation_split") or evaluated) == evaluated:
        remedy = "take num_fewshot=0 or provide its train split"
        raise ValueError(
            f"task {task.config.task!r}: {shots} examples would come from the evaluated items themselves; {remedy}"
        )


def _result(leaf: str, task, samples: Sequence[Mapping], source: str) -> TaskResult:
    """One task's samples, in the order of its items (one entry per filter and item)."""
    samples = sorted(samples, key=lambda sample: sample["doc_id"])
    first = [sample for sample in samples if sample["filter"] == samples[0]["filter"]]
    scores: dict[str, list[float]] = {}
    for sample in samples:
        for metric in sample["metrics"]:
            if isinstance(sample[metric], int | float | np.number):
                name = "log_likelihood" if metric == "perplexity" else metric
                name += "" if sample["filter"] == "none" else f",{sample['filter']}"
                scores.setdefault(name, []).append(float(sample[metric]))
    if not scores:
        raise RuntimeError(f"task {leaf!r} has no metric that is one number per item: it cannot be compared item by item")
    several = task.OUTPUT_TYPE == "multiple_choice"
    choices = [tuple(task.doc_to_choice(sample["doc"])) for sample in first] if several else []
    likelihoods = [[likelihood for likelihood, _ in sample["filtered_resps"]] for sample in first] if several else []
    digest = hashlib.sha256()
    for sample in first:
        digest.update(json.dumps([sample["arguments"], sample["target"]], ensure_ascii=False, default=str).encode())
    split = task.get_config("test_split") or task.get_config("validation_split")
    named = "document" if leaf in embedded_tasks.BUILDERS else None
    return TaskResult(
        task=leaf,
        scores={metric: tuple(values) for metric, values in scores.items()},
        items=tuple(str(sample["doc"][named] if named else sample["doc_id"]) for sample in first),
        chance=float(np.mean([1 / len(texts) for texts in choices])) if several else None,
        predicted=tuple(int(np.argmax(values)) for values in likelihoods),
        answers=tuple(_answer(task, sample) for sample in first) if several else (),
        choices=choices[0] if len(set(choices)) == 1 and len(first) > 1 else (),
        items_sha256=digest.hexdigest(),
        settings={"source": source, "split": split, "num_fewshot": task.get_config("num_fewshot"), "version": task.VERSION},
    )


def _answer(task, sample: Mapping) -> int:
    """Index of the right choice, wherever the task keeps it."""
    gold = task.doc_to_text(sample["doc"]) if task.multiple_input else sample["target"]
    return int(gold) if isinstance(gold, int) or str(gold).isdigit() else task.doc_to_choice(sample["doc"]).index(gold)


def _merged(name: str, parts: Sequence[TaskResult]) -> TaskResult:
    """A group as one task: every item weighs the same, as lm-eval's ``weight_by_size``."""
    if len(parts) == 1:
        return parts[0]

    def joined(values: Iterable[tuple]) -> tuple:
        return tuple(itertools.chain.from_iterable(values))

    metrics = [metric for metric in parts[0].scores if all(metric in part.scores for part in parts)]
    chances, choices = [part.chance for part in parts], {part.choices for part in parts}
    return TaskResult(
        task=name,
        scores={metric: joined(part.scores[metric] for part in parts) for metric in metrics},
        items=tuple(f"{part.task}/{item}" for part in parts for item in part.items),
        chance=None if None in chances else float(np.average(chances, weights=[part.n for part in parts])),
        predicted=joined(part.predicted for part in parts),
        answers=joined(part.answers for part in parts),
        choices=choices.pop() if len(choices) == 1 else (),
        items_sha256=hashlib.sha256("".join(part.items_sha256 for part in parts).encode()).hexdigest(),
        settings={**parts[0].settings, "members": {part.task: part.n for part in parts}},
    )
