"""The GDA model classes."""

from .modeling_gda import (
    GDAForCausalLM,
    GDAForQuestionAnswering,
    GDAForSequenceClassification,
    GDAForTokenClassification,
    GDAModel,
    GDAPreTrainedModel,
)

__all__ = [
    "GDAForCausalLM",
    "GDAForQuestionAnswering",
    "GDAForSequenceClassification",
    "GDAForTokenClassification",
    "GDAModel",
    "GDAPreTrainedModel",
]
