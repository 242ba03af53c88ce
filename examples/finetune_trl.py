"""Fine-tune a GDA model with TRL: LoRA on chats (SFT), then on preferences (DPO).

    pip install trl peft
    python examples/finetune_trl.py ./llama-gda ./tuned --chats chats.jsonl --preferences preferences.jsonl
    python examples/finetune_trl.py --smoke

A row of chats has the field `messages`; a row of preferences has `prompt`, `chosen` and `rejected`. PEFT adapts the
layers that it adapts in a Llama, q_proj and v_proj. λ keeps its value; `gda train --train lora` trains it as well.
"""

import argparse
import tempfile
from pathlib import Path

import torch
from datasets import Dataset, load_dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

import gda  # noqa: F401 - registers the model type "gda"

CHATS = [
    {
        "messages": [
            {"role": "user", "content": f"What is {n} + 1?"},
            {"role": "assistant", "content": f"{n + 1}"},
        ]
    }
    for n in range(8)
]
PREFERENCES = [{"prompt": f"{n} + 1 =", "chosen": f" {n + 1}", "rejected": f" {n}"} for n in range(8)]


def settings(out: Path, smoke: bool) -> dict:
    """Arguments that both trainers have."""
    limits = {"max_steps": 2, "per_device_train_batch_size": 2} if smoke else {"num_train_epochs": 1}
    return {
        "output_dir": str(out),
        "report_to": "none",
        "save_strategy": "no",
        "use_cpu": not torch.cuda.is_available(),
        "bf16": torch.cuda.is_available(),
        **limits,
    }


def tune(model: Path, out: Path, chats: Dataset, preferences: Dataset, smoke: bool) -> None:
    """Write the tuned model, with the adapters merged, to `out`."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    lora = LoraConfig(task_type="CAUSAL_LM", r=8)

    sft = SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(model),
        args=SFTConfig(**settings(out / "sft", smoke), max_length=512),
        train_dataset=chats,
        processing_class=tokenizer,
        peft_config=lora,
    )
    sft.train()
    merged = sft.model.merge_and_unload()

    dpo = DPOTrainer(
        model=merged,
        args=DPOConfig(**settings(out / "dpo", smoke), beta=0.1),
        train_dataset=preferences,
        processing_class=tokenizer,
        peft_config=lora,
    )
    dpo.train()
    dpo.model.merge_and_unload().save_pretrained(out)
    tokenizer.save_pretrained(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", type=Path, help="folder of a GDA model")
    parser.add_argument("out", nargs="?", type=Path, help="folder to write the tuned model to")
    parser.add_argument("--chats", help="JSON Lines with `messages`")
    parser.add_argument("--preferences", help="JSON Lines with `prompt`, `chosen` and `rejected`")
    parser.add_argument("--smoke", action="store_true", help="two steps of a tiny model on made-up data")
    options = parser.parse_args()
    if not options.smoke:
        if None in (options.model, options.out, options.chats, options.preferences):
            parser.error("name MODEL, OUT, --chats and --preferences, or try --smoke")
        data = (load_dataset("json", data_files=file, split="train") for file in (options.chats, options.preferences))
        tune(options.model, options.out, *data, smoke=False)
        return
    from tiny import tiny_models

    with tempfile.TemporaryDirectory() as folder:
        _, model = tiny_models(Path(folder))
        out = Path(folder) / "tuned"
        tune(model, out, Dataset.from_list(CHATS), Dataset.from_list(PREFERENCES), smoke=True)
        tuned = AutoModelForCausalLM.from_pretrained(out)
        before = AutoModelForCausalLM.from_pretrained(model)
        changed = [name for name, old in before.state_dict().items() if not torch.equal(old, tuned.state_dict()[name])]
        print(f"{type(tuned).__name__}: {len(changed)} tensors changed, such as {changed[0]}")


if __name__ == "__main__":
    main()
