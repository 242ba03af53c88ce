"""Text that a source writes itself, to calibrate its split on everything that it can say."""

from collections.abc import Callable
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationConfig, PreTrainedTokenizerBase, StoppingCriteria, StoppingCriteriaList

from gda.conversion.families.llamalike import head_dim
from gda.conversion.tensors.layerwise import SHARE_OF_MEMORY, total_memory

AT_ONCE = 160  # sequences written at a time: more are no faster
QUESTION = "{question}"


@torch.inference_mode()
def sampled(
    model: Any,  # a PreTrainedModel; its `generate` has no type
    tokenizer: PreTrainedTokenizerBase,
    *,
    count: int,
    length: int,
    beginnings: list[list[int]],
    seed: int,
    advance: Callable[[int], None],
) -> torch.Tensor:
    """Token ids (count, length) that `model` writes at temperature 1.

    Sequences take turns in how they start: with a random token, as in LLM-QAT (arXiv 2305.17888), after each of the
    `beginnings`, which are token ids; and with the chat template, if there is one, so that the model writes the
    question, too, as in Magpie (arXiv 2406.08464). A sequence goes on after EOS. `advance` is called with the number of
    tokens written since the last call; some of them are cut off.
    """
    with torch.random.fork_rng([model.device] if model.device.type == "cuda" else []):
        torch.manual_seed(seed)
        starts = _starts(tokenizer, count, length, beginnings, model.config.vocab_size)
        ids = pad_sequence(starts, batch_first=True, padding_side="left")
        padding = ids.shape[1] - torch.tensor([len(start) for start in starts])
        longest = length + int(padding.max())
        # The source's own settings may narrow the distribution, and would end a sequence at EOS. A source with NaN
        # writes something, and fitting then names the layer.
        model.generation_config = GenerationConfig(
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            max_length=longest,
            remove_invalid_values=True,
            disable_compile=True,
            cache_implementation="static",
        )
        mask = (torch.arange(ids.shape[1]) >= padding[:, None]).long()
        batches, watch = -(-count // _at_once(model, longest)), StoppingCriteriaList([_Watch(advance)])
        written = [
            model.generate(part.to(model.device), attention_mask=real.to(model.device), stopping_criteria=watch).cpu()
            for part, real in zip(ids.tensor_split(batches), mask.tensor_split(batches), strict=True)
        ]
    return torch.cat(written).gather(1, padding[:, None] + torch.arange(length))


def _starts(
    tokenizer: PreTrainedTokenizerBase, count: int, length: int, beginnings: list[list[int]], embeddings: int
) -> list[torch.Tensor]:
    """The first token ids of each sequence."""
    random = random_tokens(tokenizer, count, embeddings)
    kinds = [
        torch.cat([torch.tensor(beginning, dtype=torch.long).expand(count, -1), random], dim=1)
        for beginning in beginnings
    ]
    if opening := chat_opening(tokenizer, embeddings)[: length - 1]:
        kinds.append(torch.tensor([opening]).expand(count, -1))
    return [kinds[number % len(kinds)][number] for number in range(count)]


def _at_once(model: Any, length: int) -> int:
    """How many sequences of `length` tokens to write at a time, so that their cache fits into memory.

    What is drawn depends on it, so it depends on the device's whole memory, not on what is free.
    """
    config = model.config
    heads = 2 * config.num_hidden_layers * config.num_key_value_heads  # of keys and values
    cache = heads * head_dim(config) * length * model.dtype.itemsize
    return max(1, min(AT_ONCE, int(total_memory(model.device.type) * SHARE_OF_MEMORY / cache)))


def random_tokens(tokenizer: PreTrainedTokenizerBase, count: int, embeddings: int) -> torch.Tensor:
    """Random tokens (count, 1) that have embeddings and are not special."""
    special = set(tokenizer.all_special_ids)
    plain = torch.tensor([each for each in range(min(len(tokenizer), embeddings)) if each not in special])
    return plain[torch.randint(len(plain), (count, 1))]


def chat_opening(tokenizer: PreTrainedTokenizerBase, embeddings: int) -> list[int]:
    """The ids of the chat template up to the first question; empty without a template that takes a lone question."""
    if tokenizer.chat_template is None:
        return []
    try:
        chat = str(tokenizer.apply_chat_template([{"role": "user", "content": QUESTION}], tokenize=False))
    except Exception:  # a template can raise anything, for example because it requires a system message
        return []
    opening, question, _ = chat.partition(QUESTION)
    ids: list[int] = tokenizer(opening, add_special_tokens=False).input_ids if question else []
    return ids if max(ids, default=0) < embeddings else []


class _Watch(StoppingCriteria):
    """Reports each step of a batch, and never stops it."""

    def __init__(self, advance: Callable[[int], None]):
        self._advance = advance

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **_: object) -> torch.Tensor:
        self._advance(len(input_ids))
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
