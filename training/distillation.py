"""Distillation: learning from a teacher's predictions (arXiv 1503.02531) and hidden states."""

from collections.abc import Mapping
from typing import Any

import torch
from accelerate.utils import patch_environment
from torch import Tensor
from torch.nn.functional import kl_div, log_softmax, pad
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from gda.conversion.sources.open import open_source
from gda.conversion.sources.source import Source
from gda.conversion.sources.tokenizers import NoTokenizerError
from gda.training.labels import NO_LABEL

CHUNK = 256  # tokens whose float32 probabilities are in memory


class Distillation:
    """A teacher and its weight: loss = (1 − w) · cross-entropy + w · T² · KL(teacher ‖ student) + h · hidden.

    KL compares predictions softened by the temperature T. The factor T² keeps its gradients on the scale of the others
    (arXiv 1503.02531, section 2). `hidden` compares the output of each layer (of the last one, after the final norm):
    |student − teacher|² / |teacher|² per token, averaged over tokens and layers. It is relative per token because a few
    tokens have very large states, which would dominate.

    The teacher is in evaluation mode, has no gradients, and is neither trained nor saved with the student.

    Args:
        teacher: A causal language model with the student's vocabulary.
        weight: w, from 0 to 1.
        temperature: T.
        hidden_weight: h.
    """

    def __init__(
        self, teacher: PreTrainedModel, *, weight: float, temperature: float = 1.0, hidden_weight: float = 0.0
    ):
        self.teacher = teacher.eval().requires_grad_(False)
        self.weight = weight
        self.temperature = temperature
        self.hidden_weight = hidden_weight

    @classmethod
    def load(
        cls,
        source: str,
        student: PreTrainedModel,
        *,
        weight: float,
        temperature: float = 1.0,
        hidden_weight: float = 0.0,
        tokenizer: PreTrainedTokenizerBase | None = None,
        context: int | None = None,
    ) -> "Distillation":
        """Load the teacher (a folder, Hub id or `.gguf` file) in float32; ValueError if it does not fit.

        `tokenizer` is the student's, and `context` the number of tokens in a sequence; without one, it isn't checked.
        """
        opened = open_source(source)
        if not opened.can_run:
            raise ValueError(
                f"--teacher {source} is a {opened.config.model_type!r} model, which transformers cannot run"
            )
        _require_equal_shapes(source, opened.config, student.config, hidden_weight)
        if context is not None and context > (longest := opened.config.max_position_embeddings):
            raise ValueError(f"--context {context} is above {longest}, max_position_embeddings of --teacher {source}")
        if tokenizer is not None and not _has_vocabulary(opened, tokenizer):
            raise ValueError(f"--teacher {source} has a different tokenizer than the model")
        # With sharded weights, all processes but the first would wait for weights that are never sent.
        with patch_environment(fsdp_cpu_ram_efficient_loading="false"):
            teacher = opened.load()
        return cls(teacher, weight=weight, temperature=temperature, hidden_weight=hidden_weight)

    @torch.no_grad()
    def ask(self, inputs: Mapping[str, Any]) -> Any:
        """The teacher's outputs for inputs of the student."""
        ids = inputs["input_ids"]
        self.teacher.to(ids.device)
        return self.teacher(
            input_ids=ids,
            attention_mask=inputs.get("attention_mask"),
            position_ids=inputs.get("position_ids"),
            output_hidden_states=self.hidden_weight > 0,
            use_cache=False,
        )

    def compare(self, student: Any, teacher: Any, labels: Tensor, num_items: Tensor | int) -> dict[str, Tensor]:
        """The losses of the student's outputs against the teacher's: logits (B, T, vocabulary) and hidden states.

        Predictions before each of the `labels` (B, T) that is not −100 are compared. Sums are divided by `num_items`.

        Returns:
            `kl`, the KL of the softened predictions in nats; and `hidden`, if its weight is above 0.
        """
        predicted = pad(labels[:, 1:], (0, 1), value=NO_LABEL).flatten().ne(NO_LABEL)  # (B · T,)
        losses = {"kl": divergence(student.logits, teacher.logits, predicted, self.temperature) / num_items}
        if self.hidden_weight > 0:
            pairs = zip(student.hidden_states[1:], teacher.hidden_states[1:], strict=True)
            distances = torch.stack([_distance(ours, theirs, predicted) for ours, theirs in pairs])
            losses["hidden"] = distances.mean() / num_items
        return losses

    def loss(self, cross_entropy: Tensor, losses: Mapping[str, Tensor]) -> Tensor:
        """The weighted sum of the loss on the text and the losses that `compare` returns."""
        total = (1 - self.weight) * cross_entropy + self.weight * self.temperature**2 * losses["kl"]
        return total + self.hidden_weight * losses["hidden"] if "hidden" in losses else total


def divergence(student: Tensor, teacher: Tensor, predicted: Tensor, temperature: float) -> Tensor:
    """KL(teacher ‖ student) in nats of logits (B, T, vocabulary), summed over the `predicted` tokens (B · T,).

    Float32 probabilities are computed for one chunk of tokens at a time, and again in the backward pass. For long
    contexts they would otherwise be the largest tensors of the training.
    """
    chunks = zip(
        *(each.flatten(0, -2).split(CHUNK) for each in (student, teacher, predicted.unsqueeze(-1))), strict=True
    )
    total = [checkpoint(_chunk_divergence, *chunk, temperature, use_reentrant=False) for chunk in chunks]
    return torch.stack(total).sum()


def _chunk_divergence(student: Tensor, teacher: Tensor, predicted: Tensor, temperature: float) -> Tensor:
    ours = log_softmax(student.float() / temperature, dim=-1)
    theirs = log_softmax(teacher.float() / temperature, dim=-1)
    by_token = kl_div(ours, theirs, reduction="none", log_target=True).sum(dim=-1, keepdim=True)
    return torch.where(predicted, by_token, 0.0).sum()


def _distance(ours: Tensor, theirs: Tensor, predicted: Tensor) -> Tensor:
    """|ours − theirs|² / |theirs|² of each token (B, T, hidden), summed over the predicted tokens."""
    square = theirs.float().square().mean(dim=-1)
    distance = (ours.float() - theirs.float()).square().mean(dim=-1) / square.clamp(min=torch.finfo(square.dtype).tiny)
    return torch.where(predicted, distance.flatten(), 0.0).sum()


def _has_vocabulary(teacher: Source, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the ids of a tokenizer mean the same tokens to the teacher, as far as its own can be read."""
    try:
        return tokenizer.get_vocab().items() <= teacher.tokenizer().get_vocab().items()
    except NoTokenizerError:
        return True


def _require_equal_shapes(source: str, teacher: Any, student: Any, hidden_weight: float) -> None:
    fields = ["vocab_size"] if hidden_weight == 0 else ["vocab_size", "hidden_size", "num_hidden_layers"]
    for name in fields:
        theirs, ours = getattr(teacher, name), getattr(student, name)
        if theirs != ours:
            remedy = "" if name == "vocab_size" else "; omit --hidden-weight"
            raise ValueError(f"--teacher {source} has {name}={theirs}, but the model has {ours}{remedy}")
