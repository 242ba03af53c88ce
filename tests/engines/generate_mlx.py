"""Continue prompts greedily with mlx-lm on a CPU.

python generate_mlx.py TASK.json OUT.json
"""

from pathlib import Path
from typing import Any

import mlx.core as mx
import task
from mlx_lm import load
from mlx_lm.generate import generate_step

mx.set_default_device(mx.cpu)
mx.disable_compile()  # on a CPU it would need a C++ compiler


def generate(folder: Path, prompts: list[str], num_tokens: int) -> dict[str, Any]:
    model, tokenizer = load(str(folder))
    model.set_dtype(mx.float32)
    ids = [mx.array(tokenizer.encode(prompt)) for prompt in prompts]
    return {
        "tokens": [[int(token) for token, _ in generate_step(each, model, max_tokens=num_tokens)] for each in ids],
        "logits": model(ids[0][None])[0].tolist(),
    }


if __name__ == "__main__":
    task.run(generate)
