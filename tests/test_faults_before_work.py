"""What can be seen to be wrong is refused before a kernel starts, or in the first cell, before any work (docs/faults.md)."""

import json
import re
import shutil
import time

import pytest
import torch
from architectures import build
from model_helpers import CUT, random_windows, sliced
from tokenizers import Tokenizer, processors
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast

from prunelib import models
from prunelib.apps import model_card, own_model
from prunelib.criteria import ABLATIONS, BLOCK_CRITERIA, CRITERIA
from prunelib.criteria.statistics import collect, from_states, influence_through_final_norm, read_draws
from prunelib.depth.laco import collapse
from prunelib.io import project_root
from prunelib.lab import profile, provenance, run_notebook, runs
from prunelib.lab.parameters import FREE, PATTERNS, WRITTEN, ParameterError, check, parameters
from prunelib.text import Corpus, document_rows

NOTEBOOKS = sorted((project_root() / "notebooks" / "experiments").glob("*.ipynb"))
NOTEBOOKS += [project_root() / "notebooks" / name for name in ("own_model.ipynb", "00_quickstart.ipynb", "09_explorer.ipynb")]
WRONG = {bool: ["maybe", 2], int: [-1, "x", 1.5, "inf"], float: [-0.5, "x", "nan"], str: ["", " ", "a\0b"]}


def wrong_values(parameter):
    kind, default = parameter.kind, parameter.default
    yield from WRONG.get(kind, ())
    if kind is str and not parameter.optional:
        yield "null"
    if kind is list:
        yield {"a": 1}
        one = default[0] if default else "x"
        yield from ([] if parameter.name.endswith("splits") else [[one, one]])
        yield from [[-1]] if type(one) in (int, float) else [[""]] if isinstance(one, str) else []
    if kind in (str, list) and parameter.name not in (*FREE, *WRITTEN):
        yield ["/absent/a.txt"] if kind is list else "/absent/a.txt"
    yield from {"dtype": ["bf16", "torch.float32"], "device": ["gpu", "cuda:"]}.get(parameter.name, ())
    yield from [0] if parameter.name in ("batch_size", "report_windows", "tasks_limit", "max_documents") else []
    yield from [[99]] if parameter.name.endswith("sizes") else [99] if parameter.name == "layers_removed" else []


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_found_out_in_the_last_cell(notebook, tmp_path, monkeypatch):
    """Every parameter of every notebook, with wrong values: no kernel starts."""
    monkeypatch.setattr(run_notebook, "_execute", lambda *_: pytest.fail("a kernel was started"))
    tried = 0
    for parameter in parameters(notebook).values():
        for value in wrong_values(parameter):
            if value in ([99], 99) and notebook.stem in ("healing", "tasks"):  # which leave out what their choices lack
                continue
            if parameter.name == "output":
                continue
            with pytest.raises(ParameterError, match=parameter.name):
                model = {"model": "data/reference/ref-llama-32l"} if value in ([99], 99) else {}
                model |= {"searches": ["evolutionary"]} if (parameter.name, value) == ("evolved_sizes", [99]) else {}
                run_notebook.run_notebook(notebook, tmp_path / "out.json", **model, **{parameter.name: value})
            tried += 1
    assert tried > 2 * len(parameters(notebook))
    (tmp_path / "results").mkdir()
    (tmp_path / "a.ipynb").mkdir()
    for output in (tmp_path / "results", tmp_path / "a.json"):
        with pytest.raises(ParameterError, match="is a folder: give the result another name"):
            run_notebook.run_notebook(notebook, output)


def test_names_that_the_checks_know_are_those_of_the_package():
    assert all(re.fullmatch(PATTERNS["dtype"], name) for name in models.DTYPES)
    with pytest.raises(ParameterError, match="report_texts = '' is empty: name at least one"):
        check(project_root() / "notebooks" / "own_model.ipynb", {"report_texts": ""})


def test_text_where_a_truth_value_belongs():
    """Plain papermill hands `-p stream false` on as a text, which is true."""
    namespace = {"stream": "false", "n_samples": 4, "dtype": "float32"}
    assert runs.start("statistics", namespace).parameters["stream"] is namespace["stream"] is False
    with pytest.raises(ParameterError, match="stream = 'maybe' is not of type bool"):
        runs.start("statistics", {"stream": "maybe"})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: p.update(calibration_seeds=[]), "calibration_seeds is empty"),
        (lambda p: p.update(calibration_seeds=[1, 1]), "different whole numbers"),
        (lambda p: p["models"]["ref-llama-32l"].update(dtype="bf16"), "dtype = 'bf16' is not one of"),
        (lambda p: p["selection"]["simdiff"].update(sizes=[4, 99]), r"sizes = \[4, 99\]: the model has 32 layers"),
        (lambda p: p["selection"]["simdiff"].update(sizes=[4, 4]), "holds an entry twice"),
        (lambda p: p["selection"]["rules"].update(calibration_seeds=[]), "calibration_corpus without calibration_seeds"),
        (lambda p: p["healing"]["curve"].update(seeds=[]), "seeds = .* is empty"),
        (lambda p: p["optimum"]["truth"].update(exhaustive_sizes=[32]), "the model has 32 layers"),
    ],
)
def test_profiles(change, message):
    import yaml

    smoke = yaml.safe_load((project_root() / "profiles" / "smoke.yaml").read_text(encoding="utf-8"))
    profile.read(smoke)
    change(smoke)
    with pytest.raises(profile.ProfileError, match=message):
        profile.read(smoke)


def test_slow_is_not_dead(tmp_path, monkeypatch):
    """A kernel that takes long to start, on a busy node or a network disk."""
    (tmp_path / "sitecustomize.py").write_text(
        'import sys, time\nif any("ipykernel_launcher" in a for a in sys.orig_argv): time.sleep(60)\n'
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(run_notebook, "START_TIMEOUT", 1)
    begun = time.perf_counter()
    with pytest.raises(run_notebook.NotebookError, match=r"had not started after 1 s.*set PRUNELIB_START_TIMEOUT=SECONDS"):
        run_notebook.run_notebook(NOTEBOOKS[0], tmp_path / "out.json")
    assert time.perf_counter() - begun < 50


def written(folder, name, text):
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text(text)
    return str(folder / name)


def test_things_that_share_a_name(tmp_path):
    wiki, c4 = written(tmp_path, "wiki/test.txt", "one"), written(tmp_path, "c4/test.txt", "two")
    report, _ = own_model.read_texts([wiki, c4, "pydocs:evaluation"], {})
    assert [report[name].documents for name in ("wiki/test.txt", "c4/test.txt")] == [("one",), ("two",)]
    assert "pydocs:evaluation" in report
    with pytest.raises(ValueError, match="named twice"):
        own_model.read_texts([wiki, wiki], {})
    stats = from_states(torch.randn(1, 3, 4, 8))
    for name in ("a", "b"):
        stats.save(tmp_path / f"{name}.safetensors", {"model": "m", "corpus": "pydocs", "seed": "0"})
    with pytest.raises(ValueError, match="another draw of pydocs with seed 0"):
        read_draws([tmp_path / "a.json", tmp_path / "b.json"], "m")


@pytest.mark.parametrize(
    "other",
    [
        ("a.txt", "one\n<|endoftext|>\ntwo"),
        ("b.txt", "one\n<|endoftext|>\n two \n"),
        ("c.jsonl", '{"text": "one"}\n{"text": "two"}\n'),
        ("d.txt", "one\ntwo\n\n"),  # as one document
        ("e.jsonl", "".join(json.dumps({"text": text}) + "\n" for text in ["one", "x" * 99])),  # a part of it
    ],
    ids=lambda other: other[0],
)
def test_held_out_in_name_only(other, tmp_path):
    seen = written(tmp_path, "seen.txt", "one\n<|endoftext|>\ntwo")
    with pytest.raises(ValueError, match=r"% of the reported text .* are (documents|lines) of the text of calibration"):
        own_model.read_texts([written(tmp_path, *other)], {"calibration": seen})


def test_fractions_that_are_none_and_a_model_of_one_layer(tiny_llama):
    for keep in (float("nan"), 0.0, 1.0, -1):
        with pytest.raises(ValueError, match=f"keep={keep} of a model of 6 layers: a fraction between 0 and 1"):
            own_model.layers_to_remove(tiny_llama, keep)
    with pytest.raises(ValueError, match=r"a model of 1 layers: .*of 2 layers or more"):
        own_model.layers_to_remove(build("llama", num_hidden_layers=1), 0.5)
    kept = {name: rule.protect_first + rule.protect_last for name, rule in (CRITERIA | BLOCK_CRITERIA | ABLATIONS).items()}
    name = max(kept, key=kept.get)
    own_model.check_choice(name, 9, 9 - kept[name])
    with pytest.raises(ValueError, match=f"protected: only {9 - kept[name]} may go"):
        own_model.check_choice(name, 9, 10 - kept[name])


def test_checks_that_one_entry_has_its_neighbors_have():
    long, model = random_windows(2, 80), build("gpt2")
    entries = [lambda m, w: collect(m, w, progress=False), influence_through_final_norm]
    entries.append(lambda m, w: collapse(m, w, layers_per_merge=2, progress=False))
    for entry in entries:
        for windows, message in ((long, "80 tokens exceed the 64 positions"), (long[:, :9] * 0 + 999, "token ids 999 to 999")):
            with pytest.raises(ValueError, match=message):
                entry(model, windows)
        with pytest.raises(ValueError, match="training mode"):
            entry(build("gpt2").train(), long[:, :9])
    narrow = sliced(build("llama"), CUT, random_windows())
    for entry in entries[:2]:
        with pytest.raises(models.UnsupportedModel, match="this model is sliced, and its hidden states differ in width"):
            entry(narrow, random_windows())


def test_what_was_measured_is_what_is_said():
    """Rows of one document each get no end-of-text token, also where the tokenizer adds one, whether or not they are cut."""
    made = Tokenizer(WordLevel({"<unk>": 0, "<s>": 1, "</s>": 2, "a": 3, "b": 4}, unk_token="<unk>"))
    made.pre_tokenizer = Whitespace()
    special = [("<s>", 1), ("</s>", 2)]
    made.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=special)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    rows = document_rows(Corpus("x", "train", ("a b", "a b a b a b a b"), ""), tokenizer, 2, 6, 0, progress=False)
    assert sorted(rows.labels.tolist()) == [[1, 3, 4, -100, -100, -100], [1, 3, 4, 3, 4, 3]]


def test_a_model_s_fingerprint_is_not_its_name(tiny_llama, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    models.save(tiny_llama, None, "m")
    before = provenance.model_fingerprint("m")
    assert before == provenance.model_fingerprint(str(tmp_path / "m")) != "m"
    tiny_llama.lm_head.weight.data[0, 0] += 1  # the same names and sizes
    models.save(tiny_llama, None, "m", overwrite=True)
    assert provenance.model_fingerprint("m") != before
    assert provenance.model_source("m") == str(tmp_path / "m")
    shutil.rmtree("m")
    assert provenance.model_fingerprint("nobody/model") == "nobody/model"


def test_a_card_of_a_base_model_in_latin_1(tmp_path):
    (tmp_path / "README.md").write_bytes("---\nlicense: mit\n---\nna\xefve".encode("latin-1"))
    assert model_card.license_of(str(tmp_path)) == {"license": "mit"}
