"""Compare a shared base with low-rank updates to dense projections: weights, and time of a forward pass.

The models are of medium size, with random weights: one with dense projections, and one for each rank, as in the Shared
DIFF Transformer (arXiv 2501.17900).

    python benchmarks/shared_diff.py --tokens 512 --threads 1
"""

import argparse
from collections.abc import Callable
from functools import partial

import torch
from measuring import Figure, add_options, device, figures, interleaved, parse, report
from torch import nn

from gda import GDAConfig, GDAForCausalLM

DENSE = "dense"
VOCABULARY, HIDDEN = 32000, 1024


def build(rank: int | None, options: argparse.Namespace) -> GDAForCausalLM:
    """20 query heads of width 64, of which 4 are noise heads (4:1), and 4 KV heads or 4 pairs of them."""
    config = GDAConfig(
        vocab_size=VOCABULARY,
        bos_token_id=1,
        eos_token_id=2,
        hidden_size=HIDDEN,
        intermediate_size=2816,
        num_hidden_layers=options.layers,
        num_attention_heads=20,
        num_noise_heads=4,
        num_key_value_heads=4 if options.layout == "shared" else 8,
        head_dim=64,
        kv_layout=options.layout,
        head_norm=True,
        qk_rank=rank,
    )
    return GDAForCausalLM(config).to(device(), getattr(torch, options.dtype)).eval()


class Projections(nn.Module):
    """The projections of every layer that depend on the rank: queries, and paired keys."""

    def __init__(self, model: GDAForCausalLM):
        super().__init__()
        kinds = "q" if model.config.kv_layout == "shared" else "qk"
        attentions = [layer.self_attn for layer in model.model.layers]
        self.calls: list[Callable] = [getattr(each, f"{kind}_proj") for each in attentions for kind in kinds]
        children = [child for each in attentions for child in each.named_children()]
        self.weights = nn.ModuleList(module for name, module in children if name[0] in kinds and name[1] == "_")

    def forward(self, hidden: torch.Tensor) -> None:
        for call in self.calls:
            call(hidden)


@torch.inference_mode()
def measure(options: argparse.Namespace) -> list[Figure]:
    """Figures of the whole models, and of the projections alone."""
    torch.manual_seed(0)
    models = {DENSE: build(None, options)} | {f"rank {rank}": build(rank, options) for rank in options.ranks}
    ids = torch.randint(VOCABULARY, (1, options.tokens), device=device())
    hidden = torch.randn(1, options.tokens, HIDDEN, device=device()).to(getattr(torch, options.dtype))
    parts = {name: Projections(model) for name, model in models.items()}
    found = []
    for case, modules, inputs in (("forward pass", models, ids), ("projections", parts, hidden)):
        runs = {name: partial(module, inputs) for name, module in modules.items()}
        nbytes = {name: sum(each.nbytes for each in module.parameters()) for name, module in modules.items()}
        for figure in figures(case, interleaved(runs, options), (DENSE,)):
            figure.bytes["weights"] = nbytes[figure.name]
            figure.bytes_ratio["weights"] = nbytes[figure.name] / nbytes[DENSE]
            found.append(figure)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[8, 32, 64])
    parser.add_argument("--layout", choices=("shared", "paired"), default="shared")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--tokens", type=int, default=512)
    add_options(parser, budget=10.0)
    options = parse(parser)
    sizes = f"{options.layers} layers, {options.tokens} tokens"
    report(f"{options.layout} keys and values, {sizes}, {options.dtype}", measure(options), options)


if __name__ == "__main__":
    main()
