"""Tasks through lm-eval: the same numbers as by lm-eval's own route, whatever is asked together; and the paired tests."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from architectures import build
from transformers import LlamaConfig, LlamaForCausalLM

from prunelib import models
from prunelib.evaluation import embedded_tasks, tasks
from prunelib.evaluation.intervals import McNemar
from prunelib.evaluation.tasks import TaskResult, TaskResults, evaluate_layer_sets, evaluate_tasks
from prunelib.io import project_root

pytest.importorskip("lm_eval")


@pytest.fixture(scope="module")
def tokenizer():
    return models.load_tokenizer(project_root() / "data" / "reference" / "ref-llama-32l")


@pytest.fixture(scope="module")
def small() -> LlamaForCausalLM:
    """A random model for the tokenizer of the embedded models."""
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=4096, max_position_embeddings=512, bos_token_id=0, eos_token_id=0, **sizes)
    with torch.random.fork_rng():
        return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def stories(shared_data):
    """A real tiny model with a Llama tokenizer, which puts BOS before every text by itself."""
    folder = shared_data / "models" / "stories260k"
    return models.load(folder), models.load_tokenizer(folder)


@pytest.fixture
def scripted(monkeypatch, small, tokenizer):
    """`evaluate_tasks` on a function (request → log-likelihood) instead of a model."""

    def run(score, task_set, **settings):
        from lm_eval.api.model import LM

        class Scripted(LM):
            max_length, truncated, sets, answers = 512, 0, [()], None
            loglikelihood_rolling = generate_until = None  # the embedded tasks ask for likelihoods only

            def loglikelihood(self, requests, disable_tqdm=False):
                return [(score(request), False) for request in requests]

        monkeypatch.setattr(tasks, "_language_model", lambda *_: Scripted())
        return evaluate_tasks(small, tokenizer, task_set, bos=False, progress=False, **settings)

    return run


def test_a_model_that_prefers_the_answer_is_right_and_one_that_avoids_it_wrong(scripted):
    for value, score in ((1.0, 1e6), (0.0, -1e6)):
        found = scripted(lambda request, score=score: score * (request.idx == request.doc["label"]), "embedded", limit=10)
        assert [(one.task, one.n, one.value()) for one in found.tasks.values()] == [
            (name, 10, value) for name in tasks.EMBEDDED
        ]
    assert "acc_norm" not in found["pydocs_summary"].scores  # one text is scored for all choices: there is nothing to normalize


def test_bos_is_there_or_not_whatever_the_tokenizer_does(small, tokenizer, stories):
    assert tokenizer("a tree").input_ids == tokenizer("a tree", add_special_tokens=False).input_ids  # never adds it
    assert stories[1]("a tree").input_ids[0] == stories[1].bos_token_id  # always adds it
    for model, words in ((small, tokenizer), stories):
        plain = words.encode("a tree", add_special_tokens=False)
        for bos in (True, False):
            lm = tasks._language_model(model, words, [()], bos, 4, False)
            wanted = [words.bos_token_id, *plain] if bos else plain
            assert lm.tok_encode("a tree") == wanted
            assert lm.tok_encode(words.bos_token + "a tree")[:2] == [words.bos_token_id, *plain][:2]
            assert lm.tok_encode("a tree", add_special_tokens=False) == plain
            context, continuation = lm._encode_pair("a tree", " stands")
            assert context == wanted and continuation == words.encode("a tree stands", add_special_tokens=False)[len(plain) :]
    assert tokenizer.pad_token is None  # lm-eval gave one to its own copy


def test_examples_are_answered_questions_from_other_documents(scripted):
    prompts = {}

    def keep(request):
        prompts.setdefault(request.task_name, []).append(request.args[0])
        return 0.0

    names = ["pydocs_next_line", "pydocs_summary", "pydocs_letters"]
    results = scripted(keep, names, limit=3, num_fewshot=2)
    for name in names:
        examples, items = embedded_tasks.items(name, "calibration"), embedded_tasks.items(name)
        between = {"pydocs_next_line": "\n", "pydocs_letters": " "}.get(name, "")
        told = {item.query + between + item.choices[item.label] + item.continuation for item in examples}
        for number, prompt in enumerate(prompts[name]):
            item = items[number // len(items[0].choices)]
            question = item.query or item.choices[number % len(item.choices)]
            assert prompt.endswith("\n\n" + question)
            before = prompt.removesuffix("\n\n" + question)
            assert before.startswith(tuple(told)) and before.endswith(tuple(told)) and before not in told
        assert results[name].settings["num_fewshot"] == 2


SETS = [(), (1,), (1, 3)]


@pytest.mark.slow
@pytest.mark.parametrize(("bos", "shots"), [(True, 0), (False, 1)])
def test_layer_sets_equal_one_pruned_model_at_a_time(stories, shared_data, bos, shots):
    model, tokenizer = stories
    names = ["embedded", "pydocs_letters", "arc_easy"] + ([] if shots else ["piqa", "winogrande", "lambada_openai"])
    settings = {"bos": bos, "limit": 3, "num_fewshot": shots, "data_dir": shared_data / "benchmarks", "progress": False}
    found = evaluate_layer_sets(model, tokenizer, names, [*SETS, (1,)], **settings)
    assert list(found) == SETS
    for removed in SETS:
        alone = evaluate_tasks(models.remove_layers(model, removed) if removed else model, tokenizer, names, **settings)
        assert found[removed].settings == alone.settings
        for name, theirs in alone.tasks.items():
            ours = found[removed][name]
            for same in ("predicted", "items_sha256", "settings"):
                assert getattr(ours, same) == getattr(theirs, same)
            for metric, scores in theirs.scores.items():  # LAMBADA's log-likelihoods are equal but for rounding
                assert ours.scores[metric] == pytest.approx(scores, rel=1e-5)
    assert found.layer_forwards < found.layer_forwards_alone


@pytest.mark.slow
@pytest.mark.parametrize(("bos", "shots"), [(True, 1), (False, 0)])
def test_equals_lm_evals_own_route(stories, shared_data, bos, shots):
    """`simple_evaluate` with the overrides that lm-eval documents for local files."""
    import lm_eval

    model, tokenizer = stories
    settings = {"bos": bos, "limit": 20, "num_fewshot": shots, "data_dir": shared_data / "benchmarks", "progress": False}
    states = torch.get_rng_state(), np.random.get_state()[1]  # noqa: NPY002
    results = evaluate_tasks(model, tokenizer, "arc_easy", **settings)
    assert torch.equal(states[0], torch.get_rng_state())
    assert (states[1] == np.random.get_state()[1]).all()  # noqa: NPY002
    ours, said = results["arc_easy"], {"bos": bos, "limit": 20, "num_fewshot": shots, "dtype": "float32"}
    assert said.items() <= results.settings.items()
    files = {path.stem: str(path) for path in (shared_data / "benchmarks" / "arc_easy").glob("*.jsonl")}
    local = {"task": "arc_easy", "dataset_path": "json", "dataset_name": None, "validation_split": None}
    local["dataset_kwargs"] = {"data_files": files}
    own = lm_eval.models.huggingface.HFLM(pretrained=model, tokenizer=tokenizer, batch_size=16, add_bos_token=bos)
    how = {"num_fewshot": shots, "limit": 20, "fewshot_random_seed": 1234, "log_samples": False}
    groups = [{"group": "local", "task": [local]}]
    theirs = lm_eval.simple_evaluate(own, tasks=groups, task_manager=tasks.task_manager(), **how)["results"]["arc_easy"]
    assert ours.value() == theirs["acc,none"] and ours.value("acc_norm") == theirs["acc_norm,none"]
    assert ours.stderr() == pytest.approx(theirs["acc_stderr,none"], rel=1e-12)


@pytest.mark.slow
def test_every_family_of_official_tasks_runs_offline(stories, shared_data):
    names = [*(name for name in tasks.TASK_SETS["simdiff_zero_shot"] if name != "boolq"), "mmlu", "lambada_openai", "wsc273"]
    results = evaluate_tasks(*stories, names, bos=True, limit=1, data_dir=shared_data / "benchmarks", progress=False)
    assert {name: result.n for name, result in results.tasks.items()} == {**dict.fromkeys(names, 1), "mmlu": 57}
    assert results["mmlu"].chance == 0.25 and {"mmlu_anatomy/0", "mmlu_astronomy/0"} < set(results["mmlu"].items)
    assert results["lambada_openai"].chance is None and "log_likelihood" in results["lambada_openai"].scores
    text = json.dumps([results.settings, [one.settings for one in results.tasks.values()], results.rows()])
    assert str(shared_data) not in text and str(Path.home()) not in text
    assert list(results.averages()) == ["average", "average_without_wsc"]


@pytest.mark.slow
def test_constant_yes_on_boolq_is_seen(scripted, shared_data):
    copies = {"data_dir": shared_data / "benchmarks"}
    results = scripted(lambda request: float(request.args[1] == " yes"), "boolq", **copies)
    boolq = results["boolq"]
    assert boolq.n == 3270
    assert round(100 * boolq.value(), 2) == 62.17  # SimDiff, Table 2: SLEB 62.17
    assert boolq.constant_share == 1 and boolq.best_constant == boolq.value()
    half = scripted(lambda request: float(len(request.args[0]) % 2 == request.idx), "boolq", limit=50, **copies)["boolq"]
    assert 0.2 < half.constant_share < 0.8


def offline_copy(folder: Path, **splits: list[dict]) -> None:
    folder.mkdir(parents=True)
    for split, rows in splits.items():
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


@pytest.mark.slow
def test_tasks_of_ours_and_generation_run_on_offline_copies(small, tokenizer, tmp_path):
    pairs = [{"sentence1": "一", "sentence2": "二", "label": label, "idx": label} for label in (0, 1, 2)]
    offline_copy(tmp_path / "cmnli", validation=pairs)
    story = {"context": ["甲：好。", "乙：好。"], "question": "谁？", "choice": ["甲", "乙", "丙"], "answer": "乙"}
    offline_copy(tmp_path / "c3", validation=[story, {**story, "choice": ["甲", "乙"]}])
    article = {"article": "A tree stood.", "question": "What stood?", "options": ["a", "b", "c", "d"], "answer": "C"}
    offline_copy(tmp_path / "race_middle", test=[article, {**article, "answer": "A"}])
    offline_copy(tmp_path / "xsum", test=[{"document": "A tree stood.", "summary": "A tree.", "id": "1"}] * 2)
    sums = [{"question": "1+1?", "answer": "It is 2. #### 2"}, {"question": "2+1?", "answer": "It is 3. #### 3"}]
    offline_copy(tmp_path / "gsm8k", test=sums, train=sums)
    pronoun = {"text": "The tree fell because it was old .", "span1_index": 1, "span2_index": 4}
    pronoun |= {"span1_text": "tree", "span2_text": "it"}
    offline_copy(tmp_path / "wsc", validation=[{**pronoun, "label": 1}, {**pronoun, "label": 0}])
    problems = [{"question": "What stood?", "answer": "D", "options": ["a", "b", "c", "d"]}]
    offline_copy(tmp_path / "race", test=[{"article": "A tree stood.", "problems": repr(problems)}] * 2)
    five = {"label": list("ABCDE"), "text": ["one", "two", "three", "four", "five"]}
    offline_copy(tmp_path / "commonsense_qa", validation=[{"question": "How many?", "choices": five, "answerKey": "B"}] * 2)
    names = ["cmnli", "c3", "race_middle", "xsum", "gsm8k", "wsc", "race", "commonsense_qa"]
    results = evaluate_tasks(small, tokenizer, names, bos=True, limit=2, num_fewshot=0, data_dir=tmp_path, progress=False)
    expected = {"cmnli": ((0, 1), 1 / 3), "c3": ((1, 1), 5 / 12), "race_middle": ((2, 0), 1 / 4), "wsc": ((1, 0), 1 / 2)}
    expected |= {"race": ((3, 3), 1 / 4), "commonsense_qa": ((1, 1), 1 / 5)}
    for name, (answers, chance) in expected.items():
        assert (results[name].answers, results[name].chance) == (answers, pytest.approx(chance))
    assert results["xsum"].metric == "rouge1" and 0 <= results["xsum"].value() <= 1
    assert set(results["gsm8k"].scores) == {"exact_match,strict-match", "exact_match,flexible-extract"}
    assert results["wsc"].choices == ("no", "yes") and results["wsc"].best_constant == 0.5
    article = ["pydocs_summary", "xsum"]
    with pytest.raises(ValueError, match=r"'xsum' asks for generate_until.*evaluate_tasks"):
        evaluate_layer_sets(small, tokenizer, article, [(1,)], bos=True, data_dir=tmp_path, progress=False)


@pytest.mark.parametrize("family", ["mistral", "gemma3_text", "gpt_neox", "bloom"])
def test_texts_continued_together_are_those_continued_alone(family, tokenizer):
    """Padded on the left, with a cache, beside texts that are longer and shorter than the window of 5 tokens."""
    from lm_eval.api.instance import Instance

    model, texts = (
        build(family, vocab_size=4096),
        ["Returns the", "A tree stood there, old as trees are, for long", "def f(x):"],
    )

    def continued(batch_size, *some):
        lm = tasks._language_model(model, tokenizer, [()], True, batch_size, False)
        options = {"until": ["\n\n\n"], "max_gen_toks": 8, "do_sample": False}
        return lm.generate_until([Instance("generate_until", {}, (text, options), 0) for text in some])

    assert continued(3, *texts) == [continued(1, text)[0] for text in texts]


def test_bad_requests_are_refused_before_any_work(small, tokenizer, tmp_path):
    def run(task_set="piqa", **settings):
        return evaluate_tasks(small, tokenizer, task_set, progress=False, **{"bos": True, "data_dir": tmp_path, **settings})

    with pytest.raises(FileNotFoundError, match=r"piqa/validation\.jsonl"):
        run()
    with pytest.raises(RuntimeError, match=r"openbookqa.*Hub.*data_dir"):
        run("openbookqa", data_dir=None)
    with pytest.raises(ValueError, match="limit=0"):
        run(limit=0)
    with pytest.raises(ValueError, match=r"removed \(4,\)"):
        evaluate_layer_sets(small, tokenizer, "embedded", [(1,), (4,)], bos=True, progress=False)
    with pytest.raises(ValueError, match="piqa is named twice"):
        run(["piqa", "simdiff_zero_shot"])
    row = {"goal": "Cut bread.", "sol1": "Use a knife.", "sol2": "Use a spoon.", "label": 0}
    offline_copy(tmp_path / "piqa", validation=[row, row])
    with pytest.raises(ValueError, match="evaluated items themselves"):
        run(num_fewshot=1)
    (tmp_path / "piqa" / "validation.jsonl").write_text('{"goal": "Cut bread.", "label": 0}\n')
    with pytest.raises(ValueError, match=r"piqa.*reads the column 'sol1'"):
        run()
    bare = models.load_tokenizer(project_root() / "data" / "reference" / "ref-llama-32l")
    bare.bos_token = None
    with pytest.raises(ValueError, match="bos=False"):
        evaluate_tasks(small, bare, "embedded", bos=True)


def result(task: str, correct: list[int], sha: str = "s") -> TaskResult:
    return TaskResult(task, {"acc": tuple(map(float, correct))}, tuple(map(str, range(len(correct)))), 0.5, (), (), (), sha, {})


def test_averages_with_and_without_the_two_tasks():
    answered = {"wsc": [1, 1, 0, 1], "boolq": [0, 1], "piqa": [0, 0, 1]}
    found = TaskResults({name: result(name, correct) for name, correct in answered.items()}, {}).averages()
    assert found["average"].value == pytest.approx((0.75 + 0.5 + 1 / 3) / 3)
    assert found["average_without_wsc"].value == pytest.approx((0.5 + 1 / 3) / 2)
    assert found["average_without_boolq"].n == 2
    assert found["average_without_wsc_boolq"].value == pytest.approx(1 / 3)
    assert all(average.low <= average.value <= average.high for average in found.values())
    assert list(TaskResults({"boolq": result("boolq", [0, 1])}, {}).averages()) == ["average"]


def test_a_guess_within_the_interval_is_at_chance():
    assert result("piqa", [1, 0] * 50).at_chance and result("piqa", [0] * 60 + [1] * 40).at_chance  # below chance, too
    assert not result("piqa", [1] * 75 + [0] * 25).at_chance


def test_compare_refuses_other_items_and_other_prompts():
    a = TaskResults({"piqa": result("piqa", [1, 0, 1, 1]), "boolq": result("boolq", [1, 0])}, {"bos": True})
    b = TaskResults({"piqa": result("piqa", [0, 0, 1, 0]), "boolq": result("boolq", [1, 1])}, {"bos": True})
    piqa, boolq, average = tasks.compare(a, b)
    assert piqa.mcnemar == McNemar(2, 0, 0.5)
    assert average.difference.value == pytest.approx((0.5 - 0.5) / 2)
    assert (boolq.n, average.n) == (2, 6)
    with pytest.raises(ValueError, match="not on the same items"):
        tasks.compare(a, TaskResults({"piqa": result("piqa", [1, 0], sha="other")}, {"bos": True}))
    with pytest.raises(ValueError, match="bos=False"):
        tasks.compare(a, TaskResults(b.tasks, {"bos": False}))
    with pytest.raises(ValueError, match="a task in common"):
        tasks.compare(a, TaskResults({"arc_easy": result("arc_easy", [1, 0])}, {"bos": True}))
