"""Grouped Differential Attention for Hugging Face transformers.

`import gda` teaches AutoConfig, AutoModel, AutoModelForCausalLM and the classification Auto classes the model type
"gda". Public names are imported when they are first used.
"""

from functools import cache
from importlib import import_module
from typing import TYPE_CHECKING, Any

from transformers import AutoConfig

from gda._version import __version__
from gda.configuration.configuration_gda import GDAConfig

if TYPE_CHECKING:
    from gda._demo import demo
    from gda.conversion.convert import convert
    from gda.conversion.export import export
    from gda.conversion.fold import fold
    from gda.conversion.grow import grow
    from gda.conversion.inspect import inspect
    from gda.conversion.push import push
    from gda.conversion.verify import verify
    from gda.eval.attention_report import attention
    from gda.eval.evaluate import evaluate
    from gda.modeling_gda.modeling_gda import (
        GDAForCausalLM,
        GDAForQuestionAnswering,
        GDAForSequenceClassification,
        GDAForTokenClassification,
        GDAModel,
    )
    from gda.training.train import train

_HOMES = {
    name: module
    for module, names in {
        "gda.conversion.convert": ["convert"],
        "gda.conversion.export": ["export"],
        "gda.conversion.fold": ["fold"],
        "gda.conversion.grow": ["grow"],
        "gda.conversion.inspect": ["inspect"],
        "gda.conversion.push": ["push"],
        "gda.conversion.verify": ["verify"],
        "gda.eval.attention_report": ["attention"],
        "gda.eval.evaluate": ["evaluate"],
        "gda._demo": ["demo"],
        "gda.modeling_gda.modeling_gda": [
            "GDAForCausalLM",
            "GDAForQuestionAnswering",
            "GDAForSequenceClassification",
            "GDAForTokenClassification",
            "GDAModel",
        ],
        "gda.training.train": ["train"],
    }.items()
    for name in names
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'gda' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])


@cache
def _register_models() -> None:
    import transformers

    from gda.modeling_gda import modeling_gda

    for auto_name, model_class in {
        "AutoModel": modeling_gda.GDAModel,
        "AutoModelForCausalLM": modeling_gda.GDAForCausalLM,
        "AutoModelForQuestionAnswering": modeling_gda.GDAForQuestionAnswering,
        "AutoModelForSequenceClassification": modeling_gda.GDAForSequenceClassification,
        "AutoModelForTokenClassification": modeling_gda.GDAForTokenClassification,
    }.items():
        getattr(transformers, auto_name).register(GDAConfig, model_class, exist_ok=True)


def _register() -> None:
    """Register the config now, the models with the first config that comes to be, also by unpickling.

    The Auto classes look a model up by its config, so nothing is missed; and a script that makes none, such as
    `gda --help`, is spared the import of transformers' modelling code, which takes longer than that of torch.
    """
    AutoConfig.register("gda", GDAConfig, exist_ok=True)

    def make(cls: type[GDAConfig], /, *_: Any, **__: Any) -> GDAConfig:  # config.json may hold a field `cls`
        _register_models()
        return object.__new__(cls)

    GDAConfig.__new__ = make  # type: ignore[method-assign, assignment]


_register()

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
