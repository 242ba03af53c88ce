"""Growing a GDA model, or a model that is converted first, into a larger one that computes the same function.

Each operator takes a planned conversion and returns a larger one, whose recipes build on the given ones. Operators can
therefore be chained, also after the expansion of a Llama, without writing intermediate models.

    --depth    layers  0 1 2 3          →  0 1 1′ 2 3 3′        a copy adds nothing: its o_proj and down_proj are 0
    --signal   heads   a b n  c d n     →  a a b b n  c c d d n   replicas beside their original; noise heads stay
    --hidden   channels of the residual stream, and --mlp neurons: x →  x x
    --width    heads   a b n  c d n     →  a b n  c d n  a b n  c d n   KV heads, channels and neurons likewise
"""

from dataclasses import replace

from gda.conversion.conversion import Conversion, with_fields
from gda.conversion.families.llamalike import LLAMALIKES
from gda.conversion.growth import growth
from gda.conversion.growth.depth import copy_positions, deepen
from gda.conversion.growth.masked import mask_growth
from gda.conversion.growth.replicate import TILED, replicate_signal, tile
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
    if in_masked_growth(source.config):
        raise ValueError(f"{source.name} is in masked growth; train it until its fade is 1, then grow it")
    start = (expand if source.config.model_type in LLAMALIKES else map_tensors)(source, options)
    layers = start.config.num_hidden_layers
    copied = growth.copied_layers(options, layers)
    model = _untied(start) if options.untie else start
    if copied:
        model = deepen(model, copied, silent=options.new_layers != "copy")
    if options.masked:
        model = mask_growth(model, options, copy_positions(layers, copied))
    else:
        model = _replicated(model, options)
    notes = list(start.notes)
    if options.noise_std == 0 and growth.makes_replicas(options):
        notes.append("--noise-std 0: replicas are equal and get equal gradients, so they stay equal during training")
    settings = start.settings | {"growth": growth.settings(options)}
    return replace(model.in_order(), mode="grow", notes=notes, settings=settings, before=start)


def _untied(model: Conversion) -> Conversion:
    """Copy tied embeddings into a head of its own."""
    if not model.config.tie_word_embeddings:
        raise ValueError("--untie: the embeddings of the source are not tied")
    head = {"lm_head.weight": model.recipes["model.embed_tokens.weight"]}
    return replace(model, config=with_fields(model.config, tie_word_embeddings=False), recipes=model.recipes | head)


def _replicated(model: Conversion, options: GrowOptions) -> Conversion:
    """Give a model more signal heads, then tile its hidden size, its MLP, or all of it."""
    if options.signal is not None:
        model = replicate_signal(model, int(options.signal), options)
    for operator in TILED:
        if (times := getattr(options, operator)) is not None:
            model = tile(model, operator, int(times), options)
    return model
