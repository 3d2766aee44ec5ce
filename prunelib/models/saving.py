"""Save a model as an ordinary safetensors checkpoint, and prove that it loads."""

import copy
import os
import shutil
import tempfile
import warnings
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from prunelib.io import first_line, flush, leftovers, temporary_prefix
from prunelib.models.layers import evaluating, layers_path, probe_tokens
from prunelib.models.loading import CheckpointError, from_files, load_tokenizer, recover
from prunelib.models.onednn import use_onednn_like


def save(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    folder: str | os.PathLike,
    *,
    overwrite: bool = False,
) -> None:
    """Write `model` (and `tokenizer`) to `folder` as an ordinary safetensors checkpoint, and prove that it loads.

    A temporary folder beside it is written, loaded and compared (keys, weights, logits on a probe batch), then renamed:
    `folder` is complete or absent. The check needs the memory of a second model on the device of `model`.

    Raises ValueError when `folder` holds something and `overwrite` is False, CheckpointError when the reload differs.
    """
    target = Path(folder).expanduser()
    recover(target)
    if target.exists() and not (target.is_dir() and (overwrite or not any(target.iterdir()))):
        raise ValueError(f"{str(target)!r} is a file or a folder that is not empty: choose another, or pass overwrite=True")
    layers_path(model)  # only models that can be taken apart
    target.parent.mkdir(parents=True, exist_ok=True)
    for left in leftovers(target):
        shutil.rmtree(left, ignore_errors=True)
    scratch = Path(tempfile.mkdtemp(prefix=temporary_prefix(target), dir=target.parent))
    try:
        _write(model, tokenizer, scratch / "new")
        _check_reload(model, tokenizer, scratch / "new")
        flush(scratch / "new")
        if target.is_dir():
            target.rename(scratch / "old")
        (scratch / "new").rename(target)
    except BaseException:
        if (scratch / "old").exists() and not target.exists():
            (scratch / "old").rename(target)
        raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _write(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, folder: Path) -> None:
    generation = model.generation_config
    try:
        if generation is not None:
            generation.validate(strict=True)
    except ValueError as error:
        # Several published models set a temperature without do_sample, which save_pretrained refuses to write.
        warnings.warn(f"generation_config saved with do_sample=True: {first_line(error)}", stacklevel=3)
        model.generation_config = copy.deepcopy(generation)
        model.generation_config.do_sample = True
    try:
        model.save_pretrained(folder)
    finally:
        model.generation_config = generation
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)


@torch.no_grad()
def _check_reload(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, folder: Path) -> None:
    options = {"dtype": model.dtype, "attn_implementation": model.config._attn_implementation, "local_files_only": True}
    again = from_files(folder, **options)
    again = use_onednn_like(model, again.to(model.device).eval())
    weights = again.state_dict()
    for name, tensor in model.state_dict().items():
        if name not in weights or not torch.equal(tensor, weights[name].to(tensor)):
            raise CheckpointError(f"tensor {name!r} of the saved model is not the one in memory (or is not finite)")
    with evaluating(model):
        expected, actual = (one(input_ids=probe_tokens(model), use_cache=False).logits.float() for one in (model, again))
    if not bool(torch.isfinite(expected).all()):
        raise CheckpointError("the model gives logits that are not finite; it is not worth saving")
    difference, scale = float((expected - actual).abs().max()), float(expected.abs().max())
    # Same weights, same code, same device: the sums may still be ordered differently.
    if difference > 8 * torch.finfo(model.dtype).eps * max(scale, 1.0):
        raise CheckpointError(f"the saved model gives other logits: they differ by up to {difference:.3g} (of {scale:.3g})")
    if tokenizer is not None:
        text = "One clone, two commands: 3.14 (naïve)\n"
        if load_tokenizer(folder)(text)["input_ids"] != tokenizer(text)["input_ids"]:
            raise CheckpointError("the saved tokenizer does not load as the one in memory")
