"""The files that are read, their places in a workspace of tiny models, and the calls that read them."""

import contextlib
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors.torch import save_file

import gda
from gda.conversion.writing import stream

from ..support.gguf_files import SHAPE, write_gguf
from ..support.llamas import llama_model, save_llama
from ..support.relatives import save_motif
from ..support.splitting import save_text

STEPS: dict[str, Any] = {"steps": 2, "batch_size": 2, "context": 16, "save_every": 1, "keep": 2}
TEXT = "".join(f"{i} times {i} is {i * i}. " for i in range(60))


@dataclass(frozen=True)
class Target:
    """A file, how it is written, and the function that reads it; `call` gets the workspace and may create `out` in
    it.
    """

    file: str
    kind: str
    call: Callable[[Path], object]
    slow: bool = False  # trains or converts


def make_workspace(folder: Path) -> Path:
    """Every file that is read, undamaged; `held` is a copy of what calls change."""
    save_llama(folder / "llama")
    save_llama(folder / "shards", max_shard_size="20KB", dtype=torch.bfloat16)
    save_motif(folder / "motif")
    write_gguf(folder / "tiny.gguf", llama_model(**SHAPE))
    gda.convert(folder / "llama", folder / "gda", verify=False)
    gda.grow(folder / "gda", folder / "grown", signal=2, verify=False)
    save_text(folder / "text.txt", 3000)
    rows = [{"text": TEXT}, {"text": "é" * 50, "other": [1, 2]}, {"text": ""}]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    pq.write_table(pa.table({"text": [TEXT, "b" * 90], "n": [1, 2]}), folder / "rows.parquet")
    (folder / "card").mkdir()
    (folder / "card" / "README.md").write_text(CARD)
    save_file({"a": torch.zeros(3)}, folder / "secret.safetensors")
    _begin_a_conversion(folder)
    _begin_a_split(folder)
    _begin_a_run(folder)
    return folder


CARD = """---
license: apache-2.0
model-index:
- name: tiny
  results:
  - task: {type: text-generation}
    dataset: {name: a, type: b, args: {limit: 3}}
    metrics: [{type: acc, value: 0.5}]
---
# tiny
"""


def _begin_a_conversion(folder: Path) -> None:
    """The folder of a conversion that was interrupted while writing."""
    written = stream.write_safetensors

    def second_is_interrupted(path: Path, *arguments: Any) -> str:
        if (path.parent / "manifest.json").exists():
            raise KeyboardInterrupt
        return written(path, *arguments)

    stream.write_safetensors = second_is_interrupted
    try:
        _convert(folder)
    except KeyboardInterrupt:
        (folder / ".out.partial").rename(folder / "begun-conversion")
    finally:
        stream.write_safetensors = written


def _convert(folder: Path, **options: Any) -> object:
    with contextlib.chdir(folder):  # a conversion knows its source by the path that it was given
        return gda.convert("shards", "out", max_shard_size="20KB", verify=False, **options)


def _split(folder: Path, out: Path, **options: Any) -> object:
    return gda.convert(
        folder / "llama",
        out,
        mode="split",
        effort="fast",
        calibration=folder / "text.txt",
        calibration_tokens=512,
        verify=False,
        **options,
    )


def _begin_a_split(folder: Path) -> None:
    """The folder of a split that was interrupted after fitting."""
    written = stream.write_safetensors

    def interrupt(*arguments: Any) -> str:
        raise KeyboardInterrupt

    stream.write_safetensors = interrupt
    try:
        _split(folder, folder / "out")
    except KeyboardInterrupt:
        (folder / ".out.partial").rename(folder / "begun-split")
    finally:
        stream.write_safetensors = written


def _train(folder: Path, model: str = "gda", *, data: str = "text.txt", **options: Any) -> Any:
    with contextlib.chdir(folder):  # a run knows its data by the path that it was given
        return gda.train(folder / model, folder / "out", data=data, **(STEPS | options))


def _begin_a_run(folder: Path) -> None:
    """The folders of a training run killed after its first checkpoint, and of one killed at the end."""
    from gda.common.files import StagedFolder

    finish = StagedFolder.finish

    def interrupt(staged: StagedFolder) -> None:
        raise KeyboardInterrupt

    def copy_and_go_on(checkpoint: Path, *arguments: Any) -> None:
        marked(checkpoint, *arguments)
        if not (folder / "begun-run").exists():
            shutil.copytree(folder / ".out.partial", folder / "begun-run")

    from gda.training.callbacks import checkpoints

    marked = checkpoints.mark_complete
    StagedFolder.finish, checkpoints.mark_complete = interrupt, copy_and_go_on
    try:
        _train(folder)
    except KeyboardInterrupt:
        (folder / ".out.partial").rename(folder / "ended-run")
    finally:
        StagedFolder.finish, checkpoints.mark_complete = finish, marked


def _resumed(begun: str, call: Callable[[Path], object]) -> Callable[[Path], object]:
    """The call, after the unfinished work was copied into place."""

    def run(folder: Path) -> object:
        shutil.copytree(folder / begun, folder / ".out.partial")
        return call(folder)

    return run


def _rehearsed(source: str, **options: Any) -> Callable[[Path], object]:
    return lambda folder: gda.convert(folder / source, folder / "out", dry_run=True, **options)


def _goes_on(folder: Path) -> object:
    return _convert(folder, resume=True)


def _run_goes_on(folder: Path) -> object:
    return _train(folder, resume=True)


def _plotted(folder: Path) -> object:
    from gda.training.plot import plot

    shutil.copytree(folder / "ended-run", folder / "out")
    return plot(folder / "out")


def _card(folder: Path) -> object:
    from gda.eval.card import read_card

    return read_card(folder / "card")


def _pushed(folder: Path) -> object:
    return gda.push(folder / "gda", "me/tiny", dry_run=True)


def _calibrated(file: str) -> Callable[[Path], object]:
    return lambda folder: gda.convert(
        folder / "llama",
        folder / "out",
        mode="split",
        effort="fast",
        calibration=folder / file,
        calibration_tokens=256,
        dry_run=True,
    )


def _inspected(folder: Path) -> object:
    return gda.inspect(folder / "gda")


def _tensors_verified(folder: Path) -> object:
    return gda.verify(folder / "llama", folder / "gda", method="tensors")


def _of_a_checkpoint(folder: Path) -> object:
    return _train(folder, "begun-run/checkpoint-1", dry_run=True)


def _new_parts(folder: Path) -> object:
    return _train(folder, "grown", train="new", dry_run=True)


def _on(file: str, **options: Any) -> Callable[[Path], object]:
    return lambda folder: _train(folder, data=file, dry_run=True, **options)


INDEX = "model.safetensors.index.json"
TARGETS: dict[str, Target] = {
    "config of a Llama": Target("llama/config.json", "json", _rehearsed("llama")),
    "config of a Motif": Target("motif/config.json", "json", _rehearsed("motif")),
    "config of a GDA, inspected": Target("gda/config.json", "json", _inspected),
    "config of a GDA, grown": Target(
        "gda/config.json", "json", lambda folder: gda.grow(folder / "gda", folder / "out", signal=2, dry_run=True)
    ),
    "config of a GDA, trained": Target("gda/config.json", "json", lambda folder: _train(folder, dry_run=True)),
    "index": Target(f"shards/{INDEX}", "json", _rehearsed("shards")),
    "weights of a Llama": Target("llama/model.safetensors", "safetensors", _rehearsed("llama")),
    "weights of a Motif": Target("motif/model.safetensors", "safetensors", _rehearsed("motif")),
    "weights of a GDA": Target("gda/model.safetensors", "safetensors", _inspected),
    "weights of a GDA, trained": Target(
        "gda/model.safetensors", "safetensors", lambda folder: _train(folder, dry_run=True)
    ),
    "GGUF": Target("tiny.gguf", "bytes", _rehearsed("tiny.gguf")),
    "conversion.json, inspected": Target("gda/conversion.json", "json", _inspected),
    "conversion.json, verified": Target("gda/conversion.json", "json", _tensors_verified),
    "conversion.json, pushed": Target("gda/conversion.json", "json", _pushed),
    "trainable.json": Target("grown/trainable.json", "json", _new_parts),
    "calibration in rows": Target("rows.jsonl", "jsonl", _calibrated("rows.jsonl")),
    "calibration in text": Target("text.txt", "bytes", _calibrated("text.txt")),
    "data in rows": Target("rows.jsonl", "jsonl", _on("rows.jsonl")),
    "data in rows, streamed": Target("rows.jsonl", "jsonl", _on("rows.jsonl", streaming=True)),
    "data in parquet": Target("rows.parquet", "bytes", _on("rows.parquet")),
    "card": Target("card/README.md", "bytes", _card),
    "training.json at the end": Target("ended-run/training.json", "json", _resumed("ended-run", _run_goes_on)),
    "training_log.jsonl, drawn": Target("ended-run/training_log.jsonl", "jsonl", _plotted),
    "checkpoint.json of a model": Target("begun-run/checkpoint-1/checkpoint.json", "json", _of_a_checkpoint),
    "manifest of a conversion": Target(
        "begun-conversion/manifest.json", "json", _resumed("begun-conversion", _goes_on), slow=True
    ),
    "fingerprint of a split": Target(
        "begun-split/work/begun.json",
        "json",
        _resumed("begun-split", lambda folder: _split(folder, folder / "out", resume=True)),
        slow=True,
    ),
    "training.json of a run": Target("begun-run/training.json", "json", _resumed("begun-run", _run_goes_on), slow=True),
    "checkpoint.json of a run": Target(
        "begun-run/checkpoint-1/checkpoint.json", "json", _resumed("begun-run", _run_goes_on), slow=True
    ),
    "trainer_state.json of a run": Target(
        "begun-run/checkpoint-1/trainer_state.json", "json", _resumed("begun-run", _run_goes_on), slow=True
    ),
    "optimizer of a run": Target(
        "begun-run/checkpoint-1/optimizer.pt", "bytes", _resumed("begun-run", _run_goes_on), slow=True
    ),
    "weights of a run": Target(
        "begun-run/checkpoint-1/model.safetensors", "safetensors", _resumed("begun-run", _run_goes_on), slow=True
    ),
    "log of a run": Target("begun-run/training_log.jsonl", "jsonl", _resumed("begun-run", _run_goes_on), slow=True),
}
