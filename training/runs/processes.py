"""The processes of one training run: what they do together, and how the error of one ends all of them."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import gather_object, parse_flag_from_env

from gda.common.errors import CheckFailed

T = TypeVar("T")

# Of errors that a process tells the others of: what is none of these is a ValueError to them.
KINDS = (FileNotFoundError, FileExistsError, PermissionError, ConnectionError, BlockingIOError, OSError, CheckFailed)

# What gloo and NCCL say when a process at the other end is gone.
PEER_IS_GONE = ("Connection closed by peer", "Connection reset by peer", "Socket Timeout", "remote process exited")


def on_cpu() -> bool:
    """Whether to train on the CPU: where there is nothing faster, or `accelerate launch --cpu` says so."""
    return not torch.accelerator.is_available() or bool(parse_flag_from_env("ACCELERATE_USE_CPU"))


class Processes:
    """This process among those that `accelerate launch` or torchrun has started; alone, if none of them did.

    Attributes:
        count: Of all machines.
        is_main: Whether this one writes and prints.
    """

    def __init__(self) -> None:
        state = PartialState(cpu=on_cpu())
        self.count: int = state.num_processes
        self.index: int = state.process_index
        self.is_main: bool = state.is_main_process

    def together(self, work: Callable[[], T]) -> T:
        """Do `work` in every process. If it fails in one, all raise its error, and the others know that it is told of.

        `told_elsewhere` is then an attribute of the error.
        """
        if self.count == 1:
            return work()
        result, error = None, None
        try:
            result = work()
        except Exception as caught:
            error = caught
        failed = [(index, _portable(each)) for index, each in enumerate(self.gather(_portable(error))) if each]
        if not failed:
            return result  # type: ignore[return-value]
        first, told = failed[0]
        if error is not None and first == self.index:
            raise error
        told.told_elsewhere = True  # type: ignore[union-attr]
        raise told  # type: ignore[misc]

    def on_main(self, work: Callable[[], T]) -> T:
        """Do `work` in the main process alone, and give its result to all; it must be small, and picklable."""
        result = self.together(lambda: work() if self.is_main else None)
        return self.gather(result)[0] if self.count > 1 else result  # type: ignore[return-value]

    def gather(self, value: T) -> list[T]:
        """The values of all processes, in their order."""
        return gather_object([value]) if self.count > 1 else [value]

    def any(self, flags: list[bool], device: torch.device) -> list[bool]:
        """For each flag, whether a process has it set; quick, for use in every step."""
        if self.count == 1:
            return flags
        reduced = torch.tensor(flags, dtype=torch.int32, device=device)
        torch.distributed.all_reduce(reduced, torch.distributed.ReduceOp.MAX)
        return [bool(flag) for flag in reduced.tolist()]

    @contextlib.contextmanager
    def ended_by_another(self) -> Iterator[None]:
        """Be quiet about connections that break because another process has failed, and has told why."""
        try:
            yield
        except RuntimeError as error:
            if self.count == 1 or not any(said in str(error) for said in PEER_IS_GONE):
                raise
            ended = ConnectionError("another process of this run has ended")
            ended.told_elsewhere = True  # type: ignore[attr-defined]
            raise ended from None


def _portable(error: Exception | None) -> Exception | None:
    """One that says the same and that another process can read, whatever was the signature of its class."""
    if error is None:
        return None
    return next((kind for kind in KINDS if isinstance(error, kind)), ValueError)(str(error))


def is_told_elsewhere(error: BaseException) -> bool:
    """Whether another process tells of this error."""
    told: Any = getattr(error, "told_elsewhere", False)
    return bool(told)
