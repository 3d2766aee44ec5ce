"""Tasks through lm-eval on a model in memory, and paired tests between two models on the same items.

`evaluate_tasks` runs lm-eval's official tasks, the small YAML tasks in ``data/tasks`` and the embedded ones
(`prunelib.evaluation.embedded_tasks`) with the same prompts, metrics and item order as the ``lm_eval`` command. What the command leaves to the
tokenizer or to chance is stated: BOS, few-shot examples, all four seeds. ``data_dir`` points at offline copies,
``<data_dir>/<task>/<split>.jsonl`` with the columns that the official task reads; then no hub is needed.

`evaluate_layer_sets` gives the same results for many removals of layers from one model, several times cheaper than one by one.

Two tasks decide averages by a single constant answer (BoolQ 62.2 % "yes", WSC 63.5 % "no"): `TaskResult.constant_answer` says
when that has happened, and `TaskResults.averages` gives every average with and without them.
"""

import contextlib
import copy
import hashlib
import importlib.metadata
import json
import logging
import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float64
from transformers import PreTrainedModel

from prunelib.evaluation import embedded_tasks as docitems
from prunelib.evaluation.likelihoods import Answer, LayerSetLikelihoods, Request, layer_set_likelihoods
from prunelib.io import project_root
from prunelib.models import decoder_layers, memory
from prunelib.models.layerwise import LayerSet, check_layer_set
from prunelib.text import corpora

Scores = Sequence[float] | Sequence[int] | np.ndarray  # one number per item

# Two sets: in the first a text of the corpus is scored, in the second the name of an answer (a letter, yes or no). Small models
# read texts long before they can answer in names, so an average over both would say nothing.
EMBEDDED = ("pydocs_next_line", "pydocs_summary", "pydocs_parameter")
EMBEDDED_PROMPTS = ("pydocs_letters", "pydocs_yes_no")
TASK_SETS: dict[str, tuple[str, ...]] = {
    "embedded": EMBEDDED,
    "embedded_prompts": EMBEDDED_PROMPTS,
    # SimDiff, Tables 2, 3 and 5: plain acc, 0 shots.
    "simdiff_zero_shot": (
        "boolq",
        "piqa",
        "hellaswag",
        "winogrande",
        "arc_easy",
        "arc_challenge",
        "openbookqa",
        "mathqa",
    ),
    # SimDiff, Table 1 (there through OpenCompass); its "CoQA" is CommonsenseQA; lm-eval's `race` is the high-school part.
    "simdiff_nlu": (
        "cmnli",
        "hellaswag",
        "piqa",
        "wsc",
        "commonsense_qa",
        "boolq",
        "race_middle",
        "race",
        "xsum",
        "c3",
    ),
    "mmlu": ("mmlu",),
    "gsm8k": ("gsm8k",),
    "lambada": ("lambada_openai",),
    "wsc273": ("wsc273",),
}

# Where lm-eval keeps the tasks above. An index of these folders takes a quarter of a second, of everything over ten.
OFFICIAL_FOLDERS = (
    "arc",
    "commonsense_qa",
    "gsm8k",
    "hellaswag",
    "lambada",
    "mathqa",
    "mmlu/default",
    "openbookqa",
    "piqa",
    "race",
    "super_glue/boolq",
    "super_glue/wsc",
    "winogrande",
    "wsc273",
)
SPLIT_KEYS = ("training_split", "validation_split", "test_split", "fewshot_split")

WSC = ("wsc", "wsc273")
BOOLQ = ("boolq",)
CONSTANT = 0.95  # share of one answer from which a model counts as giving a constant answer
EXACT_UP_TO = 1000  # discordant items up to which McNemar's test is the exact binomial one


class TaskError(RuntimeError):
    """A task cannot be run here: its data cannot be reached, or it gave nothing that can be scored."""


# --- results -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TaskResult:
    """One task on one model, item by item.

    Attributes:
        scores: metric → one number per item, in the task's order: ``acc`` and ``acc_norm`` are 0 or 1, ``rouge1`` lies between,
            ``log_likelihood`` (LAMBADA) is in nats. A filter of lm-eval stands behind a comma: ``exact_match,strict-match``.
        items: names of the items; those of the embedded tasks name the docstring, which two items may share.
        chance: expected ``acc`` of a uniform guess, None where there are no choices.
        predicted, answers: index of the choice, empty where there are no choices. Only where every item has the same choice
            texts (``choices``) can an answer be constant.
        items_sha256: over every prompt, continuation and answer: two results with the same hash can be paired.
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
        """Number of items."""
        return len(self.items)

    @property
    def metric(self) -> str:
        """The metric that averages are taken over: ``acc``, as SimDiff reports, or the task's first where it has none."""
        return "acc" if "acc" in self.scores else next(iter(self.scores))

    def value(self, metric: str | None = None) -> float:
        """Mean over the items. Raises ValueError for a metric that this task does not have."""
        return float(np.mean(self._of(metric)))

    def stderr(self, metric: str | None = None) -> float | None:
        """Standard error of the mean over items (ddof 1, as lm-eval's); None for one item."""
        values = self._of(metric)
        return float(np.std(values, ddof=1) / np.sqrt(len(values))) if len(values) > 1 else None

    def _of(self, metric: str | None) -> Float64[np.ndarray, " item"]:
        metric = metric or self.metric
        if metric not in self.scores:
            raise ValueError(f"task {self.task!r} has no metric {metric!r}: choose one of {', '.join(self.scores)}")
        return np.asarray(self.scores[metric], dtype=np.float64)

    @property
    def acc(self) -> float:
        """Accuracy by log-likelihood. Raises ValueError where the task has none."""
        return self.value("acc")

    @property
    def acc_norm(self) -> float | None:
        """Accuracy by log-likelihood per character of the choice; None where the task does not define it."""
        return self.value("acc_norm") if "acc_norm" in self.scores else None

    @property
    def constant_share(self) -> float | None:
        """Share of the model's most frequent answer; None where the choices differ from item to item."""
        return max(Counter(self.predicted).values()) / self.n if self.choices else None

    @property
    def constant_answer(self) -> str | None:
        """The answer that the model gives to (nearly) every question, None when it does not.

        Such a score says how often that answer is right, nothing about the model: 62.2 % on BoolQ, 36.5 or 63.5 % on WSC.
        """
        if self.choices and self.constant_share >= CONSTANT:
            return self.choices[Counter(self.predicted).most_common(1)[0][0]]
        return None

    @property
    def best_constant(self) -> float | None:
        """The accuracy of the best constant answer; None where the choices differ from item to item."""
        return max(Counter(self.answers).values()) / self.n if self.choices else None

    def to_json(self) -> dict:
        """Plain data that keeps every item, for paired tests between runs; items are numbered, their names are not kept."""
        number = {name: i for i, name in enumerate(dict.fromkeys(self.items))}
        return {
            "task": self.task,
            "scores": {metric: _packed(values) for metric, values in self.scores.items()},
            "items": [number[name] for name in self.items],
            "chance": self.chance,
            "predicted": list(self.predicted),
            "answers": list(self.answers),
            "choices": list(self.choices),
            "items_sha256": self.items_sha256,
            "settings": dict(self.settings),
        }

    @classmethod
    def from_json(cls, data: Mapping) -> "TaskResult":
        """The result that `to_json` described. Raises ValueError when a part is missing or its length is wrong."""
        try:
            found = cls(
                task=data["task"],
                scores={metric: _unpacked(values) for metric, values in data["scores"].items()},
                items=tuple(map(str, data["items"])),
                chance=data["chance"],
                predicted=tuple(data["predicted"]),
                answers=tuple(data["answers"]),
                choices=tuple(data["choices"]),
                items_sha256=data["items_sha256"],
                settings=dict(data["settings"]),
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"not the record of a task result: {type(error).__name__}: {error}") from None
        wrong = [metric for metric, values in found.scores.items() if len(values) != found.n]
        if wrong:
            raise ValueError(f"task {found.task!r}: {len(found.scores[wrong[0]])} scores {wrong[0]!r} of {found.n} items")
        return found

    def rows(self) -> list[dict]:
        """Rows for `results.write_run`: one per metric, with chance, and the two facts about constant answers."""
        rows = [
            {"task": self.task, "metric": metric, "value": self.value(metric), "n": self.n, "stderr": self.stderr(metric)}
            for metric in self.scores
        ]
        more = {"chance": self.chance, "best_constant": self.best_constant, "constant_share": self.constant_share}
        rows += [
            {"task": self.task, "metric": name, "value": value, "n": self.n}
            for name, value in more.items()
            if value is not None
        ]
        return [{key: value for key, value in row.items() if value is not None} for row in rows]


def _packed(values: Sequence[float]) -> str | list[float]:
    """Right or wrong answers as a string of 1 and 0 (a run file holds thousands), other scores as they are."""
    return "".join(str(int(value)) for value in values) if set(values) <= {0.0, 1.0} else list(values)


def _unpacked(values: str | Sequence[float]) -> tuple[float, ...]:
    return tuple(map(float, values))


@dataclass(frozen=True)
class Average:
    """Unweighted mean of the tasks' values, with a bootstrap interval over items (each task resampled by itself)."""

    label: str
    tasks: tuple[str, ...]
    value: float
    low: float
    high: float
    level: float


@dataclass(frozen=True)
class TaskResults:
    """Results by task, in the order asked for, and the settings they share."""

    tasks: Mapping[str, TaskResult]
    settings: Mapping

    def __getitem__(self, task: str) -> TaskResult:
        return self.tasks[task]

    def average(
        self,
        *,
        without: Sequence[str] = (),
        metric: str | None = None,
        label: str = "average",
        seed: int = 0,
        n: int = 2000,
        level: float = 0.95,
    ) -> Average:
        """Mean over the tasks that are not in `without`; `metric` None takes each task's own main metric.

        A task that lacks `metric` (``acc_norm``) counts with its main one, as published averages do. Raises ValueError when no
        task is left.
        """
        kept = {name: result for name, result in self.tasks.items() if name not in without}
        if not kept:
            raise ValueError(f"no task is left of {', '.join(self.tasks)} without {', '.join(without)}")
        values = [_values(result, metric) for result in kept.values()]
        drawn = np.mean(
            [
                _bootstrap_means(value, result.items, seed + i, n)
                for i, (value, result) in enumerate(zip(values, kept.values(), strict=True))
            ],
            axis=0,
        )
        low, high = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2])
        return Average(label, tuple(kept), float(np.mean([value.mean() for value in values])), float(low), float(high), level)

    def averages(self, *, metric: str | None = None, seed: int = 0, n: int = 2000, level: float = 0.95) -> tuple[Average, ...]:
        """The average over all tasks, and again without WSC, without BoolQ and without both, where these were run."""
        variants = {
            "average": (),
            "average_without_wsc": WSC,
            "average_without_boolq": BOOLQ,
            "average_without_wsc_boolq": WSC + BOOLQ,
        }
        found: dict[tuple[str, ...], Average] = {}
        for label, without in variants.items():
            kept = tuple(name for name in self.tasks if name not in without)
            if kept and kept not in found:
                found[kept] = self.average(without=without, metric=metric, label=label, seed=seed, n=n, level=level)
        return tuple(found.values())

    def rows(self) -> list[dict]:
        """Rows for `results.write_run`: every task's, then the averages with the ends of their intervals."""
        rows = [row for result in self.tasks.values() for row in result.rows()]
        for average in self.averages():
            for end, value in (("", average.value), ("_low", average.low), ("_high", average.high)):
                rows.append({"task": "all", "metric": average.label + end, "value": value, "n": len(average.tasks)})
        return rows

    def to_json(self) -> dict:
        """Plain data for the ``extra`` of a run file; see `TaskResult.to_json`."""
        return {"settings": dict(self.settings), "tasks": [result.to_json() for result in self.tasks.values()]}

    @classmethod
    def from_json(cls, data: Mapping) -> "TaskResults":
        """The results that `to_json` described. Raises ValueError as `TaskResult.from_json`."""
        try:
            settings, results = dict(data["settings"]), list(data["tasks"])
        except (KeyError, TypeError) as error:
            raise ValueError(f"not the record of task results: {type(error).__name__}: {error}") from None
        tasks = [TaskResult.from_json(result) for result in results]
        return cls({result.task: result for result in tasks}, settings)

    def describe(self) -> dict:
        """What JSON can hold beside the rows: settings, items' hashes, constant answers."""
        return {
            "settings": dict(self.settings),
            "tasks": {
                name: {**result.settings, "items_sha256": result.items_sha256, "constant_answer": result.constant_answer}
                for name, result in self.tasks.items()
            },
        }


def _values(result: TaskResult, metric: str | None) -> Float64[np.ndarray, " item"]:
    return np.asarray(result.scores[metric if metric in result.scores else result.metric], dtype=np.float64)


# --- running -------------------------------------------------------------------------------------------------------------


def task_names(task_set: str | Sequence[str]) -> tuple[str, ...]:
    """The tasks of a named set (`TASK_SETS`), or the given names as they are: any name of lm-eval's is allowed.

    Raises:
        ValueError: no task, or a task named twice.
    """
    if isinstance(task_set, str):
        names = TASK_SETS.get(task_set, (task_set,))
    else:
        names = tuple(name for entry in task_set for name in TASK_SETS.get(entry, (entry,)))
    twice = [name for name, count in Counter(names).items() if count > 1]
    if not names or twice:
        raise ValueError(f"tasks {task_set!r}: {f'{twice[0]} is named twice' if twice else 'name at least one'}")
    return tuple(names)


@memory.says_what_fits("batch_size", "a smaller dtype")
def evaluate_tasks(
    model: PreTrainedModel,
    tokenizer,
    task_set: str | Sequence[str],
    *,
    bos: bool,
    limit: int | None = None,
    num_fewshot: int | None = 0,
    batch_size: int = 16,
    seed: int = 1234,
    data_dir: str | Path | None = None,
    progress: bool = True,
) -> TaskResults:
    """Run tasks through lm-eval on a model as it is in memory, pruned or not.

    Args:
        task_set: a key of `TASK_SETS` or names of tasks.
        bos: whether the beginning-of-text token precedes every prompt. lm-eval leaves this to the tokenizer, and asks some of
            them (such as those of the embedded models) in vain; here the token is put there, or kept away, in any case. An
            empty prompt is always scored after this token: something must come first.
        limit: the first so many items of every task (of every subject of MMLU), None for all.
        num_fewshot: examples before every item, None for the task's own default (GSM8K: 5).
        seed: for lm-eval's four generators: Python's, NumPy's, torch's and the one that draws few-shot examples. The caller's
            generators are left as they were.
        data_dir: folder with ``<task>/<split>.jsonl`` (``mmlu/test.jsonl`` and ``dev.jsonl`` with a column ``subject``). None
            reads the hub, or its cache under ``HF_HUB_OFFLINE=1``. The embedded tasks need neither.

    Raises:
        ValueError: unknown task, numbers out of range, no BOS token, a damaged file, or few-shot examples that could only come
            from the evaluated items themselves.
        FileNotFoundError: no ``data_dir``, or no file for a task in it (the message names what was looked for).
        TaskError: the hub cannot be reached and there is no copy; lm-eval is not installed.
    """
    request = _Asked.of(tokenizer, task_set, bos, limit, num_fewshot, batch_size, seed, data_dir)
    lm_eval = _lm_eval()
    with _quiet(), _generators(seed):
        loaded = _loaded(request)
        lm = _language_model(model, tokenizer, bos, batch_size, progress)
        output = lm_eval.evaluate(lm=lm, task_dict=loaded.tasks, limit=limit, bootstrap_iters=0, log_samples=True)
    return _results(request, loaded, output["samples"], lm, model)


class LayerSetTasks(dict[LayerSet, TaskResults]):
    """Removed layers → `TaskResults`, and what it cost.

    ``layer_forwards`` counts the calls of decoder layers, over all batches; ``layer_forwards_alone`` is what every set by
    itself takes on the same batches. ``tokens`` counts the tokens in these batches; ``tokens_alone`` is what they are in
    `evaluate_tasks`, where every choice is a text of its own. So `evaluate_tasks` on every set takes, in calls weighed by their
    tokens, ``layer_forwards_alone / layer_forwards * tokens_alone / tokens`` times the work.
    """

    layer_forwards: int = 0
    layer_forwards_alone: int = 0
    tokens: int = 0
    tokens_alone: int = 0


@memory.says_what_fits("batch_size", "a smaller dtype")
def evaluate_layer_sets(
    model: PreTrainedModel,
    tokenizer,
    task_set: str | Sequence[str],
    layer_sets: Iterable[LayerSet],
    *,
    bos: bool,
    limit: int | None = None,
    num_fewshot: int | None = 0,
    batch_size: int = 16,
    seed: int = 1234,
    data_dir: str | Path | None = None,
    progress: bool = True,
) -> LayerSetTasks:
    """`evaluate_tasks` on the model without each of the given sets of layers, for the price of what differs between them.

    The same tasks, prompts, metrics and settings: lm-eval asks, and what it asks is answered for all sets in one walk
    (`prunelib.evaluation.likelihoods`), in which layers that several sets begin with run once, choices of one question share the beginning
    of their text, and the head runs at the scored positions only. Log-likelihoods agree with
    ``evaluate_tasks(remove_layers(model, removed), …)`` to float tolerance, so an item can differ only where two choices tie.

    Args:
        layer_sets: the removed layers or sublayers, each ascending; ``()`` is the dense model. Repeated sets are evaluated once.
        batch_size: choices in one batch.

    The other arguments are those of `evaluate_tasks`.

    Raises:
        ValueError: a set that is not ascending, out of range, or everything; a task that does not compare
            likelihoods of given texts (GSM8K and XSum generate); and as `evaluate_tasks`.
        FileNotFoundError, TaskError: as `evaluate_tasks`.
        UnsupportedModel: layers of this model cannot be skipped.
    """
    request = _Asked.of(tokenizer, task_set, bos, limit, num_fewshot, batch_size, seed, data_dir)
    sets = list(dict.fromkeys(tuple(removed) for removed in layer_sets))
    for removed in sets:
        check_layer_set(len(decoder_layers(model)), removed)
    lm_eval = _lm_eval()
    found = LayerSetTasks()
    with _quiet(), _generators(seed):
        loaded = _loaded(request)
        for name, task in loaded.tasks["tasks"].items():
            if task.OUTPUT_TYPE not in ("multiple_choice", "loglikelihood"):
                raise ValueError(
                    f"task {name!r} asks for {task.OUTPUT_TYPE}, and only likelihoods of given texts are shared between "
                    "layer sets: take evaluate_tasks(remove_layers(model, removed), …) for this task"
                )
            _keep_requests(task)
        lm = _shared_language_model(model, tokenizer, sets, bos, batch_size, progress)
        for removed in sets:
            lm.removed = removed
            output = lm_eval.evaluate(lm=lm, task_dict=loaded.tasks, limit=limit, bootstrap_iters=0, log_samples=True)
            found[removed] = _results(request, loaded, output["samples"], lm, model)
    if sets:
        found.layer_forwards, found.layer_forwards_alone = lm.likelihoods.layer_forwards, lm.likelihoods.layer_forwards_alone
        found.tokens, found.tokens_alone = lm.likelihoods.tokens, lm.likelihoods.tokens_alone
    return found


@dataclass(frozen=True)
class _Asked:
    """What was asked for, checked."""

    names: tuple[str, ...]
    bos: bool
    limit: int | None
    num_fewshot: int | None
    batch_size: int
    seed: int
    data_dir: Path | None

    @classmethod
    def of(
        cls,
        tokenizer,
        task_set: str | Sequence[str],
        bos: bool,
        limit: int | None,
        num_fewshot: int | None,
        batch_size: int,
        seed: int,
        data_dir: str | Path | None,
    ) -> "_Asked":
        names = task_names(task_set)
        if (limit is not None and limit < 1) or batch_size < 1 or (num_fewshot is not None and num_fewshot < 0) or seed < 0:
            raise ValueError(
                f"limit={limit}, batch_size={batch_size}, num_fewshot={num_fewshot}, seed={seed}: limit and batch_size from 1, "
                "num_fewshot and seed from 0"
            )
        if bos and tokenizer.bos_token_id is None:
            raise ValueError("bos=True, but the tokenizer has no BOS token: take bos=False")
        if data_dir is not None and not Path(data_dir).is_dir():
            raise FileNotFoundError(f"data_dir={str(data_dir)!r} is no folder")
        return cls(names, bos, limit, num_fewshot, batch_size, seed, None if data_dir is None else Path(data_dir))


@dataclass(frozen=True)
class _Loaded:
    """lm-eval's task objects, the leaf tasks of every name asked for, and where every leaf's items come from."""

    tasks: dict
    leaves: Mapping[str, tuple[str, ...]]
    sources: Mapping[str, Mapping[str, str]]


def _loaded(asked: _Asked) -> _Loaded:
    leaves, specs, sources = _specs(asked.names, asked.data_dir, fewshot=bool(asked.num_fewshot))
    loaded = _load(specs, asked.names, hub=asked.data_dir is None and not set(asked.names) <= set(docitems.BUILDERS))
    for task in loaded["tasks"].values():
        if asked.num_fewshot is not None or task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=asked.num_fewshot or 0)
        task.set_fewshot_seed(seed=asked.seed)
        _check_fewshot(task)
    return _Loaded(loaded, leaves, sources)


def _results(asked: _Asked, loaded: _Loaded, samples: Mapping, lm, model: PreTrainedModel) -> TaskResults:
    results = {}
    for name in asked.names:
        parts = [
            _result(leaf, loaded.tasks["tasks"][leaf], samples[leaf], loaded.sources[leaf]) for leaf in loaded.leaves[name]
        ]
        results[name] = parts[0] if len(parts) == 1 else _merged(name, parts)
    settings = {
        "lm_eval": importlib.metadata.version("lm_eval"),
        "bos": asked.bos,
        "limit": asked.limit,
        "num_fewshot": "task default" if asked.num_fewshot is None else asked.num_fewshot,
        "seeds": dict.fromkeys(("random", "numpy", "torch", "fewshot"), asked.seed),
        "batch_size": asked.batch_size,
        "dtype": str(model.dtype).removeprefix("torch."),
        "max_length": lm.max_length,
        "truncated_requests": lm.truncated,
    }
    return TaskResults(results, settings)


def _lm_eval():
    try:
        import lm_eval
        import lm_eval.evaluator
        import lm_eval.models.huggingface
        import lm_eval.tasks
    except ImportError as error:
        raise TaskError(f"tasks need lm-eval and datasets ({error}): pip install -r requirements.lock") from None
    return lm_eval.evaluator


def _language_model(model: PreTrainedModel, tokenizer, bos: bool, batch_size: int, progress: bool):
    return _wrapped(_in_memory(bos, progress), model, tokenizer, batch_size)


def _shared_language_model(
    model: PreTrainedModel, tokenizer, sets: Sequence[LayerSet], bos: bool, batch_size: int, progress: bool
):
    class Shared(_in_memory(bos, progress)):
        """Answers for the model without the layers ``removed``: the first question is answered for all sets, and kept."""

        removed: LayerSet = ()
        likelihoods: LayerSetLikelihoods | None = None

        def loglikelihood(self, requests, disable_tqdm=False) -> list[Answer]:
            if self.likelihoods is None:
                self._items = [(request.task_name, request.doc_id) for request in requests]
                super().loglikelihood(requests, disable_tqdm=True)
            return self.likelihoods[self.removed]

        def _loglikelihood_tokens(self, requests, disable_tqdm=False, override_bs=None) -> list[Answer]:
            self._count_truncated(requests)
            asked = [
                Request(tuple((context + continuation)[-(self.max_length + 1) :][:-1]), tuple(continuation), item)
                for (_, context, continuation), item in zip(requests, self._items, strict=True)
            ]
            self.likelihoods = layer_set_likelihoods(
                self.model,
                asked,
                sets,
                batch_size=batch_size,
                softmax_dtype=self.softmax_dtype,
                progress=progress,
            )
            return self.likelihoods[self.removed]

    return _wrapped(Shared, model, tokenizer, batch_size)


def _wrapped(kind: type, model: PreTrainedModel, tokenizer, batch_size: int):
    # A copy: lm-eval gives the tokenizer a pad token and turns its padding side around.
    return kind(pretrained=model, tokenizer=copy.deepcopy(tokenizer), batch_size=batch_size, add_bos_token=False)


def _keep_requests(task) -> None:
    """Build the requests of a task once: every later evaluation asks the same ones again, few-shot examples included."""
    build, built = task.build_all_requests, False

    def build_once(**settings) -> None:
        nonlocal built
        if not built:
            build(**settings)
            built = True
        for request in task.instances:
            request.resps, request.filtered_resps = [], {}

    task.build_all_requests = build_once


def _in_memory(bos: bool, progress: bool) -> type:
    from lm_eval.models.huggingface import HFLM

    class InMemory(HFLM):
        """HFLM that puts BOS where it was asked for, whatever the tokenizer does, and counts the prompts it had to cut."""

        truncated = 0

        def tok_encode(self, string, add_special_tokens=None, left_truncate_len=None, **kwargs):
            ids = self.tokenizer.encode(string, add_special_tokens=False)
            first = self.tokenizer.bos_token_id
            if bos and add_special_tokens is not False and ids[:1] != [first]:
                ids = [first, *ids]
            return ids[-left_truncate_len:] if left_truncate_len else ids

        def tok_batch_encode(self, strings, padding_side="left", left_truncate_len=None, truncation=False):
            first = self.tokenizer.bos_token
            if bos:
                strings = [string if string.startswith(first) else first + string for string in strings]
            return super().tok_batch_encode(strings, padding_side, left_truncate_len, truncation)

        def loglikelihood(self, requests, disable_tqdm=False):
            return super().loglikelihood(requests, disable_tqdm=disable_tqdm or not progress)

        def _loglikelihood_tokens(self, requests, disable_tqdm=False, override_bs=None):
            self._count_truncated(requests)
            # Of requests that read the same tokens and score more or fewer of them (the same docstring in two tasks), lm-eval
            # 0.4 scores the shorter at the wrong positions: those of the beginning of the longer. Asked apart, both are right.
            splits: dict[tuple[int, ...], list[int]] = {}
            rounds: dict[int, list[int]] = {}
            for number, (_, context, continuation) in enumerate(requests):
                seen = splits.setdefault((*context, *continuation[:-1]), [])
                if len(continuation) not in seen:
                    seen.append(len(continuation))
                rounds.setdefault(seen.index(len(continuation)), []).append(number)
            answers: dict[int, Answer] = {}
            for numbers in rounds.values():
                asked = [requests[number] for number in numbers]
                found = super()._loglikelihood_tokens(asked, disable_tqdm=disable_tqdm, override_bs=override_bs)
                answers.update(zip(numbers, found, strict=True))
            return [answers[number] for number in range(len(requests))]

        def _count_truncated(self, requests) -> None:
            self.truncated += sum(
                len(context) + len(continuation) > self.max_length + 1 for _, context, continuation in requests
            )

        def generate_until(self, requests, disable_tqdm=False):
            return super().generate_until(requests, disable_tqdm=disable_tqdm or not progress)

    return InMemory


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """lm-eval warns about every setting that is made on purpose here."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


@contextlib.contextmanager
def _generators(seed: int) -> Iterator[None]:
    """Seed the global generators that lm-eval draws from, and put them back."""
    python, array = random.getstate(), np.random.get_state()  # noqa: NPY002
    with torch.random.fork_rng():
        random.seed(seed)
        np.random.seed(seed)  # noqa: NPY002
        torch.manual_seed(seed)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(array)  # noqa: NPY002


# --- which tasks, from where ---------------------------------------------------------------------------------------------


@lru_cache(maxsize=1)
def _task_manager():
    """One index for the task sets above: lm-eval's own folders and data/tasks."""
    import lm_eval.tasks

    official = Path(lm_eval.tasks.__file__).parent
    folders = [official / name for name in OFFICIAL_FOLDERS]
    return lm_eval.tasks.TaskManager(include_defaults=False, include_path=[*folders, project_root() / "data" / "tasks"])


@lru_cache(maxsize=1)
def _full_task_manager():
    """Everything that lm-eval knows: takes over ten seconds, so only for a name outside the task sets."""
    import lm_eval.tasks

    return lm_eval.tasks.TaskManager(include_path=project_root() / "data" / "tasks")


def _manager_for(names: Sequence[str]):
    manager = _task_manager()
    if all(name in manager.task_index for name in names):
        return manager
    manager = _full_task_manager()
    unknown = [name for name in names if name not in manager.task_index]
    if unknown:
        raise ValueError(f"unknown task {unknown[0]!r}: neither a set ({', '.join(TASK_SETS)}) nor a task of lm-eval's")
    return manager


def _specs(
    names: Sequence[str], data_dir: Path | None, *, fewshot: bool
) -> tuple[dict[str, tuple[str, ...]], list[dict], dict[str, dict[str, str]]]:
    """Name → its leaf tasks; what to override of every leaf; where every leaf's items come from, in words."""
    index = _manager_for(names).task_index
    leaves = {name: _leaves(name, index) for name in names}
    specs, sources = [], {}
    for name, members in leaves.items():
        for leaf in members:
            config = index[leaf].cfg
            if leaf in docitems.BUILDERS:
                splits = {"test": docitems.items(leaf)}
                sources[leaf] = {"source": "pydocs/evaluation", "embedded_items_sha256": docitems.digest(splits["test"])}
                if fewshot:
                    splits["fewshot"] = docitems.items(leaf, "calibration")
                    sources[leaf]["fewshot_items_sha256"] = docitems.digest(splits["fewshot"])
                override = {"custom_dataset": _embedded(splits)}
                if not fewshot:  # lm-eval reads the examples even for 0 shots
                    override["fewshot_split"] = None
            elif data_dir is not None:
                override, sources[leaf] = _local(name, leaf, config, data_dir), {"source": "offline copy"}
            else:
                path = "/".join(filter(None, (config.get("dataset_path"), config.get("dataset_name"))))
                override, sources[leaf] = {}, {"source": path}
            specs.append({"task": leaf, **override})
    return leaves, specs, sources


def _leaves(name: str, index: Mapping) -> tuple[str, ...]:
    """The tasks below a group or a tag (the 57 subjects of MMLU); a task is its own leaf."""
    entry = index[name]
    if entry.kind.name == "TAG":
        return tuple(sorted(entry.tags))
    if entry.kind.name != "GROUP":
        return (name,)
    members = [member if isinstance(member, str) else member.get("task") or member.get("group") for member in entry.cfg["task"]]
    return tuple(leaf for member in members for leaf in _leaves(member, index))


def _embedded(splits: Mapping[str, Sequence[docitems.Item]]) -> Callable:
    def read(**_):
        import datasets

        return {split: datasets.Dataset.from_list([asdict(item) for item in items]) for split, items in splits.items()}

    return read


def _local(name: str, leaf: str, config: Mapping, data_dir: Path) -> dict:
    """Overrides that make an official task read ``<data_dir>/<task>/<split>.jsonl``."""
    folder = data_dir / (leaf if (data_dir / leaf).is_dir() else name)
    wanted = {key: config[key] for key in SPLIT_KEYS if config.get(key)}
    files = {split: folder / f"{split}.jsonl" for split in dict.fromkeys(wanted.values())}
    evaluated = wanted.get("test_split") or wanted.get("validation_split")
    if evaluated is None or not files[evaluated].is_file():
        raise FileNotFoundError(f"task {leaf!r}: {folder.name}/{evaluated}.jsonl is not in data_dir={str(data_dir)!r}")
    present = {split: path for split, path in files.items() if path.is_file()}
    subject = config.get("dataset_name") if folder.name != leaf else None
    _check_columns(leaf, config, _records(files[evaluated], files[evaluated].stat().st_mtime_ns, subject)[0])
    # lm-eval reads the few-shot pool even for 0 shots: a split without a file must not be configured.
    absent = {key: None for key, split in wanted.items() if split not in present}

    def read(**_):
        import datasets

        return {
            split: datasets.Dataset.from_list(_records(path, path.stat().st_mtime_ns, subject))
            for split, path in present.items()
        }

    return {"custom_dataset": read, "dataset_kwargs": None, **absent}


def _check_columns(leaf: str, config: Mapping, record: Mapping) -> None:
    """Refuse records without a column that the prompts name: lm-eval would score an empty text or the column's name instead."""
    from jinja2 import Environment, TemplateError, meta

    if config.get("process_docs"):
        return  # makes columns of its own, and fails by itself
    wanted: set[str] = set()
    for key in ("doc_to_text", "doc_to_choice", "doc_to_target"):
        value = config.get(key)
        if isinstance(value, str) and value.isidentifier():
            wanted.add(value)
        elif isinstance(value, str) and "{{" in value:
            with contextlib.suppress(TemplateError):  # filters of lm-eval's own
                wanted |= meta.find_undeclared_variables(Environment().parse(value))
    absent = sorted(wanted - set(record))
    if absent:
        raise ValueError(
            f"task {leaf!r} reads the column {absent[0]!r}, the offline copy has {', '.join(map(repr, record))}: "
            "it needs the columns of the official data set"
        )


def _records(path: Path, modified: int, subject: str | None) -> list[dict]:
    """The records of one file, or those of one subject of MMLU. Raises ValueError when there is none."""
    rows, by_subject = _file(path, modified)
    found = rows if subject is None else by_subject.get(subject, [])
    if not found:
        raise ValueError(f"{path} holds no record" + (f" whose subject is {subject!r}" if subject else ""))
    return found


@lru_cache(maxsize=4)
def _file(path: Path, modified: int) -> tuple[list[dict], dict[str, list[dict]]]:
    """All records of one file, and the same by subject; `modified` makes the cache forget a file that changed."""
    rows: list[dict] = []
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}, line {number}: not JSON ({error})") from None
            if not isinstance(row, dict):
                raise ValueError(f"{path}, line {number}: one JSON object a line is expected")
            rows.append(row)
    by_subject: dict[str, list[dict]] = {}
    for row in rows:
        by_subject.setdefault(str(row.get("subject")), []).append(row)
    return rows, by_subject


def _load(specs: Sequence[Mapping], names: Sequence[str], *, hub: bool) -> dict:
    """lm-eval's task objects. Only members of an inline group are merged with the official configuration."""
    what = f"the tasks {', '.join(names)} are read from the Hugging Face hub"
    remedy = "Give data_dir, a folder with <task>/<split>.jsonl, or take the tasks 'embedded'."
    if hub:
        try:
            corpora.require_hub(what, remedy)
        except RuntimeError as error:
            raise TaskError(str(error)) from None
    try:
        return _manager_for(names).load([{"group": "prunelib", "task": [dict(spec) for spec in specs]}])
    except KeyError as error:
        raise ValueError(
            f"the tasks {', '.join(names)}: a record lacks {error}; an offline copy needs the columns of the official data set"
        ) from error
    except (OSError, RuntimeError, ValueError) as error:
        if not hub:
            raise
        first = str(error).splitlines()[0] if str(error) else ""
        raise TaskError(f"{what}, which failed ({type(error).__name__}: {first}). {remedy}") from error


def _check_fewshot(task) -> None:
    """Refuse few-shot examples from the evaluated items: without a train split lm-eval would take those, and warn."""
    shots = task.get_config("num_fewshot")
    if not shots or task.fewshot_cfg.samples is not None:
        return
    split = task.fewshot_cfg.split or task.get_config("training_split")
    evaluated = task.get_config("test_split") or task.get_config("validation_split")
    pool = split or task.get_config("validation_split") or evaluated
    if pool == evaluated:
        raise ValueError(
            f"task {task.config.task!r}: its {shots} few-shot examples would be drawn from the evaluated items themselves; "
            "take num_fewshot=0 or provide its train split"
        )


# --- from lm-eval's samples to results -----------------------------------------------------------------------------------


def _result(leaf: str, task, samples: Sequence[Mapping], source: Mapping) -> TaskResult:
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
        raise TaskError(f"task {leaf!r} has no metric that is one number per item: it cannot be compared item by item")
    several = task.OUTPUT_TYPE == "multiple_choice"
    texts = {tuple(task.doc_to_choice(sample["doc"])) for sample in first} if several else set()
    digest = hashlib.sha256()
    for sample in first:
        digest.update(json.dumps([sample["arguments"], sample["target"]], ensure_ascii=False, default=str).encode())
    settings = {
        **source,
        "split": task.get_config("test_split") or task.get_config("validation_split"),
        "num_fewshot": task.get_config("num_fewshot"),
        "version": task.VERSION,
    }
    return TaskResult(
        task=leaf,
        scores={metric: tuple(values) for metric, values in scores.items()},
        items=tuple(
            str(sample["doc"].get("document", "")) if leaf in docitems.BUILDERS else str(sample["doc_id"]) for sample in first
        ),
        chance=float(np.mean([1 / len(task.doc_to_choice(sample["doc"])) for sample in first])) if several else None,
        predicted=tuple(int(np.argmax([likelihood for likelihood, _ in sample["filtered_resps"]])) for sample in first)
        if several
        else (),
        answers=tuple(_answer(task, sample) for sample in first) if several else (),
        choices=texts.pop() if len(texts) == 1 and len(first) > 1 else (),
        items_sha256=digest.hexdigest(),
        settings=settings,
    )


def _answer(task, sample: Mapping) -> int:
    """Index of the right choice, wherever the task keeps it."""
    gold = task.doc_to_text(sample["doc"]) if task.multiple_input else sample["target"]
    choices = task.doc_to_choice(sample["doc"])
    return int(gold) if isinstance(gold, int) or str(gold).isdigit() else choices.index(gold)


def _merged(name: str, parts: Sequence[TaskResult]) -> TaskResult:
    """A group as one task: every item weighs the same, as lm-eval's ``weight_by_size``."""
    metrics = [metric for metric in parts[0].scores if all(metric in part.scores for part in parts)]
    choices = {part.choices for part in parts}
    return TaskResult(
        task=name,
        scores={metric: tuple(score for part in parts for score in part.scores[metric]) for metric in metrics},
        items=tuple(f"{part.task}/{item}" for part in parts for item in part.items),
        chance=float(np.average([part.chance for part in parts], weights=[part.n for part in parts]))
        if all(part.chance is not None for part in parts)
        else None,
        predicted=tuple(index for part in parts for index in part.predicted),
        answers=tuple(index for part in parts for index in part.answers),
        choices=choices.pop() if len(choices) == 1 else (),
        items_sha256=hashlib.sha256("".join(part.items_sha256 for part in parts).encode()).hexdigest(),
        settings={**parts[0].settings, "members": {part.task: part.n for part in parts}},
    )


# --- two models on the same items ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class McNemar:
    """``only_a``, ``only_b``: items that one model alone answers right; ``p``: two-sided, of "both are equally often right"."""

    only_a: int
    only_b: int
    p: float
    exact: bool


@dataclass(frozen=True)
class Difference:
    """``a - b`` with its bootstrap interval; ``clusters`` is how many independent groups of items were drawn from."""

    difference: float
    low: float
    high: float
    level: float
    clusters: int


@dataclass(frozen=True)
class Comparison:
    """Two models on one task (``task`` "average": all of them); McNemar's test only for metrics that are right or wrong."""

    task: str
    metric: str
    n: int
    difference: Difference
    mcnemar: McNemar | None


def mcnemar(a: Scores, b: Scores) -> McNemar:
    """McNemar's test on paired right (1) or wrong (0) answers.

    Exact (binomial) up to 1,000 discordant items, above that the chi-square approximation with continuity correction.

    Raises:
        ValueError: lengths that differ, no item, or values other than 0 and 1.
    """
    from scipy import stats

    left, right = _paired(a, b)
    if not np.isin(left, (0, 1)).all() or not np.isin(right, (0, 1)).all():
        raise ValueError("McNemar's test compares right (1) and wrong (0) answers; take `mean_difference` for other scores")
    only_a, only_b = int(((left == 1) & (right == 0)).sum()), int(((left == 0) & (right == 1)).sum())
    discordant = only_a + only_b
    if discordant <= EXACT_UP_TO:
        p = float(stats.binomtest(only_a, discordant).pvalue) if discordant else 1.0
        return McNemar(only_a, only_b, p, exact=True)
    statistic = max(abs(only_a - only_b) - 1, 0) ** 2 / discordant
    return McNemar(only_a, only_b, float(stats.chi2.sf(statistic, df=1)), exact=False)


def mean_difference(
    a: Scores,
    b: Scores,
    *,
    items: Sequence[str] | None = None,
    seed: int = 0,
    n: int = 10_000,
    level: float = 0.95,
) -> Difference:
    """Paired bootstrap of the mean of a − b: items are drawn with replacement, the same ones for both models.

    Items that share a name in `items` (two questions on one docstring) are drawn together.

    Raises:
        ValueError: lengths that differ, fewer than two independent items, or ``n``, ``level``, ``seed`` out of range.
    """
    left, right = _paired(a, b)
    if n < 1 or not 0 < level < 1 or seed < 0:
        raise ValueError(f"n={n}, level={level}, seed={seed}: n from 1, level between 0 and 1, seed from 0")
    names = [str(i) for i in range(len(left))] if items is None else items
    if len(names) != len(left):
        raise ValueError(f"{len(names)} names of {len(left)} items")
    clusters = len(set(names))
    if clusters < 2:
        raise ValueError(f"{clusters} independent item: a bootstrap needs at least 2")
    drawn = _bootstrap_means(left - right, names, seed, n)
    low, high = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2])
    return Difference(float((left - right).mean()), float(low), float(high), level, clusters)


def compare(
    a: TaskResults, b: TaskResults, *, metric: str | None = None, seed: int = 0, n: int = 10_000, level: float = 0.95
) -> tuple[Comparison, ...]:
    """a − b on every task that both have, then on their average (each task resampled by itself).

    `metric` None takes each task's main one; a task that lacks `metric` is compared by its main one.

    Raises:
        ValueError: no task in common, or different items or prompts (another limit, corpus, data_dir or number of shots).
    """
    shared = [name for name in a.tasks if name in b.tasks]
    if not shared:
        raise ValueError(f"no task in common: {', '.join(a.tasks)} and {', '.join(b.tasks)}")
    if a.settings.get("bos") != b.settings.get("bos"):
        raise ValueError("one result was measured with BOS, the other without: a paired test needs the same prompts")
    found, drawn, observed = [], [], []
    for i, name in enumerate(shared):
        left, right = a[name], b[name]
        if left.items_sha256 != right.items_sha256:
            raise ValueError(
                f"task {name!r}: the two results are not on the same items and prompts ({left.n} and {right.n} items, "
                f"sha256 {left.items_sha256[:12]}… and {right.items_sha256[:12]}…); a paired test needs the same"
            )
        used = metric if metric in left.scores else left.metric
        x, y = _values(left, used), _values(right, used)
        right_or_wrong = bool(np.isin(x, (0, 1)).all() and np.isin(y, (0, 1)).all())
        difference = mean_difference(x, y, items=left.items, seed=seed + i, n=n, level=level)
        found.append(Comparison(name, used, left.n, difference, mcnemar(x, y) if right_or_wrong else None))
        drawn.append(_bootstrap_means(x - y, left.items, seed + i, n))
        observed.append(difference.difference)
    low, high = np.quantile(np.mean(drawn, axis=0), [(1 - level) / 2, (1 + level) / 2])
    items, clusters = sum(entry.n for entry in found), sum(entry.difference.clusters for entry in found)
    average = Difference(float(np.mean(observed)), float(low), float(high), level, clusters)
    return (*found, Comparison("average", metric or "main", items, average, None))


def _paired(a: Scores, b: Scores) -> tuple[Float64[np.ndarray, " item"], Float64[np.ndarray, " item"]]:
    left, right = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if left.shape != right.shape or left.ndim != 1 or not len(left):
        raise ValueError(f"scores of shape {left.shape} and {right.shape}: a paired test needs the same items, at least one")
    return left, right


def _bootstrap_means(
    values: Float64[np.ndarray, " item"], items: Sequence[str], seed: int, n: int
) -> Float64[np.ndarray, " draw"]:
    """`n` bootstrap means; items of one name are one cluster, drawn together."""
    order = {name: i for i, name in enumerate(dict.fromkeys(items))}
    member = np.array([order[name] for name in items])
    totals = np.stack([np.bincount(member, weights=values), np.bincount(member).astype(np.float64)], axis=1)
    # Clusters with the same sum and size are interchangeable: drawing how often each kind occurs is the same bootstrap, and
    # right or wrong answers have few kinds.
    kinds, frequency = np.unique(totals, axis=0, return_counts=True)
    generator = np.random.default_rng(seed)
    drawn = np.empty(n)
    for start in range(0, n, 256):  # all draws at once would not fit for ten thousand different scores
        counts = generator.multinomial(len(order), frequency / len(order), size=min(256, n - start)).astype(np.float64)
        sums, sizes = (counts @ kinds).T
        drawn[start : start + len(counts)] = sums / sizes
    return drawn
