"""Exported GGUF files in llama.cpp: greedy text and probabilities of the GDA model, and ids of the tokenizer."""

from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, GenerationConfig

import gda
from gda.conversion.demo import find_demo_model
from gda.conversion.sources.gguf_splits import BYTE_LEVEL_SPLITS
from gda.conversion.tensors.lambdas import layer_lambdas

from ..support.checkpoints import load, logits, needs_smollm2
from ..support.gguf_files import SHAPE as GGUF_SHAPE
from ..support.gguf_files import llama3_factors, write_gguf
from ..support.llamas import byte_tokenizer, llama_model
from ..support.splitting import save_text
from ..support.tiny import tiny_model
from ..support.tokenizer_kinds import HARD_TEXTS, byte_level_tokenizer, sentencepiece_tokenizer
from .kinds import KINDS, LLAMA3, NUM_TOKENS, PROMPTS, SHAPE, run_transformers
from .llama_cpp import install_llama_cpp, run_llama_cpp, same_text

pytestmark = pytest.mark.engines

WINDOWS = [name for name, kind in KINDS.items() if "sliding_window" in kind.fields]
QUESTION = "What is the capital of France?"


@pytest.fixture(scope="session")
def packages() -> Path:
    """The folder with node-llama-cpp. Tests are skipped if it cannot be installed."""
    try:
        return install_llama_cpp()
    except RuntimeError as error:
        pytest.skip(str(error))


def test_every_kind_of_model(packages: Path, tmp_path: Path) -> None:
    """The greedy text of each prompt and the probabilities of the first new token are the same."""
    prompts, folders, files = [byte_tokenizer().encode(prompt) for prompt in PROMPTS], [], {}
    for seed, (name, kind) in enumerate(KINDS.items()):
        folders.append(tmp_path / name / "gda")
        tiny_model(seed=seed, **(SHAPE | kind.fields)).save_pretrained(folders[-1])
        byte_tokenizer().save_pretrained(folders[-1])
        if name in WINDOWS:
            with pytest.raises(ValueError, match="sliding_window has no counterpart"):
                gda.export(folders[-1], tmp_path / name / "x.gguf", format="gguf")
            continue
        report = gda.export(folders[-1], tmp_path / name / "x.gguf", format="gguf", verify=False)
        files[name] = {"path": str(report.out), "prompts": prompts, "numTokens": NUM_TOKENS}
    expected = run_transformers(folders)
    for name, result in run_llama_cpp(packages, files, tmp_path).items():
        for got, tokens in zip(result["continued"], expected[name]["tokens"], strict=True):
            assert same_text(got["tokens"], tokens), name
        probabilities = torch.tensor(expected[name]["logits"])[-1].softmax(-1)
        for token, probability in result["continued"][0]["probabilities"]:
            assert probability == pytest.approx(probabilities[token].item(), abs=2e-6), name


SCALED = {
    "linear": {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0},
    "no type": {"llama.rope.scaling.factor": 4.0},
    "old key": {"llama.rope.scale_linear": 4.0},
    "none": {"llama.rope.scaling.type": "none", "llama.rope.scaling.factor": 4.0},
    "yarn": {"llama.rope.scaling.type": "yarn", "llama.rope.scaling.factor": 4.0},
    "yarn, length": {
        "llama.rope.scaling.type": "yarn",
        "llama.rope.scaling.factor": 4.0,
        "llama.rope.scaling.original_context_length": 32,
    },
    "llama3": {},
    "split": {},
}


def test_gguf_files_are_read_as_llama_cpp_reads_them(packages: Path, tmp_path: Path) -> None:
    """RoPE scaling in the metadata and in rope_freqs.weight, and split files, give the same probabilities."""
    base = {"rope_type": "default", "rope_theta": 100.0}
    llama = llama_model(**GGUF_SHAPE, max_position_embeddings=512, rope_parameters=base)
    prompts, files = [byte_tokenizer().encode(prompt) for prompt in PROMPTS], {}
    for name, metadata in SCALED.items():
        extra = {"rope_freqs.weight": llama3_factors(100.0, 16, LLAMA3)} if name == "llama3" else {}
        parts = 8 if name == "split" else 0
        (tmp_path / name).mkdir()
        path = write_gguf(tmp_path / name / "x.gguf", llama, metadata=metadata, extra_tensors=extra, max_tensors=parts)
        gda.convert(path, tmp_path / name / "gda", verify=False)
        files[name] = {"path": str(path), "prompts": prompts, "numTokens": NUM_TOKENS}
    distinct = set()
    for name, result in run_llama_cpp(packages, files, tmp_path).items():
        for prompt, got in zip(prompts, result["continued"], strict=True):
            probabilities = logits(tmp_path / name / "gda", torch.tensor([prompt]))[0, -1].softmax(-1)
            for token, probability in got["probabilities"]:
                assert probability == pytest.approx(probabilities[token].item(), abs=2e-6), name
        distinct.add(round(probabilities.max().item(), 6))
    assert len(distinct) == len(SCALED) - len(("no type", "old key", "split"))  # of linear twice, and of none


def test_token_ids(packages: Path, tmp_path: Path) -> None:
    """The ids of difficult texts that contain special tokens are the same."""
    made = {way: byte_level_tokenizer(way) for way in BYTE_LEVEL_SPLITS} | {"sentencepiece": sentencepiece_tokenizer()}
    files = {}
    for name, tokenizer in made.items():
        tiny_model(vocab_size=len(tokenizer) + 3).save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
        report = gda.export(tmp_path / name, tmp_path / f"{name}.gguf", format="gguf", verify=False)
        files[name] = {"path": str(report.out), "texts": HARD_TEXTS}
    for name, result in run_llama_cpp(packages, files, tmp_path).items():
        for text, ids in zip(HARD_TEXTS, result["ids"], strict=True):
            if name != "qwen2" or "x̄" not in text:  # llama.cpp knows no NFC, as a note says
                assert ids == made[name](text).input_ids, f"{name}: {text!r}"


@needs_smollm2
def test_smollm2_from_gguf_to_gda_and_back(packages: Path, tmp_path: Path) -> None:
    """Converted, trained until λ is not 0, and exported, it answers with the tokens that transformers generates."""
    gda.convert(find_demo_model(), tmp_path / "gda", verify=False)
    gda.train(
        tmp_path / "gda",
        tmp_path / "trained",
        data=[save_text(tmp_path / "data.txt")],
        train="attention",
        steps=4,
        batch_size=1,
        context=128,
        learning_rate=1e-5,
        lambda_learning_rate=2e-3,
    )
    report = gda.export(tmp_path / "trained", tmp_path / "back.gguf", format="gguf", verify=False)
    assert report.num_attention_heads == 12
    model, tokenizer = load(tmp_path / "trained"), AutoTokenizer.from_pretrained(tmp_path / "trained")
    assert all(layer_lambdas(model.config, model.state_dict().__getitem__))
    messages = [{"role": "user", "content": QUESTION}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    ids = tokenizer(text).input_ids
    file = {"path": str(report.out), "texts": [text], "prompts": [ids], "numTokens": 24, "question": QUESTION}
    result = run_llama_cpp(packages, {"smollm2": file}, tmp_path)["smollm2"]
    assert result["ids"] == [ids]
    assert "Paris" in result["answer"]
    model.generation_config = GenerationConfig(eos_token_id=tokenizer.eos_token_id)
    given = torch.tensor([ids])
    written = model.generate(given, attention_mask=torch.ones_like(given), max_new_tokens=24, do_sample=False)
    expected = written[0, len(ids) :].tolist()
    got = result["continued"][0]["tokens"]
    assert got == expected[: len(got)]
    assert expected[len(got) :] in ([], [tokenizer.eos_token_id])
    assert "Paris" in tokenizer.decode(got)
