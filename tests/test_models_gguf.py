"""GGUF files: a tiny Llama written with the gguf package, as llama.cpp's converter does, and files that are wrong."""

import hashlib
import json

import gguf as library
import numpy as np
import pytest
import torch
from gguf.quants import dequantize, quantize
from tokenizers import Tokenizer, pre_tokenizers, trainers
from tokenizers import models as tokenizer_models
from transformers import LlamaConfig, LlamaForCausalLM

from prunelib import io, models
from prunelib.lab.provenance import model_description
from prunelib.models import gguf

QUANTIZED = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
NAMES = {f"self_attn.{part}_proj": f"attn_{part}" for part in "qkv"} | {"self_attn.o_proj": "attn_output"}
NAMES |= {"mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down"}
NAMES |= {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}
OUTER = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}
Q8_0 = library.GGMLQuantizationType.Q8_0


@pytest.fixture(scope="module")
def vocabulary():
    tokenizer = Tokenizer(tokenizer_models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    options = {"special_tokens": ["<|endoftext|>"], "initial_alphabet": pre_tokenizers.ByteLevel.alphabet()}
    trainer = trainers.BpeTrainer(vocab_size=320, show_progress=False, **options)
    tokenizer.train_from_iterator([gguf.PASSAGE, "1952 1952 1952 1952"], trainer)
    return tokenizer


@pytest.fixture(scope="module")
def original(vocabulary):
    torch.manual_seed(0)
    shape = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3}
    shape |= {"num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(vocab_size=vocabulary.get_vocab_size(), tie_word_embeddings=True, max_position_embeddings=256, **shape)
    return LlamaForCausalLM(config).eval()


def permuted(weight, heads):
    """llama.cpp rotates neighboring dimensions, transformers those of the two halves."""
    return weight.reshape(heads, 2, weight.shape[0] // heads // 2, -1).swapaxes(1, 2).reshape(weight.shape)


def write(file, model, vocabulary, *, architecture="llama", tokens=True, parts=0, drop=None, pre="smollm"):
    config, writer = model.config, library.GGUFWriter(file, architecture)
    writer.add_name("tiny")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config.vocab_size)
    if parts:
        writer.add_uint16("split.count", parts)
    if tokens:
        state = vocabulary.get_vocab()
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(pre)
        writer.add_token_list(sorted(state, key=state.get))
        writer.add_token_merges([" ".join(pair) for pair in merges(vocabulary)])
        writer.add_bos_token_id(0)
        writer.add_eos_token_id(0)
        writer.add_add_bos_token(False)
    for name, tensor in model.state_dict().items():
        weight = tensor.numpy()
        if name in OUTER:
            writer.add_tensor(OUTER[name], weight)
        elif name != "lm_head.weight":
            _, _, layer, *middle, _ = name.split(".")
            short = NAMES[".".join(middle)]
            if short in ("attn_q", "attn_k"):
                weight = permuted(weight, config.num_attention_heads if short == "attn_q" else config.num_key_value_heads)
            if f"{layer}.{short}" != drop:
                raw = {"raw_dtype": Q8_0} if short in QUANTIZED else {}
                writer.add_tensor(f"blk.{layer}.{short}.weight", quantize(weight, Q8_0) if raw else weight, **raw)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def merges(vocabulary):
    return [pair if isinstance(pair, list) else pair.split(" ") for pair in json.loads(vocabulary.to_str())["model"]["merges"]]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(io, "CONVERTED", str(tmp_path / "converted"))
    monkeypatch.setattr(gguf, "PERPLEXITY_BOUND", float("inf"))
    return tmp_path


def test_model_of_a_file_has_the_dequantized_weights(folder, original, vocabulary):
    file = write(folder / "tiny.gguf", original, vocabulary)
    model = models.load(file)
    for name, tensor in original.state_dict().items():
        quantized = "proj" in name
        expected = dequantize(quantize(tensor.numpy(), Q8_0), Q8_0) if quantized else tensor.numpy()
        np.testing.assert_array_equal(model.state_dict()[name].numpy(), expected, err_msg=name)
    source = model.config.dequantized_from
    assert source["file"] == "tiny.gguf" and source["weights"] == "21 Q8_0 8 F32"
    assert not (folder / "converted").joinpath("tiny.gguf").exists()


def test_conversion_happens_once(folder, original, vocabulary, monkeypatch):
    file = write(folder / "tiny.gguf", original, vocabulary)
    first = gguf.safetensors_folder(file)
    monkeypatch.setattr(gguf, "_convert", lambda *_: pytest.fail("converted again"))
    assert gguf.safetensors_folder(file) == first
    assert [path.name for path in (folder / "converted").iterdir()] == [first.name]


def test_digits_are_split_as_the_model_was_trained(folder, original, vocabulary):
    tokenizer = models.load_tokenizer(write(folder / "tiny.gguf", original, vocabulary))
    assert len(vocabulary.encode("1952").ids) < 4  # the vocabulary has a merge of digits
    assert tokenizer.convert_ids_to_tokens(tokenizer("1952", add_special_tokens=False)["input_ids"]) == list("1952")


def test_a_pruned_model_says_where_its_weights_come_from(folder, original, vocabulary):
    model = models.load(write(folder / "tiny.gguf", original, vocabulary))
    models.save(models.remove_layers(model, [1]), None, folder / "pruned")
    assert models.load(folder / "pruned").config.dequantized_from["file"] == "tiny.gguf"
    assert model_description(str(folder / "pruned"))["dequantized_from"]["weights"] == "21 Q8_0 8 F32"


def truncated(file):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def no_gguf(file):
    file.write_bytes(b"PK\3\4 an archive")


@pytest.mark.parametrize(
    ("options", "damage", "says"),
    [
        ({}, truncated, r"bad\.gguf is truncated"),
        ({}, no_gguf, r"bad\.gguf is not a GGUF file"),
        ({"architecture": "gemma3n"}, None, r"architecture 'gemma3n'.*safetensors"),
        ({"tokens": False}, None, r"no tokenizer"),
        ({"pre": "next-year"}, None, r"splits text as 'next-year', which transformers .* does not know"),
        ({"parts": 3}, None, r"one of 3 parts.*--merge"),
        ({"drop": "1.ffn_up"}, None, r"1 missing \(model\.layers\.1\.mlp\.up_proj\.weight\)"),
    ],
)
def test_wrong_files_are_refused(folder, original, vocabulary, options, damage, says):
    file = write(folder / "bad.gguf", original, vocabulary, **options)
    if damage is not None:
        damage(file)
    with pytest.raises(models.CheckpointError, match=says):
        models.load(file)
    assert not list((folder / "converted").glob("*")) if (folder / "converted").exists() else True


def test_a_model_that_knows_no_english_is_refused(folder, original, vocabulary, monkeypatch):
    file = write(folder / "tiny.gguf", original, vocabulary)
    monkeypatch.setattr(gguf, "PERPLEXITY_BOUND", 200.0)
    with pytest.raises(models.CheckpointError, match=r"perplexity 3\d\d, bound 200.*transformers"):
        models.load(file)


def test_a_file_that_does_not_exist(folder):
    with pytest.raises(models.CheckpointError, match=r"nowhere\.gguf"):
        models.load(folder / "nowhere.gguf")


def test_packaged_models(folder, original, vocabulary, monkeypatch):
    """Installed in parts, joined and checked; a missing package and another file are errors that name the command."""
    whole = write(folder / "tiny.gguf", original, vocabulary).read_bytes()
    for part, content in enumerate((whole[:9999], whole[9999:])):
        package = folder / f"tiny_part{part}"
        package.mkdir()
        (package / "__init__.py").write_text("raise ImportError('packages of models are never imported')\n")
        (package / "tiny.part").write_bytes(content)
    monkeypatch.syspath_prepend(str(folder))

    def packaged(sha256, parts=2):
        files = tuple((f"tiny_part{part}", "tiny.part") for part in range(parts))
        return gguf.PackagedModel(files, sha256, "MIT", False, float("inf"), "make tiny")

    sha256 = hashlib.sha256(whole).hexdigest()
    monkeypatch.setattr(gguf, "PACKAGED", {"tiny": packaged(sha256), "other": packaged("0" * 64), "gone": packaged(sha256, 3)})
    assert models.load("tiny").config.dequantized_from["sha256"] == sha256
    assert gguf.safetensors_folder("tiny") == folder / "converted" / "tiny"
    with pytest.raises(models.CheckpointError, match=r"sha256 .* `make tiny`"):
        models.load("other")
    with pytest.raises(models.CheckpointError, match=r"not installed: run `make tiny`"):
        models.load("gone")
