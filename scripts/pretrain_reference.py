"""Train the embedded reference models: small, deep decoders that behave like large ones when layers are removed.

Two sub-commands of ``python scripts/pretrain_reference.py``:

1. ``train``: one model of `REFERENCES`. Byte-level BPE over the training text, which is the same for all models; training and
   held-out text as flat arrays of token ids; then the Hugging Face Trainer, resumed from the last checkpoint in ``--work``;
2. ``card``: README.md and loss_curve.png beside the weights, every number from ``training.json`` and the files there.

Sizes (reference_models.yaml), data and steps were fixed before any pruning result was seen, and are not tuned afterwards.
"""

import argparse
import hashlib
import itertools
import json
import math
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import jinja2
import numpy as np
import torch
import yaml
from torch.utils.data import Dataset
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast, Trainer, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from prunelib.evaluation import perplexity
from prunelib.io import at_root, file_sha256, write_json, write_text
from prunelib.lab.provenance import record
from prunelib.text.corpora import DOCUMENT_END, read_file, read_records, record_text

VOCABULARY = 4096
TOKENIZER_CHARACTERS = 60_000_000  # of each file
WINDOW = 512  # tokens of one training window; also the models' longest context
TEXTS = ("english", "pydocs", "english_held_out", "pydocs_held_out")  # to train on, and for the loss


@dataclass(frozen=True)
class Reference:
    """One reference model: its Hugging Face type and configuration, and its training budget."""

    model_type: str
    config: dict
    tokens: int = 400_000_000
    pydocs_share: float = 0.25  # of the training windows; the rest is general English
    batch: int = 128  # windows of `WINDOW` tokens in one optimizer step
    learning_rate: float = 2e-3  # peak of the cosine schedule, reached after ``warmup`` steps
    warmup: int = 300
    weight_decay: float = 0.1
    held_out_windows: int = 256
    seed: int = 0

    @property
    def steps(self) -> int:
        return math.ceil(self.tokens / (self.batch * WINDOW))


_MODELS = yaml.safe_load(Path(__file__).with_name("reference_models.yaml").read_text(encoding="utf-8"))
REFERENCES = {name: Reference(**settings) for name, settings in _MODELS.items()}


def read_documents(path: Path) -> Iterator[str]:
    """Training texts of a file as `prunelib.text.corpora` reads it; where JSON lines name a split, those of ``train`` alone."""
    if ".jsonl" in path.suffixes:
        yield from (record_text(record) for _, record in read_records(path) if record.get("split", "train") == "train")
    else:
        yield from (text.strip("\n") for text in read_file(path) if text.strip())


def train_tokenizer(files: list[Path], folder: Path) -> None:
    """Byte-level BPE of `VOCABULARY` entries from at most `TOKENIZER_CHARACTERS` of each file, saved as a fast tokenizer."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    def texts() -> Iterator[str]:
        for path in files:
            left = TOKENIZER_CHARACTERS
            for text in read_documents(path):
                yield text[:left]
                left -= len(text)
                if left <= 0:
                    break

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        # Single digits and runs of spaces as tokens of their own: indented docstrings would otherwise eat the vocabulary.
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[DOCUMENT_END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts(), trainer)
    ends = {"bos_token": DOCUMENT_END, "eos_token": DOCUMENT_END}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=WINDOW, **ends).save_pretrained(folder)


def tokenize(path: Path, tokenizer) -> np.ndarray:
    """All documents of a file as one uint16 array, each preceded by the end-of-text token."""
    pieces: list[np.ndarray] = []
    documents = read_documents(path)
    while texts := list(itertools.islice(documents, 256)):
        for encoding in tokenizer.backend_tokenizer.encode_batch(texts, add_special_tokens=False):
            pieces.append(np.array([tokenizer.bos_token_id, *encoding.ids], dtype=np.uint16))
    return np.concatenate(pieces)


def window_starts(tokens: int, windows: int, rng: np.random.Generator) -> np.ndarray:
    """Start offsets of ``windows`` training windows: whole passes over the text, each shifted and shuffled anew."""
    if tokens < 2 * WINDOW:
        raise ValueError(f"{tokens} tokens of text are too few: at least {2 * WINDOW} are needed")
    starts = np.empty(0, dtype=np.int64)
    while len(starts) < windows:
        starts = np.append(starts, rng.permutation(np.arange(rng.integers(WINDOW), tokens - WINDOW, WINDOW)))
    return starts[:windows]


class Windows(Dataset):
    """Training windows, mixed from several token arrays in the stated shares; item i is a pure function of (seed, i)."""

    def __init__(self, sources: list[np.ndarray], shares: list[float], windows: int, seed: int):
        rng = np.random.default_rng(seed)
        counts = [round(windows * share) for share in shares[:-1]]
        counts.append(windows - sum(counts))
        starts = [window_starts(len(source), count, rng) for source, count in zip(sources, counts, strict=True)]
        pairs = np.stack([np.repeat(np.arange(len(sources)), counts), np.concatenate(starts)], axis=1)
        self.sources, self.order = sources, rng.permutation(pairs)

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        source, start = self.order[index]
        ids = torch.from_numpy(self.sources[source][start : start + WINDOW].astype(np.int64))
        return {"input_ids": ids, "labels": ids}


def build_model(reference: Reference, tokenizer):
    """A freshly initialized model of one reference configuration."""
    config = AutoConfig.for_model(
        reference.model_type,
        vocab_size=VOCABULARY,
        max_position_embeddings=WINDOW,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        **reference.config,
    )
    torch.manual_seed(reference.seed)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def train(name: str, reference: Reference, tokenizer, arrays: dict[str, np.ndarray], work: Path, folder: Path) -> None:
    """Train one reference model, from the last checkpoint in ``work`` where there is one, and save it as bfloat16 with its log.

    arrays: token ids of the `TEXTS`.
    """
    texts, shares = TEXTS[:2], [1 - reference.pydocs_share, reference.pydocs_share]
    data = Windows([arrays[key] for key in texts], shares, reference.steps * reference.batch, reference.seed)
    held_out = {key: Windows([arrays[f"{key}_held_out"]], [1.0], reference.held_out_windows, 1) for key in texts}
    on_gpu = torch.cuda.is_available()
    arguments = TrainingArguments(
        output_dir=str(work),
        max_steps=reference.steps,
        per_device_train_batch_size=reference.batch,
        per_device_eval_batch_size=reference.batch,
        learning_rate=reference.learning_rate,
        lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr_rate": 0.05},
        warmup_steps=reference.warmup,
        weight_decay=reference.weight_decay,
        adam_beta2=0.95,
        max_grad_norm=1.0,
        bf16=on_gpu,
        tf32=on_gpu or None,
        torch_compile=on_gpu,
        dataloader_num_workers=4 if on_gpu else 0,
        dataloader_drop_last=True,
        eval_strategy="steps",
        eval_steps=max(1, reference.steps // 12),
        save_strategy="steps",
        save_steps=max(1, reference.steps // 6),
        save_total_limit=1,
        logging_steps=max(1, reference.steps // 120),
        seed=reference.seed,
        report_to="none",
        disable_tqdm=on_gpu,
    )
    checkpoint = get_last_checkpoint(str(work)) if work.is_dir() else None
    # The Trainer restores weights by their names in memory, but GPT-NeoX saves its head under another name, so that head
    # would silently stay at its initial value. `from_pretrained` knows the names on disk.
    if checkpoint:
        model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32, use_safetensors=True)
    else:
        model = build_model(reference, tokenizer)
    trainer = Trainer(model=model, args=arguments, train_dataset=data, eval_dataset=held_out)
    trainer.train(resume_from_checkpoint=checkpoint)
    model = trainer.accelerator.unwrap_model(trainer.model, keep_torch_compile=False).to(torch.bfloat16)
    # The losses of the card are those of the saved weights, so they are measured again after rounding to bfloat16.
    final = {
        key: perplexity(model, torch.stack([window["input_ids"] for window in windows]), batch_size=64).nll
        for key, windows in held_out.items()
    }
    model.config.use_cache = True  # the Trainer turns it off
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    hashes = {key: hashlib.sha256(array.tobytes()).hexdigest() for key, array in sorted(arrays.items())}
    steps = {"steps": reference.steps, "tokens_seen": reference.steps * reference.batch * WINDOW}
    log = {
        "name": name,
        "reference": asdict(reference) | steps,
        "window": WINDOW,
        "parameters": sum(p.numel() for p in model.parameters()),
        "tokens": {key: len(array) for key, array in sorted(arrays.items())},
        "held_out_nats_per_token": final,
        "provenance": record(data=hashes, device="cuda" if on_gpu else "cpu"),
        "log": trainer.state.log_history,
    }
    write_json(folder / "training.json", log)


CARD = Path(__file__).with_name("reference_card.md")
CURVES = (
    ("training (mixture)", "loss", {"color": "#8c8c8c"}),
    ("held-out English", "eval_english_loss", {"color": "#0072b2", "marker": "o"}),
    ("held-out pydocs", "eval_pydocs_loss", {"color": "#d55e00", "marker": "s"}),
)


def card(folder: Path) -> str:
    """The model card of a trained reference model: every number comes from its files."""
    log, config, manifest = (
        json.loads(path.read_text(encoding="utf-8"))
        for path in (folder / "training.json", folder / "config.json", at_root("data/corpora/manifest.json"))
    )
    template = jinja2.Template(CARD.read_text(encoding="utf-8"), undefined=jinja2.StrictUndefined, keep_trailing_newline=True)
    return template.render(
        folder=folder,
        log=log,
        config=config,
        reference=log["reference"],
        packages=list(manifest["pydocs"]["packages"]),
        megabytes=(folder / "model.safetensors").stat().st_size / 1e6,
        end=DOCUMENT_END,
        characters=TOKENIZER_CHARACTERS,
        sha256=file_sha256,
        exp=math.exp,
    )


def draw_losses(folder: Path) -> Path:
    """``loss_curve.png`` beside the log: training and held-out loss against tokens seen."""
    from matplotlib import pyplot as plt

    from prunelib.figures import save, style

    log = json.loads((folder / "training.json").read_text(encoding="utf-8"))
    millions = log["reference"]["batch"] * log["window"] / 1e6
    style.use_style()
    figure, axes = plt.subplots(figsize=(style.WIDTH, 3.2), layout="constrained")
    for label, key, look in CURVES:
        points = [(entry["step"] * millions, entry[key]) for entry in log["log"] if key in entry]
        axes.plot(*zip(*points, strict=True), label=label, **look)
    axes.set(xlabel="million tokens seen", ylabel="loss (nats per token)", title=log["name"], xlim=(0, None))
    axes.legend()
    plt.close(figure)
    (folder / "loss_curve.png").write_bytes(save.picture(figure, ".png"))
    return folder / "loss_curve.png"


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python scripts/pretrain_reference.py", description=__doc__.split("\n")[0])
    steps = parser.add_subparsers(dest="step", required=True)
    one = steps.add_parser("train", help="train one reference model, its tokenizer first")
    one.add_argument("--name", choices=REFERENCES, required=True)
    for name in (*TEXTS, "work", "out"):
        one.add_argument(f"--{name}", type=Path, required=True)
    two = steps.add_parser("card", help="write the model card and the loss curve of a trained reference model")
    two.add_argument("folder", type=at_root, help="of the model")
    options = parser.parse_args(argv)
    if options.step == "card":
        draw_losses(options.folder)
        write_text(options.folder / "README.md", card(options.folder))
        return 0
    vocabulary = options.work / "tokenizer"
    if not vocabulary.is_dir():
        train_tokenizer([options.english, options.pydocs], vocabulary)
    tokenizer = AutoTokenizer.from_pretrained(vocabulary)
    arrays = {name: tokenize(getattr(options, name), tokenizer) for name in TEXTS}
    train(options.name, REFERENCES[options.name], tokenizer, arrays, options.work / "checkpoints", options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
