"""Compare fading λ in with plain training, by held-out losses of a small expanded Llama, over seeds.

    python benchmarks/annealing.py --out results

A tiny Llama is trained on Python's documentation and expanded by `gda convert`, so that λ starts at 0. `gda train` then
trains copies of it on the same data with the same steps and rates, with and without fading λ in. The last tenth of the
text is held out.
"""

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

VOCABULARY, CONTEXT, BATCH = 2048, 128, 8


def prepare(out: Path, steps: int) -> None:
    """Write the texts and the expanded model."""
    import torch
    from measuring import trained_tokenizer
    from transformers import LlamaConfig, LlamaForCausalLM

    import gda
    from gda.common.text import python_documentation

    text = python_documentation()
    train, held_out = text[: len(text) * 9 // 10], text[len(text) * 9 // 10 :]
    out.mkdir(parents=True, exist_ok=True)
    (out / "train.txt").write_text(train)
    (out / "held_out.txt").write_text(held_out)
    tokenizer = trained_tokenizer([train], VOCABULARY, ["<eos>"], eos_token="<eos>")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )
    model = LlamaForCausalLM(config)
    ids = torch.tensor(tokenizer(train, verbose=False).input_ids)
    rows = ids[: len(ids) // CONTEXT * CONTEXT].view(-1, CONTEXT)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        batch = rows[torch.randint(len(rows), (BATCH,))]
        optimizer.zero_grad()
        model(batch, labels=batch).loss.backward()
        optimizer.step()
        schedule.step()
    model.save_pretrained(out / "llama")
    tokenizer.save_pretrained(out / "llama")
    gda.convert(out / "llama", out / "gda", overwrite=True)


def main() -> None:
    """Train all copies and print their held-out losses."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="Folder for models and results.json.")
    parser.add_argument("--pretraining-steps", type=int, default=600, help="Training steps of the Llama.")
    parser.add_argument(
        "--steps", type=int, default=200, help="Training steps of each copy; λ is faded in over half of them."
    )
    parser.add_argument("--seeds", type=int, default=3, help="Number of seeds.")
    parser.add_argument("--target", type=float, default=0.2, help="Value of --lambda-target.")
    parser.add_argument("--lambda-learning-rate", type=float, default=5e-3, help="Peak learning rate of λ.")
    args = parser.parse_args()
    annealing = {"lambda_target": args.target, "fade_steps": args.steps // 2}
    arms: dict[str, dict[str, Any]] = {"plain": {}, f"annealed through {args.target:g}": annealing}
    import gda

    begun = time.process_time()
    if not (args.out / "gda").is_dir():
        prepare(args.out, args.pretraining_steps)
    print(f"prepared in {time.process_time() - begun:.0f} seconds of CPU", flush=True)
    losses: dict[str, list[float]] = {name: [] for name in arms}
    for seed in range(args.seeds):
        for name, options in arms.items():
            report = gda.train(
                args.out / "gda",
                args.out / f"{name.replace(' ', '-')}-{seed}",
                data=args.out / "train.txt",
                eval_data=args.out / "held_out.txt",
                steps=args.steps,
                eval_every=args.steps,
                save_every=args.steps,
                batch_size=BATCH,
                learning_rate=5e-4,
                lambda_learning_rate=args.lambda_learning_rate,
                seed=seed,
                overwrite=True,
                **options,
            )
            losses[name].append(report.last_eval_loss)
            print(
                f"seed {seed}, {name}: {report.first_eval_loss:.4f} before, {report.last_eval_loss:.4f} after",
                flush=True,
            )
    (args.out / "results.json").write_text(json.dumps(losses, indent=2))
    for name, values in losses.items():
        deviation = f", standard deviation {statistics.stdev(values):.4f}" if len(values) > 1 else ""
        print(f"{name}: mean {statistics.mean(values):.4f}{deviation}")
    differences = [there - here for here, there in zip(*losses.values(), strict=True)]
    print(f"annealed - plain, seed by seed: {', '.join(f'{each:+.4f}' for each in differences)}")
    print(f"{(time.process_time() - begun) / 60:.1f} minutes of CPU")


if __name__ == "__main__":
    main()
