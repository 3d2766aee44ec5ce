"""Save a model as an ordinary safetensors checkpoint, and prove that it loads."""

import errno
import os
import shutil
import tempfile
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import CONFIG_NAME

from prunelib.io import flush, leftovers, temporary_prefix
from prunelib.models.layers import evaluating, layers_path, probe_tokens
from prunelib.models.loading import PROBE, CheckpointError, from_files, load_tokenizer, recover, savable_generation
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
    `folder` is complete or absent. Where a folder cannot be renamed (a mounted volume, the working directory), its files are
    replaced, the configuration last: without it nothing is loaded. A link is followed. The check needs the memory of a second
    model on the device of `model`.

    Raises as `check_place`, and CheckpointError when the reload differs.
    """
    target, inside = check_place(folder, overwrite=overwrite)
    layers_path(model)  # only models that can be taken apart
    scratch = Path(tempfile.mkdtemp(prefix=temporary_prefix(target), dir=inside or target.parent))
    try:
        _write(model, tokenizer, scratch / "new")
        _check_reload(model, scratch / "new")
        if tokenizer is not None:
            _check_tokenizer(tokenizer, scratch / "new")
        flush(scratch / "new")
        if inside:
            _replace_files(scratch / "new", inside)
        else:
            if target.is_dir():
                target.rename(scratch / "old")
            (scratch / "new").rename(target)
    except BaseException:
        if (scratch / "old").exists() and not target.exists():
            (scratch / "old").rename(target)
        raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def check_place(folder: str | os.PathLike, *, overwrite: bool = False) -> tuple[Path, Path | None]:
    """Where a model will be, links followed; the same folder again where it cannot be renamed, and is written inside.

    Raises ValueError, before any work, when `folder` holds something and `overwrite` is False, or cannot be written to.
    """
    target = Path(folder).expanduser().resolve()
    recover(target)
    for left in (*leftovers(target), *leftovers(target / target.name)):
        shutil.rmtree(left, ignore_errors=True)
    if target.exists() and not (target.is_dir() and (overwrite or not any(target.iterdir()))):
        raise ValueError(f"{str(target)!r} is a file or a folder that is not empty: choose another, or pass overwrite=True")
    fixed = target.is_dir() and (os.path.ismount(target) or Path.cwd().is_relative_to(target))
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=temporary_prefix(target), dir=target if fixed else target.parent) as scratch:
            if target.is_dir() and not fixed:
                try:  # a bind mount looks like any folder
                    target.rename(Path(scratch) / "old")
                    (Path(scratch) / "old").rename(target)
                except OSError as error:
                    fixed = error.errno in (errno.EBUSY, errno.EXDEV)
    except OSError as error:
        raise ValueError(f"cannot write to {str(target)!r} ({error.strerror or error}): choose another folder") from error
    return target, target if fixed else None


def _replace_files(new: Path, target: Path) -> None:
    """Move the files of `new` to `target` in the place of those that are there; its hidden files and folders stay."""
    old = [path for path in target.iterdir() if path.is_file() and not path.name.startswith(".")]
    for path in sorted(old, key=lambda path: path.name != CONFIG_NAME):
        path.unlink()
    for path in sorted(new.iterdir(), key=lambda path: path.name == CONFIG_NAME):
        shutil.move(path, target / path.name)


def rehearse(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: str | os.PathLike) -> None:
    """Save everything but the weights once, for nothing: what will keep a model that is made of this one from being saved in
    `folder`, over what is there, is found before any work. Raises as `save`."""
    check_place(folder, overwrite=True)
    with tempfile.TemporaryDirectory() as scratch:
        model.config.save_pretrained(scratch)
        if (generation := savable_generation(model.generation_config)) is not None:
            generation.save_pretrained(scratch)
        tokenizer.save_pretrained(scratch)
        _check_tokenizer(tokenizer, scratch)


def _write(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, folder: Path) -> None:
    generation = model.generation_config
    model.generation_config = savable_generation(generation)
    try:
        model.save_pretrained(folder)
    finally:
        model.generation_config = generation
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)


@torch.no_grad()
def _check_reload(model: PreTrainedModel, folder: Path) -> None:
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


def _check_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: str | os.PathLike) -> None:
    if load_tokenizer(folder)(PROBE)["input_ids"] != tokenizer(PROBE)["input_ids"]:
        raise CheckpointError("the saved tokenizer does not load as the one in memory")
