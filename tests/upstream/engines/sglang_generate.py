"""Run SGLang on a model's folder, let it continue the folder's prompts, and print the tokens as JSON.

    python sglang_generate.py FOLDER

SGLang's processes import this file again, and each of them installs the stand-ins.
"""

import json
import sys
from pathlib import Path

import stand_ins

stand_ins.install()


def main(folder: Path) -> None:
    import sglang

    expected = json.loads((folder / "expected.json").read_text())
    engine = sglang.Engine(
        model_path=str(folder),
        model_impl="transformers",
        trust_remote_code=True,
        device="cpu",
        attention_backend="torch_native",
        dtype="float32",
        skip_tokenizer_init=True,
        disable_cuda_graph=True,
        disable_overlap_schedule=True,
        context_length=64,
        max_total_tokens=512,
        max_running_requests=4,
        mem_fraction_static=0.3,
    )
    settings = {"temperature": 0, "max_new_tokens": len(expected["tokens"][0]), "ignore_eos": True}
    outputs = engine.generate(input_ids=expected["prompts"], sampling_params=settings)
    print("TOKENS", json.dumps([output["output_ids"] for output in outputs]), flush=True)
    engine.shutdown()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
