"""Uploads to the Hub: what is wrong is found before anything takes time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import HfApi, constants, get_token
from huggingface_hub.utils import HFValidationError, validate_repo_id

from lckv.errors import UserError, first_line

_REPLACED = ("*.safetensors", "*.safetensors.index.json", "*.bin", "*.bin.index.json", "*.py")
"""What an earlier upload may have left that would be loaded in the place of this one's, or beside it."""


def check_repo_name(repo: str) -> None:
    """Refuses what cannot be the name of a repository, without asking the Hub.

    Raises:
        UserError: naming the key.
    """
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise UserError(f"push={repo}: is no name on the Hub, which is OWNER/NAME") from error


def check_access(repo: str) -> None:
    """Finds out whether the Hub can be reached with a token that it knows.

    Raises:
        UserError: if not.
    """
    with _asking(repo):
        token = get_token()
    if token is None:
        raise UserError(f"push={repo}: there is no token for the Hub; give one: hf auth login, or HF_TOKEN=...")
    if constants.HF_HUB_OFFLINE:
        raise UserError(f"push={repo}: the Hub is not to be asked, as HF_HUB_OFFLINE says; leave one of them out")
    with _asking(repo):
        HfApi().whoami()


def upload(folder: Path, repo: str) -> str:
    """Uploads a folder as one commit, into a repository that is made if it is not there yet; returns its address.

    Weights and code of an earlier upload are replaced, other files stay.

    Raises:
        UserError: if the Hub does not take it; it says how to try again.
    """
    with _asking(repo, f"; {folder} is written: hf upload {repo} {folder}"):
        api = HfApi()
        address = api.create_repo(repo, exist_ok=True)
        api.upload_folder(
            repo_id=address.repo_id, folder_path=folder, commit_message="Upload model", delete_patterns=list(_REPLACED)
        )
    return str(address)


@contextmanager
def _asking(repo: str, then: str = "") -> Iterator[None]:
    try:
        yield
    except Exception as error:  # whatever a network and those behind it may end in
        raise UserError(f"push={repo}: the Hub says: {first_line(error)}{then}") from error
