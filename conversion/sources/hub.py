"""Downloading from the Hub, and one-line errors for what can go wrong with it."""

import contextlib
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HTTPError,
    IncompleteSnapshotError,
    LocalEntryNotFoundError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from gda.common.errors import first_line
from gda.common.places import check_repository
from gda.common.progress import logger

LOG_IN = "log in with `hf auth login` or set HF_TOKEN"
GO_ON = "; run the same command again to continue"
SHA256 = re.compile(r"[0-9a-f]{64}")


def require_token(repo: str) -> None:
    """Check the user's token before work that ends in a push; raise the errors of `push`."""
    with hub_errors(repo, "main"):
        token = HfApi().whoami().get("auth", {}).get("accessToken", {})
    if token.get("role") == "read":
        raise PermissionError(f"{repo}: the token is read-only; {LOG_IN} with one that can write")


def download(repo: str, revision: str | None, patterns: list[str], optional: Sequence[str] = ()) -> Path:
    """Download the files of `repo` that match `patterns`, unless cached, and return their folder in the cache.

    If the Hub is not reached, the cache may lack those of `patterns` that are `optional`, which is logged.

    Raises:
        FileNotFoundError: if there is no such repository or revision.
        PermissionError, ConnectionError: if the Hub cannot be reached or denies access.
    """
    with hub_errors(repo, revision):
        # Weights in subfolders (`*` matches slashes, too), and those in the authors' own format.
        ignored = ["*/*.safetensors*", "consolidated*"]
        try:
            return Path(snapshot_download(repo, revision=revision, allow_patterns=patterns, ignore_patterns=ignored))
        except IncompleteSnapshotError as error:
            needed = [each for each in patterns if each not in optional]
            folder = snapshot_download(repo, revision=revision, allow_patterns=needed, ignore_patterns=ignored)
            logger.warning("%s", first_line(error))
            return Path(folder)


def check_downloaded(path: Path, digest: str) -> None:
    """Raise ValueError unless a file's SHA-256 is the one that the Hub gave, which is its name in the Hub's cache."""
    blob = path.resolve()
    if SHA256.fullmatch(blob.name) and blob.name != digest:
        raise ValueError(f"{path.name} is damaged: its SHA-256 is not the one that the Hub gave; remove {blob}")


@contextlib.contextmanager
def hub_errors(repo: str, revision: str | None) -> Iterator[None]:
    """Turn the Hub client's errors into one line that names the repository and the remedy."""
    check_repository(repo)
    at = f"{repo}@{revision}" if revision not in (None, "main") else repo
    try:
        yield
    except RevisionNotFoundError:
        raise FileNotFoundError(f"{at}: the repository has no such revision") from None
    except LocalTokenNotFoundError:
        raise PermissionError(f"{at}: there is no token for the Hub; {LOG_IN}") from None
    except OfflineModeIsEnabled:
        raise ConnectionError(f"{at}: HF_HUB_OFFLINE is set; unset it to reach the Hub") from None
    except GatedRepoError:
        raise PermissionError(f"{at} is gated; ask for access on its page, then {LOG_IN}") from None
    except RepositoryNotFoundError as error:
        if error.response.request.method not in ("GET", "HEAD"):
            raise PermissionError(f"{at}: the token may not write there; {LOG_IN}") from None
        raise FileNotFoundError(f"{at} is not on the Hub; if it is private, {LOG_IN}") from None
    except RuntimeError as error:  # raised for any failed upload of a file, and by Xet
        if not isinstance(error.__cause__, HTTPError):
            reason = first_line(error.__cause__ or error).rstrip(".")
            raise ConnectionError(f"{at}: {reason}{GO_ON}") from None
        raise _described(f"{at}: {first_line(error)}", error.__cause__, resumable=True) from None
    except LocalEntryNotFoundError as error:
        raise ConnectionError(f"{at} is not cached and could not be downloaded: {first_line(error)}") from None
    except HTTPError as error:
        raise _described(at, error) from None
    except (PermissionError, FileNotFoundError) as error:
        if error.errno is not None:  # of a file here
            raise
        raise type(error)(f"{at}: {first_line(error)}; {LOG_IN}") from None  # of Xet
    except (ConnectionError, TimeoutError) as error:  # of Xet
        raise ConnectionError(f"{at}: the connection to the Hub broke ({first_line(error)}){GO_ON}") from None


def _described(at: str, error: HTTPError, resumable: bool = False) -> OSError:
    if not isinstance(error, HfHubHTTPError):
        return ConnectionError(f"{at}: the connection to the Hub broke ({first_line(error)}){GO_ON}")
    status = error.response.status_code
    message = error.server_message or f"HTTP {status}"
    if status in (401, 403):
        return PermissionError(f"{at}: the token may not do this ({message}); {LOG_IN} with one that can write")
    return ConnectionError(f"{at}: the Hub refused ({status}: {message}){GO_ON if resumable or status >= 500 else ''}")
