"""The GDA model classes. Importing this package registers the model type "gda" with the Auto classes."""

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from .configuration_gda import GDAConfig
from .modeling_gda import (
    GDAForCausalLM,
    GDAForQuestionAnswering,
    GDAForSequenceClassification,
    GDAForTokenClassification,
    GDAModel,
    GDAPreTrainedModel,
)

AutoConfig.register("gda", GDAConfig, exist_ok=True)
AutoModel.register(GDAConfig, GDAModel, exist_ok=True)
AutoModelForCausalLM.register(GDAConfig, GDAForCausalLM, exist_ok=True)
AutoModelForQuestionAnswering.register(GDAConfig, GDAForQuestionAnswering, exist_ok=True)
AutoModelForSequenceClassification.register(GDAConfig, GDAForSequenceClassification, exist_ok=True)
AutoModelForTokenClassification.register(GDAConfig, GDAForTokenClassification, exist_ok=True)

__all__ = [
    "GDAForCausalLM",
    "GDAForQuestionAnswering",
    "GDAForSequenceClassification",
    "GDAForTokenClassification",
    "GDAModel",
    "GDAPreTrainedModel",
]
