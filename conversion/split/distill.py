"""Training the attention of a split model on its source's predictions, with one layer in memory at a time.

A step runs the layers forward; computes the KL divergence from the source's predictions; and goes back through the
layers for the gradients of their attention, which is then updated. Activations are kept if they fit into memory;
otherwise only the input of each layer is, and the layer runs again on the way back. The attention includes its biases
and the norms of q and k; MLPs, the other norms and embeddings are frozen. Trained weights and Adam's moments are in
mapped files.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch.nn.functional import kl_div, log_softmax

from gda.configuration.configuration_gda import GDAConfig
from gda.conversion.split.rows import Rows
from gda.conversion.split.work import Work
from gda.conversion.tensors.layerwise import LayerwiseModel

BATCH = 2  # rows in a step
# Size of Adam's step relative to the root mean square of a tensor's weights.
RELATIVE_LEARNING_RATE = 0.0025
SMALLEST_SCALE = 0.02  # for a tensor of zeros, such as a λ projection
BETAS = (0.9, 0.99)
WARM_UP = 20  # steps
CHUNK = 128  # tokens whose logits are in memory
CHECKPOINTS = 10  # per run: a killed run loses at most a tenth of the training

ATTENTION = "self_attn."  # what the names of the trained tensors begin with


@dataclass(frozen=True)
class Plan:
    """How long to train, in which order of the rows, and whether matrices are multiplied in bfloat16."""

    steps: int
    seed: int
    mixed_precision: bool

    def rate(self, step: int) -> float:
        """The learning rate of a step relative to its peak: linear warm-up, then linear decay to 0."""
        return min(1.0, (step + 1) / WARM_UP) * (1 - step / self.steps)

    def batch(self, step: int, rows: Rows) -> torch.Tensor:
        """Which rows, all of one kind, a step reads: each once per epoch, in random order."""
        epoch, number = divmod(step, len(rows.batches(BATCH)))
        generator = torch.Generator().manual_seed(self.seed + epoch)
        batches = rows.batches(BATCH, torch.randperm(len(rows), generator=generator))
        return batches[torch.randperm(len(batches), generator=generator)[number]]


@dataclass(frozen=True)
class _Pass:
    """A layer's run: its input and attention weights as leaves, and its output."""

    entering: torch.Tensor
    trained: dict[str, torch.Tensor]
    left: torch.Tensor


class Distillation:
    """Trains the attention of a split model.

    `start` returns the initial attention tensors of a layer, by their names in the layer. Weights, moments and
    checkpoints are stored in `work`. `keeps_graphs` keeps the activations of all layers for the way back, instead of
    running each layer again.
    """

    def __init__(
        self,
        model: LayerwiseModel,
        start: Callable[[int], dict[str, torch.Tensor]],
        work: Work,
        *,
        keeps_graphs: bool = False,
    ):
        self.model = model
        self.work = work
        self.keeps_graphs = keeps_graphs
        self.step = 0
        self.weights: list[dict[str, torch.Tensor]] = []
        self.means: list[dict[str, torch.Tensor]] = []
        self.squares: list[dict[str, torch.Tensor]] = []
        self.scales: list[dict[str, float]] = []
        for layer in range(model.num_layers):
            tensors = start(layer)
            zeros = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
            sizes = {name: tensor.square().mean().sqrt().item() for name, tensor in tensors.items()}
            self.scales.append({name: size or SMALLEST_SCALE for name, size in sizes.items()})
            self.weights.append(self._mapped("weight", layer, tensors))
            self.means.append(self._mapped("mean", layer, zeros))
            self.squares.append(self._mapped("square", layer, zeros))
        self._load_checkpoint()

    def _mapped(self, kind: str, layer: int, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Copies of the tensors in mapped files."""
        allocate = self.work.allocate
        return {name: allocate(f"{kind}-{layer}-{name}", *each.shape).copy_(each) for name, each in tensors.items()}

    def train(self, plan: Plan, rows: Rows, last_states: torch.Tensor) -> Iterator[float]:
        """Train to the last step of the plan, and yield the loss of each step, in nats per token.

        `last_states` are the inputs of the source's last norm, (rows, T, hidden).
        """
        every = max(1, plan.steps // CHECKPOINTS)
        head = self.model.head()
        while self.step < plan.steps:
            batch = plan.batch(self.step, rows)
            ids, wanted = (rows.sequences(batch, each[batch]) for each in (rows.ids, last_states))
            with torch.autocast(self.model.device.type, torch.bfloat16, enabled=plan.mixed_precision):
                loss = self._train_on(ids, wanted, head, plan.rate(self.step))
            self.step += 1
            if self.step % every == 0 or self.step == plan.steps:
                self._save_checkpoint()
            yield loss

    def _train_on(
        self, ids: torch.Tensor, wanted: torch.Tensor, head: Callable[[torch.Tensor], torch.Tensor], rate: float
    ) -> float:
        passes: list[_Pass | torch.Tensor] = []  # without graphs, only the inputs of the layers
        states = self.model.embed(ids)
        for layer in range(self.model.num_layers):
            with torch.set_grad_enabled(self.keeps_graphs):
                passed = self._pass(layer, states)
            states = passed.left.detach()
            passes.append(passed if self.keeps_graphs else passed.entering)
        loss, gradient = _divergence(head, wanted.to(self.model.device), states)
        for layer in reversed(range(self.model.num_layers)):
            kept = passes.pop()
            passed = kept if isinstance(kept, _Pass) else self._pass(layer, kept)
            leaves = [passed.entering, *passed.trained.values()]
            gradient, *gradients = torch.autograd.grad(passed.left, leaves, gradient)
            for name, each in zip(passed.trained, gradients, strict=True):
                self._update(layer, name, each, rate)
        return loss

    def _pass(self, layer: int, states: torch.Tensor) -> "_Pass":
        """Run a layer on `states` (B, T, hidden), with its attention's weights as leaves."""
        entering = states.detach().requires_grad_()
        weights = self.weights[layer].items()
        trained = {name: weight.detach().to(self.model.device).requires_grad_() for name, weight in weights}
        return _Pass(entering, trained, self.model.run(layer, self.model.tensors(layer, trained), entering))

    def tensors(self, layer: int) -> dict[str, torch.Tensor]:
        """All tensors of a layer, with the current attention."""
        return self.model.tensors(layer, self.weights[layer])

    @torch.no_grad()
    def _update(self, layer: int, name: str, gradient: torch.Tensor, rate: float) -> None:
        """One step of Adam (arXiv 1412.6980). torch's own keeps all moments in memory."""
        weight, mean, square = (each[layer][name] for each in (self.weights, self.means, self.squares))
        gradient = gradient.to(weight)
        mean.lerp_(gradient, 1 - BETAS[0])
        square.lerp_(gradient.square(), 1 - BETAS[1])
        bias, bias_of_square = (1 - beta ** (self.step + 1) for beta in BETAS)
        size = RELATIVE_LEARNING_RATE * self.scales[layer][name] * rate
        weight.addcdiv_(mean, (square / bias_of_square).sqrt_().add_(1e-12), value=-size / bias)

    def _save_checkpoint(self) -> None:
        before = self.work.facts("trained")["step"] if self.work.has("trained") else None
        for layer in range(self.model.num_layers):
            self.work.save(f"trained-{self.step}-{layer}", {}, self._state(layer))
        self.work.save("trained", {"step": self.step})
        if before not in (None, self.step):
            for layer in range(self.model.num_layers):
                self.work.forget(f"trained-{before}-{layer}")

    def _load_checkpoint(self) -> None:
        if not self.work.has("trained"):
            return
        self.step = self.work.facts("trained")["step"]
        for layer in range(self.model.num_layers):
            saved = self.work.tensors(f"trained-{self.step}-{layer}")
            for name, tensor in self._state(layer).items():
                tensor.copy_(saved[name])

    def _state(self, layer: int) -> dict[str, torch.Tensor]:
        kinds = {"weight": self.weights, "mean": self.means, "square": self.squares}
        return {f"{kind}.{name}": tensor for kind, of in kinds.items() for name, tensor in of[layer].items()}


def graph_bytes(config: GDAConfig, tokens: int) -> int:
    """About the bytes that a step on so many tokens keeps: activations, and weights with copies in a narrow dtype."""
    attention = config.num_attention_heads * config.head_dim
    activations = tokens * (8 * config.hidden_size + 4 * attention + 4 * config.intermediate_size)
    weights = config.hidden_size * (4 * attention + 3 * config.intermediate_size)
    return config.num_hidden_layers * (4 * activations + 6 * weights)


def _divergence(
    head: Callable[[torch.Tensor], torch.Tensor], wanted: torch.Tensor, got: torch.Tensor
) -> tuple[float, torch.Tensor]:
    """KL(source ‖ result) in nats per token, and its gradient for `got`; inputs of the last norm, (B, T, hidden)."""
    leaf = got.detach().requires_grad_()
    total, tokens = 0.0, leaf[..., 0].numel()
    for source, result in zip(wanted.flatten(0, 1).split(CHUNK), leaf.flatten(0, 1).split(CHUNK), strict=True):
        with torch.no_grad():
            expected = log_softmax(head(source).float(), dim=-1)
        logits = head(result)
        with torch.no_grad():
            found = log_softmax(logits.float(), dim=-1)
            total += kl_div(found, expected, reduction="sum", log_target=True).item()
            slope = found.exp_().sub_(expected.exp_()).div_(tokens)  # of the divergence, for the logits
        logits.backward(slope.to(logits))
    assert leaf.grad is not None
    return total / tokens, leaf.grad
