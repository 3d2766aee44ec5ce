"""Upload a finished model to the Hugging Face hub, and find out before any work whether that will be possible."""

import os

import huggingface_hub
from huggingface_hub.errors import HfHubHTTPError, HFValidationError

from prunelib import io


class PublishError(RuntimeError):
    """The hub cannot or must not be written to; the message says what to do."""


def check(repository: str) -> str:
    """The account that would publish `repository` ("owner/name"); nothing is written.

    Raises PublishError when the name is none, the hub is switched off or out of reach, there is no valid token, or the
    repository exists already.
    """
    problem, api = f"push_to={repository!r}", huggingface_hub.HfApi()
    later = f"leave push_to out and upload the folder later (hf upload {repository} FOLDER)"
    try:
        huggingface_hub.utils.validate_repo_id(repository)
        _, _ = repository.split("/")
    except (HFValidationError, ValueError):
        raise PublishError(f"{problem} is no repository of the hub: give owner/name") from None
    if huggingface_hub.constants.HF_HUB_OFFLINE:
        raise PublishError(f"{problem}, but HF_HUB_OFFLINE is set: unset it, or {later}")
    if huggingface_hub.get_token() is None:
        raise PublishError(f"{problem}, but there is no token of the hub: run `hf auth login`, or set HF_TOKEN, or {later}")
    if silent := io.hub_unreachable():
        raise PublishError(f"{problem}, but the hub cannot be reached ({silent}): connect, or {later}")
    try:
        account, exists = api.whoami()["name"], api.repo_exists(repository)
    except HfHubHTTPError as error:
        raise PublishError(f"{problem}, but the hub refuses the token ({error}): `hf auth login` again, or {later}") from None
    if exists:
        raise PublishError(f"{problem} exists on the hub: nothing there is replaced; give another name")
    return account


def push_to_hub(folder: str | os.PathLike, repository: str, *, private: bool = True) -> str:
    """Create `repository`, upload a finished model folder, and return the address of the commit.

    Raises PublishError when the upload fails: the folder stays complete.
    """
    api = huggingface_hub.HfApi()
    try:
        api.create_repo(repository, private=private)
        return str(api.upload_folder(repo_id=repository, folder_path=folder, commit_message="Model, written by prunelib"))
    except Exception as error:
        remedy = f"the model is complete in {folder}: hf upload {repository} {folder}"
        raise PublishError(f"the upload to {repository} failed ({type(error).__name__}: {error}); {remedy}") from error
