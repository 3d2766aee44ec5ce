"""Upload a finished model to the Hugging Face hub, and find out before any work whether that will be possible."""

import os
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub.errors import HfHubHTTPError, HFValidationError

from prunelib import io


class PublishError(RuntimeError):
    """The hub cannot or must not be written to; the message says what to do."""


def check(repository: str, *, api: Any = None) -> str:
    """The account that would publish `repository` ("owner/name"); nothing is written.

    Raises PublishError when the name is none, the hub is switched off or out of reach, there is no valid token, or the
    repository exists already.
    """
    problem = f"push_to={repository!r}"
    later = f"leave push_to out and upload the folder later (hf upload {repository} FOLDER)"
    try:
        huggingface_hub.utils.validate_repo_id(repository)
    except HFValidationError as error:
        raise PublishError(f"{problem} is no repository of the hub: {error}") from None
    if "/" not in repository:
        raise PublishError(f"{problem} is no repository of the hub: give owner/name")
    if huggingface_hub.constants.HF_HUB_OFFLINE:
        raise PublishError(f"{problem}, but HF_HUB_OFFLINE is set: unset it, or {later}")
    if huggingface_hub.get_token() is None:
        raise PublishError(f"{problem}, but there is no token of the hub: run `hf auth login`, or set HF_TOKEN, or {later}")
    silent = io.hub_unreachable() if api is None else None
    if silent is not None:
        raise PublishError(f"{problem}, but the hub cannot be reached ({silent}): connect, or {later}")
    api = api or huggingface_hub.HfApi()
    try:
        account, exists = api.whoami()["name"], api.repo_exists(repository)
    except HfHubHTTPError as error:
        raise PublishError(f"{problem}, but the hub refuses the token ({error}): `hf auth login` again, or {later}") from None
    if exists:
        raise PublishError(f"{problem} exists on the hub: nothing there is replaced; give another name")
    return account


def push_to_hub(folder: str | os.PathLike, repository: str, *, private: bool = True, api: Any = None) -> str:
    """Create `repository`, upload a model folder with its card, and return the address of the commit.

    Raises PublishError for a folder without a model or a card, and when the upload fails: the folder stays complete.
    """
    folder = Path(folder)
    missing = [pattern for pattern in ("config.json", "README.md", "*.safetensors") if not any(folder.glob(pattern))]
    if missing:
        raise PublishError(f"{folder} has no {' and no '.join(missing)}: it is not a finished model, nothing is uploaded")
    api = api or huggingface_hub.HfApi()
    try:
        api.create_repo(repository, private=private)
        return str(api.upload_folder(repo_id=repository, folder_path=folder, commit_message="Model, written by prunelib"))
    except Exception as error:
        remedy = f"the model is complete in {folder}: hf upload {repository} {folder}"
        raise PublishError(f"the upload to {repository} failed ({type(error).__name__}: {error}); {remedy}") from error
