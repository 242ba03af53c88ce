"""Stands in for the helpers by which transformers' tests start processes; its sdist leaves them out. CPU and gloo."""

import multiprocessing
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

# Ranks are forked from a server that has already imported what all tests need.
multiprocessing.set_forkserver_preload(["transformers.models.auto.modeling_auto", "tests.test_modeling_gda"])


def _get_distributed_backend() -> str:
    return "gloo"


def _get_distributed_device_type() -> str:
    return "cpu"


def _get_rank_device(rank: int) -> torch.device:
    return torch.device("cpu")


def _set_rank_device(rank: int) -> None:
    torch.set_num_threads(1)


def _start_rank_processes(function: Callable, args: tuple, nprocs: int) -> None:
    """Run `function(rank, *args)` in `nprocs` processes; an error in one of them is raised here."""
    mp.start_processes(function, args=args, nprocs=nprocs, start_method="forkserver")


def run_distributed(world_size: int) -> Callable:
    """`run_distributed(n)(function)(*args)` runs `function(rank, *args)` on n ranks of one process group."""

    def distribute(function: Callable) -> Callable:
        def run(*args: Any) -> None:
            with tempfile.TemporaryDirectory() as folder:
                _start_rank_processes(
                    _run_rank, (world_size, str(Path(folder, "rendezvous")), function, args), world_size
                )

        return run

    return distribute


def _run_rank(rank: int, world_size: int, rendezvous: str, function: Callable, args: tuple) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)}
    _set_rank_device(rank)
    dist.init_process_group(
        _get_distributed_backend(), init_method=f"file://{rendezvous}", rank=rank, world_size=world_size
    )
    try:
        function(rank, *args)
    finally:
        dist.destroy_process_group()
