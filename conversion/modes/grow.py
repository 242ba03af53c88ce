"""Growing a GDA model, or a model that is converted first, into a larger one that computes the same function.

Each operator takes a planned conversion and returns a larger one, whose recipes build on the given ones. Operators can
therefore be chained, also after the expansion of a Llama, without writing intermediate models.

    --depth    layers  0 1 2 3          →  0 1 1′ 2 3 3′        a copy adds nothing: its o_proj and down_proj are 0
    --signal   heads   a b n  c d n     →  a a b b n  c c d d n   replicas beside their original; noise heads stay
    --width    heads   a b n  c d n     →  a b n  c d n  a b n  c d n   KV heads, channels and neurons likewise
"""

from dataclasses import replace

from gda.conversion.conversion import Conversion
from gda.conversion.families.llamalike import LLAMALIKES
from gda.conversion.growth import growth
from gda.conversion.growth.depth import copy_positions, deepen
from gda.conversion.growth.masked import mask_growth
from gda.conversion.growth.replicate import replicate_signal, replicate_width
from gda.conversion.modes.expand import plan as expand
from gda.conversion.modes.map import plan as map_tensors
from gda.conversion.options import GrowOptions
from gda.conversion.sources.source import Source
from gda.conversion.writing.headmap import in_masked_growth


def plan(source: Source, options: GrowOptions) -> Conversion:
    """Make a model deeper, then give it more signal heads, then make it wider; or mask all that is new.

    In this order, replicas in a copied layer, where o_proj is zero, have their own noise.

    Raises:
        ValueError: for impossible growth, naming the option, and for a source whose masked growth is unfinished.
    """
    options, seed = growth.checked(options), options.seed
    if in_masked_growth(source.config):
        raise ValueError(f"{source.name} is in masked growth; train it until its fade is 1, then grow it")
    start = (expand if source.config.model_type in LLAMALIKES else map_tensors)(source, options)
    noise_std = options.noise_std
    signal, width = (None if times is None else int(times) for times in (options.signal, options.width))
    layers = start.config.num_hidden_layers
    copied = growth.copied_layers(options, layers)
    model = deepen(start, copied) if copied else start
    if options.masked:
        new_layers = copy_positions(layers, copied)
        model = mask_growth(model, signal=signal, mlp=options.mlp, new_layers=new_layers, seed=seed)
    elif signal is not None:
        model = replicate_signal(model, signal, noise_std=noise_std, seed=seed)
    if width is not None:
        model = replicate_width(model, width, noise_std=noise_std, seed=seed)
    notes = list(start.notes)
    if noise_std == 0 and (signal or width):
        notes.append("--noise-std 0: replicas are equal and get equal gradients, so they stay equal during training")
    settings = {"growth": growth.settings(options)}
    return replace(model.in_order(), mode="grow", notes=notes, settings=settings, before=start)
