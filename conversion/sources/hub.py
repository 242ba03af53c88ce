"""What the Hub gives, and what to do where it does not."""

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    LocalEntryNotFoundError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import validate_repo_id

from gda.common.errors import first_line

LOG_IN = "log in with `hf auth login` or set HF_TOKEN"
SHA256 = re.compile(r"[0-9a-f]{64}")


def check_name(repo: str) -> None:
    """Raise ValueError if `repo` is no name that the Hub allows for a repository."""
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise ValueError(f"{repo} is no name of a repository: {first_line(error)}") from None


def require_token(repo: str) -> None:
    """Ask the Hub who we are, before work that ends in a push.

    Raises:
        PermissionError, ConnectionError: as `push` would.
    """
    with hub_errors(repo, "main"):
        token = HfApi().whoami().get("auth", {}).get("accessToken", {})
    if token.get("role") == "read":
        raise PermissionError(f"{repo}: the token may only read; {LOG_IN} with one that can write")


def download(repo: str, revision: str | None, patterns: list[str]) -> Path:
    """The folder in the Hub's cache with the files of `repo` that match `patterns`; what is absent is downloaded.

    Raises:
        FileNotFoundError: if there is no such repository or revision.
        PermissionError, ConnectionError: if the Hub does not give it.
    """
    with hub_errors(repo, revision):
        # What authors release beside a model: the same weights in a form of their own.
        ignored = ["original/*", "consolidated*"]
        return Path(snapshot_download(repo, revision=revision, allow_patterns=patterns, ignore_patterns=ignored))


def check_downloaded(path: Path, digest: str) -> None:
    """Compare a file's SHA-256 with the name that it has in the Hub's cache, which is the one that the Hub gave.

    Raises:
        ValueError: if they differ.
    """
    blob = path.resolve()
    if SHA256.fullmatch(blob.name) and blob.name != digest:
        raise ValueError(f"{path.name} is not the file that the Hub describes: its SHA-256 differs; remove {blob}")


@contextlib.contextmanager
def hub_errors(repo: str, revision: str | None) -> Iterator[None]:
    """Say in one line what the Hub's client says in many, and what to do."""
    check_name(repo)
    at = f"{repo}@{revision}" if revision not in (None, "main") else repo
    try:
        yield
    except RevisionNotFoundError:
        raise FileNotFoundError(f"{at}: the repository has no such revision") from None
    except LocalTokenNotFoundError:
        raise PermissionError(f"{at}: no token to show the Hub; {LOG_IN}") from None
    except OfflineModeIsEnabled:
        raise ConnectionError(f"{at}: HF_HUB_OFFLINE is set; unset it to reach the Hub") from None
    except GatedRepoError:
        raise PermissionError(f"{at} is gated; ask for access on its page, then {LOG_IN}") from None
    except RepositoryNotFoundError as error:
        if error.response.request.method not in ("GET", "HEAD"):
            raise PermissionError(f"{at}: the token may not write there; {LOG_IN}") from None
        raise FileNotFoundError(f"{at} is not on the Hub; if it is private, {LOG_IN}") from None
    except RuntimeError as error:  # raised for whatever stops the upload of one file
        if not isinstance(error.__cause__, HTTPError):
            raise
        raise _described(f"{at}: {first_line(error)}", error.__cause__, goes_on=True) from None
    except LocalEntryNotFoundError as error:
        raise ConnectionError(f"{at} is not in the cache, and the Hub did not give it: {first_line(error)}") from None
    except HTTPError as error:
        raise _described(at, error) from None


def _described(at: str, error: HTTPError, goes_on: bool = False) -> OSError:
    remedy = "; the same command goes on"
    if not isinstance(error, HfHubHTTPError):
        return ConnectionError(f"{at}: the connection to the Hub broke ({first_line(error)}){remedy}")
    status = error.response.status_code
    said = error.server_message or f"HTTP {status}"
    if status in (401, 403):
        return PermissionError(f"{at}: the token may not do this ({said}); {LOG_IN} with one that can write")
    return ConnectionError(f"{at}: the Hub refused ({status}: {said}){remedy if goes_on or status >= 500 else ''}")
