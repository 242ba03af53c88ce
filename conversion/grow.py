"""Grow a GDA model, or a model that is converted first, into a larger one that computes the same function."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from gda.common.options import takes
from gda.common.screen import quiet_transformers
from gda.common.trainable import Trainable
from gda.configuration.configuration_gda import GDAConfig
from gda.conversion.growth import growth
from gda.conversion.growth.depth import copy_positions
from gda.conversion.modes.registry import plan
from gda.conversion.options import GrowOptions
from gda.conversion.sources.open import open_source
from gda.conversion.writing.headmap import head_map
from gda.conversion.writing.write_model import ConvertReport, write_model


@dataclass(frozen=True, kw_only=True)
class GrowReport(ConvertReport):
    """What growth did, or with `dry_run` would do: the report of a conversion, and the model before it.

    Attributes:
        growth: The options of the growth.
        before: Configuration of the model before growth; for a Llama, that of its expansion.
        num_parameters_before: Its number of parameters.
        copied_layers: The layers of the source that a new layer follows: a copy or, with random weights, none.
        new_layers: The positions of the new layers in the result.
        trainable: The content of trainable.json.
    """

    growth: dict[str, Any]
    before: GDAConfig
    num_parameters_before: int
    copied_layers: list[int]
    new_layers: list[int]
    trainable: Trainable

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON-ready values."""
        return super().to_dict() | {
            "growth": self.growth,
            "head_map_before": head_map(self.before),
            "num_layers_before": self.before.num_hidden_layers,
            "num_layers": self.config.num_hidden_layers,
            "hidden_size_before": self.before.hidden_size,
            "hidden_size": self.config.hidden_size,
            "num_parameters_before": self.num_parameters_before,
            "copied_layers": self.copied_layers,
            "new_layers": self.new_layers,
            "trainable": self.trainable.to_dict(),
        }


@takes(GrowOptions)
def grow(options: GrowOptions, *, console: Console | None = None) -> GrowReport:
    """Grow a model into a larger one that computes the same function, for any λ.

    Several operators can be combined. They are applied in the order depth, signal, width, hidden, mlp. Each keeps the
    function, so a different order gives different weights for the same function.

    - `signal`: group-differentiated growth (arXiv 2510.06949). Each signal head is replicated, r:1 becomes signal·r:1;
      noise heads, keys and values stay. The columns of o_proj are divided among the replicas.
    - `depth`: LLaMA-Pro (arXiv 2401.02415). Copies of layers, after their originals, with zero o_proj and down_proj.
      Every layer keeps its λ_init and its kind of attention.
    - `hidden`, `mlp`: HyperCloning (arXiv 2409.12903) of the residual stream or the neurons; heads stay.
    - `width`: both, and all heads. head_dim stays.
    - `untie`: the head gets a copy of tied embeddings, first of all.
    - `masked`: Masked Structure Growth (arXiv 2305.02869), with `signal`, `mlp` and `depth`. New heads, neurons and
      layers start from random weights and are faded in; with `new_layers="copy"`, new layers are copies that are
      blended with their input. The fade is 0 in the result, where new parts have no gradient;
      `gda.training.FadeCallback` raises it to 1 during training.

    Equal replicas would stay equal during training, so `noise_std` adds noise to the weights that read them. The noise
    sums to exactly zero over each set of replicas in the dtype of the weights, so the logits stay the same.

    Tensors are streamed, and `out` appears only when it is complete and verified. Its trainable.json lists the new
    parameters (`gda.common.trainable.Trainable`).

    Raises:
        FileNotFoundError, FileExistsError, ValueError, OSError: for bad input, in one line that names the remedy.
        ImportError: naming the extra, if a package is missing that reads the source.
        CheckFailed: if a check of the result fails, such as that of its tokenizer; `out` is then not created.
        VerificationFailed: likewise, if the result does not compute what the source computes.
    """
    with quiet_transformers():
        source = open_source(options.model, options.revision)
        conversion = plan("grow", source, options)
        report = write_model(conversion, source, Path(options.out), options, console=console)
    before, new_parameters = conversion.before, conversion.new_parameters
    assert before is not None
    assert new_parameters is not None
    layers = before.config.num_hidden_layers
    copied = growth.copied_layers(options, layers)
    return GrowReport(
        **vars(report),
        growth=growth.settings(options),
        before=before.config,
        num_parameters_before=before.num_parameters,
        copied_layers=copied,
        new_layers=copy_positions(layers, copied),
        trainable=new_parameters,
    )
