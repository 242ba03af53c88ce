"""Write a checkpoint as a stream: shard by shard, tensor by tensor, resumable from the finished shards."""

import hashlib
import json
import threading
from collections.abc import Callable, Container, Iterator
from concurrent.futures import CancelledError, ThreadPoolExecutor, as_completed
from pathlib import Path

import torch
from huggingface_hub.serialization import split_state_dict_into_shards_factory
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from gda._version import __version__
from gda.common.files import read_json, remove, sha256, stamps, write_json, write_text
from gda.common.screen import progress_bars
from gda.conversion.options import parsed_size
from gda.conversion.sources.source import Source
from gda.conversion.tensors.file_range import FileRange
from gda.conversion.tensors.recipes import Recipe
from gda.conversion.tensors.safetensors_io import INDEX_FILE, SafetensorsReader, file_order, write_safetensors

MANIFEST_FILE = "manifest.json"
FILENAME_PATTERN = "model{suffix}.safetensors"


def shards_of(recipes: dict[str, Recipe], max_shard_size: str | int) -> dict[str, list[str]]:
    """Tensor names by file, in the files and order of `save_pretrained` with the same `max_shard_size`."""
    split = split_state_dict_into_shards_factory(
        {name: recipe.spec for name, recipe in recipes.items()},
        get_storage_size=lambda spec: spec.nbytes,
        filename_pattern=FILENAME_PATTERN,
        max_shard_size=parsed_size(max_shard_size),
    )
    return split.filename_to_tensors


def write_checkpoint(
    folder: Path,
    recipes: dict[str, Recipe],
    source: Source,
    *,
    max_shard_size: str | int,
    settings: dict[str, object],
    keep: Container[str] = (),
    workers: int = 1,
    console: Console | None = None,
) -> dict[str, str]:
    """Write the weights into `folder`, marked by `mark_mode`, continuing from shards that an earlier process finished.

    A manifest lists the finished shards with their SHA-256. Files in the folder that are unknown and not in `keep` are
    removed. `settings` are what the bytes depend on, apart from the source.

    Returns:
        SHA-256 of each weight file.

    Raises:
        ValueError: if the folder was begun with other settings or from another source.
    """
    shards = shards_of(recipes, max_shard_size)
    fingerprint = _fingerprint(source, settings, shards)
    finished = _finished_shards(folder / MANIFEST_FILE, fingerprint)
    intact = {
        file: digest
        for file, digest in finished.items()
        if (folder / file).is_file() and sha256(folder / file) == digest
    }
    for path in folder.iterdir():
        if path.name not in intact and path.name != MANIFEST_FILE and path.name not in keep:
            remove(path)

    def remember(file: str, digest: str) -> None:
        intact[file] = digest
        held = {"mode": settings.get("mode"), "fingerprint": fingerprint, "finished": intact}
        write_json(folder / MANIFEST_FILE, held)

    def made(name: str) -> torch.Tensor | FileRange:
        recipe, stored = recipes[name], None
        if (original := recipe.copy_of) is not None and source.specs[original] == recipe.spec:
            stored = source.stored(original)
        return recipe(source.read) if stored is None else stored

    write_weights(folder, recipes, shards, made, intact=intact, finished=remember, workers=workers, console=console)
    return {file: intact[file] for file in shards}


def write_weights(
    folder: Path,
    recipes: dict[str, Recipe],
    shards: dict[str, list[str]],
    made: Callable[[str], torch.Tensor | FileRange],
    *,
    intact: Container[str] = (),
    finished: Callable[[str, str], None] = lambda file, digest: None,
    workers: int = 1,
    console: Console | None = None,
) -> None:
    """Write the index and each shard that is not `intact`; call `finished(file, SHA-256)` after each shard.

    `made(name)` returns a tensor, or where its bytes are. With several `workers`, threads call it.
    """
    sizes, stop = {name: recipe.spec.nbytes for name, recipe in recipes.items()}, threading.Event()
    done_before = sum(sizes[name] for file, names in shards.items() if file in intact for name in names)
    with byte_progress(console) as progress:
        task = progress.add_task("writing", total=sum(sizes.values()), completed=done_before)

        def in_turn(names: list[str]) -> Iterator[tuple[str, torch.Tensor | FileRange]]:
            for name in names:
                if stop.is_set():
                    raise CancelledError
                yield name, made(name)
                progress.update(task, advance=sizes[name])

        def write(file: str) -> str:
            specs = {name: recipes[name].spec for name in shards[file]}
            return write_safetensors(folder / file, specs, in_turn(file_order(specs)))

        missing = [file for file in shards if file not in intact]
        _write_all(missing, write, finished, workers, stop)
    if len(shards) > 1:
        _write_index(folder, recipes, shards)


def _write_all(
    files: list[str],
    write: Callable[[str], str],
    finished: Callable[[str, str], None],
    workers: int,
    stop: threading.Event,
) -> None:
    """Call `finished(file, write(file))` for each file; `stop` is set when one fails, to stop the others."""
    if workers == 1:  # in this thread, so that the state on disk is deterministic
        for file in files:
            finished(file, write(file))
        return
    with ThreadPoolExecutor(workers) as pool:
        writing = {pool.submit(write, file): file for file in files}
        try:
            for future in as_completed(writing):
                finished(writing[future], future.result())
        finally:
            stop.set()
            pool.shutdown(cancel_futures=True)


def byte_progress(console: Console | None) -> Progress:
    """A progress bar that counts bytes."""
    columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    return progress_bars(console, TextColumn("{task.description}"), *columns)


def _fingerprint(source: Source, settings: dict[str, object], shards: dict[str, list[str]]) -> str:
    """Identifies the conversion: only a run with the same fingerprint may continue it."""
    identity = [
        __version__,
        torch.__version__,
        source.name,
        source.revision,
        stamps(source.weight_files),
        source.config.to_dict() | {"_name_or_path": None},  # the same source by a relative or an absolute path
        settings,
        shards,
    ]
    return hashlib.sha256(json.dumps(identity, sort_keys=True, default=str).encode()).hexdigest()


def mark_mode(folder: Path, mode: str) -> None:
    """Write a manifest, which marks the folder as a conversion of this mode; ValueError if it is one of another mode.

    A split, which may have taken hours, is not given up for another mode, and does not begin where it would fail.
    """
    manifest = folder / MANIFEST_FILE
    if not manifest.exists():
        write_json(manifest, {"mode": mode, "finished": {}})
        return
    held = read_json(manifest)
    begun = held.get("mode") if isinstance(held, dict) else None
    if begun != mode:
        raise ValueError(
            f"{folder} was begun with mode {begun!r:.100}, not {mode!r}; continue it with the command that began it, "
            "or pass --overwrite instead of --resume to start over"
        )


def _finished_shards(manifest: Path, fingerprint: str) -> dict[str, str]:
    held = read_json(manifest)
    finished = held.get("finished")
    if not isinstance(finished, dict) or (finished and held.get("fingerprint") != fingerprint):
        raise ValueError(
            f"{manifest.parent} was started with another source or other settings; pass --overwrite instead of "
            "--resume to start over"
        )
    return finished


def _write_index(folder: Path, recipes: dict[str, Recipe], shards: dict[str, list[str]]) -> None:
    index = {
        "metadata": {
            "total_parameters": sum(recipe.spec.numel for recipe in recipes.values()),
            "total_size": sum(recipe.spec.nbytes for recipe in recipes.values()),
        },
        "weight_map": {name: file for file, names in shards.items() for name in names},
    }
    write_text(folder / INDEX_FILE, json.dumps(index, indent=2, sort_keys=True) + "\n")


def different_tensors(folder: Path, recipes: dict[str, Recipe], source: Source, console: Console | None) -> list[str]:
    """Names of the tensors in `folder` that differ in a bit from what the recipes make of the source."""
    written = SafetensorsReader(folder)
    if missing := sorted(set(recipes) ^ set(written.specs)):
        return missing
    different = []
    with byte_progress(console) as progress:
        task = progress.add_task("comparing", total=sum(recipe.spec.nbytes for recipe in recipes.values()))
        for name, recipe in recipes.items():
            if written.specs[name] != recipe.spec or not torch.equal(written.read(name), recipe(source.read)):
                different.append(name)
            progress.advance(task, recipe.spec.nbytes)
    return different
