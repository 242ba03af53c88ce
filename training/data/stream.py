"""Sequences that are read while the model trains, and the file from which a resumed run continues them."""

import copy
import itertools
import json
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.numpy import save_file
from torch import Tensor
from torch.utils.data import IterableDataset

from gda.common.progress import logger
from gda.training.data.packing import COLUMNS, Block, OpenSequence, Progress, SequencePacker, Tally, ahead
from gda.training.data.rows import Source

# Sequences that are held in memory. When there are as many, a random half of them comes next, in random order.
SHUFFLE_BUFFER = 1000

Row = NDArray[np.int32]  # (columns, context)


@dataclass
class StreamState:
    """What the next sequences of a stream depend on."""

    seed: int  # the data is shuffled by it and `epoch`
    epoch: int = 0  # the number of the pass over the data
    progress: Progress = field(default_factory=Progress)  # in this pass
    count: int = 0  # sequences that were handed out, in all passes
    buffer: list[Row] = field(default_factory=list)  # sequences that are packed, but not shuffled
    ready: deque[Row] = field(default_factory=deque)  # sequences that come next

    def __post_init__(self) -> None:
        self.random = np.random.default_rng((self.seed, self.epoch))

    def add(self, block: Block, progress: Progress) -> None:
        """Put sequences into the buffer, and a half of it into `ready` whenever it is full."""
        self.progress = progress
        for row in np.stack(list(block.values()), axis=1):
            self.buffer.append(row.copy())
            if len(self.buffer) >= SHUFFLE_BUFFER:
                self._shuffle(SHUFFLE_BUFFER // 2)

    def end_pass(self) -> None:
        """Put the rest of the buffer into `ready`, and begin the next pass."""
        self._shuffle(0)
        self.epoch, self.progress = self.epoch + 1, Progress()
        self.__post_init__()

    def _shuffle(self, kept: int) -> None:
        rows = [self.buffer[index] for index in self.random.permutation(len(self.buffer))]
        self.ready.extend(rows[: len(rows) - kept])
        self.buffer = rows[len(rows) - kept :]

    def save(self, path: Path) -> None:
        """Write a safetensors file, with all that is no sequence in its metadata."""
        progress, unfinished = self.progress, self.progress.unfinished
        described = {
            **{name: getattr(self, name) for name in ("seed", "epoch", "count")},
            **{name: getattr(progress, name) for name in ("source", "position")},
            "rest": progress.rest.tolist(),
            "tally": asdict(progress.tally),
            "used": [each.used for each in unfinished],
            "random": self.random.bit_generator.state,
        }
        rows = {"buffer": self.buffer, "ready": self.ready, "unfinished": [each.columns for each in unfinished]}
        tensors = {name: np.stack(each) for name, each in rows.items() if each}
        save_file(tensors, path, {"stream": json.dumps(described)})

    @classmethod
    def read(cls, path: Path, shape: tuple[int, int]) -> "StreamState":
        """The state that `save` wrote; ValueError if its sequences have another shape (columns, context)."""
        rows: dict[str, list[Row]] = {"buffer": [], "ready": [], "unfinished": []}
        with safe_open(path, framework="numpy") as file:
            described = json.loads(file.metadata()["stream"])
            for name in file.keys():  # noqa: SIM118 - it cannot be iterated
                rows[name] = list(file.get_tensor(name))
        if any(row.shape != shape or row.dtype != np.int32 for name in rows for row in rows[name]):
            raise ValueError(f"{path.name} holds other sequences than (columns, context) = {shape}")
        if any(
            type(described[name]) is not int or described[name] < 0 for name in ("seed", "epoch", "count", "source")
        ):
            raise ValueError(f"{path.name} does not describe a stream")
        progress = Progress(
            described["source"],
            described["position"],
            np.array(described["rest"], dtype=np.int32),
            [OpenSequence(*each) for each in zip(rows["unfinished"], described["used"], strict=True)],
            Tally(**described["tally"]),
        )
        state = cls(described["seed"], described["epoch"], progress, described["count"], rows["buffer"])
        state.ready.extend(rows["ready"])
        state.random.bit_generator.state = described["random"]
        return state


class SequenceStream(IterableDataset[dict[str, Tensor]]):
    """Sequences without end: all documents again and again, shuffled in another order each time.

    Rows are int64 tensors (context,), as in `Sequences.rows`. The next documents are read and tokenized in a thread.

    To the Trainer, this is one endless epoch. A resumed Trainer drops the batches before its position. They are
    placeholders here, because a resumed stream does not read those documents again.
    """

    def __init__(self, packer: SequencePacker, sources: Sequence[Source], seed: int):
        self.packer, self.sources = packer, sources
        self.columns = COLUMNS if any(each.has_examples for each in sources) else COLUMNS[:1]
        self._start = self._state = StreamState(seed)
        self._last: deque[Row] = deque(maxlen=0)

    def remember(self, number: int) -> None:
        """Keep the last sequences that were handed out, so that `save` can go back as far."""
        self._last = deque(self._last, maxlen=number)

    def save(self, path: Path, count: int) -> None:
        """Write the state after the first `count` sequences, although more were handed out ahead of time."""
        state = self._state
        if not 0 <= (again := state.count - count) <= len(self._last):
            raise ValueError(f"the stream is at sequence {state.count:,}, too far from {count:,} to be saved")
        ready = [*list(self._last)[len(self._last) - again :], *state.ready]
        saved = replace(state, count=count, ready=deque(ready))
        saved.random = state.random
        saved.save(path)

    def resume(self, path: Path) -> None:
        """Begin with a saved state. Its position is tried, so that a damaged one is noticed here."""
        self._start = StreamState.read(path, (len(self.columns), self.packer.context))
        progress = self._start.progress
        for source in self.sources[progress.source :][:1]:
            next(iter(source.documents(progress.position)), None)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        state = self._state = copy.deepcopy(self._start)
        placeholder = dict.fromkeys(self.columns, torch.zeros(1, dtype=torch.int64))
        yield from itertools.repeat(placeholder, state.count)
        for _ in self._filled(state):
            while state.ready:
                row = state.ready.popleft()
                state.count += 1
                self._last.append(row)
                yield {name: torch.from_numpy(row[number]).long() for number, name in enumerate(self.columns)}

    def _filled(self, state: StreamState) -> Iterator[None]:
        """Add sequences to the state, again and again."""
        yield
        while True:
            for block, progress in ahead(self._blocks(copy.deepcopy(state.progress))):
                state.add(block, progress)
                yield
            state.end_pass()
            yield

    def _blocks(self, progress: Progress) -> Iterator[tuple[Block, Progress]]:
        for block in self.packer.blocks(self.sources, progress):
            yield block, copy.deepcopy(progress)
        for note in progress.tally.notes(self.packer.context):
            logger.info("end of the data: %s", note)
