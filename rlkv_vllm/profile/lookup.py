"""Find a head profile by path, packaged name, or Hugging Face repository."""

from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path

from rlkv_vllm.errors import RlkvError
from rlkv_vllm.files import one_line, read_bytes, read_text
from rlkv_vllm.profile import hub
from rlkv_vllm.profile.io import load_profile
from rlkv_vllm.profile.schema import HeadProfile

HUB_FILE = "head_profile.json"

_PACKAGE = Path(__file__).resolve().parent.parent
_HUB_NAME = re.compile(
    r"(?P<repo>[^@:#]+)(@(?P<revision>[^@:#]+))?(:(?P<file>[^@:#]+))?"
    r"(#sha256=(?P<sha256>[^@:#]+))?"
)
_SHA256 = re.compile(r"[0-9a-f]{64}", re.IGNORECASE)


def packaged_folders() -> tuple[Path, ...]:
    """Folders of packaged profiles: beside the package in a clone, inside it in a wheel."""
    return _PACKAGE.parent / "head_profiles", _PACKAGE / "_head_profiles"


def packaged_profiles() -> dict[str, Path]:
    """Name to file of every packaged profile, sorted by name."""
    found: dict[str, Path] = {}
    for folder in packaged_folders():
        for path in folder.glob("*.json"):
            found.setdefault(path.stem, path)
    return dict(sorted(found.items()))


def is_own_file(name: str, path: Path) -> bool:
    """Whether `name`, found at `path`, is a file of the user's: neither packaged nor of the hub."""
    folders = [folder.resolve() for folder in packaged_folders()]
    return path.resolve().parent not in folders and path == Path(name).expanduser()


def find_profile(name: str) -> tuple[HeadProfile, Path]:
    """Load the profile that `name` stands for.

    Args:
        name: one of
            - the path of a profile file,
            - the name of a packaged profile (`rlkv profile list`),
            - `org/repo[@revision][:file][#sha256=HEX]` on the Hugging Face hub. The file is
              `head_profile.json` if none is named. Its SHA-256 is compared with the one in
              the name and with `<file>.sha256` if the repository has that.

    Returns:
        The profile and the local file it was read from.

    Raises:
        RlkvError: if there is no such profile, or it is not valid.
    """
    # os.path, unlike pathlib, treats an impossible path as a file that does not exist.
    local = os.path.expanduser(name)
    if os.path.isfile(local):
        return load_profile(local), Path(local)
    packaged = packaged_profiles().get(name)
    if packaged is not None:
        return load_profile(packaged), packaged
    match = _HUB_NAME.fullmatch(name)
    is_hub_name = match is not None and hub.is_repo_id(match["repo"])
    # `results/profile.json` is a forgotten file more often than a repository.
    if match is None or not is_hub_name or (name.endswith(".json") and not match["file"]):
        if os.path.exists(local):
            return load_profile(local), Path(local)  # raises, and says why
        raise RlkvError(
            f"profile {one_line(name)}: no such file, packaged profile "
            f"({', '.join(packaged_profiles()) or 'none'}) or `org/repo[@revision]`: check the "
            "name, see `rlkv profile list`"
        )
    path = _from_hub(name, match["repo"], match["revision"], match["file"], match["sha256"])
    return load_profile(path), path


def _from_hub(
    name: str, repo: str, revision: str | None, file: str | None, pinned: str | None
) -> Path:
    if pinned is not None and not _SHA256.fullmatch(pinned):
        raise RlkvError(
            f"profile {one_line(name)}: #sha256= needs 64 hexadecimal digits: copy them from "
            "`sha256sum`"
        )
    for given in filter(None, (revision, file)):
        # Names of hub files and revisions become paths in the cache.
        if given.startswith("/") or "\\" in given or ".." in given.split("/"):
            raise RlkvError(
                f"profile {one_line(name)}: {one_line(given)} leads out of the repository: name a "
                "file or revision inside it"
            )
    file = file or HUB_FILE
    path, commit = hub.download(repo, file, revision, what="profile")
    actual = hashlib.sha256(read_bytes(path)).hexdigest()

    def check(origin: str, digest: str) -> None:
        if actual != digest.lower():
            raise RlkvError(
                f"profile {one_line(name)}: SHA-256 of {file} is {actual}, but {origin} says "
                f"{one_line(digest, 64)}: do not use this file; ask its author, or fix the name"
            )

    if pinned is not None:
        check("the name", pinned)
    sidecar = hub.download_optional(repo, f"{file}.sha256", commit or revision, what="profile")
    if sidecar is not None:
        words = read_text(sidecar).split()  # `sha256sum` writes "HEX  name"
        check(f"{file}.sha256", words[0] if words else "nothing")
    return path
