"""Upload a finished model folder to the Hugging Face hub, and find out before any work whether that will be possible."""

import os
import re
from pathlib import Path
from typing import Any

from prunelib import io

NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
NEEDED = ("config.json", "README.md")


class PublishError(RuntimeError):
    """The hub cannot or must not be written to; the message says what to do."""


def check(repository: str, *, api: Any = None) -> str:
    """The account that would publish `repository` ("owner/name"). Nothing is written.

    Raises PublishError when the name is none, the hub is switched off or out of reach, there is no token or one that the hub
    refuses, or the repository exists already.
    """
    if not NAME.fullmatch(repository):
        raise PublishError(f"push_to={repository!r} is no repository of the hub: give owner/name")
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    later = f"leave push_to out and upload the folder later (hf upload {repository} FOLDER)"
    if huggingface_hub.constants.HF_HUB_OFFLINE:
        raise PublishError(f"push_to={repository!r}, but HF_HUB_OFFLINE is set: unset it, or {later}")
    if api is None:
        if huggingface_hub.get_token() is None:
            raise PublishError(
                f"push_to={repository!r}, but there is no token of the hub: run `hf auth login`, or set HF_TOKEN, or {later}"
            )
        silent = io.hub_unreachable()
        if silent is not None:
            raise PublishError(f"push_to={repository!r}, but the hub cannot be reached ({silent}): connect, or {later}")
        api = huggingface_hub.HfApi()
    try:
        account = api.whoami()["name"]
        exists = api.repo_exists(repository)
    except HFValidationError as error:
        raise PublishError(f"push_to={repository!r} is no repository of the hub: {error}") from None
    except HfHubHTTPError as error:
        raise PublishError(
            f"push_to={repository!r}, but the hub refuses the token ({_first_line(error)}): `hf auth login` again, or {later}"
        ) from None
    if exists:
        raise PublishError(f"push_to={repository!r} exists on the hub: nothing there is replaced; give another name")
    return account


def push(folder: str | os.PathLike, repository: str, *, private: bool = True, api: Any = None) -> str:
    """Create `repository` and upload everything in a model folder, card included; the address of the commit.

    Raises PublishError for a folder without a model or a card, and when the upload fails: the folder is complete, and can be
    uploaded by hand.
    """
    folder = Path(folder)
    missing = [name for name in NEEDED if not (folder / name).is_file()] or (
        [] if any(folder.glob("*.safetensors")) else ["*.safetensors"]
    )
    if missing:
        raise PublishError(f"{folder} has no {' and no '.join(missing)}: it is not a finished model, nothing is uploaded")
    if api is None:
        import huggingface_hub

        api = huggingface_hub.HfApi()
    try:
        api.create_repo(repository, private=private, repo_type="model", exist_ok=False)
        done = api.upload_folder(
            repo_id=repository, folder_path=str(folder), repo_type="model", commit_message="Model, written by prunelib"
        )
    except Exception as error:
        raise PublishError(
            f"the upload to {repository} failed ({type(error).__name__}: {_first_line(error)}); the model is complete in "
            f"{folder}: hf upload {repository} {folder}"
        ) from error
    return str(getattr(done, "commit_url", done))


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
