"""The processes of a training run: shared work, and errors that end all of them."""

import os
import secrets
from collections.abc import Callable, Collection
from datetime import timedelta
from typing import TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType, gather_object, parse_flag_from_env
from torch.distributed import PrefixStore, TCPStore

from gda.common.errors import CheckFailed

T = TypeVar("T")
E = TypeVar("E", bound=BaseException)
PREFIX_KEY = "gda/prefix"
# How long a process waits for the others, which may write or upload a large model. `runs.watch` finds lost ones sooner.
PATIENCE = timedelta(hours=4)

# Kinds of errors that are passed on to the other processes; any other kind becomes a ValueError there.
KINDS = (FileNotFoundError, FileExistsError, PermissionError, ConnectionError, BlockingIOError, OSError, CheckFailed)

# Where accelerate ignores its settings for FSDP and DeepSpeed.
UNSHARDED = (DistributedType.NO, DistributedType.MULTI_CPU)
LAUNCHER_PRECISION = "ACCELERATE_MIXED_PRECISION"  # an environment variable


def on_cpu() -> bool:
    """Whether to train on the CPU: without an accelerator, or with `accelerate launch --cpu`."""
    return not torch.accelerator.is_available() or bool(parse_flag_from_env("ACCELERATE_USE_CPU"))


def auto_is_bfloat16(dtypes: Collection[torch.dtype]) -> bool:
    """Whether `--precision auto` computes in bfloat16, for a model with weights of these data types.

    It does if `accelerate launch` or its configuration asks for it, and on a GPU that supports it if a weight has it.
    """
    if os.environ.get(LAUNCHER_PRECISION, "no") == "bf16":
        return True
    fast = not on_cpu() and torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
    return fast and torch.bfloat16 in dtypes


def require_known_precision() -> None:
    """Raise ValueError if the launcher, or its configuration, asks for a precision other than float32 and bfloat16."""
    if (wanted := os.environ.get(LAUNCHER_PRECISION, "no")) not in ("no", "bf16"):
        raise ValueError(f"--mixed_precision {wanted} is not supported; launch with no or bf16, or pass --precision")


class Processes:
    """This process, number `index` of the `count` that `accelerate launch` or torchrun started; the main one writes."""

    def __init__(self) -> None:
        if _may_be_restarted() and not torch.distributed.is_initialized():
            _connect_after_restart()
        state = PartialState(cpu=on_cpu(), timeout=PATIENCE)
        self.count: int = state.num_processes
        self.index: int = state.process_index
        self.is_main: bool = state.is_main_process
        # What the launcher, or its configuration, asks for.
        self.uses_deepspeed = bool(parse_flag_from_env("ACCELERATE_USE_DEEPSPEED"))
        self.uses_fsdp = bool(parse_flag_from_env("ACCELERATE_USE_FSDP"))
        self.fsdp_recomputes = self.uses_fsdp and bool(parse_flag_from_env("FSDP_ACTIVATION_CHECKPOINTING"))

    @property
    def keeper(self) -> str:
        """What keeps the optimizer, and decides in which files a checkpoint has it."""
        if self.uses_deepspeed:
            return f"DeepSpeed's ZeRO-{os.environ.get('ACCELERATE_DEEPSPEED_ZERO_STAGE', '?')}"
        return "FSDP2" if self.uses_fsdp else "no sharding"

    def require_sharding(self) -> None:
        """Raise ValueError if the launcher asks for sharding that would silently not take place, or for FSDP1."""
        if self.uses_fsdp and os.environ.get("FSDP_VERSION") != "2":
            raise ValueError("FSDP1 is not supported; set fsdp_version: 2 in the configuration for accelerate")
        if (self.uses_fsdp or self.uses_deepspeed) and PartialState().distributed_type in UNSHARDED:
            raise ValueError(
                f"accelerate ignores {self.keeper} here: sharding needs GPUs and a launcher; for data parallelism on "
                "CPUs, launch with --multi_gpu"
            )

    def together(self, work: Callable[[], T]) -> T:
        """Call `work` in every process. If it fails in one, all raise its error.

        In the others, the error has the attribute `reported_elsewhere`: it is already reported.
        """
        if self.count == 1:
            return work()
        result, error = None, None
        try:
            result = work()
        except Exception as caught:
            error = caught
        failed = [(index, each) for index, each in enumerate(self.gather(_portable(error))) if each is not None]
        if not failed:
            return result  # type: ignore[return-value]
        first, reported = failed[0]
        if error is not None and first == self.index:
            raise error
        raise reported_elsewhere(reported)

    def on_main(self, work: Callable[[], T]) -> T:
        """Call `work` in the main process only, and return its result, small and picklable, in all of them."""
        result = self.together(lambda: work() if self.is_main else None)
        return self.gather(result)[0] if self.count > 1 else result  # type: ignore[return-value]

    def gather(self, value: T) -> list[T]:
        """The values of all processes, in order."""
        return gather_object([value]) if self.count > 1 else [value]

    def any(self, flags: list[bool], device: torch.device) -> list[bool]:
        """For each flag, whether it is set in any process; fast enough for every step."""
        if self.count == 1:
            return flags
        reduced = torch.tensor(flags, dtype=torch.int32, device=device)
        torch.distributed.all_reduce(reduced, torch.distributed.ReduceOp.MAX)
        return [bool(flag) for flag in reduced.tolist()]


def disconnect() -> None:
    """Close the connections between the processes: C++ can abort a process that shuts down with open ones."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _may_be_restarted() -> bool:
    """Whether torchrun starts the processes again when one fails (`--max-restarts`), with the store that it has."""
    may_restart = int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")) > 0
    return may_restart and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def _connect_after_restart() -> None:
    """Connect processes that torchrun has started, maybe not for the first time.

    Some would find the addresses of ended processes in its store. So the main process chooses a new prefix for the
    addresses, which is removed when all processes know it.
    """
    index, count = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    store = TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), count, is_master=False)
    if index == 0:
        store.set(PREFIX_KEY, secrets.token_hex())
    prefixed = PrefixStore(store.get(PREFIX_KEY).decode(), store)
    torch.distributed.init_process_group(store=prefixed, rank=index, world_size=count, timeout=PATIENCE)
    if prefixed.add("know", 1) == count:
        store.delete_key(PREFIX_KEY)


def reported_elsewhere(error: E) -> E:
    """Mark an error as reported by another process, so that the command does not print it again."""
    error.reported_elsewhere = True  # type: ignore[attr-defined]
    return error


def _portable(error: Exception | None) -> Exception | None:
    """An error with the same message that other processes can unpickle, whatever the signature of its class."""
    if error is None:
        return None
    return next((kind for kind in KINDS if isinstance(error, kind)), ValueError)(str(error))
