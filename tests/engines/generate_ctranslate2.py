"""Convert a model with CTranslate2's own converter, and continue prompts greedily on a CPU.

python generate_ctranslate2.py TASK.json OUT.json
"""

import tempfile
from pathlib import Path
from typing import Any

import ctranslate2
import numpy as np
import task
from ctranslate2.converters import TransformersConverter
from transformers import AutoTokenizer


def generate(folder: Path, prompts: list[str], num_tokens: int) -> dict[str, Any]:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = [tokenizer.encode(prompt) for prompt in prompts]
    with tempfile.TemporaryDirectory() as converted:
        TransformersConverter(str(folder)).convert(converted, quantization="float32", force=True)
        generator = ctranslate2.Generator(converted, device="cpu", compute_type="float32", intra_threads=1)
    results = generator.generate_batch(
        [tokenizer.convert_ids_to_tokens(each) for each in ids],
        max_length=num_tokens,
        sampling_topk=1,
        end_token=[],
        include_prompt_in_result=False,
    )
    return {
        "tokens": [result.sequences_ids[0] for result in results],
        "logits": np.array(generator.forward_batch([ids[0]]))[0].tolist(),
    }


if __name__ == "__main__":
    task.run(generate)
