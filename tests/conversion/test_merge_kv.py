"""KV heads are merged in closed form before heads are divided: exactly where heads say the same in other words."""

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel

import gda
from gda.conversion.split.merge import cluster
from gda.conversion.writing.write_model import ConvertReport

from ..support.commands import Command
from ..support.llama_like import some_ids, source_model
from ..support.llamas import byte_tokenizer, llama_model, save_llama, tensors_of
from ..support.tiny import relative_error

TEXT = Path(gda.__file__).read_text() * 2  # some English, some code
TOKENS = 1024


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("\n".join(f"{line} {number}" for number, line in enumerate(TEXT.splitlines())))
    return path


@pytest.fixture
def split(text: Path, tmp_path: Path) -> Callable[..., ConvertReport]:
    """Split a folder into a fresh one, in closed form unless told otherwise."""

    def run(source: Path, merge_kv: int | None, out: str = "out", **options: Any) -> ConvertReport:
        options = {"effort": "fast", "calibration": text, "calibration_tokens": TOKENS} | options
        return gda.convert(source, tmp_path / out, mode="split", merge_kv=merge_kv, **options)

    return run


def save(model: PreTrainedModel, folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    model.generation_config = GenerationConfig(bos_token_id=0, eos_token_id=1)
    model.to(dtype).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def load(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


# ------------------------------------------------------------------------------- KV heads that differ in nothing real


@torch.no_grad()
def with_spread_heads(
    grouped: PreTrainedModel, mha: PreTrainedModel, places: list[int], seed: int = 0
) -> PreTrainedModel:
    """`mha`, made to compute what `grouped` computes, though no two of its keys or values are alike.

    Query head i of `grouped`, and a KV head of its own, become head places[i]: the key of each is turned and scaled,
    another way at each frequency (only in sign, where keys are normed), and its value is multiplied by a matrix; what
    reads them undoes it.
    """
    generator = torch.Generator().manual_seed(seed)
    tensors, config = grouped.state_dict(), grouped.config
    heads, kv_heads, d = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    normed = hasattr(grouped.model.layers[0].self_attn, "k_norm")
    for layer in range(config.num_hidden_layers):
        prefix = f"model.layers.{layer}.self_attn."
        made: dict[str, list[Tensor]] = {name: [torch.empty(0)] * heads for name in tensors if prefix in name}
        made = {name: parts for name, parts in made.items() if "_norm" not in name and "o_proj.bias" not in name}
        for head, place in enumerate(places):
            read = head * kv_heads // heads
            turn = torch.randn(d // 2, generator=generator, dtype=torch.complex64)
            if normed:
                turn = turn.real.sign().to(turn)
            matrix = torch.randn(d, d, generator=generator) + 2 * torch.eye(d)
            for name, parts in made.items():
                if "q_proj" in name:
                    parts[place] = turned(rows(tensors[name], head, d), 1 / turn.conj())
                elif "k_proj" in name:
                    parts[place] = turned(rows(tensors[name], read, d), turn)
                elif "v_proj" in name:
                    parts[place] = matrix @ rows(tensors[name], read, d)
                else:
                    parts[place] = (tensors[name][:, head * d : (head + 1) * d] @ matrix.inverse()).T
        for name, parts in made.items():
            tensors[name] = torch.cat(parts).T if "o_proj" in name else torch.cat(parts)
    mha.load_state_dict(tensors)
    return mha.eval()


def rows(tensor: Tensor, head: int, d: int) -> Tensor:
    return tensor[head * d : (head + 1) * d]


def turned(rows: Tensor, turn: Tensor) -> Tensor:
    """The pairs (i, i + d/2) of a head's rows, times a complex number each."""
    real, imaginary = rows.chunk(2)
    z = torch.complex(real, imaginary) * (turn[:, None] if rows.dim() == 2 else turn)
    return torch.cat([z.real, z.imag])


PLACES = [5, 0, 3, 1, 7, 2, 4, 6]  # of the heads of two KV heads, four each: {0, 1, 3, 5} and {2, 4, 6, 7}
SPREAD = {"num_attention_heads": 8, "hidden_size": 40, "head_dim": 8}


def spread(model_type: str, **changes: Any) -> tuple[PreTrainedModel, PreTrainedModel]:
    """A model of two KV heads, and one with eight that computes the same."""
    make: Callable[..., PreTrainedModel] = llama_model
    if model_type != "llama":

        def make(**fields: Any) -> PreTrainedModel:
            return source_model(model_type, **fields)

    grouped = make(**SPREAD, num_key_value_heads=2, **changes)
    return grouped, with_spread_heads(grouped, make(**SPREAD, num_key_value_heads=8, **changes), PLACES)


@pytest.mark.parametrize(
    ("model_type", "changes"),
    [
        ("llama", {}),
        ("llama", {"attention_bias": True}),
        ("mistral", {"sliding_window": 6}),
        ("qwen2", {}),
        ("qwen3", {}),
    ],
    ids=str,
)
def test_heads_that_differ_in_nothing_real_are_found_and_merged_without_loss(
    model_type: str, changes: dict[str, Any], tmp_path: Path, split: Callable[..., ConvertReport]
) -> None:
    grouped, mha = spread(model_type, **changes)
    ids = some_ids()
    with torch.no_grad():
        assert relative_error(mha(ids).logits, grouped(ids).logits) < 1e-4
    report = split(save(mha, tmp_path / "source"), 2)
    assert report.split is not None
    for layer in report.split.layers:
        assert layer.merge is not None
        assert layer.merge.groups == [[0, 1, 3, 5], [2, 4, 6, 7]]
        assert max(layer.merge.lost_keys, layer.merge.lost_values, layer.merge.error) < 1e-6
    # Nothing but the order of heads tells it from a split of the grouped model itself.
    alone = split(save(grouped, tmp_path / "grouped"), None, "alone")
    assert alone.split is not None
    for layer, expected in zip(report.split.layers, alone.split.layers, strict=True):
        assert [PLACES.index(head) for head in layer.noise_heads] == expected.noise_heads
    with torch.no_grad():
        merged, divided = (load(tmp_path / out)(ids).logits for out in ("out", "alone"))
    assert relative_error(merged, divided) < 1e-3


# --------------------------------------------------------------------------------------------------- where rows go

# By name: model type, heads, KV heads, KV heads of the result, and what else differs.
SHAPES: dict[str, tuple[str, int, int, int, dict[str, Any]]] = {
    "llama 4/4 to 2": ("llama", 4, 4, 2, {}),
    "llama 12/6 to 2": ("llama", 12, 6, 2, {"hidden_size": 36}),
    "llama 6/6 to 1, biases": ("llama", 6, 6, 1, {"attention_bias": True, "hidden_size": 36}),
    "mistral 6/6 to 3, window": ("mistral", 6, 6, 3, {"sliding_window": 6}),
    "qwen2 8/4 to 2": ("qwen2", 8, 4, 2, {}),
    "qwen3 6/6 to 2": ("qwen3", 6, 6, 2, {}),
    "qwen3 4/4 to 2, biases": ("qwen3", 4, 4, 2, {"attention_bias": True}),
}


def shaped(shape: str) -> tuple[PreTrainedModel, int]:
    model_type, heads, kv_heads, merge_kv, changes = SHAPES[shape]
    fields = {"num_attention_heads": heads, "num_key_value_heads": kv_heads, "head_dim": 8, **changes}
    return (llama_model(**fields) if model_type == "llama" else source_model(model_type, **fields)), merge_kv


def with_bias(tensors: dict[str, Tensor], layer: int, projection: str) -> Tensor:
    """The rows of a projection, with its bias as a last column, (heads, d, hidden + 1)."""
    prefix = f"model.layers.{layer}.self_attn.{projection}."
    weight = tensors[prefix + "weight"].double()
    bias = tensors.get(prefix + "bias", torch.zeros(len(weight)))
    return torch.cat([weight, bias[:, None]], dim=1).unflatten(0, (-1, 8))


def in_pairs(rows: Tensor) -> Tensor:
    """(heads, d, …) → (heads, d/2, …), complex."""
    return torch.complex(*rows.chunk(2, dim=1))


def is_combination(vectors: Tensor, basis: Tensor) -> bool:
    """Whether every row of `vectors` is a sum of multiples of rows of `basis`."""
    factors = torch.linalg.lstsq(basis.T, vectors.T, driver="gelsd").solution
    return relative_error((basis.T @ factors).real, vectors.T.real) < 1e-5


@pytest.mark.parametrize("shape", SHAPES)
def test_every_row_comes_from_the_heads_that_the_report_names(
    shape: str, tmp_path: Path, split: Callable[..., ConvertReport]
) -> None:
    """No two rows of the source are alike: a query is one head's, frequency by frequency; k and v are their group's."""
    model, merge_kv = shaped(shape)
    report = split(save(model, tmp_path / "source"), merge_kv)
    assert report.split is not None
    assert report.config.num_key_value_heads == merge_kv
    source, result = tensors_of(tmp_path / "source"), tensors_of(tmp_path / "out")
    together = model.config.num_attention_heads // model.config.num_key_value_heads
    for number, layer in enumerate(report.split.layers):
        assert layer.merge is not None
        groups = layer.merge.groups
        assert sorted(itertools.chain(*groups)) == list(range(model.config.num_key_value_heads))
        roles = [torch.tensor(heads).view(merge_kv, -1) for heads in (layer.signal_heads, layer.noise_heads)]
        order = torch.cat(roles, dim=1).tolist()
        assert [sorted({head // together for head in heads}) for heads in order] == groups
        query, key = (in_pairs(with_bias(source, number, name)) for name in ("q_proj", "k_proj"))
        turned_query, merged_key = (in_pairs(with_bias(result, number, name)) for name in ("q_proj", "k_proj"))
        for got, head in zip(turned_query, itertools.chain(*order), strict=True):
            for frequency in range(4):
                assert is_combination(got[frequency][None], query[head, frequency][None]), (head, frequency)
        for got, group in zip(merged_key, groups, strict=True):
            for frequency in range(4):
                assert is_combination(got[frequency][None], key[group, frequency])
        value, merged_value = (with_bias(each, number, "v_proj") for each in (source, result))
        for got, group in zip(merged_value, groups, strict=True):
            assert is_combination(got, value[group].flatten(0, 1))
    copied = {name for name in source if not any(f".{each}_proj." in name for each in ("q", "k", "v", "o"))}
    assert all(torch.equal(result[name], source[name]) for name in copied)


@torch.no_grad()
def attention_of(model: Any, layer: int, states: Tensor, *, outputs: bool) -> Tensor:
    """What goes into, or comes out of, the output projection of a layer, for hidden states that enter the layer."""
    seen = []

    def keep(_module: Any, inputs: Any, output: Tensor) -> None:
        seen.append(output if outputs else inputs[0])

    handle = model.model.layers[layer].self_attn.o_proj.register_forward_hook(keep)
    positions = torch.arange(states.shape[1])[None]
    window = getattr(model.config, "sliding_window", None)
    distance = positions.T - positions
    seen_by = (distance >= 0) & (distance < (window or states.shape[1]))
    rotary = model.model.rotary_emb(states, positions)
    model.model.layers[layer](states, attention_mask=seen_by[None, None], position_embeddings=rotary)
    handle.remove()
    return seen[0]


@pytest.mark.parametrize("shape", SHAPES)
def test_the_error_of_the_merge_is_that_of_a_model_with_fewer_kv_heads_and_the_best_output_projection(
    shape: str, text: Path, tmp_path: Path, split: Callable[..., ConvertReport]
) -> None:
    """By transformers' own class, with the q, k and v of the result, and least squares over the calibration text."""
    model, merge_kv = shaped(shape)
    report = split(save(model, tmp_path / "source"), merge_kv, calibration_tokens=1024)
    assert report.split is not None
    config = type(model.config)(**(model.config.to_dict() | {"num_key_value_heads": merge_kv}))
    merged = type(model)(config).eval()
    tensors = merged.state_dict()
    result = tensors_of(tmp_path / "out")
    merged.load_state_dict(
        tensors | {name: each for name, each in result.items() if name in tensors and "o_proj" not in name}
    )
    ids = byte_tokenizer()(text.read_text(), add_special_tokens=False).input_ids[:1024]
    windows = torch.tensor(ids).view(8, 128)[:-1]  # one is held out
    with torch.no_grad():
        states = model(windows, output_hidden_states=True, use_cache=False).hidden_states
    for number, layer in enumerate(report.split.layers):
        assert layer.merge is not None
        bias = result.get(f"model.layers.{number}.self_attn.o_proj.bias", torch.zeros(1))
        wanted = (attention_of(model, number, states[number], outputs=True) - bias).flatten(0, 1).double()
        heads = attention_of(merged, number, states[number], outputs=False).flatten(0, 1).double()
        best = heads @ torch.linalg.lstsq(heads, wanted).solution
        error = ((best - wanted).square().sum() / wanted.square().sum()).item()
        assert error > 1e-3
        assert layer.merge.error == pytest.approx(error, rel=1e-3)


def test_fewer_kv_heads_lose_more(tmp_path: Path, split: Callable[..., ConvertReport]) -> None:
    source = save_llama(tmp_path / "source", num_attention_heads=8, num_key_value_heads=8, head_dim=4)
    losses = []
    for merge_kv in (4, 2, 1):
        report = split(source, merge_kv, f"out-{merge_kv}")
        assert report.split is not None
        losses.append([layer.merge for layer in report.split.layers])
    for more, fewer in itertools.pairwise(losses):
        for some, less in zip(more, fewer, strict=True):
            assert some is not None
            assert less is not None
            assert some.error < less.error
            assert some.lost_keys < less.lost_keys
            assert some.lost_values < less.lost_values


def test_a_narrow_source_is_merged_by_statistics_that_are_not(
    tmp_path: Path, split: Callable[..., ConvertReport]
) -> None:
    """Of bfloat16 weights the statistics are what they are of the same weights in float32."""
    source = save_llama(tmp_path / "source", num_key_value_heads=4, dtype=torch.bfloat16)
    wide = save(AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32), tmp_path / "wide")
    narrow_report, wide_report = split(source, 2), split(wide, 2, "wide-out")
    assert narrow_report.split is not None
    assert wide_report.split is not None
    assert narrow_report.split.layers == wide_report.split.layers
    narrow, expected = tensors_of(tmp_path / "out"), tensors_of(tmp_path / "wide-out")
    for name, tensor in narrow.items():
        assert tensor.dtype == (torch.float32 if ".lambda_" in name else torch.bfloat16), name
        assert torch.equal(tensor.float(), expected[name].to(tensor.dtype).float()), name


# ------------------------------------------------------------------------------------------------------- which groups


def test_groups_are_of_equal_size_and_near() -> None:
    generator = torch.Generator().manual_seed(0)
    for heads, groups in ((8, 2), (8, 4), (9, 3), (6, 1), (12, 3)):
        places = torch.randperm(heads, generator=generator)
        planted = sorted(sorted(each) for each in places.view(groups, -1).tolist())
        distance = 1 + 0.5 * torch.rand(heads, heads, generator=generator).triu(1)
        for group in planted:
            for one in group:
                distance[one, group] = 0.1
        distance = distance.triu(1) + distance.triu(1).T
        assert cluster(distance, groups) == planted


def test_no_exchange_of_two_heads_makes_groups_nearer() -> None:
    generator = torch.Generator().manual_seed(0)
    distance = torch.rand(12, 12, generator=generator).triu(1)
    distance = distance + distance.T

    def total(groups: list[list[int]]) -> float:
        return sum(distance[group][:, group].sum().item() for group in groups)

    groups = cluster(distance, 4)
    least = total(groups)
    for first in range(4):
        for second in range(first):
            for i in range(3):
                for j in range(3):
                    tried = [list(group) for group in groups]
                    tried[first][i], tried[second][j] = tried[second][j], tried[first][i]
                    assert total(tried) >= least - 1e-5


def test_keys_that_are_alike_are_kept_as_they_are(tmp_path: Path, split: Callable[..., ConvertReport]) -> None:
    model = llama_model(num_key_value_heads=4)
    tensors = model.state_dict()
    for name in tensors:
        if "k_proj" in name:
            tensors[name][8:16], tensors[name][24:] = tensors[name][:8], tensors[name][16:24]
    model.load_state_dict(tensors)
    report = split(save(model, tmp_path / "source"), 2)
    assert report.split is not None
    assert [layer.merge.groups for layer in report.split.layers if layer.merge is not None] == [[[0, 1], [2, 3]]] * 2
    source, result = tensors_of(tmp_path / "source"), tensors_of(tmp_path / "out")
    for layer in range(2):
        key, merged = (with_bias(each, layer, "k_proj") for each in (source, result))
        assert relative_error(merged, key[[0, 2]]) < 1e-5


# ---------------------------------------------------------------------------------------------------------- the house


def test_an_interrupted_merge_goes_on_and_ends_in_the_same_bytes(
    tmp_path: Path, split: Callable[..., ConvertReport], monkeypatch: pytest.MonkeyPatch
) -> None:
    from gda.conversion.split import fit

    source = save_llama(tmp_path / "source", num_key_value_heads=4, num_hidden_layers=3)
    split(source, 2, "whole")
    merge, layers = fit.merge_layer, []

    def interrupted(*arguments: Any) -> Any:
        layers.append(len(layers))
        if len(layers) == 3:
            raise KeyboardInterrupt
        return merge(*arguments)

    monkeypatch.setattr(fit, "merge_layer", interrupted)
    with pytest.raises(KeyboardInterrupt):
        split(source, 2)
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match="without --resume"):
        split(source, 1, resume=True)
    split(source, 2, resume=True)
    assert len(layers) == 4  # the last one again, and no other
    whole, resumed = tensors_of(tmp_path / "whole"), tensors_of(tmp_path / "out")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_what_is_merged_is_trained_then(
    tmp_path: Path, split: Callable[..., ConvertReport], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Training begins at the merged q, k and v, whose report stays; the result is nearer to the source."""
    from gda.conversion.split.splitter import EFFORTS

    monkeypatch.setitem(EFFORTS, "default", 30)
    source = save_llama(tmp_path / "source", num_key_value_heads=4)
    fast, report = split(source, 2), split(source, 2, "trained", effort="default")
    assert fast.split is not None
    assert report.split is not None
    assert [each.merge for each in report.split.layers] == [each.merge for each in fast.split.layers]
    assert report.split.perplexity_closed_form == pytest.approx(fast.split.perplexity)
    assert fast.verification is not None
    assert report.verification is not None
    assert fast.verification.kl is not None
    assert report.verification.kl is not None
    assert report.verification.kl < fast.verification.kl


def test_the_report_is_on_the_screen_in_conversion_json_and_on_the_card(
    text: Path, tmp_path: Path, command: Command
) -> None:
    source = save_llama(tmp_path / "source", num_key_value_heads=4, dtype=torch.bfloat16)
    arguments = ["--mode", "split", "--merge-kv", "2", "--calibration", text, "--calibration-tokens", TOKENS]
    planned = command("convert", source, tmp_path / "out", *arguments, "--dry-run", "--json")
    outcome = command("convert", source, tmp_path / "out", *arguments, "--effort", "fast")
    assert (planned.code, outcome.code) == (0, 0), outcome.error
    assert "the 4 KV heads of a layer are merged to 2" in outcome.out
    assert "merged KV heads, before heads were divided: relative error" in outcome.out
    made = json.loads((tmp_path / "out/conversion.json").read_text())
    assert made["settings"]["split"]["merge_kv"] == 2
    for layer in made["split"]["layers"]:
        assert set(layer["merge"]) == {"groups", "lost_keys", "lost_values", "error"}
        assert 0 < layer["merge"]["error"] < 1
    first = made["split"]["layers"][0]["merge"]["groups"]
    assert str(first) in made["tensors"]["model.layers.0.self_attn.k_proj.weight"]["how"]
    assert "merged keys" in made["tensors"]["model.layers.0.self_attn.q_proj.weight"]["how"]
    card = (tmp_path / "out/README.md").read_text()
    assert "The 4 KV heads of each layer of its source were merged to 2" in card
    assert "| 0 | " + ", ".join("+".join(map(str, group)) for group in first) + " |" in card
    tensors = tensors_of(tmp_path / "out")
    assert json.loads(planned.out)["num_parameters"] == sum(tensor.numel() for tensor in tensors.values())
    assert "KV cache: 128 bytes a token (its source: 256)" in command("inspect", tmp_path / "out").out
    assert command("verify", source, tmp_path / "out").code == 0
    assert command("verify", source, tmp_path / "out", "--method", "layers").code == 0


def test_without_a_merge_the_report_says_none(tmp_path: Path, split: Callable[..., ConvertReport]) -> None:
    report = split(save_llama(tmp_path / "source"), None)
    assert report.split is not None
    assert [layer.merge for layer in report.split.layers] == [None, None]
    assert json.loads((tmp_path / "out/conversion.json").read_text())["settings"]["split"]["merge_kv"] is None
    assert "merged" not in (tmp_path / "out/README.md").read_text()


@pytest.mark.parametrize(
    ("kv_heads", "options", "words"),
    [
        (4, ["--mode", "split"], "--merge-kv 1 or 2 merges KV heads first, and --mode expand adds noise heads"),
        (4, ["--mode", "split", "--ratio", "2"], "--ratio 2 does not divide the 4 query heads"),
        (4, ["--mode", "split", "--merge-kv", "3"], "--merge-kv 3: the source has 4 KV heads to merge; possible: 1, 2"),
        (4, ["--mode", "split", "--merge-kv", "4"], "possible: 1, 2"),
        (4, ["--mode", "split", "--merge-kv", "8"], "possible: 1, 2"),
        (4, ["--mode", "split", "--merge-kv", "0"], "possible: 1, 2"),
        (4, ["--mode", "split", "--merge-kv", "-2", "--ratio", "2"], "possible: 1, 2"),
        (1, ["--mode", "split", "--merge-kv", "1"], "1 KV heads to merge; leave --merge-kv away"),
        (4, ["--mode", "split", "--merge-kv", "2", "--noise-heads", "4"], "possible for --noise-heads: 2 (1:1)"),
        (4, ["--mode", "split", "--merge-kv", "2", "--ratio", "2"], "possible for --noise-heads: 2 (1:1)"),
        (4, ["--merge-kv", "2"], "--merge-kv is for --mode split"),
        (4, ["--mode", "expand", "--merge-kv", "2"], "--merge-kv is for --mode split"),
    ],
    ids=str,
)
def test_what_cannot_be_merged_is_refused_in_one_line(
    kv_heads: int, options: list[str], words: str, tmp_path: Path, command: Command
) -> None:
    source = save_llama(tmp_path / "source", num_key_value_heads=kv_heads)
    outcome = command("convert", source, tmp_path / "out", *options)
    assert outcome.code == 2
    assert len(outcome.error.splitlines()) == 1
    assert words in outcome.error
    assert not (tmp_path / "out").exists()


def test_a_source_with_nan_is_refused_in_one_line(text: Path, tmp_path: Path, command: Command) -> None:
    for name in ("q_proj", "k_proj", "v_proj"):
        model = llama_model(num_key_value_heads=4)
        getattr(model.model.layers[1].self_attn, name).weight.data[3, 2] = torch.nan
        source = save(model, tmp_path / name)
        outcome = command(
            "convert", source, tmp_path / "out", "--mode", "split", "--merge-kv", "2", "--calibration", text
        )
        assert outcome.code == 2
        assert outcome.error.splitlines() == [outcome.error.strip()]
        assert "model.layers.1.self_attn of the source gives values that are not finite" in outcome.error
