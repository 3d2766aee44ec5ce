"""A plan or a pruned model for other programs: mergekit, `llama-quantize`, and GGUF files for llama.cpp.

mergekit and `llama-quantize` remove the layers of the dense model, without repair or healing; a GGUF file holds the model as it
is. Every export is read back before it is called done. What a format cannot say is refused: it would run as another model.
"""

import itertools
import json
import os
import unicodedata
from functools import partial
from pathlib import Path

import gguf as library
import numpy as np
import torch
import yaml
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from prunelib.io import replacing, write_text
from prunelib.models import gguf
from prunelib.models.architectures import SLICED_MODEL_TYPE, UnsupportedModel
from prunelib.models.loading import PROBE, CheckpointError
from prunelib.models.plans import DropPlan

ARCHITECTURES = {"llama": "LLAMA", "qwen2": "QWEN2", "qwen3": "QWEN3"}  # model type → its name in `gguf.MODEL_ARCH`
KINDS = {"f16": 0.001, "q8_0": 0.02, "q4_0": 2.0}
"""Types of the matrices in a GGUF file, with the largest mean divergence KL(model || file) on `PASSAGE`, nats per token."""
GEMMA_PERIOD = 6  # in llama.cpp every sixth layer of Gemma 3 has full attention, whatever the configuration says
CONVERT = "save it as safetensors and try convert_hf_to_gguf.py of llama.cpp"


def check_plan(plan: DropPlan, config: PreTrainedConfig) -> None:
    """Raise UnsupportedModel when no other program can say what `plan` removes of a model with this configuration."""
    if config.model_type == SLICED_MODEL_TYPE:
        raise UnsupportedModel("layers of a sliced model differ in width, which GGUF and mergekit cannot say: keep safetensors")
    for layer, part in (unit for unit in plan.removed if not isinstance(unit, int)):
        raise UnsupportedModel(f"the plan removes the {part} of layer {layer} alone: GGUF and mergekit know whole layers only")


def mergekit_yaml(plan: DropPlan, config: PreTrainedConfig, model: str) -> str:
    """A mergekit configuration (method `passthrough`, upper bounds exclusive) that removes the layers of `plan` from `model`.

    Raises as `check_plan`, and UnsupportedModel for a configuration that lists the kind of every layer (Qwen2 and 3, Gemma 3):
    mergekit 0.1.5 leaves the list as it was, and crashes.
    """
    check_plan(plan, config)
    if getattr(config.get_text_config(decoder=True), "layer_types", None):
        raise UnsupportedModel(
            f"mergekit crashes on a {config.model_type} model: it does not shorten the configuration's layer_types. Take the "
            "saved checkpoint, or the command for llama-quantize"
        )
    bounds = itertools.pairwise([-1, *plan.removed, plan.n_layers])
    slices = [{"sources": [{"model": model, "layer_range": [a + 1, b]}]} for a, b in bounds if a + 1 < b]
    text = yaml.safe_dump({"slices": slices, "merge_method": "passthrough"}, sort_keys=False, default_flow_style=None)
    if removed_by(text, plan.n_layers) != plan.removed:
        raise CheckpointError(f"the mergekit configuration does not remove {plan.removed}: {text}")
    return text


def removed_by(text: str, n_layers: int) -> tuple[int, ...]:
    """Inverse of `mergekit_yaml`: the layers of a model of `n_layers` that a mergekit configuration leaves out."""
    slices = [source["layer_range"] for one in yaml.safe_load(text)["slices"] for source in one["sources"]]
    return tuple(sorted({*range(n_layers)}.difference(*(range(*bounds) for bounds in slices))))


def prune_layers_command(plan: DropPlan, config: PreTrainedConfig) -> str:
    """The command of llama.cpp that removes the layers of `plan` from a GGUF file of the dense model, and quantizes it.

    Raises as `check_plan`, and UnsupportedModel for a Gemma 3 in which llama.cpp would mistake the attention of a layer.
    """
    check_plan(plan, config)
    config = config.get_text_config(decoder=True)
    if config.model_type.startswith("gemma3"):
        kept = [kind for index, kind in enumerate(config.layer_types) if index not in plan.removed]
        full = [index for index, kind in enumerate(kept) if kind == "full_attention"]
        if full != list(range(GEMMA_PERIOD - 1, len(kept), GEMMA_PERIOD)):
            raise UnsupportedModel(
                f"full attention would be in layers {full} of the {len(kept)} that stay, but llama.cpp puts it in every "
                f"{GEMMA_PERIOD}th of a Gemma 3: remove layers that keep this order, or keep safetensors"
            )
    layers = f"--prune-layers {','.join(map(str, plan.removed))} " if plan.removed else ""
    return f"llama-quantize {layers}in.gguf out.gguf q4_k_m\n"


def write_plan(plan: DropPlan, config: PreTrainedConfig, model: str, folder: str | os.PathLike) -> dict[str, str]:
    """Write `mergekit.yaml` and `llama-quantize.txt` to `folder`: their texts by name, the reason where one is refused."""
    texts = {}
    made = {"mergekit.yaml": partial(mergekit_yaml, model=model), "llama-quantize.txt": prune_layers_command}
    for name, make in made.items():
        try:
            texts[name] = make(plan, config)
            write_text(Path(folder) / name, texts[name])
        except UnsupportedModel as error:
            texts[name] = f"not written: {error}"
            (Path(folder) / name).unlink(missing_ok=True)
    return texts


def check_gguf(config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase, kind: str) -> None:
    """Raise, before any work, ValueError for an unknown kind and UnsupportedModel for what `write_gguf` cannot say."""
    if kind not in KINDS:
        raise ValueError(f"no kind of GGUF file {kind!r}; there are: {', '.join(KINDS)}")
    reasons = {
        f"the model type {config.model_type!r} (known: {', '.join(ARCHITECTURES)})": config.model_type not in ARCHITECTURES,
        "scaled rotary embeddings": (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default") != "default",
        "a sliding window": "sliding_attention" in (getattr(config, "layer_types", None) or ()),
        "this tokenizer (no byte-level BPE, or an unknown split)": split_name(tokenizer) is None,
    }
    for reason in (reason for reason, holds in reasons.items() if holds):
        raise UnsupportedModel(f"no GGUF file is written for {reason}: {CONVERT}")


def split_name(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """What llama.cpp calls the way in which a byte-level BPE tokenizer splits text first; None for any other tokenizer."""
    from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

    state = json.loads(tokenizer.backend_tokenizer.to_str())
    parts = (state["pre_tokenizer"] or {}).get("pretokenizers", [state["pre_tokenizer"]])
    match [part["type"] for part in parts if part] if state["model"]["type"] == "BPE" else []:
        case ["ByteLevel"]:
            return gguf.LIKE_GPT2[0]
        case ["Digits", "ByteLevel"] if parts[0]["individual_digits"]:
            return gguf.DIGITS_FIRST[0]
        case ["Split", "ByteLevel"]:
            known = {split: name for name, split in reversed(GGUF_PRE_TOKENIZER_SPLITS.items())}
            return known.get(parts[0]["pattern"].get("Regex"))
    return None


def write_gguf(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, file: str | os.PathLike, kind: str = "f16", note: str = ""
) -> float:
    """Write a GGUF file, matrices as `kind` and all else in float32; transformers reads it back before it is in its place.

    Returns KL(model || file), nats per token of `PASSAGE`. Raises as `check_gguf`, and CheckpointError when a weight read back
    is not the rounded one, a token id is another, or the divergence is above `KINDS`. Needs the memory of two more models.
    """
    check_gguf(model.config, tokenizer, kind)
    tied = model.config.tie_word_embeddings
    state = {name: tensor for name, tensor in model.state_dict().items() if not (tied and name == "lm_head.weight")}
    with replacing(file) as temporary:
        writer = library.GGUFWriter(temporary, ARCHITECTURES[model.config.model_type].lower())
        _write_config(writer, model, kind, note)
        _write_tokenizer(writer, tokenizer, model.get_input_embeddings().num_embeddings)
        rounded = {name: _write_tensor(writer, model.config, name, tensor, kind) for name, tensor in state.items()}
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return _checked(model, tokenizer, temporary, rounded, KINDS[kind])


def _write_config(writer, model: PreTrainedModel, kind: str, note: str) -> None:
    config = model.config
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    fields = {
        "name": Path(config._name_or_path or config.model_type).name,
        "description": note,
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "head_count": config.num_attention_heads,
        "head_count_kv": config.num_key_value_heads,
        "layer_norm_rms_eps": config.rms_norm_eps,
        "rope_freq_base": config.rope_parameters["rope_theta"],
        **dict.fromkeys(("rope_dimension_count", "key_length", "value_length"), size),
        "vocab_size": model.get_input_embeddings().num_embeddings,
        "file_type": library.LlamaFileType[f"MOSTLY_{kind.upper()}"],
        "quantization_version": library.GGML_QUANT_VERSION,
    }
    for name, value in fields.items():
        getattr(writer, f"add_{name}")(value)


def _write_tokenizer(writer, tokenizer: PreTrainedTokenizerBase, rows: int) -> None:
    """The vocabulary, padded to the `rows` of the embeddings, and the merges of a byte-level BPE tokenizer."""
    vocabulary, added = tokenizer.get_vocab(), tokenizer.added_tokens_decoder
    tokens = {index: f"[PAD{index}]" for index in range(rows)} | {index: token for token, index in vocabulary.items()}
    types = dict.fromkeys(tokens, library.TokenType.UNUSED) | dict.fromkeys(vocabulary.values(), library.TokenType.NORMAL)
    types |= {i: library.TokenType.CONTROL if one.special else library.TokenType.USER_DEFINED for i, one in added.items()}
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(split_name(tokenizer))
    writer.add_token_list([tokens[index] for index in range(rows)])
    writer.add_token_types([types[index] for index in range(rows)])
    writer.add_token_merges([pair if isinstance(pair, str) else " ".join(pair) for pair in merges])
    writer.add_add_space_prefix(False)
    writer.add_add_bos_token(tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id)
    for kind in ("bos", "eos", "unk", "pad"):
        if (index := getattr(tokenizer, f"{kind}_token_id")) is not None:
            getattr(writer, f"add_{kind}_token_id")(index)
    if tokenizer.chat_template:
        writer.add_chat_template(tokenizer.chat_template)


def _write_tensor(writer, config: PreTrainedConfig, name: str, tensor: torch.Tensor, kind: str) -> np.ndarray:
    """Add one tensor under its name in GGUF; returns its rounded values."""
    architecture = library.MODEL_ARCH[ARCHITECTURES[config.model_type]]
    named = library.get_tensor_name_map(architecture, config.num_hidden_layers).get_name(name, (".weight", ".bias"))
    if named is None:
        raise UnsupportedModel(f"GGUF has no name for the tensor {name!r} of a {config.model_type} model: {CONVERT}")
    weight, type_ = tensor.float().cpu().numpy(), library.GGMLQuantizationType[kind.upper()]
    if weight.ndim == 1:
        type_ = library.GGMLQuantizationType.F32
    elif weight.shape[-1] % library.GGML_QUANT_SIZES[type_][0]:
        type_ = library.GGMLQuantizationType.F16  # rows that hold no whole number of blocks
    data = library.quants.quantize(weight, type_)
    rounded = library.quants.dequantize(data, type_)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.split(".")[-2])
    if config.model_type == "llama" and heads:  # llama.cpp rotates neighboring dimensions, transformers those of the two halves
        data = data.reshape(heads, 2, len(data) // heads // 2, -1).swapaxes(1, 2).reshape(data.shape)
    writer.add_tensor(named, np.ascontiguousarray(data), raw_dtype=type_)
    return rounded


@torch.no_grad()
def _checked(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, file: Path, rounded: dict[str, np.ndarray], bound: float
) -> float:
    again, again_tokenizer, _ = gguf.read(file)
    weights = again.state_dict()
    for name, values in rounded.items():
        if not np.array_equal(weights[name].numpy(), values):
            raise CheckpointError(f"tensor {name!r} is read back from the GGUF file with other values; do not use the export")
    text = unicodedata.normalize("NFC", PROBE)  # llama.cpp does not normalize
    found, expected = (one(text, add_special_tokens=False)["input_ids"] for one in (again_tokenizer, tokenizer))
    if found != expected:
        raise CheckpointError(f"the tokenizer read back from the GGUF file gives other token ids: {CONVERT}")
    ids = torch.tensor([tokenizer(gguf.PASSAGE)["input_ids"][: model.config.max_position_embeddings]])
    expected, actual = (one(input_ids=ids.to(one.device)).logits.cpu().double().log_softmax(-1) for one in (model, again))
    divergence = float((expected.exp() * (expected - actual)).sum(-1).mean())
    if not divergence <= bound:
        raise CheckpointError(f"predictions of the GGUF file diverge by {divergence:.3g} nats (bound {bound:g}): {CONVERT}")
    return divergence
