"""Grouped Differential Attention for Hugging Face transformers.

`import gda` teaches AutoConfig, AutoModel, AutoModelForCausalLM and the classification Auto classes the model type
"gda". Public names are imported when they are first used, and transformers is not imported before somebody else does:
`gda --help` needs neither it nor torch.
"""

from functools import cache
from importlib import import_module
from typing import TYPE_CHECKING, Any

from gda._imports import when_imported
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

_HOMES = {
    name: module
    for module, names in {
        "gda.conversion.convert": ["convert"],
        "gda.conversion.demo": ["demo"],
        "gda.conversion.export": ["export"],
        "gda.conversion.fold": ["fold"],
        "gda.conversion.grow": ["grow"],
        "gda.conversion.inspect": ["inspect"],
        "gda.conversion.push": ["push"],
        "gda.conversion.verify": ["verify"],
        "gda.eval.attention.attention": ["attention"],
        "gda.eval.evaluate": ["evaluate"],
        "gda.configuration.configuration_gda": ["GDAConfig"],
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


def _register_config() -> None:
    from transformers import AutoConfig

    from gda.configuration.configuration_gda import GDAConfig

    AutoConfig.register("gda", GDAConfig, exist_ok=True)


@cache
def _register_models() -> None:
    import transformers

    from gda.configuration.configuration_gda import GDAConfig
    from gda.modeling_gda import modeling_gda

    for auto_name, model_class in {
        "AutoModel": modeling_gda.GDAModel,
        "AutoModelForCausalLM": modeling_gda.GDAForCausalLM,
        "AutoModelForQuestionAnswering": modeling_gda.GDAForQuestionAnswering,
        "AutoModelForSequenceClassification": modeling_gda.GDAForSequenceClassification,
        "AutoModelForTokenClassification": modeling_gda.GDAForTokenClassification,
    }.items():
        getattr(transformers, auto_name).register(GDAConfig, model_class, exist_ok=True)


def _register_models_with_the_first_config() -> None:
    """The Auto classes look a model up by its config, so a script that makes none is spared the modelling code.

    A config also comes to be by unpickling, which calls `__new__` and not `__init__`.
    """
    from gda.configuration.configuration_gda import GDAConfig

    def make(cls: type[GDAConfig], /, *_: Any, **__: Any) -> GDAConfig:  # config.json may hold a field `cls`
        _register_models()
        return object.__new__(cls)

    GDAConfig.__new__ = make  # type: ignore[method-assign, assignment]


when_imported("transformers.models.auto.configuration_auto", _register_config)
when_imported("gda.configuration.configuration_gda", _register_models_with_the_first_config)

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
