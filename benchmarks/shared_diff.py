"""Compare a shared base with low-rank updates to dense projections: parameters, and time of a forward pass.

The models are of medium size, with random weights: one with dense projections, and one for each rank, as in the Shared
DIFF Transformer (arXiv 2501.17900). Repetitions are interleaved: each runs every model once. A figure is the median of
the ratios to the dense model within a repetition.

    python benchmarks/shared_diff.py --tokens 512 --repeat 11
"""

import argparse
import json
import statistics
import time

import torch

from gda import GDAConfig, GDAForCausalLM

DENSE = 0


def config(rank: int, layout: str, layers: int) -> GDAConfig:
    """Hidden size 1,024, 20 query heads of width 64, of which 4 are noise heads (4:1), and 4 KV heads or 4 pairs of
    them.
    """
    return GDAConfig(
        vocab_size=32000,
        bos_token_id=1,
        eos_token_id=2,
        hidden_size=1024,
        intermediate_size=2816,
        num_hidden_layers=layers,
        num_attention_heads=20,
        num_noise_heads=4,
        num_key_value_heads=4 if layout == "shared" else 8,
        head_dim=64,
        kv_layout=layout,
        head_norm=True,
        qk_rank=rank or None,
    )


@torch.inference_mode()
def seconds(module: torch.nn.Module, *inputs: torch.Tensor) -> float:
    begun = time.perf_counter()
    module(*inputs)
    return time.perf_counter() - begun


class Projections(torch.nn.Module):
    """The projections of every layer that depend on the rank: queries, and paired keys."""

    def __init__(self, model: GDAForCausalLM):
        super().__init__()
        self.layers = [layer.self_attn for layer in model.model.layers]
        self.names = "q" if model.config.kv_layout == "shared" else "qk"

    def forward(self, hidden: torch.Tensor) -> None:
        for attention in self.layers:
            for name in self.names:
                getattr(attention, f"{name}_proj")(hidden)

    def numel(self) -> int:
        """Number of their parameters."""
        parts = tuple(f"{name}_{part}." for name in self.names for part in ("proj", "base", "down", "up"))
        parameters = (pair for attention in self.layers for pair in attention.named_parameters())
        return sum(parameter.numel() for name, parameter in parameters if name.startswith(parts))


def measure(options: argparse.Namespace) -> list[dict[str, float]]:
    """A row for the dense model and one for each rank."""
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    models = {
        rank: GDAForCausalLM(config(rank, options.layout, options.layers)).eval() for rank in (DENSE, *options.ranks)
    }
    ids = torch.randint(32000, (1, options.tokens))
    hidden = torch.randn(1, options.tokens, 1024)
    whole: dict[int, list[float]] = {rank: [] for rank in models}
    part: dict[int, list[float]] = {rank: [] for rank in models}
    for repetition in range(options.repeat + 1):  # the first is to warm up
        for rank, model in models.items():
            taken = seconds(model, ids), seconds(Projections(model), hidden)
            if repetition:
                whole[rank].append(taken[0])
                part[rank].append(taken[1])

    def ratio(times: dict[int, list[float]], rank: int) -> float:
        return statistics.median(mine / dense for mine, dense in zip(times[rank], times[DENSE], strict=True))

    projections = {rank: Projections(model).numel() for rank, model in models.items()}
    return [
        {
            "rank": rank,
            "parameters": model.num_parameters(),
            "projection_parameters": projections[rank],
            "projection_share": projections[rank] / projections[DENSE],
            "forward_s": statistics.median(whole[rank]),
            "forward_ratio": ratio(whole, rank),
            "projection_s": statistics.median(part[rank]),
            "projection_ratio": ratio(part, rank),
        }
        for rank, model in models.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[8, 32, 64])
    parser.add_argument("--layout", choices=("shared", "paired"), default="shared")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--repeat", type=int, default=11)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    rows = measure(options)
    if options.json:
        print(json.dumps(rows, indent=2))
        return
    print(
        f"{options.layout} keys and values, {options.layers} layers, {options.tokens} tokens, float32, "
        f"{options.threads} thread(s), medians of {options.repeat}"
    )
    what = "queries" if options.layout == "shared" else "queries and keys"
    print(f"rank     parameters      forward   × dense   {what}: parameters   × dense       time   × dense")
    for row in rows:
        name = "dense" if row["rank"] == DENSE else str(row["rank"])
        print(
            f"{name:<6} {row['parameters']:>12,} {1000 * row['forward_s']:9.0f} ms   {row['forward_ratio']:7.3f}"
            f"{row['projection_parameters']:>{len(what) + 15},}   {row['projection_share']:7.3f}"
            f"  {1000 * row['projection_s']:6.1f} ms   {row['projection_ratio']:7.3f}"
        )


if __name__ == "__main__":
    main()
