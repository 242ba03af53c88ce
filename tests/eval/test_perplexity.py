"""Perplexity of a text by token, word and byte, compared with a token-by-token sum."""

import json
import math
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma3Config, MambaConfig, PreTrainedModel

from gda.common.perplexity import SequenceLoss, perplexity, ratio_interval, text_perplexity
from gda.eval.models import longest_sequence

from ..support.commands import Command
from ..support.llamas import byte_tokenizer, llama_model, save_llama

TEXT = "The hen and the other hen, naïve as they are, sat in the theatre.\n" * 4


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    """A tiny Llama. Tests must not change it."""
    return llama_model()


@torch.no_grad()
def summed(model: PreTrainedModel, context: int, stride: int) -> float:
    """Negative log-likelihood of TEXT after BOS, one token at a time.

    Contexts of `context` tokens, the last one included, start every `stride` tokens. A token is predicted in the first
    context that contains it.
    """
    ids = [0, *byte_tokenizer()(TEXT, add_special_tokens=False).input_ids]
    total = 0.0
    for target in range(1, len(ids)):
        begin = 0
        while begin + context < target:
            begin += stride
        if begin + context >= len(ids) - 1:
            begin = max(0, len(ids) - 1 - context)
        logits = model(torch.tensor([ids[begin:target]])).logits[0, -1].double()
        total -= (logits[ids[target]] - logits.logsumexp(0)).item()
    return total


@pytest.mark.parametrize(("context", "stride"), [(512, None), (32, None), (32, 8), (32, 31), (1, 1)])
def test_every_token_is_counted_once(context: int, stride: int | None, model: PreTrainedModel) -> None:
    """Also those at the edges of contexts, and the first, which is predicted from BOS."""
    found = text_perplexity(model, byte_tokenizer(), TEXT, context=context, stride=stride)
    tokens = len(byte_tokenizer()(TEXT, add_special_tokens=False).input_ids)
    assert (found.tokens, found.words, found.bytes) == (tokens, len(TEXT.split()), len(TEXT.encode()))
    assert (found.context, found.stride) == (context, stride or context)
    total = summed(model, context, stride or context)
    for value, number in ((found.token, tokens), (found.word, found.words), (found.byte, found.bytes)):
        assert math.log(value) == pytest.approx(total / number, rel=1e-5)


def test_equals_the_rolling_likelihood_of_lm_eval(model: PreTrainedModel) -> None:
    """If contexts do not overlap."""
    pytest.importorskip("lm_eval")
    from lm_eval.api.instance import Instance

    from gda.eval.lm_eval.harness import GDALM

    lm = GDALM(model, tokenizer=byte_tokenizer(), max_length=32, progress=False)
    request = Instance(request_type="loglikelihood_rolling", doc={}, arguments=(TEXT,), idx=0)
    (rolling,) = lm.loglikelihood_rolling([request])
    found = text_perplexity(model, byte_tokenizer(), TEXT, context=32)
    assert math.log(found.token) * found.tokens == pytest.approx(-rolling, rel=1e-5)


def test_perplexity_of_the_demo(model: PreTrainedModel) -> None:
    """Without overlap, and without the first token of each sequence."""
    ids = torch.tensor(byte_tokenizer()(TEXT, add_special_tokens=False).input_ids)
    total, counted = 0.0, 0
    with torch.no_grad():
        for window in (ids[begin : begin + 32] for begin in range(0, len(ids), 32)):
            if len(window) > 1:
                scores = model(window.unsqueeze(0)).logits[0].double().log_softmax(-1)
                total -= sum(scores[i, window[i + 1]].item() for i in range(len(window) - 1))
                counted += len(window) - 1
    assert perplexity(model, ids, context=32) == pytest.approx(math.exp(total / counted), rel=1e-5)
    with pytest.raises(ValueError, match="at least two tokens"):
        perplexity(model, ids[:1])


@pytest.mark.parametrize(("text", "word"), [("", "empty"), (" \n", "empty"), ("<s>", "only a BOS token")])
def test_empty_text_is_refused(text: str, word: str, model: PreTrainedModel) -> None:
    with pytest.raises(ValueError, match=word):
        text_perplexity(model, byte_tokenizer(), text)


def test_ids_without_an_embedding_are_refused(model: PreTrainedModel) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["<more>"])
    with pytest.raises(ValueError, match=f"ids up to {len(tokenizer) - 1}, but the model has {len(tokenizer) - 1} emb"):
        text_perplexity(model, tokenizer, "one <more>")


def test_model_without_a_limit() -> None:
    """Its configuration has no number of positions, or has it in the part for text."""
    assert longest_sequence(MambaConfig()) > 10**9
    assert longest_sequence(Gemma3Config(text_config={"max_position_embeddings": 77})) == 77


@pytest.mark.parametrize("stride", [0, -1, 33])
def test_stride_above_the_context_is_refused(stride: int, model: PreTrainedModel) -> None:
    with pytest.raises(ValueError, match=f"stride {stride} "):
        text_perplexity(model, byte_tokenizer(), TEXT, context=32, stride=stride)


def test_output_of_the_command(tmp_path: Path, command: Command) -> None:
    """The function's numbers on the screen and as JSON; the context is at most the model's."""
    pytest.importorskip("lm_eval")
    folder = save_llama(tmp_path / "llama")
    (tmp_path / "text.txt").write_text(TEXT)
    arguments = ("eval", folder, "--perplexity", tmp_path / "text.txt")
    printed = command(*arguments, "--context", 32, "--stride", 16)
    assert printed.code == 0, printed.error
    expected = text_perplexity(
        AutoModelForCausalLM.from_pretrained(folder), byte_tokenizer(), TEXT, context=32, stride=16
    )
    for word in (f"{expected.token:.4f}", f"{expected.byte:.4f}", " 32 ", " 16 ", f" {expected.tokens} "):
        assert word in printed.out
    output = json.loads(command(*arguments, "--json").out)["gda"]["perplexity"]
    assert (output["context"], output["stride"]) == (128, 128)
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "latin.txt").write_bytes("naïve".encode("latin-1"))
    for name, word in (("empty.txt", "is empty"), ("latin.txt", "is not text in UTF-8")):
        outcome = command("eval", folder, "--perplexity", tmp_path / name)
        assert outcome.code == 2
        assert f"{name} {word}" in outcome.error


# Quantiles of Student's t at 97.5 %, from the tables of NIST.
STUDENT = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 7: 2.365, 15: 2.131, 30: 2.042, 100: 1.984}


@pytest.mark.parametrize("freedom", STUDENT)
def test_interval_of_the_ratio(freedom: int) -> None:
    """For sequences of equal length, the interval of the mean difference per token."""
    draw = torch.Generator().manual_seed(freedom)
    theirs = 100 + 5 * torch.randn(freedom + 1, generator=draw, dtype=torch.float64)
    differences = 1 + torch.randn(freedom + 1, generator=draw, dtype=torch.float64)
    low, high = ratio_interval(losses(theirs + differences), losses(theirs))
    mean, margin = differences.mean().item(), STUDENT[freedom] * differences.std().item() / math.sqrt(freedom + 1)
    assert math.log(high * low) / 2 * 40 == pytest.approx(mean)
    assert math.log(high / low) / 2 * 40 == pytest.approx(margin, rel=1e-2)


def losses(nats: torch.Tensor) -> list[SequenceLoss]:
    return [SequenceLoss(each, 40) for each in nats.tolist()]


def test_interval_covers_the_ratio_of_the_population() -> None:
    """In 95 % of samples of 12 sequences of unequal length."""
    draw, covered = torch.Generator().manual_seed(0), 0
    for _ in range(2000):
        tokens = torch.randint(20, 60, (12,), generator=draw)
        nats = tokens * (0.1 + 0.05 * torch.randn(12, generator=draw))
        ours = [SequenceLoss(3.0 * n + d, n) for n, d in zip(tokens.tolist(), nats.tolist(), strict=True)]
        low, high = ratio_interval(ours, [SequenceLoss(3.0 * n, n) for n in tokens.tolist()])
        covered += low < math.exp(0.1) < high
    assert 0.93 < covered / 2000 < 0.97


def test_no_interval_without_pairs() -> None:
    one, other = SequenceLoss(10.0, 4), SequenceLoss(10.0, 5)
    assert ratio_interval([one], [one]) is None
    assert ratio_interval([one, one], [one, other]) is None
    assert ratio_interval([one, other], [one, other]) == (1.0, 1.0)
