"""transformers' common model tests on GDA, and on Llama for comparison.

`pytest tests` does not collect this file, because it imports transformers' test modules, which are in no wheel.
`run.py` provides them.
"""

import unittest
from typing import Any

import torch
from transformers import (
    LlamaForCausalLM,
    LlamaForQuestionAnswering,
    LlamaForSequenceClassification,
    LlamaForTokenClassification,
    LlamaModel,
    PreTrainedConfig,
)
from transformers.models.auto import modeling_auto

from gda import (
    GDAForCausalLM,
    GDAForQuestionAnswering,
    GDAForSequenceClassification,
    GDAForTokenClassification,
    GDAModel,
)

from . import test_fsdp_mixin, test_tensor_parallel_mixin
from .generation.test_utils import GenerationTesterMixin
from .test_configuration_common import ConfigTester
from .test_fsdp_mixin import FSDPTesterMixin
from .test_modeling_common import ModelTesterMixin, ids_tensor, random_attention_mask
from .test_tensor_parallel_mixin import TensorParallelTesterMixin
from .test_training_mixin import TrainingTesterMixin

# transformers' tests look up in these tables which classes take labels, and in these sets which model types run in
# several processes. A model outside transformers must be added to them.
modeling_auto.MODEL_MAPPING_NAMES["gda"] = "GDAModel"
modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES["gda"] = "GDAForCausalLM"
modeling_auto.MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES["gda"] = "GDAForQuestionAnswering"
modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES["gda"] = "GDAForSequenceClassification"
modeling_auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES["gda"] = "GDAForTokenClassification"
test_fsdp_mixin.FSDP_DISTRIBUTED_TEST_MODEL_TYPES |= {"gda", "llama"}
test_tensor_parallel_mixin.TP_DISTRIBUTED_TEST_MODEL_TYPES |= {"gda", "llama"}


class DecoderTester:
    """Builds the small configs and inputs that transformers' tests need."""

    batch_size = 5
    seq_length = 7
    is_training = True

    def __init__(self, causal_lm_class: type, fields: dict[str, Any], num_attention_maps: int):
        self.causal_lm_class = causal_lm_class
        self.config_class = causal_lm_class.config_class
        self.fields = fields
        self.hidden_size = fields["hidden_size"]
        self.num_hidden_layers = fields["num_hidden_layers"]
        self.num_attention_heads = num_attention_maps  # the tests compare the number of `attentions` with it

    def get_config(self) -> PreTrainedConfig:
        return self.config_class(**self.fields)

    def prepare_config_and_inputs_for_common(self) -> tuple[PreTrainedConfig, dict[str, torch.Tensor]]:
        shape = [self.batch_size, self.seq_length]
        inputs = {
            "input_ids": ids_tensor(shape, self.fields["vocab_size"]),
            "attention_mask": random_attention_mask(shape),
        }
        return self.get_config(), inputs


class UpstreamTests(
    ModelTesterMixin, GenerationTesterMixin, TrainingTesterMixin, TensorParallelTesterMixin, FSDPTesterMixin
):
    """The tests of a causal language model. Subclasses name the model."""

    fields: dict[str, Any]
    causal_lm_class: type = GDAForCausalLM
    all_model_classes: tuple[type, ...] = (
        GDAModel,
        GDAForCausalLM,
        GDAForSequenceClassification,
        GDAForTokenClassification,
        GDAForQuestionAnswering,
    )
    test_can_init_all_missing_weights_before_2023 = True  # a file without a copyright line counts as old and is exempt
    model_tester: DecoderTester = None  # type: ignore[assignment]  # abstract in the mixins, created by setUp

    shape = {
        "vocab_size": 99,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "head_dim": 8,
        "max_position_embeddings": 512,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }

    def setUp(self) -> None:
        fields = self.shape | self.fields
        maps = fields["num_attention_heads"] - fields.get("num_noise_heads", 0)
        self.model_tester = DecoderTester(self.causal_lm_class, fields, maps)

    def test_config(self) -> None:
        ConfigTester(self, config_class=self.causal_lm_class.config_class, hidden_size=32).run_common_tests()

    def test_config_with_every_field(self) -> None:
        ConfigTester(
            self, config_class=self.causal_lm_class.config_class, **self.model_tester.fields
        ).run_common_tests()

    def test_generation_tester_mixin_inheritance(self) -> None:
        if getattr(GenerationTesterMixin, "is_stand_in", False):
            self.skipTest("transformers' generation tests are not in its sdist")
        super().test_generation_tester_mixin_inheritance()

    def _get_tiny_config(self) -> tuple[type[PreTrainedConfig], dict[str, Any]]:
        """The config of the FSDP tests. Theirs always sets 4 query and 4 KV heads, which leaves no noise head."""
        config = self.causal_lm_class.config_class(
            **(self.model_tester.fields | {"vocab_size": 256, "hidden_size": 64})
        )
        return type(config), config.to_diff_dict()


class GDASharedTest(UpstreamTests, unittest.TestCase):
    """The default: shared keys and values, one λ per layer; 8 signal and 2 noise heads on 2 KV heads."""

    fields = {"num_attention_heads": 10, "num_noise_heads": 2, "num_key_value_heads": 2}


class GDAPairedTest(UpstreamTests, unittest.TestCase):
    """As Motif-2: paired keys, head norm, PolyNorm; 8 signal and 2 noise heads on 2 pairs of KV heads."""

    fields = {
        "num_attention_heads": 10,
        "num_noise_heads": 2,
        "num_key_value_heads": 4,
        "kv_layout": "paired",
        "lambda_init_offset": -1,
        "head_norm": True,
        "hidden_act": "poly_norm",
    }


class GDASigmoidTest(UpstreamTests, unittest.TestCase):
    """Token-dependent λ, head norm, q/k norm, a sliding layer; each of the 2 noise queries serves 2 of the 4 KV
    heads.
    """

    fields = {
        "num_attention_heads": 10,
        "num_noise_heads": 2,
        "num_key_value_heads": 4,
        "lambda_type": "sigmoid",
        "head_norm": True,
        "qk_norm": True,
        "sliding_window": 4,
        "layer_types": ["sliding_attention", "full_attention"],
    }


class LlamaTest(UpstreamTests, unittest.TestCase):
    """Llama in the same harness. Tests that it does not pass are limited by the harness or the machine."""

    fields = {"num_attention_heads": 8, "num_key_value_heads": 2}
    causal_lm_class = LlamaForCausalLM
    all_model_classes = (
        LlamaModel,
        LlamaForCausalLM,
        LlamaForSequenceClassification,
        LlamaForTokenClassification,
        LlamaForQuestionAnswering,
    )
