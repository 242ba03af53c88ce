"""The layers of a source, one after another: what their heads give, and how they are merged and divided by that."""

import copy
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace

import torch
from transformers import PreTrainedConfig

from gda.configuration.configuration_gda import GDAConfig
from gda.conversion.split.heads import Moments, Split, split_layer, undivided_error
from gda.conversion.split.merge import Merge, Statistics, merge_layer
from gda.conversion.split.recipes import reordered
from gda.conversion.split.work import Work
from gda.conversion.tensors.layerwise import LayerwiseModel, layer_prefix

BATCH = 4  # windows that a layer reads at a time
MOST_TOKENS = 32768  # that moments are taken of: more change nothing

# Called with which windows went through a module, what went in, and what came out.
Hook = Callable[[slice, torch.Tensor, torch.Tensor], None]


def fit_layers(
    source: LayerwiseModel, config: GDAConfig, windows: torch.Tensor, *, fitted: int, lambdas: list[float], work: Work
) -> Iterator[Split]:
    """Divide the heads of one layer after another; those that `work` has are not done again.

    Where the result has fewer KV heads than the source, they are merged first; `merged_tensor` has what comes of that.
    When the last layer is done, `last_states` are what it gave.

    Args:
        source: The source.
        config: Of the result.
        windows: Ids (windows, T).
        fitted: How many of them, from the first on, moments may be taken of.
        lambdas: λ to try.
        work: Where results and activations lie.
    """
    buffers = _buffers(work, source.config, windows)
    if not work.has(_name(0)):
        for batch in range(0, len(windows), BATCH):
            buffers[0][batch : batch + BATCH] = source.embed(windows[batch : batch + BATCH])
    counted = min(fitted, max(1, MOST_TOKENS // windows.shape[1]))
    fit = _MergedFit(source, config, counted, lambdas, work) if merges(source.config, config) else None
    for index in range(source.num_layers):
        name = _name(index)
        if not work.has(name):
            entering, leaving = buffers[index % 2], buffers[(index + 1) % 2]
            tensors: dict[str, torch.Tensor] = {}
            if fit is None:
                split = _fit_layer(source, index, config, entering, leaving, counted, lambdas)
            else:
                split, tensors = fit(index, entering, leaving)
            if not torch.isfinite(leaving).all():
                raise _not_finite(index, "mlp")
            facts = {key: value for key, value in asdict(split).items() if key != "output"}
            work.save(name, facts, {"output": split.output.float(), **tensors})
        facts = work.facts(name)
        merge = facts.pop("merge")
        yield Split(**facts, output=work.tensors(name)["output"], merge=None if merge is None else Merge(**merge))


def merges(source: PreTrainedConfig, config: GDAConfig) -> bool:
    """Whether KV heads of the source are merged for a result of that configuration."""
    return config.num_key_value_heads != source.num_key_value_heads


def merged_tensor(work: Work, layer: int, name: str) -> torch.Tensor:
    """A tensor of q, k or v of a layer with merged KV heads, by its name in the layer, as the result has it."""
    return work.tensors(_name(layer))[name]


def last_states(source: LayerwiseModel, windows: torch.Tensor, work: Work) -> torch.Tensor:
    """What the last layer of the source gives, (windows, T, hidden), once `fit_layers` is done."""
    return _buffers(work, source.config, windows)[source.num_layers % 2]


def _name(index: int) -> str:
    return f"layer-{index}"


def _buffers(work: Work, config: PreTrainedConfig, windows: torch.Tensor) -> list[torch.Tensor]:
    """What goes into a layer and what comes out of it: each is kept until the layer after the next, for a kill."""
    return [work.allocate(f"states-{number}", *windows.shape, config.hidden_size) for number in (0, 1)]


@torch.no_grad()
def _fit_layer(
    source: LayerwiseModel,
    index: int,
    config: GDAConfig,
    entering: torch.Tensor,
    leaving: torch.Tensor,
    counted: int,
    lambdas: list[float],
) -> Split:
    tensors = source.tensors(index)
    output = tensors["self_attn.o_proj.weight"]
    moments = Moments(output.shape[1], output.shape[0], source.device)
    bias = _output_bias(tensors)

    def count(_rows: slice, heads: torch.Tensor, outputs: torch.Tensor) -> None:
        moments.add(heads, outputs - bias)

    _run(source, index, tensors, entering, {"o_proj": count}, counted=counted, leaving=leaving)
    return _divide(index, moments, output, config, lambdas)


class _MergedFit:
    """Merges the KV heads of a layer, and then divides the heads of what comes of that.

    The layer is run twice: as it is, for statistics and for what its attention gives, and with merged KV heads.
    """

    def __init__(
        self, source: LayerwiseModel, config: GDAConfig, counted: int, lambdas: list[float], work: Work
    ) -> None:
        merged_config = copy.deepcopy(source.config)
        merged_config.num_key_value_heads = config.num_key_value_heads
        self.source, self.merged = source, source.of_config(merged_config)
        self.config, self.counted, self.lambdas, self.work = config, counted, lambdas, work

    @torch.no_grad()
    def __call__(
        self, index: int, entering: torch.Tensor, leaving: torch.Tensor
    ) -> tuple[Split, dict[str, torch.Tensor]]:
        """The split of a layer, and its q, k and v by their names in the layer, in the order of the result."""
        tensors = self.source.tensors(index)
        wanted = self.work.allocate("attention", self.counted, *entering.shape[1:])
        statistics = self._statistics(index, tensors, entering, leaving, wanted)
        groups, merged, lost = merge_layer(tensors, statistics, self.config.num_key_value_heads)
        moments = self._moments(index, tensors | merged, entering, wanted)
        split = _divide(index, moments, merged.pop("self_attn.o_proj.weight"), self.config, self.lambdas)
        for name in merged:
            if ".q_proj." in name:
                merged[name] = reordered(merged[name], order=split.order, head_dim=self.config.head_dim)
        together = statistics.heads // statistics.kv_heads
        heads = [kv_head * together + offset for group in groups for kv_head in group for offset in range(together)]
        merge = Merge(groups, **lost, error=undivided_error(moments))
        return replace(split, order=[heads[place] for place in split.order], merge=merge), merged

    def _statistics(
        self,
        index: int,
        tensors: dict[str, torch.Tensor],
        entering: torch.Tensor,
        leaving: torch.Tensor,
        wanted: torch.Tensor,
    ) -> Statistics:
        """Run the source's layer: statistics of its heads, and in `wanted` what its attention gives."""
        statistics = Statistics(
            self.config.num_attention_heads,
            self.source.config.num_key_value_heads,
            self.config.head_dim,
            normed=self.config.qk_norm,
            device=self.source.device,
        )
        bias = _output_bias(tensors)

        def keep(rows: slice, _heads: torch.Tensor, outputs: torch.Tensor) -> None:
            wanted[rows] = outputs - bias

        def hooked(hook: Callable[[torch.Tensor], None]) -> Hook:
            return lambda _rows, _inputs, outputs: hook(outputs)

        hooks = {name: hooked(hook) for name, hook in statistics.hooks().items()} | {"o_proj": keep}
        _run(self.source, index, tensors, entering, hooks, counted=self.counted, leaving=leaving)
        if not statistics.is_finite():
            raise _not_finite(index, "self_attn")
        return statistics

    def _moments(
        self, index: int, tensors: dict[str, torch.Tensor], entering: torch.Tensor, wanted: torch.Tensor
    ) -> Moments:
        """Run the merged layer: what its heads give, and what is to become of that."""
        output = tensors["self_attn.o_proj.weight"]
        moments = Moments(output.shape[1], output.shape[0], self.merged.device)

        def count(rows: slice, heads: torch.Tensor, _outputs: torch.Tensor) -> None:
            moments.add(heads, wanted[rows].to(heads.device))

        _run(self.merged, index, tensors, entering[: self.counted], {"o_proj": count}, counted=self.counted)
        return moments


def _run(
    model: LayerwiseModel,
    index: int,
    tensors: dict[str, torch.Tensor],
    entering: torch.Tensor,
    hooks: dict[str, Hook],
    *,
    counted: int,
    leaving: torch.Tensor | None = None,
) -> None:
    """Run a layer on what enters it, with hooks on modules of its attention for the first `counted` windows."""
    seen = 0

    def hooked(hook: Hook) -> Callable[[torch.nn.Module, tuple[torch.Tensor], torch.Tensor], None]:
        def call(_module: torch.nn.Module, inputs: tuple[torch.Tensor], outputs: torch.Tensor) -> None:
            if (count := min(len(outputs), counted - seen)) > 0:
                hook(slice(seen, seen + count), inputs[0][:count], outputs[:count])

        return call

    attention = model.layer(index).self_attn
    handles = [attention.get_submodule(name).register_forward_hook(hooked(hook)) for name, hook in hooks.items()]
    try:
        for batch in range(0, len(entering), BATCH):
            left = model.run(index, tensors, entering[batch : batch + BATCH].to(model.device))
            if leaving is not None:
                leaving[batch : batch + BATCH] = left
            seen += len(left)
    finally:
        for handle in handles:
            handle.remove()


def _divide(index: int, moments: Moments, output: torch.Tensor, config: GDAConfig, lambdas: list[float]) -> Split:
    if not torch.isfinite(moments.heads).all() or not torch.isfinite(moments.cross).all():
        raise _not_finite(index, "self_attn")
    return split_layer(
        moments,
        output,
        num_noise_heads=config.num_noise_heads,
        num_kv_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        lambdas=lambdas,
    )


def _output_bias(tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    output = tensors["self_attn.o_proj.weight"]
    return tensors.get("self_attn.o_proj.bias", torch.zeros(1, device=output.device))


def _not_finite(index: int, module: str) -> ValueError:
    return ValueError(f"{layer_prefix(index)}{module} of the source gives values that are not finite")
