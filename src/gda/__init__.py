"""Grouped Differential Attention for Hugging Face transformers.

`import gda` registers the model type "gda" with AutoConfig, AutoModel, AutoModelForCausalLM and the classification Auto
classes, which imports transformers. The public names below are imported when they are first used.
"""

import sys
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gda._version import __version__

if TYPE_CHECKING:
    from gda.configuration.configuration_gda import GDAConfig
    from gda.conversion.convert import convert
    from gda.conversion.demo import demo
    from gda.conversion.export import export
    from gda.conversion.fold import fold
    from gda.conversion.grow import grow
    from gda.conversion.inspect import inspect
    from gda.conversion.push import push
    from gda.conversion.verify import verify
    from gda.eval.attention.attention import attention
    from gda.eval.evaluate import evaluate
    from gda.modeling_gda.modeling_gda import (
        GDAForCausalLM,
        GDAForQuestionAnswering,
        GDAForSequenceClassification,
        GDAForTokenClassification,
        GDAModel,
    )
    from gda.training.train import train

# Written out, with the imports above, for type checkers.
__all__ = [
    "GDAConfig",
    "GDAForCausalLM",
    "GDAForQuestionAnswering",
    "GDAForSequenceClassification",
    "GDAForTokenClassification",
    "GDAModel",
    "__version__",
    "attention",
    "convert",
    "demo",
    "evaluate",
    "export",
    "fold",
    "grow",
    "inspect",
    "push",
    "train",
    "verify",
]

# The public names that are neither models nor functions of gda.conversion.
_ELSEWHERE = {
    "GDAConfig": "gda.configuration.configuration_gda",
    "attention": "gda.eval.attention.attention",
    "evaluate": "gda.eval.evaluate",
    "train": "gda.training.train",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'gda' has no attribute {name!r}")
    usual = "gda.modeling_gda.modeling_gda" if name.startswith("GDA") else f"gda.conversion.{name}"
    return getattr(import_module(_ELSEWHERE.get(name, usual)), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _is_the_command() -> bool:
    """Whether this process was started as `gda` or `python -m gda.cli`."""
    return [Path(program).name for program in sys.argv[:1]] == ["gda"] or sys.orig_argv[1:3] == ["-m", "gda.cli"]


# `gda --help` needs neither torch nor transformers, which take seconds to import. A command that opens a model imports
# gda.modeling_gda, and so registers the model type, by itself.
if not _is_the_command():
    import_module("gda.modeling_gda")
