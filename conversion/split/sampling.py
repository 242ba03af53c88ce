"""Text that a source writes itself, to calibrate its split on everything that it can say."""

from collections.abc import Callable
from typing import Any

import torch
from transformers import (
    GenerationConfig,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
)

BATCH = 64  # sequences written at a time
QUESTION = "{question}"


@torch.inference_mode()
def sampled(
    model: Any,  # a PreTrainedModel; its `generate` has no type
    tokenizer: PreTrainedTokenizerBase,
    *,
    count: int,
    length: int,
    seed: int,
    advance: Callable[[int], None],
) -> torch.Tensor:
    """Token ids (count, length) that `model` writes at temperature 1.

    Every other sequence starts with a random token, after BOS if the tokenizer adds it, as in LLM-QAT (arXiv
    2305.17888). The others start with the chat template, if there is one, so that the model writes the question, too,
    as in Magpie (arXiv 2406.08464). A sequence goes on after EOS. `advance` is called with the number of tokens written
    since the last call.
    """
    # The source's own settings may narrow the distribution, and would end a sequence at EOS. A source with NaN writes
    # something, and fitting then names the layer.
    model.generation_config = GenerationConfig(
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        max_length=length,
        remove_invalid_values=True,
        cache_implementation="static",
    )
    watch = StoppingCriteriaList([_Watch(advance)])
    written = torch.empty(count, length, dtype=torch.long)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        starts = [random_starts(tokenizer, count)]
        if opening := chat_opening(tokenizer)[: length - 1]:
            starts.append(torch.tensor([opening]).expand(count, -1))
        for number, start in enumerate(starts):
            here = slice(number, count, len(starts))  # they alternate, so every part of the result has both
            batches = [
                model.generate(ids, attention_mask=torch.ones_like(ids), stopping_criteria=watch).cpu()
                for ids in start[here].to(model.device).split(BATCH)
            ]
            written[here] = torch.cat([torch.empty(0, length, dtype=torch.long), *batches])
    return written


def random_starts(tokenizer: PreTrainedTokenizerBase, count: int) -> torch.Tensor:
    """Random tokens (count, 1), or (count, 2) after BOS; no special ones."""
    special = set(tokenizer.all_special_ids)
    plain = torch.tensor([number for number in range(len(tokenizer)) if number not in special])
    tokens = plain[torch.randint(len(plain), (count, 1))]
    bos = tokenizer.bos_token_id
    if bos is None or tokenizer("a").input_ids[0] != bos:
        return tokens
    return torch.cat([torch.full_like(tokens, bos), tokens], dim=1)


def chat_opening(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The ids of the chat template up to the first question; empty without a template."""
    if tokenizer.chat_template is None:
        return []
    chat = str(tokenizer.apply_chat_template([{"role": "user", "content": QUESTION}], tokenize=False))
    ids: list[int] = tokenizer(chat.partition(QUESTION)[0], add_special_tokens=False).input_ids
    return ids


class _Watch(StoppingCriteria):
    """Reports each step of a batch, and never stops it."""

    def __init__(self, advance: Callable[[int], None]):
        self._advance = advance

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **_: object) -> torch.Tensor:
        self._advance(len(input_ids))
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
