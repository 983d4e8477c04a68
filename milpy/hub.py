"""A model or adapter by name: a local folder as it is, else a snapshot from the Hugging Face Hub.

A path that exists is never looked up anywhere. From the Hub come weights as safetensors, JSON,
tokenizer files and the chat template; pickles and code are not downloaded.
"""

from __future__ import annotations

import re
from pathlib import Path

from milpy.errors import HubError

ALLOW_PATTERNS = (
    "*.safetensors",
    "*.json",
    "tokenizer.model",
    "merges.txt",
    "vocab.txt",
    "chat_template.jinja",
)
# "*" crosses folders: original/, onnx/ and the like would double the download.
IGNORE_PATTERNS = ("*/*",)

_HUB_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*(/[A-Za-z0-9][A-Za-z0-9._-]*)?")


def resolve_model(path_or_id: str | Path, revision: str | None = None) -> Path:
    """The folder of a model or adapter. HubError says what was looked for and where."""
    if path_or_id == "":
        raise HubError("model name is empty, expected a folder or the id of a Hub repository")
    path = Path(path_or_id).expanduser()
    if path.is_dir():
        if revision is not None:
            raise HubError(f"{path}: is a local folder, expected no revision, found {revision!r}")
        return path
    if path.exists():
        raise HubError(f"{path}: is a file, expected a folder or the id of a Hub repository")
    name = str(path_or_id)
    if isinstance(path_or_id, Path) or not _HUB_ID.fullmatch(name):
        raise HubError(f"{name}: no such folder, and not the id of a Hub repository")
    return _download(name, revision)


def _download(repo_id: str, revision: str | None) -> Path:
    # Heavy, and needed only for names that are not local.
    from huggingface_hub import snapshot_download  # noqa: PLC0415
    from huggingface_hub.errors import (  # noqa: PLC0415
        GatedRepoError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    at = f"revision {revision!r}" if revision else "its main revision"
    try:
        folder = snapshot_download(
            repo_id,
            revision=revision,
            allow_patterns=list(ALLOW_PATTERNS),
            ignore_patterns=list(IGNORE_PATTERNS),
        )
    except HFValidationError as problem:
        raise HubError(
            f"{repo_id}: no such folder, and not the id of a Hub repository"
        ) from problem
    except GatedRepoError as problem:
        raise HubError(f"{repo_id}: gated on the Hub; no access with this login") from problem
    except RevisionNotFoundError as problem:
        raise HubError(f"{repo_id}: the Hub has no {at}") from problem
    except RepositoryNotFoundError as problem:
        raise HubError(
            f"{repo_id}: no such folder, and no such repository on the Hub (or it is private)"
        ) from problem
    except LocalEntryNotFoundError as problem:
        raise HubError(
            f"{repo_id}: no such folder, {at} is not in the Hub's cache, and the Hub is offline"
        ) from problem
    except Exception as problem:  # the library's errors have no common base and change by version
        raise HubError(f"{repo_id}: download from the Hub failed: {problem}") from problem
    return Path(folder)
