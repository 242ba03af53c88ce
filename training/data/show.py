"""A sequence as text, with the parts that the model learns and those that it only reads."""

import itertools
from collections.abc import Iterator

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from gda.training.labels import NO_LABEL


def describe_sequence(row: dict[str, Tensor], tokenizer: PreTrainedTokenizerBase) -> Iterator[str]:
    """Lines that show one row of `Sequences`: the texts are Python literals, which makes line ends visible."""
    ids = row["input_ids"].tolist()
    labels = row.get("labels", row["input_ids"]).tolist()
    starts = [0]  # of documents
    if "position_ids" in row:
        starts = row["position_ids"].eq(0).nonzero().flatten().tolist()
    yield f"first sequence: {len(ids)} tokens"
    for number, (start, end) in enumerate(itertools.pairwise([*starts, len(ids)]), 1):
        learned = [label != NO_LABEL for label in labels[start:end]]
        if not any(learned):
            yield f"  padding  {end - start} tokens"
            continue
        if len(starts) > 1:
            yield f"  document {number}"
        for is_learned, part in itertools.groupby(zip(ids[start:end], learned, strict=True), key=lambda each: each[1]):
            text = tokenizer.decode([token for token, _ in part], clean_up_tokenization_spaces=False)
            yield f"  {'learned' if is_learned else 'read   '}  {text!r}"
