"""Save the tiny models that `run.py` gives to serving engines, each with the results of transformers.

    python tests/upstream/engines/save_models.py FOLDER

Each folder is written by `save_pretrained`, including the code, and has `expected.json`: token ids, logits at each
position, and greedy continuations of a few prompts. For an exported model these are the results of its GDA model.
"""

import copy
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from models import EXPORTED, GDA, NUM_NEW_TOKENS, REFUSED, SHAPE, STOCK
from transformers import PreTrainedModel

from gda import GDAConfig, GDAForCausalLM, export

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "support"))
from tiny import make_asymmetric


@torch.no_grad()
def expectation(model: PreTrainedModel) -> dict[str, Any]:
    """The expected results: logits (T, vocab) of some ids, and greedy continuations of a few prompts."""
    generator = torch.Generator().manual_seed(1)
    prompts = [torch.randint(SHAPE["vocab_size"], (length,), generator=generator) for length in (12, 3, 20)]
    settings: dict[str, Any] = {"do_sample": False, "max_new_tokens": NUM_NEW_TOKENS, "pad_token_id": 0}
    return {
        "prompts": [prompt.tolist() for prompt in prompts],
        "logits": model(prompts[0][None]).logits[0].tolist(),
        "tokens": [model.generate(prompt[None], **settings)[0, len(prompt) :].tolist() for prompt in prompts],
    }


def save(model: PreTrainedModel, folder: Path) -> None:
    make_asymmetric(model).save_pretrained(folder)
    expected = expectation(model)
    if getattr(model.config, "sliding_window", None):  # see test_sglang.py
        config = copy.deepcopy(model.config)
        config.sliding_window += 1
        wider = type(model)(config).eval()
        wider.load_state_dict(model.state_dict())
        expected["tokens_of_wider_window"] = expectation(wider)["tokens"]
    (folder / "expected.json").write_text(json.dumps(expected))


def main(folder: Path) -> None:
    for name, family in STOCK.items():
        config = getattr(transformers, f"{family}Config")(**SHAPE)
        save(getattr(transformers, f"{family}ForCausalLM")(config), folder / name)
    for name, fields in (GDA | REFUSED).items():
        save(GDAForCausalLM(GDAConfig(**(SHAPE | {"num_noise_heads": 2} | fields))), folder / name)
    for name, fields in EXPORTED.items():
        model, exported = folder / f"gda-for-{name}", folder / f"exported-{name}"
        save(GDAForCausalLM(GDAConfig(**(SHAPE | {"num_noise_heads": 2} | fields))), model)
        assert export(model, exported).format == name
        shutil.copy(model / "expected.json", exported)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
