"""Token ids in rows of one length: a row is one sequence, or is cut into short ones.

A model reads short texts as well as long ones, and they begin in many ways. The source forms its attention sink in the
first tokens of a sequence; a split that has seen few beginnings may fail to, and then misreads the whole sequence.
"""

from dataclasses import dataclass

import torch

SHORT = 16  # tokens of a short sequence
EVERY = 4  # of four rows, the last is cut


@dataclass(frozen=True)
class Rows:
    """Token ids (rows, T), and which rows (rows,) are cut into sequences of `SHORT` tokens."""

    ids: torch.Tensor
    is_cut: torch.Tensor

    def __len__(self) -> int:
        return len(self.ids)

    def batches(self, size: int, order: torch.Tensor | None = None) -> list[torch.Tensor]:
        """Indices of up to `size` rows of one kind, for all rows, in ascending or another order."""
        order = torch.arange(len(self)) if order is None else order
        kinds = [order[self.is_cut[order] == kind] for kind in (False, True)]
        return [batch for kind in kinds for batch in kind.split(size) if len(batch)]

    def sequences(self, batch: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """The sequences in rows of one kind: `values` of these rows, (B, T, …), as (sequences, length, …)."""
        return values.unflatten(1, (-1, SHORT)).flatten(0, 1) if self.is_cut[batch[0]] else values


def to_cut(count: int) -> torch.Tensor:
    """Which of `count` rows are cut, (count,)."""
    return torch.arange(count) % EVERY == EVERY - 1


def whole(ids: torch.Tensor) -> Rows:
    """Rows (rows, T) of which none is cut."""
    return Rows(ids, torch.zeros(len(ids), dtype=torch.bool))
