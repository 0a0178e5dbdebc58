"""Single files from the Hugging Face hub, with errors that say how to fix them."""

from __future__ import annotations

import re
from pathlib import Path

from rlkv_vllm.errors import RlkvError
from rlkv_vllm.files import one_line

_REPO_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
_COMMIT = re.compile(r"[0-9a-f]{40}")


def is_repo_id(name: str) -> bool:
    """Whether `name` has the form `org/repo`."""
    return _REPO_ID.fullmatch(name) is not None


def download(
    repo: str, filename: str, revision: str | None, *, what: str
) -> tuple[Path, str | None]:
    """Fetch one file of a repository into the hub's cache.

    Honours `HF_HUB_OFFLINE`, `HF_ENDPOINT`, `HF_HOME` and the user's token. Returns the cached file
    and its commit, if known. `what` names the repository in messages: `model`, `profile`.

    Raises:
        RlkvError: if the repository, revision or file does not exist, or the hub cannot be
            reached and the file is not cached.
    """
    from huggingface_hub import constants, hf_hub_download
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    cached_only = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else "the hub is unreachable"
    # Subclasses first: the first match is the reason.
    reasons: dict[type[Exception], str] = {
        LocalEntryNotFoundError: f"{filename} is not in the Hugging Face cache and {cached_only}: "
        "go online or give a local path",
        GatedRepoError: "access is restricted: accept its terms on the hub and log in with "
        "`hf auth login`",
        RepositoryNotFoundError: "no such repository on the Hugging Face hub (or it is private): "
        "check the name, or log in with `hf auth login`",
        RevisionNotFoundError: "no such revision: give a commit, branch or tag that exists",
        EntryNotFoundError: f"the repository has no {filename}: check the name",
        HFValidationError: "not a valid repository name: use `org/repo`",
    }
    try:
        path = Path(hf_hub_download(repo, filename, revision=revision))
    except Exception as error:  # the HTTP library differs between versions of the hub's client
        reason = next(
            (text for kind, text in reasons.items() if isinstance(error, kind)),
            f"{filename} cannot be fetched ({type(error).__name__}): try again or give a local "
            "path",
        )
        at = one_line(f"{repo}@{revision}" if revision else repo)
        raise RlkvError(f"{what} {at}: {reason}") from error
    commit = path.parents[len(Path(filename).parts) - 1].name
    return path, commit if _COMMIT.fullmatch(commit) else revision


def download_optional(repo: str, filename: str, revision: str | None, *, what: str) -> Path | None:
    """As `download`, but None if the repository has no such file.

    Also None if the hub cannot be reached and the cache does not know about the file.
    """
    from huggingface_hub.errors import EntryNotFoundError

    try:
        return download(repo, filename, revision, what=what)[0]
    except RlkvError as error:
        if isinstance(error.__cause__, EntryNotFoundError):
            return None
        raise
