"""Key retrieval against the ratio of signal to noise heads: tiny models from scratch, equal data, about equal FLOPs.

Models have few layers, so the GPU is idle during most of a training step. All variants of one seed therefore train at
the same time: each captures its whole training step in a CUDA graph, and each graph is replayed on its own stream. One
seed is one block: its variants read the same rows in the same order, and it counts only when all of them have finished.

The difficulty is chosen before any GDA is trained. The Transformer alone is trained on each difficulty of LADDER with
two seeds of its own. The first difficulty with a mean accuracy in WANTED is taken, or else the one closest to its
middle, so that the variants can be better or worse than the Transformer.

The number of training steps follows from the remaining time: a few steps of one block are timed, and the number, within
STEPS, is chosen so that about BLOCKS blocks fit.

The width of the MLP makes up for the differences in FLOPs between variants.
"""

import argparse
import dataclasses
import math
import os
import statistics
import sys
import time
from dataclasses import dataclass

import torch
from equal_flops import Heads, Shape, build, flops, interval, mlp_width
from kit import OutOfTime, Part, Row, capture, free_memory, one_line, parser_of
from measuring import device, synchronize
from recall import VOCABULARY, Difficulty, question_places, rows
from torch import Tensor
from torch.nn.functional import cross_entropy

TRANSFORMER = "Transformer"
PAIRED: Row = {"kv_layout": "paired", "head_norm": True}
VARIANTS: dict[str, Heads] = {
    TRANSFORMER: Heads(16, 0, {}),
    "paired 1:1": Heads(8, 8, PAIRED),
    "paired 3:1": Heads(12, 4, PAIRED),
    "paired 4:1": Heads(16, 4, PAIRED),
    "paired 7:1": Heads(14, 2, PAIRED),
    "shared 1:1": Heads(8, 8, {}),
    "shared 3:1": Heads(12, 4, {}),
    "shared 4:1": Heads(16, 4, {}),
    "shared tanh 3:1": Heads(12, 4, {"lambda_type": "tanh"}),
    "shared tanh 4:1": Heads(16, 4, {"lambda_type": "tanh"}),
    "shared sigmoid 4:1": Heads(16, 4, {"lambda_type": "sigmoid"}),
}
LADDER = (Difficulty(4, 8, 4), Difficulty(8, 16, 8), Difficulty(16, 32, 16), Difficulty(32, 64, 16))
WANTED = (0.5, 0.9)
STEPS, BLOCKS = (1000, 4000), 10
WARM_UPS = 3  # steps before a capture


@dataclass(frozen=True)
class Size:
    """Size of a model and its training."""

    hidden: int = 128
    layers: int = 2
    head_dim: int = 16
    kv_heads: int = 2
    mlp: int = 512  # the Transformer's
    steps: int = 2000  # pace() decides
    batch: int = 64
    learning_rate: float = 2e-3
    tests: int = 1024  # rows

    def shape(self, length: int) -> Shape:
        """The shape that FLOPs are counted for, with rows of `length` tokens."""
        return Shape(self.hidden, self.layers, self.head_dim, self.kv_heads, length)


SMOKE = Size(hidden=32, layers=1, mlp=512, steps=6, batch=4, tests=8)


def mlp_of(size: Size, name: str, length: int) -> int:
    """The width of the MLP that gives the FLOPs of the Transformer."""
    shape = size.shape(length)
    return mlp_width(shape, VARIANTS[name], flops(shape, VARIANTS[TRANSFORMER], size.mlp))


class Training:
    """One model in training. `replay` runs one step; the first few have already run."""

    def __init__(self, name: str, size: Size, difficulty: Difficulty, seed: int, data: Tensor):
        self.size, self.difficulty, self.data = size, difficulty, data  # data: (steps, batch, length)
        shape, mlp = size.shape(difficulty.length), mlp_of(size, name, difficulty.length)
        fields = {"vocab_size": VOCABULARY, "max_position_embeddings": difficulty.length}
        self.model = build(shape, VARIANTS[name], mlp, seed, **fields).to(device())
        self.at = torch.zeros(1, dtype=torch.long, device=device())  # number of the step
        self.losses = torch.zeros(size.steps, device=device())
        self.places = question_places(difficulty, self.at.device)
        causal = torch.ones(difficulty.length, difficulty.length, dtype=torch.bool, device=device()).tril()
        self.mask = causal[None, None]
        self.learning_rates = torch.tensor([self.schedule(step) for step in range(size.steps)], device=device())
        on_gpu = torch.cuda.is_available()
        self.learning_rate = torch.tensor(0.0, device=device())
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=self.learning_rate, betas=(0.9, 0.95), weight_decay=0.1, capturable=on_gpu,
            foreach=on_gpu,
        )  # fmt: skip
        self.stream = torch.cuda.Stream() if on_gpu else None
        self.made = min(WARM_UPS, size.steps)
        self.replay = capture(self.step, self.made)

    def schedule(self, step: int) -> float:
        """Linear warm-up over 5 % of the steps, then half a cosine down to a tenth of the peak."""
        warm_up = max(1, self.size.steps // 20)
        progress = max(0, step - warm_up) / max(1, self.size.steps - warm_up)
        falling = 0.55 + 0.45 * math.cos(math.pi * progress)
        return self.size.learning_rate * min(1.0, (step + 1) / warm_up) * falling

    def answers(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (batch · questions, vocabulary) and the correct values."""
        # A 4D mask, since making one looks at the data, which a capture can't.
        hidden = self.model.model(input_ids=ids, attention_mask=self.mask, use_cache=False).last_hidden_state
        return self.model.lm_head(hidden[:, self.places]).flatten(0, 1), ids[:, self.places + 1].flatten()

    def step(self) -> None:
        """One training step, with all its inputs on the device."""
        self.optimizer.zero_grad(set_to_none=True)
        loss = cross_entropy(*self.answers(self.data.index_select(0, self.at)[0]))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0, foreach=True)
        self.learning_rate.copy_(self.learning_rates.index_select(0, self.at)[0])
        self.optimizer.step()
        self.losses.index_copy_(0, self.at, loss.detach().unsqueeze(0))
        self.at.add_(1)

    def train_step(self) -> None:
        """Start the next step on this model's stream."""
        if self.stream is None:
            self.replay()
            return
        with torch.cuda.stream(self.stream):
            self.replay()

    @torch.no_grad()
    def result(self, tests: Tensor) -> Row:
        """Loss and accuracy on held-out rows, and the mean training loss."""
        logits, right = self.answers(tests)
        return {
            "accuracy": (logits.argmax(-1) == right).float().mean().item(),
            "loss": cross_entropy(logits, right).item(),
            "mean_training_loss": self.losses.mean().item(),
        }


def block(part: Part, names: list[tuple[str, Difficulty, int]], size: Size) -> list[Row]:
    """Train all of these (variant, difficulty, seed) at the same time. Data depends on difficulty and seed only."""
    data: dict[tuple[Difficulty, int], Tensor] = {}
    for _, difficulty, seed in names:
        if (difficulty, seed) not in data:
            generator = torch.Generator(device()).manual_seed(1000 + seed)
            made = rows(difficulty, size.steps * size.batch, generator)
            data[difficulty, seed] = made.view(size.steps, size.batch, -1)
    found: list[Row] = []
    running: dict[int, Training] = {}
    for index, (name, difficulty, seed) in enumerate(names):
        found.append({"name": name, "difficulty": str(difficulty), "seed": seed})
        try:
            running[index] = Training(name, size, difficulty, seed, data[difficulty, seed])
        except Exception as error:  # one variant that cannot be captured must not cost the others
            found[index]["error"] = one_line(error)
            synchronize()
    synchronize()
    begun = time.monotonic()
    for step in range(min((training.made for training in running.values()), default=0), size.steps):
        for training in running.values():
            training.train_step()
        if step % 100 == 0:
            synchronize()
            if part.left() <= 0:
                raise OutOfTime
    synchronize()
    part.content["training_seconds"] = time.monotonic() - begun  # of the last block
    for index, training in running.items():
        tests = rows(names[index][1], size.tests, torch.Generator(device()).manual_seed(1))
        found[index] |= training.result(tests)
    return found


def pace(part: Part, size: Size) -> int:
    """Number of steps, a multiple of 100, such that BLOCKS blocks and the ladder fit into the remaining time."""
    names = [(name, LADDER[2], -3) for name in VARIANTS]
    for steps in (10, 250):  # the first loads kernels
        begun = time.monotonic()
        block(part, names, dataclasses.replace(size, steps=steps))
        whole = time.monotonic() - begun
    step_seconds = max(part.content["training_seconds"] / (250 - WARM_UPS), 1e-4)
    build_seconds = whole - part.content["training_seconds"]
    fitting = (part.left() / (BLOCKS + 1) - build_seconds) / step_seconds
    part.content["pace"] = {"build_seconds": build_seconds, "milliseconds_per_step_of_a_block": 1000 * step_seconds}
    print(f"[{part.budget - part.left():6.1f}s] {part.content['pace']}, {fitting:.0f} steps fit", flush=True)
    return int(max(STEPS[0], min(STEPS[1], fitting)) // 100 * 100)


def choose(part: Part, size: Size) -> Difficulty:
    """Train the Transformer on each difficulty, and choose one as described above."""
    seeds = (-1, -2)
    ladder = list(LADDER[:2] if part.content["smoke"] else LADDER)
    found = block(part, [(TRANSFORMER, difficulty, seed) for difficulty in ladder for seed in seeds], size)
    for row in found:
        part.add({"stage": "ladder", **row})
    failed = {row["difficulty"]: row["error"] for row in found if "error" in row}
    if not (ladder := [each for each in ladder if str(each) not in failed]):
        raise RuntimeError(next(iter(failed.values())))
    accuracy = {
        each: statistics.fmean(row["accuracy"] for row in found if row["difficulty"] == str(each)) for each in ladder
    }
    inside = [each for each in ladder if WANTED[0] <= accuracy[each] <= WANTED[1]]
    chosen = inside[0] if inside else min(ladder, key=lambda each: abs(accuracy[each] - statistics.fmean(WANTED)))
    part.content["difficulty"] = {**dataclasses.asdict(chosen), "length": chosen.length, "rule": " ".join(
        (__doc__ or "").split("\n\n")[2].split())}  # fmt: skip
    part.write()
    return chosen


def summary(found: list[Row], size: Size, length: int) -> list[Row]:
    """For each variant: means, and differences to the Transformer of the same seed with 95 % t-intervals."""
    runs = [row for row in found if row.get("stage") == "sweep" and "accuracy" in row]
    peers = {row["seed"]: row for row in runs if row["name"] == TRANSFORMER}
    lines = []
    shape = size.shape(length)
    of_peer = flops(shape, VARIANTS[TRANSFORMER], size.mlp)
    for name, heads in VARIANTS.items():
        own = [row for row in runs if row["name"] == name and row["seed"] in peers]
        if not own:
            continue
        mlp = mlp_of(size, name, length)
        line: Row = {
            "name": name,
            "seeds": len(own),
            "mlp": mlp,
            "flops": flops(shape, heads, mlp) / of_peer,
        }
        for measure in ("accuracy", "loss", "mean_training_loss"):
            line[measure] = statistics.fmean(row[measure] for row in own)
            if heads.noise:
                line[f"{measure}_difference"] = interval([row[measure] - peers[row["seed"]][measure] for row in own])
        lines.append(line)
    return lines


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--seeds", type=int, default=100, help="Largest number of blocks.")
    options: argparse.Namespace = parser.parse_args()
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "32")  # as many streams as variants; read when CUDA starts
    torch.backends.cuda.matmul.allow_tf32 = True  # equal for all variants; a third of the time
    size = SMOKE if options.smoke else Size()
    part = Part("sweep", options)
    try:
        if not options.smoke:
            size = dataclasses.replace(size, steps=pace(part, size))
        part.content["size"] = dataclasses.asdict(size)
        difficulty = choose(part, size)
    except OutOfTime:
        part.add({"stage": "ladder", "skipped": "out of time"})
        return
    except Exception as error:
        part.add({"stage": "ladder", "error": one_line(error)})
        sys.exit(1)
    longest = 0.0
    for seed in range(2 if options.smoke else options.seeds):
        free_memory()
        begun = time.monotonic()
        if part.left() < 1.1 * longest:
            break
        try:
            found = block(part, [(name, difficulty, seed) for name in VARIANTS], size)
        except OutOfTime:
            part.add({"stage": "sweep", "seed": seed, "skipped": "out of time in the midst of a block"})
            break
        except Exception as error:
            part.add({"stage": "sweep", "seed": seed, "error": one_line(error)})
            break
        for row in found:
            part.rows.append({"stage": "sweep", **row})
        longest = max(longest, time.monotonic() - begun)
        part.content["summary"] = summary(part.rows, size, difficulty.length)
        part.write()
        print(f"[{part.budget - part.left():6.1f}s] seed {seed} took {time.monotonic() - begun:.1f} s", flush=True)
    part.finish()


if __name__ == "__main__":
    main()
