"""Packages that only some commands need, and what to say where one is missing. It imports nothing of gda."""

import contextlib
import shlex
from collections.abc import Iterator

# As in setup.cfg. The packages are named instead of the extra, so that the command works in any environment.
EXTRAS = {
    "eval": ("lm-eval>=0.4.13", "datasets>=4.2", "pyarrow"),
    "train": ("datasets>=4.2", "peft>=0.18", "pyarrow"),
    "gguf": ("gguf>=0.17",),
    "tokenizers": ("sentencepiece>=0.2", "protobuf>=4", "tiktoken"),
    "serve": ("transformers[serving]",),
    "png": ("matplotlib",),
}


@contextlib.contextmanager
def needed_by(user: str, extra: str) -> Iterator[None]:
    """Import packages of an extra inside the block; `user` is what needs them, for the error message.

    Raises:
        ImportError: naming the command that installs the packages, if one cannot be imported.
    """
    try:
        yield
    except ImportError as error:
        command = shlex.join(["pip", "install", *EXTRAS[extra]])
        missing = error.name or error
        raise ImportError(f"{user} needs a package that cannot be imported ({missing}): {command}") from None
