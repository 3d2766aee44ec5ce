"""Plans and pruned models in the formats of mergekit and llama.cpp, read back by what reads them there."""

import json
import urllib.request

import gguf as library
import numpy as np
import pytest
import torch
from architectures import build
from gguf.quants import dequantize, quantize
from tokenizers import Regex, Tokenizer, pre_tokenizers, processors, trainers
from tokenizers import models as tokenizer_models
from transformers import PreTrainedTokenizerFast
from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

from prunelib import io, models
from prunelib.models import export, gguf
from prunelib.models.architectures import SLICED_MODEL_TYPE
from prunelib.models.loading import PROBE
from prunelib.models.plans import DropPlan

LEVEL = pre_tokenizers.ByteLevel(add_prefix_space=False)
SPLITS = {
    "gpt-2": LEVEL,
    "smollm": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), LEVEL]),
    "qwen2": pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(GGUF_PRE_TOKENIZER_SPLITS["qwen2"]), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    ),
}
PLAN = DropPlan(6, (1, 2, 5), "test")


def trained(split, bos=False):
    """A small byte-level BPE tokenizer with two special tokens and one that is not special."""
    tokenizer = Tokenizer(tokenizer_models.BPE())
    tokenizer.pre_tokenizer = SPLITS[split]
    options = {"special_tokens": ["<s>", "</s>"], "initial_alphabet": pre_tokenizers.ByteLevel.alphabet()}
    tokenizer.train_from_iterator(
        [gguf.PASSAGE, *["2023"] * 9], trainers.BpeTrainer(vocab_size=318, show_progress=False, **options)
    )
    tokenizer.add_tokens(["<think>"])
    if bos:
        ids = [("<s>", tokenizer.token_to_id("<s>"))]
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=ids)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.setattr(io, "CONVERTED", str(tmp_path / "converted"))
    monkeypatch.setattr(gguf, "PERPLEXITY_BOUND", float("inf"))
    return tmp_path


@pytest.mark.parametrize(
    ("family", "split", "kind"),
    [
        ("llama", "smollm", "f16"),
        ("llama_tied", "gpt-2", "q8_0"),
        ("llama", "qwen2", "q4_0"),
        ("qwen2", "qwen2", "f16"),
        ("qwen3", "qwen2", "q8_0"),
    ],
)
def test_a_gguf_file_holds_the_rounded_weights_and_the_tokens(place, family, split, kind):
    tokenizer = trained(split)
    shape = {"head_dim": 128} if family == "qwen3" else {}  # transformers reads no other from GGUF
    pruned = models.remove_layers(build(family, vocab_size=len(tokenizer) + 1, **shape), PLAN.removed)
    divergence = export.write_gguf(pruned, tokenizer, place / "tiny.gguf", kind)
    assert 0 < divergence < {"f16": 1e-6, "q8_0": 1e-3, "q4_0": 0.2}[kind]

    again, reread = models.load(place / "tiny.gguf"), models.load_tokenizer(place / "tiny.gguf")
    for name, tensor in pruned.state_dict().items():
        blocks = tensor.ndim == 2 and kind != "f16" and tensor.shape[1] % 32 == 0
        type_ = library.GGMLQuantizationType[kind.upper()] if blocks else None
        values = tensor.numpy()
        rounded = dequantize(quantize(values, type_), type_) if blocks else values.astype(np.float16).astype(np.float32)
        np.testing.assert_array_equal(again.state_dict()[name], values if tensor.ndim == 1 else rounded, err_msg=name)
    ids = torch.tensor([tokenizer(gguf.PASSAGE)["input_ids"][:64]])
    with torch.no_grad():
        expected, actual = (model(input_ids=ids).logits.double().log_softmax(-1) for model in (pruned, again))
    kl = torch.nn.functional.kl_div(actual, expected, log_target=True, reduction="sum") / ids.numel()
    assert divergence == pytest.approx(float(kl), rel=1e-4, abs=1e-12)
    text = "1952 <think> a <s> town</s>  of\n ½ wood"
    assert reread(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert reread.eos_token == "</s>"


def test_whether_a_text_begins_with_a_token_of_its_own_is_written(place):
    for bos in (False, True):
        tokenizer = trained("gpt-2", bos)
        export.write_gguf(build("llama", vocab_size=len(tokenizer)), tokenizer, place / "tiny.gguf")
        fields = library.GGUFReader(place / "tiny.gguf").fields
        assert fields["tokenizer.ggml.add_bos_token"].contents() == bos
        assert fields["tokenizer.ggml.bos_token_id"].contents() == tokenizer("a")["input_ids"][0] if bos else True


def test_a_file_that_reads_back_otherwise_never_takes_its_place(place, monkeypatch):
    tokenizer = trained("gpt-2")
    model = build("llama", vocab_size=len(tokenizer))
    monkeypatch.setitem(export.KINDS, "q4_0", 1e-6)
    with pytest.raises(models.CheckpointError, match=r"diverge by .* nats \(bound 1e-06\)"):
        export.write_gguf(model, tokenizer, place / "tiny.gguf", "q4_0")
    monkeypatch.setattr(export, "split_name", lambda _: "smollm")
    with pytest.raises(models.CheckpointError, match="other token ids"):
        export.write_gguf(model, tokenizer, place / "tiny.gguf")
    monkeypatch.setattr(library.quants, "dequantize", lambda data, _: np.zeros_like(data, dtype=np.float32))
    with pytest.raises(models.CheckpointError, match="with other values"):
        export.write_gguf(model, tokenizer, place / "tiny.gguf")
    assert list(place.iterdir()) == []


@pytest.mark.parametrize(
    ("family", "changes", "kind", "says"),
    [
        ("llama", {}, "q3_k", "'q3_k'; there are: f16, q8_0"),
        ("gpt_neox", {}, "f16", "model type 'gpt_neox'.*convert_hf_to_gguf"),
        ("gemma3_text", {}, "f16", "model type 'gemma3_text'"),
        ("qwen2_sliding", {}, "f16", "a sliding window"),
        ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}, "f16", "scaled rotary"),
    ],
)
def test_what_gguf_cannot_say_is_refused_before_any_work(place, family, changes, kind, says):
    tokenizer = trained("gpt-2")
    with pytest.raises(ValueError, match=says):
        export.write_gguf(build(family, vocab_size=len(tokenizer), **changes), tokenizer, place / "tiny.gguf", kind)
    assert list(place.iterdir()) == []


def test_a_tokenizer_of_another_kind_is_refused(place):
    words = Tokenizer(tokenizer_models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    with pytest.raises(models.UnsupportedModel, match="this tokenizer"):
        export.write_gguf(build("llama"), PreTrainedTokenizerFast(tokenizer_object=words), place / "tiny.gguf")


@pytest.mark.parametrize("removed", [(), (0,), (5,), (0, 1, 2, 3, 4), (1, 2, 5), (0, 2, 4)])
def test_a_mergekit_configuration_gives_the_plan_back(removed):
    plan = DropPlan(6, removed, "test")
    text = export.mergekit_yaml(plan, build("llama").config, "some/model")
    assert export.removed_by(text, 6) == removed


def test_what_is_written_beside_a_model(place):
    texts = export.write_plan(PLAN, build("llama").config, "some/model", place)
    assert texts["mergekit.yaml"] == (
        "slices:\n- sources:\n  - model: some/model\n    layer_range: [0, 1]\n"
        "- sources:\n  - model: some/model\n    layer_range: [3, 5]\nmerge_method: passthrough\n"
    )
    assert texts["llama-quantize.txt"] == "llama-quantize --prune-layers 1,2,5 in.gguf out.gguf q4_k_m\n"
    assert {name: (place / name).read_text() for name in texts} == texts
    texts = export.write_plan(PLAN, build("qwen3").config, "some/model", place)
    assert "mergekit crashes on a qwen3 model" in texts["mergekit.yaml"]
    assert [path.name for path in place.iterdir()] == ["llama-quantize.txt"], "what no longer holds is not left there"


def test_what_only_a_checkpoint_can_say(tiny_llama):
    parts = DropPlan(6, ((2, "attn"),), "test")
    with pytest.raises(models.UnsupportedModel, match="attn of layer 2 alone"):
        export.prune_layers_command(parts, tiny_llama.config)
    tiny_llama.config.model_type = SLICED_MODEL_TYPE
    with pytest.raises(models.UnsupportedModel, match="differ in width"):
        export.mergekit_yaml(PLAN, tiny_llama.config, "m")


@pytest.mark.parametrize(
    ("removed", "works"), [((16, 17), True), (tuple(range(6)), True), ((8, 9, 14, 16), False), ((5,), False)]
)
def test_gemma_3_keeps_the_order_that_llama_cpp_assumes(removed, works):
    kinds = ["full_attention" if index % 6 == 5 else "sliding_attention" for index in range(18)]
    config = build("gemma3_text", num_hidden_layers=18, layer_types=kinds).config
    plan = DropPlan(18, removed, "test")
    with pytest.raises(models.UnsupportedModel, match="mergekit crashes"):
        export.mergekit_yaml(plan, config, "m")
    if works:
        assert export.prune_layers_command(plan, config).split()[2] == ",".join(map(str, removed))
    else:
        with pytest.raises(models.UnsupportedModel, match="every 6th"):
            export.prune_layers_command(plan, config)


@pytest.mark.slow
def test_llama_cpp_predicts_as_transformers_does(tmp_path):
    """Tokens of a text, greedy tokens, and the perplexity of 64 tokens, of SmolLM2 without four layers in float16."""
    llama_cpp = pytest.importorskip("xllamacpp", reason="needs xllamacpp (pip install --no-deps xllamacpp)")
    try:
        tokenizer, dense = models.load_tokenizer("smollm2-135m-instruct"), models.load("smollm2-135m-instruct")
    except models.CheckpointError as error:
        pytest.skip(str(error))
    pruned = models.remove_layers(dense, [10, 12, 13, 22])
    export.write_gguf(pruned, tokenizer, tmp_path / "pruned.gguf")

    settings = llama_cpp.CommonParams()
    settings.model.path = str(tmp_path / "pruned.gguf")
    settings.n_ctx, settings.n_parallel, settings.cpuparams.n_threads, settings.warmup = 256, 1, 1, False
    server = llama_cpp.Server(settings)

    body = json.dumps({"content": PROBE}).encode()
    request = urllib.request.Request(f"{server.listening_address}/tokenize", body, {"Content-Type": "application/json"})
    assert json.load(urllib.request.urlopen(request))["tokens"] == tokenizer(PROBE)["input_ids"]

    def complete(prompt, tokens, **more):
        request = {"prompt": prompt, "max_tokens": tokens, "temperature": 0, "logprobs": 1, **more}
        return server.handle_completions(request)["choices"][0]["logprobs"]["content"]

    ids = tokenizer(gguf.PASSAGE)["input_ids"][:65]
    with torch.no_grad():
        generated = pruned.generate(torch.tensor([ids[:16]]), max_new_tokens=24, do_sample=False)[0, 16:].tolist()
        log_p = pruned(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
    assert [one["id"] for one in complete(ids[:16], 24)] == generated
    # The bias forces the token; the log-probability reported with it is that without the bias.
    found = [complete(ids[:at], 1, logit_bias=[[ids[at], 1e4]])[0] for at in range(1, 65)]
    assert [one["id"] for one in found] == ids[1:]
    expected = [float(log_p[at - 1, ids[at]]) for at in range(1, 65)]
    assert np.mean([one["logprob"] for one in found]) == pytest.approx(np.mean(expected), abs=0.01)
