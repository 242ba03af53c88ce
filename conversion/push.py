"""Push the folder of a GDA model to the Hub in one commit."""

import contextlib
import inspect
import re
import shlex
import tempfile
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.utils import disable_progress_bars, filter_repo_objects
from rich.console import Console
from transformers.dynamic_module_utils import get_relative_import_files

from gda.common.assets import LICENCE_PATTERNS, tokenizer_code
from gda.common.errors import Interrupted
from gda.common.files import read_json, write_json, write_text
from gda.common.options import takes
from gda.common.places import ADAPTER_CONFIG
from gda.common.progress import shows_progress
from gda.common.screen import quiet_transformers
from gda.configuration.configuration_gda import AUTO_MAP, GDAConfig
from gda.conversion.options import PushOptions
from gda.conversion.sources.config_file import read_gda_config
from gda.conversion.sources.folder import FolderSource
from gda.conversion.sources.hub import GO_ON, hub_errors
from gda.conversion.sources.open import MODEL_PATTERNS
from gda.conversion.sources.source import CARD_FILE, PROVENANCE_FILE, TRAINING_FILE
from gda.conversion.tensors.safetensors_io import INDEX_FILE, WEIGHTS_FILE
from gda.conversion.writing.card import PLACEHOLDER, model_card
from gda.conversion.writing.provenance import history_of
from gda.modeling_gda.modeling_gda import GDAModel

REVISION = re.compile(r"[\w.-]+(/[\w.-]+)*")
# In the folder, but left out without a note.
UNREPORTED = (".cache", ".git", ".gitattributes", "training_log.jsonl", "training.html")
DIGITS = "[0-9]" * 5
# Files of an earlier model, or of an adapter, that would be loaded with this one, besides its code. Others stay.
STALE = (
    WEIGHTS_FILE,
    INDEX_FILE,
    f"model-{DIGITS}-of-{DIGITS}.safetensors",
    TRAINING_FILE,
    *(each for each in MODEL_PATTERNS if not each.startswith("*.safetensors") and each not in LICENCE_PATTERNS),
)


@dataclass(frozen=True)
class PushReport:
    """What was pushed.

    Attributes:
        repo: The repository, as "owner/name".
        revision: The branch.
        files: The model's files, by their paths in the repository.
        nbytes: Their total size.
        left_out: Files of the folder that are not part of a model.
        notes: What else the user should know.
        url: The model's page.
        commit: The commit; the last one of the branch if nothing had changed.
        removed: Files of an earlier model in the repository that this one doesn't have.
        changed: Whether there was anything to commit.
        dry_run: Whether nothing was sent.
    """

    repo: str
    revision: str
    files: list[str]
    nbytes: int
    left_out: list[str]
    notes: list[str] = field(default_factory=list)
    url: str = ""
    commit: str | None = None
    removed: list[str] = field(default_factory=list)
    changed: bool = False
    dry_run: bool = False

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON-ready values."""
        return dict(vars(self))


@takes(PushOptions)
def push(options: PushOptions, *, console: Console | None = None) -> PushReport:
    """Push the folder of a GDA language model to the Hub in one commit, with a model card and the model's code.

    Weights that an interrupted push uploaded are not sent again. Files of an earlier model in the repository that this
    one doesn't have, such as other shards or a chat template, are removed: they would be loaded with it. The folder is
    not changed: card and code are added to the commit if the folder lacks them. Of training.json, only the history of
    the model is pushed: the rest names paths of this machine.

    Raises:
        FileNotFoundError: if the folder doesn't exist.
        ValueError: if the folder doesn't hold a complete GDA language model, the Hub doesn't allow a name, or the
            repository exists and is public instead of private, or vice versa.
        PermissionError: if there is no token that may write to the repository.
        ConnectionError: if the Hub cannot be reached, or refuses.
    """
    folder, repo, revision = Path(options.folder), options.repo, options.revision
    if not REVISION.fullmatch(revision):
        raise ValueError(f"--revision {revision!r} is not a valid branch name")
    if (folder / ADAPTER_CONFIG).is_file():
        raise ValueError(f"{folder} holds an adapter; merge it into the model, or push it with PEFT's push_to_hub")
    with tempfile.TemporaryDirectory(prefix="gda-push-") as scratch:
        with quiet_transformers():
            read_gda_config(folder)  # refuses a model of another type or with another head
            source = FolderSource(folder)
            if "/" not in repo and not options.dry_run:
                with hub_errors(repo, revision):
                    repo = f"{HfApi().whoami()['name']}/{repo}"  # the card names it
            files, notes = _files_to_push(source, Path(scratch), options.bundle_code, repo)
        report = PushReport(
            repo=repo,
            revision=revision,
            files=list(files),
            nbytes=sum(path.stat().st_size for path in files.values()),
            left_out=_left_out(folder, files),
            notes=notes,
            dry_run=options.dry_run,
        )
        if options.dry_run:
            return report
        has_card = (folder / CARD_FILE).is_file()
        message = options.message or f"Upload {folder.resolve().name}"
        # The Hub's client shows progress bars of its own, some of them in log files, too.
        bars = contextlib.nullcontext() if shows_progress(console) else disable_progress_bars()
        with hub_errors(repo, revision), bars:
            return _send(report, files, options.private, has_card, message)


def push_result(
    out: Path, repo: str, *, private: bool | None, bundle_code: bool, console: Console | None = None
) -> PushReport:
    """Push the finished result of another command, as `push` does; an error says how to push it later.

    Raises:
        Interrupted: for Ctrl-C.
        OSError, ValueError: as `push`.
    """
    visibility = [] if private is None else ["--private" if private else "--public"]
    again = shlex.join(["gda", "push", str(out), repo, *visibility, *([] if bundle_code else ["--no-bundle-code"])])
    remedy = f"{out} is complete: push it with `{again}`"
    try:
        return push(out, repo, private=private, bundle_code=bundle_code, console=console)
    except KeyboardInterrupt:
        raise Interrupted(f"interrupted; {remedy}") from None
    except ValueError as error:
        raise ValueError(f"{error}; {remedy}") from None
    except OSError as error:
        kind = next(each for each in (PermissionError, ConnectionError, OSError) if isinstance(error, each))
        raise kind(f"{str(error).removesuffix(GO_ON)}; {remedy}") from None


def _files_to_push(
    source: FolderSource, scratch: Path, bundle_code: bool, repo: str
) -> tuple[dict[str, Path], list[str]]:
    """The file to send for each path in the repository, from the folder or created in `scratch`; and notes."""
    folder, config = source.folder, source.config
    assert isinstance(config, GDAConfig)
    files = {
        path.relative_to(folder).as_posix(): path
        for pattern in (*MODEL_PATTERNS, CARD_FILE)
        for path in folder.glob(pattern)
        if path.is_file() and not path.match("*.safetensors") and path.name != INDEX_FILE
    }
    files |= {path.name: path for path in (*source.weight_files, *tokenizer_code(folder))}
    if source.weight_files != [folder / WEIGHTS_FILE]:
        files[INDEX_FILE] = folder / INDEX_FILE
    code = _code_of(folder) if getattr(config, "auto_map", None) == AUTO_MAP else []
    if code and bundle_code:
        files |= {path.name: path for path in code}
    elif bundle_code or hasattr(config, "auto_map"):
        config.save_pretrained(scratch, bundle_code=bundle_code)
    notes = _add_card(source, files, scratch, bundle_code, repo)
    if PROVENANCE_FILE not in files and (history := history_of(folder)):
        write_json(scratch / TRAINING_FILE, {"history": history})  # the rest of the file names paths of this machine
    return dict(sorted((files | {path.name: path for path in scratch.iterdir()}).items())), notes


def _add_card(source: FolderSource, files: dict[str, Path], scratch: Path, has_code: bool, repo: str) -> list[str]:
    """Create the model card in `scratch`, from the one in the folder if that was edited; return notes.

    It names the repository where the card of a folder can only say `path/or/id`.
    A conversion.json about other weights, as after training, is removed from `files`.
    """
    config, name = source.config, source.folder.resolve().name
    assert isinstance(config, GDAConfig)
    notes: list[str] = []
    known: dict[str, Any] = {"name": name, "history": history_of(source.folder), "card_data": source.card_data()}
    provenance = read_json(files[PROVENANCE_FILE]) if PROVENANCE_FILE in files else None
    generated = [model_card(config, made=provenance, has_code=has, **known) for has in (True, False)]
    if provenance is not None and provenance.get("sha256") != source.hashes():
        notes.append(f"{PROVENANCE_FILE} describes different weights and is not pushed")
        del files[PROVENANCE_FILE]
        provenance = None
    if CARD_FILE in files and files[CARD_FILE].read_bytes() in [card.encode() for card in generated]:
        del files[CARD_FILE]  # unedited: it is generated again for the files that are pushed
    if CARD_FILE not in files:
        card = model_card(config, made=provenance, has_code=has_code, **known)
        write_text(scratch / CARD_FILE, card.replace(PLACEHOLDER, repo))
        return notes
    card_bytes = files[CARD_FILE].read_bytes()
    if PLACEHOLDER.encode() in card_bytes:
        (scratch / CARD_FILE).write_bytes(card_bytes.replace(PLACEHOLDER.encode(), repo.encode()))
    if notes:
        notes.append(f"{CARD_FILE} is pushed unchanged; check that it describes these weights")
    return notes


def _code_names() -> set[str]:
    """Names of the code files that saving a model puts beside its weights."""
    module = inspect.getfile(GDAModel)
    return {Path(file).name for file in (module, *get_relative_import_files(module))}


def _code_of(folder: Path) -> list[Path]:
    """The model's code files in `folder`; none if one is missing."""
    files = [folder / name for name in _code_names()]
    return files if all(path.is_file() for path in files) else []


def _left_out(folder: Path, files: dict[str, Path]) -> list[str]:
    expected = {Path(name).parts[0] for name in files} | {*UNREPORTED, PROVENANCE_FILE}
    expected |= {path.name for path in _code_of(folder)}
    return sorted(path.name for path in folder.iterdir() if path.name not in expected)


def _send(report: PushReport, files: dict[str, Path], private: bool | None, has_card: bool, message: str) -> PushReport:
    api = HfApi()
    repo = api.create_repo(report.repo, private=private, exist_ok=True).repo_id
    if private is not None and api.model_info(repo).private is not private:
        kind = "public" if private else "private"
        raise ValueError(f"{repo} exists and is {kind}; change this on its page, or choose another name")
    if report.revision != "main":
        api.create_branch(repo, branch=report.revision, exist_ok=True)
    before = api.model_info(repo, revision=report.revision)
    held = [file.rfilename for file in before.siblings or []]
    if CARD_FILE in held and not has_card:
        files = {name: path for name, path in files.items() if name != CARD_FILE}  # it may have been edited
        note = f"{CARD_FILE} of the repository is kept, as the folder has none; check that it describes this model"
        nbytes = sum(path.stat().st_size for path in files.values())
        report = replace(report, files=list(files), nbytes=nbytes, notes=[*report.notes, note])
    removed = sorted(filter_repo_objects(set(held) - files.keys(), allow_patterns=[*STALE, *_code_names()]))
    operations: list[CommitOperationAdd | CommitOperationDelete] = [
        CommitOperationAdd(name, str(path)) for name, path in files.items()
    ]
    operations += [CommitOperationDelete(name) for name in removed]
    commit = api.create_commit(repo, operations, commit_message=message, revision=report.revision)
    url = f"{api.endpoint}/{repo}" + ("" if report.revision == "main" else f"/tree/{report.revision}")
    changed = commit.oid != before.sha
    return replace(report, repo=repo, url=url, commit=commit.oid, removed=removed, changed=changed)
