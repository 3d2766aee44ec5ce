"""Folders as people have them: every way into a model sees the same weights and tokens, or refuses (docs/faults.md)."""

import json
import os
import shutil

import pytest
import torch
from architectures import build
from model_helpers import random_windows
from safetensors.torch import load_file, save_file
from tokenizers import Regex, Tokenizer, pre_tokenizers, trainers
from tokenizers.models import BPE
from transformers import AutoModelForCausalLM, Gemma3Config, Gemma3ForConditionalGeneration

from prunelib import models
from prunelib.evaluation import perplexity
from prunelib.models import CheckpointError, saving
from prunelib.scale import offload

WINDOWS = random_windows(4, 12, vocabulary=96)


def rewritten(folder, change):
    file = folder / "model.safetensors"
    weights = load_file(file)
    save_file(change(weights), file, metadata={"format": "pt"})


def edited(file, **values):
    before = json.loads(file.read_text()) if file.is_file() else {}
    file.write_text(json.dumps(before | values))


def one_file(folder):
    build("llama").save_pretrained(folder)


def shards(folder):
    build("llama").save_pretrained(folder, max_shard_size="20KB")
    assert not (folder / "model.safetensors").exists()


def both(folder):
    shards(folder)
    save_file(build("llama", seed=1).state_dict(), folder / "model.safetensors", metadata={"format": "pt"})


def stale_index(folder):
    both(folder)
    for shard in folder.glob("model-*.safetensors"):
        shard.unlink()


def named_file(folder):
    both(folder)
    shutil.move(folder / "model.safetensors", folder / "other.safetensors")
    edited(folder / "config.json", transformers_weights="other.safetensors")


def another_head(folder):
    build("llama_tied").save_pretrained(folder)
    rewritten(folder, lambda weights: weights | {"lm_head.weight": torch.randn(128, 32) * 0.3})


def stored_frequencies(folder):
    build("llama").save_pretrained(folder)
    name = "model.layers.{}.self_attn.rotary_emb.inv_freq"
    rewritten(folder, lambda weights: weights | {name.format(layer): torch.ones(4) for layer in range(6)})


def stored_masks(folder):
    build("gpt2").save_pretrained(folder)
    old = {"bias": torch.ones(1, 1, 64, 64), "masked_bias": torch.tensor(-1e4)}
    names = {f"transformer.h.{layer}.attn.{name}": value.clone() for layer in range(6) for name, value in old.items()}
    rewritten(folder, lambda weights: weights | names)


def multimodal(folder):
    text = {"vocab_size": 128, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 6, "num_attention_heads": 4}
    text |= {"num_key_value_heads": 2, "head_dim": 8, "sliding_window": 5, "max_position_embeddings": 64}
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"image_size": 16, "patch_size": 8}
    tokens = {"image_token_index": 120, "boi_token_index": 121, "eoi_token_index": 122, "mm_tokens_per_image": 4}
    config = Gemma3Config(text_config=text | {"query_pre_attn_scalar": 8}, vision_config=vision, **tokens)
    Gemma3ForConditionalGeneration(config).save_pretrained(folder)


FOLDERS = [one_file, shards, both, stale_index, named_file, another_head, stored_frequencies, stored_masks, multimodal]


@pytest.mark.parametrize("make", FOLDERS, ids=lambda make: make.__name__)
def test_two_paths_to_one_model(make, tmp_path):
    """Resident, streamed, plain transformers, and pruned, saved and loaded again: one answer."""
    make(tmp_path / "m")
    model = models.load(tmp_path / "m")
    nll = perplexity(model, WINDOWS).nll
    assert perplexity(AutoModelForCausalLM.from_pretrained(tmp_path / "m").eval(), WINDOWS).nll == pytest.approx(nll, rel=1e-6)
    streamed = offload.OffloadedModel(tmp_path / "m", dtype="float32")
    assert offload.perplexity(streamed, WINDOWS).nll == pytest.approx(nll, rel=1e-6)
    pruned = models.remove_layers(model, [1])
    models.save(pruned, None, tmp_path / "pruned")
    expected = pytest.approx(perplexity(pruned, WINDOWS).nll, rel=1e-6)
    assert perplexity(models.load(tmp_path / "pruned"), WINDOWS).nll == expected
    assert offload.perplexity(offload.OffloadedModel(tmp_path / "pruned", dtype="float32"), WINDOWS).nll == expected


@pytest.mark.parametrize("weights", [True, False], ids=["merged model", "adapter alone"])
def test_a_folder_that_is_more_than_a_checkpoint(weights, tmp_path):
    if weights:
        one_file(tmp_path)
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "base"}')
    for load in (models.load, lambda folder: offload.OffloadedModel(folder, dtype="float32")):
        with pytest.raises(CheckpointError, match=r"adapter_config\.json.*delete the files adapter_\*.*merge_and_unload"):
            load(tmp_path)


def test_keys_that_a_model_has_no_place_for(tmp_path):
    one_file(tmp_path)
    rewritten(tmp_path, lambda weights: weights | {"v_head.summary.weight": torch.zeros(1, 32)})
    for load in (models.load, lambda folder: offload.OffloadedModel(folder, dtype="float32")):
        with pytest.raises(CheckpointError, match=r"1 unexpected \(v_head.summary.weight\). LlamaForCausalLM has no place"):
            load(tmp_path)


@pytest.mark.parametrize(
    ("settings", "kept"),
    [
        ({"do_sample": False, "temperature": 0.0}, {"do_sample": False}),
        ({"temperature": 0.6, "top_p": 0.9}, {}),  # as published with Llama 2
        ({"length_penalty": 1.2}, {}),
        ({"early_stopping": True, "num_beams": 1}, {"num_beams": 1}),
        ({"pad_token_id": -1}, {}),
        ({"do_sample": True, "temperature": 0.6, "num_beams": 3, "length_penalty": 1.2}, None),
    ],
)
def test_a_generation_config_that_transformers_reads_and_does_not_write(settings, kept, tmp_path):
    """What decoding does not read is left out on loading: the saved model generates as the original does."""
    one_file(tmp_path / "m")
    (tmp_path / "m" / "generation_config.json").write_text(json.dumps(settings))
    if kept is None:
        model, kept = models.load(tmp_path / "m"), settings
    else:
        with pytest.warns(UserWarning, match="settings of generation_config that decoding does not read are left out: .* `"):
            model = models.load(tmp_path / "m")
    models.save(model, None, tmp_path / "out")
    written = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert {name: value for name, value in written.items() if name != "transformers_version"} == kept
    given = {"max_new_tokens": 4, "min_new_tokens": 4, "pad_token_id": 0, "eos_token_id": 2}
    texts = []
    for folder in ("m", "out"):
        torch.manual_seed(0)
        texts.append(AutoModelForCausalLM.from_pretrained(tmp_path / folder).generate(WINDOWS[:1, :4], **given).tolist())
    assert texts[0] == texts[1]


def test_a_generation_config_that_cannot_be_mended_says_why_on_loading(tmp_path):
    one_file(tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps({"max_new_tokens": -1}))
    with pytest.raises(CheckpointError, match="`max_new_tokens` must be greater than 0"):
        models.load(tmp_path)


@pytest.fixture
def own_tokenizer(tmp_path):
    """A folder of type qwen2 whose tokenizer.json splits otherwise than Qwen's, as DeepSeek-R1-Distill-Qwen's does."""
    stored = Tokenizer(BPE())
    splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in (r"\p{N}{1,3}", r"\s?\p{L}+")]
    stored.pre_tokenizer = pre_tokenizers.Sequence([*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    options = {"special_tokens": ["<s>", "</s>"], "initial_alphabet": pre_tokenizers.ByteLevel.alphabet()}
    stored.train_from_iterator(
        ["word 2023 650841823"] * 50, trainers.BpeTrainer(vocab_size=300, show_progress=False, **options)
    )
    build("qwen2", vocab_size=300).save_pretrained(tmp_path / "m")
    stored.enable_padding(length=9)  # of the file; texts that are compared have none
    stored.save(str(tmp_path / "m" / "tokenizer.json"))
    edited(tmp_path / "m" / "tokenizer_config.json", tokenizer_class="LlamaTokenizerFast", bos_token="<s>", eos_token="</s>")
    stored.no_padding()
    return tmp_path / "m", stored


def test_a_tokenizer_that_is_not_the_file_s(own_tokenizer, tmp_path):
    folder, stored = own_tokenizer
    with pytest.warns(UserWarning, match=r"Qwen2Tokenizer gives other token ids than the tokenizer\.json"):
        tokenizer = models.load_tokenizer(folder)
    text = "word 2023, naïve 650841823"
    assert tokenizer(text, add_special_tokens=False)["input_ids"] == stored.encode(text, add_special_tokens=False).ids
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1)
    with pytest.warns(UserWarning, match="which is taken instead"):
        models.save(models.load(folder), tokenizer, tmp_path / "out")
        assert models.load_tokenizer(tmp_path / "out")(text)["input_ids"] == tokenizer(text)["input_ids"]


@pytest.mark.parametrize(
    "changes",
    [
        {"dtype": "fp16", "torch_dtype": "fp16"},
        {"layer_types": ["full_attention"] * 8},  # of the unpruned model
        {"num_hidden_layers": "6"},
        {"tie_word_embeddings": None},
        {"quantization_config": {"quant_method": "gptq", "bits": 4}},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_foreign_checkpoints_end_in_one_line(changes, tmp_path):
    one_file(tmp_path)
    edited(tmp_path / "config.json", **changes)
    with pytest.raises(CheckpointError) as caught:
        models.load(tmp_path)
    assert "\n" not in str(caught.value) and len(str(caught.value)) > 60
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0", "added_tokens": [], "model": {"type": "New", "vocab": {}}}')
    with pytest.raises(CheckpointError, match="cannot load a tokenizer"):
        models.load_tokenizer(tmp_path)


def test_saving_where_a_folder_cannot_be_swapped(tiny_llama, tmp_path, monkeypatch):
    """Through a link, into the working directory, and into what looks like any folder and is busy (a bind mount)."""
    for name in ("real", "here", "mounted"):
        (tmp_path / name).mkdir()
    (tmp_path / "link").symlink_to("real")
    models.save(tiny_llama, None, tmp_path / "link")
    assert (tmp_path / "link").is_symlink() and models.load(tmp_path / "real")
    monkeypatch.chdir(tmp_path / "here")
    rename = os.rename

    def busy(source, target, **options):
        if os.fspath(source) == str(tmp_path / "mounted"):
            raise OSError(16, "Device or resource busy")
        return rename(source, target, **options)

    monkeypatch.setattr(os, "rename", busy)
    for folder in (".", tmp_path / "mounted"):
        for seed in (0, 1):  # new, and over another one
            model = build("llama", seed=seed)
            models.save(model, None, folder, overwrite=bool(seed))
            assert torch.equal(models.load(folder).lm_head.weight, model.lm_head.weight)
        assert sorted(os.listdir(folder)) == ["config.json", "generation_config.json", "model.safetensors"]
    assert os.getcwd() == str(tmp_path / "here")


def test_what_keeps_a_model_from_being_saved_is_found_before_any_work(own_tokenizer, tmp_path, monkeypatch):
    folder, _ = own_tokenizer
    model = models.load(folder)
    with pytest.warns(UserWarning, match="which is taken instead"):
        tokenizer = models.load_tokenizer(folder)
        saving.rehearse(model, tokenizer, tmp_path / "new")
        assert not (tmp_path / "new").exists()
        (tmp_path / "file").touch()
        for place in (tmp_path / "file", tmp_path / "file" / "below"):
            with pytest.raises(ValueError, match=r"is a file or a folder that is not empty|cannot write to"):
                saving.rehearse(model, tokenizer, place)
        model.generation_config.max_new_tokens = -1
        with pytest.raises(CheckpointError, match="max_new_tokens"):
            saving.rehearse(model, tokenizer, tmp_path / "new")
