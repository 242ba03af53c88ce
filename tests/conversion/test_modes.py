"""One Conversion per mode: what writing, verification and the card use, and how verification plans it again."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import gda
from gda.conversion.conversion import Conversion
from gda.conversion.families.llamalike import LLAMALIKES
from gda.conversion.modes.registry import MODES, plan, plan_again
from gda.conversion.options import PLAIN_TYPES, ConvertOptions, FoldOptions, GrowOptions
from gda.conversion.sources.open import open_source
from gda.conversion.tensors.recipes import copied
from gda.conversion.tensors.safetensors_io import TensorSpec
from gda.conversion.writing.card import TEMPLATES
from gda.conversion.writing.provenance import read_settings

from ..support.llamas import files_of, save_llama
from ..support.relatives import save_motif
from ..support.tiny import tiny_model


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama with enough heads to split, a Motif, and a GDA model with qk_rank."""
    folder = tmp_path_factory.mktemp("models")
    save_llama(folder / "llama")
    save_motif(folder / "motif")
    tiny_model(qk_rank=3).save_pretrained(folder / "shared")
    return folder


def test_each_mode_has_a_file_and_a_paragraph_of_the_card() -> None:
    modes = Path(gda.conversion.modes.__file__).parent  # type: ignore[attr-defined]
    assert all((modes / f"{name}.py").is_file() for name in MODES)
    assert {f"mode_{name}" for name in MODES} == {name for name in TEMPLATES if name.startswith("mode_")}


@pytest.mark.parametrize(
    ("mode", "source", "options"),
    [
        ("expand", "llama", ConvertOptions("llama", "out", ratio=2)),
        ("map", "motif", ConvertOptions("motif", "out")),
        ("grow", "llama", GrowOptions("llama", "out", signal=2.0, depth=3)),
        ("grow", "motif", GrowOptions("motif", "out", layers="0,0", width=2)),
        ("fold", "shared", FoldOptions("shared", "out")),
    ],
)
def test_mode_returns_a_conversion(mode: str, source: str, options: Any, models: Path) -> None:
    """Its recipes read tensors of the source and make the tensors of its config. No tensor is read yet."""
    opened = open_source(models / source)
    conversion = plan(mode, opened, options)
    assert isinstance(conversion, Conversion)
    assert conversion.mode == mode
    assert conversion.lossless
    assert list(conversion.in_order().recipes) == list(conversion.recipes)
    assert {name for recipe in conversion.recipes.values() for name in recipe.sources} <= set(opened.specs)
    assert (conversion.new_parameters is None) == (mode in ("map", "fold"))
    dtypes = {
        name: recipe.spec.dtype
        for name, recipe in plan(mode, opened, replace(options, dtype="float16")).recipes.items()
    }
    is_lambda = {name: ".lambda_" in name for name in dtypes}
    assert any(is_lambda.values())
    assert all(dtype == (torch.float32 if is_lambda[name] else torch.float16) for name, dtype in dtypes.items())


@pytest.mark.parametrize(("dtype", "expected"), [(None, torch.bfloat16), (torch.float16, torch.float32)])
def test_a_cast_brings_lambda_to_float32(dtype: torch.dtype | None, expected: torch.dtype) -> None:
    """Without a cast, a λ that was saved in a narrow dtype stays as it is."""
    recipe = copied("model.layers.0.self_attn.lambda_q1", TensorSpec((8,), torch.bfloat16), dtype)
    assert recipe.spec.dtype == expected


@pytest.mark.parametrize(
    ("mode", "source", "options", "named"),
    [
        ("expand", "motif", ConvertOptions("motif", "out"), "--mode map"),
        ("split", "shared", ConvertOptions("shared", "out"), "--mode map"),
        ("map", "llama", ConvertOptions("llama", "out"), "--mode expand or split"),
        ("fold", "llama", FoldOptions("llama", "out"), "with qk_rank can be folded"),
        ("map", "motif", ConvertOptions("motif", "out", ratio=3), "--ratio is only for a Llama"),
    ],
)
def test_mode_refuses_unsuitable_sources_and_options(
    mode: str, source: str, options: Any, named: str, models: Path
) -> None:
    with pytest.raises(ValueError, match=named):
        plan(mode, open_source(models / source), options)


@pytest.mark.parametrize(
    ("source", "options"),
    [
        ("llama", {"ratio": 2, "lambda_type": "tanh", "seed": 3, "dtype": "bfloat16"}),
        ("motif", {"dtype": "float16"}),
        ("llama", {"signal": 2, "layers": [1], "noise_std": 0.1, "seed": 3}),
        ("motif", {"masked": True, "depth": 4, "mlp": 2}),
    ],
)
def test_conversion_json_is_enough_to_plan_it_again(
    source: str, options: dict[str, Any], models: Path, tmp_path: Path
) -> None:
    """With the recorded options, tensors, recipes and config are the same."""
    convert = gda.grow if options.keys() & {"signal", "depth"} else gda.convert
    report = convert(models / source, tmp_path / "out", verify=False, bundle_code=False, **options)
    settings = read_settings(tmp_path / "out")
    assert settings is not None
    again = plan_again(open_source(models / source), settings)
    tensors = json.loads((tmp_path / "out" / "conversion.json").read_text())["tensors"]
    assert {name: recipe.how for name, recipe in again.recipes.items()} == {
        name: made["how"] for name, made in tensors.items()
    }
    assert again.config.to_dict() == report.config.to_dict()


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"mode": "implode"}, "unknown mode 'implode'"),
        ({"mode": ["expand"]}, "unknown mode"),
        ({"mode": "fold"}, "use full or layers"),
        ({"mode": "map"}, "by the mode map, and llama is a"),
        ({"growth": {"signal": 2}}, "unknown growth"),
        ({"growth": [2]}, "unknown growth"),
    ],
    ids=str,
)
def test_edited_settings_are_refused(changed: dict[str, Any], named: str, models: Path, tmp_path: Path) -> None:
    """One line."""
    gda.convert(models / "llama", tmp_path / "out", verify=False)
    path = tmp_path / "out" / "conversion.json"
    made = json.loads(path.read_text())
    made["settings"] |= changed
    path.write_text(json.dumps(made))
    with pytest.raises(ValueError, match=named):
        gda.verify(models / "llama", tmp_path / "out", method="tensors")


def test_source_that_the_recorded_conversion_does_not_allow(models: Path, tmp_path: Path) -> None:
    """The remedy is another source: `verify` has no --mode."""
    gda.convert(models / "llama", tmp_path / "out", verify=False)
    with pytest.raises(ValueError, match=r"^conversion\.json .* 'gda' model; name the model that was converted$"):
        gda.verify(tmp_path / "out", tmp_path / "out", method="tensors")


def test_factors_are_the_same_with_several_workers(models: Path, tmp_path: Path) -> None:
    """Threads that write different shards factorize different weights at the same time."""
    options: dict[str, Any] = {"qk_rank": 3, "max_shard_size": "4KB", "verify": False, "bundle_code": False}
    one = gda.convert(models / "llama", tmp_path / "one", **options)
    several = gda.convert(models / "llama", tmp_path / "several", workers=4, **options)
    assert one.num_files > 4
    assert one.sha256 == several.sha256
    weights = [name for name in files_of(tmp_path / "one") if name.endswith(".safetensors")]
    assert len(weights) == one.num_files


def test_types_that_are_told_at_a_glance() -> None:
    """Options know without transformers which models are converted head by head."""
    assert set(PLAIN_TYPES) == set(LLAMALIKES)
