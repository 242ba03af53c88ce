"""A GDA model's folder goes to the Hub, in one commit."""

import contextlib
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
from rich.console import Console
from transformers.dynamic_module_utils import get_relative_import_files

from gda._files import read_json, write_text
from gda.configuration.configuration_gda import AUTO_MAP, GDAConfig

from .card import CARD_FILE, model_card
from .hub import hub_errors
from .sources import MODEL_PATTERNS, PROVENANCE_FILE, WEIGHT_PATTERNS, FolderSource, quiet_transformers
from .stream import shows_progress


@dataclass(frozen=True)
class PushReport:
    """What was pushed.

    Attributes:
        repo: The repository, as "owner/name".
        url: Where the model can be seen.
        commit: The commit made; the repository's last one if it had all of it already.
        revision: The branch.
        files: What the commit holds.
        nbytes: Size of all of it.
        left_out: Files of the folder that are no part of a model.
        dry_run: Whether nothing was sent.
    """

    repo: str
    url: str
    commit: str | None
    revision: str
    files: list[str]
    nbytes: int
    left_out: list[str]
    dry_run: bool = False

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON-ready values."""
        return dict(vars(self))


def push(
    folder: str | Path,
    repo: str,
    *,
    private: bool | None = None,
    revision: str = "main",
    message: str | None = None,
    bundle_code: bool = True,
    dry_run: bool = False,
    console: Console | None = None,
) -> PushReport:
    """Push a GDA model's folder to the Hub, in one commit, with a model card and the code of the model.

    Weights that an interrupted push has sent are not sent again; files of weights that an earlier push left there and
    that this model does not have are removed. The folder itself stays as it is: a card and the code are added to the
    commit where the folder has none.

    Args:
        folder: A folder with a GDA model.
        repo: The repository, "owner/name" or "name"; made if it is not there.
        private: Whether a repository that is made is private; by default as the owner's account has it.
        revision: Branch to push to; made if it is not there.
        message: Title of the commit.
        bundle_code: Whether the commit holds the code of the model, so that it loads with `trust_remote_code=True`
            where this package is not installed.
        dry_run: Check the folder and list its files; send nothing.
        console: Where progress is shown; nowhere if None.

    Raises:
        FileNotFoundError: if the folder is not there.
        ValueError: if it holds no whole GDA model, or a name is none that the Hub allows.
        PermissionError: if the Hub knows no token that may write there.
        ConnectionError: if the Hub cannot be reached, or refuses; the same call goes on.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not a folder; name one that holds a GDA model")
    with quiet_transformers(), tempfile.TemporaryDirectory(prefix="gda-push-") as scratch:
        source = FolderSource(folder)
        if not isinstance(source.config, GDAConfig):
            raise ValueError(f"{folder} holds a {source.config.model_type!r} model, not a GDA model")
        files = _files_to_push(source, source.config, Path(scratch), bundle_code)
        report = PushReport(
            repo=repo,
            url="",
            commit=None,
            revision=revision,
            files=list(files),
            nbytes=sum(path.stat().st_size for path in files.values()),
            left_out=_left_out(folder, files),
            dry_run=dry_run,
        )
        if dry_run:
            return report
        with hub_errors(repo, revision), _progress_bars(console):
            return _send(report, files, private, message or f"Upload {folder.resolve().name}")


def _files_to_push(source: FolderSource, config: GDAConfig, scratch: Path, bundle_code: bool) -> dict[str, Path]:
    """By path in the repository, the file to send: of the folder, or made in `scratch` where it has none."""
    folder = source.folder
    files = {
        path.relative_to(folder).as_posix(): path
        for pattern in (*MODEL_PATTERNS, CARD_FILE)
        for path in folder.glob(pattern)
        if path.is_file()
    }
    code = _code_of(folder) if hasattr(config, "auto_map") else []
    if code and bundle_code:
        files |= {path.name: path for path in code}
    elif bundle_code or hasattr(config, "auto_map"):
        config.save_pretrained(scratch, bundle_code=bundle_code)
    if CARD_FILE not in files:
        made = read_json(folder / PROVENANCE_FILE) if PROVENANCE_FILE in files else None
        write_text(scratch / CARD_FILE, model_card(config, name=folder.resolve().name, made=made, has_code=bundle_code))
    return dict(sorted((files | {path.name: path for path in scratch.iterdir()}).items()))


def _code_of(folder: Path) -> list[Path]:
    """The files of the model's code in `folder`; none if one is missing."""
    module = folder / f"{AUTO_MAP['AutoModel'].split('.')[0]}.py"
    if not module.is_file():
        return []
    files = [module, *map(Path, get_relative_import_files(module))]
    return files if all(path.is_file() for path in files) else []


def _left_out(folder: Path, files: dict[str, Path]) -> list[str]:
    sent = {Path(name).parts[0] for name in files}
    return sorted(
        path.name for path in folder.iterdir() if path.name not in sent and path.name not in (".cache", ".git")
    )


def _send(report: PushReport, files: dict[str, Path], private: bool | None, message: str) -> PushReport:
    api = HfApi()
    repo = api.create_repo(report.repo, private=private, exist_ok=True).repo_id
    if report.revision != "main":
        api.create_branch(repo, branch=report.revision, exist_ok=True)
    operations: list[CommitOperationAdd | CommitOperationDelete] = [
        CommitOperationAdd(name, str(path)) for name, path in files.items()
    ]
    # Weights of an earlier push in other files would be loaded in the place of these, or lie there for nothing.
    held = api.list_repo_files(repo, revision=report.revision)
    operations += [
        CommitOperationDelete(name)
        for name in held
        if name not in files and any(fnmatchcase(name, pattern) for pattern in WEIGHT_PATTERNS) and "/" not in name
    ]
    commit = api.create_commit(repo, operations, commit_message=message, revision=report.revision)
    url = f"{api.endpoint}/{repo}" + ("" if report.revision == "main" else f"/tree/{report.revision}")
    return replace(report, repo=repo, url=url, commit=commit.oid)


@contextlib.contextmanager
def _progress_bars(console: Console | None) -> Iterator[None]:
    """Let the Hub's client show its bars where somebody watches, and nowhere else."""
    if shows_progress(console) or are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()
