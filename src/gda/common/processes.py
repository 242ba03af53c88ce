"""The processes that `accelerate launch` or torchrun has started."""

import os


def is_main_process() -> bool:
    """Whether this process is the first of them, the one that reports. A process of its own is."""
    return os.environ.get("RANK", "0") == "0"
