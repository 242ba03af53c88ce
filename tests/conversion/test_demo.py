"""`gda demo` on a tiny Llama."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

import gda
from gda.conversion.writing import write_model as write_module

from ..support.llamas import save_llama


def test_interrupted_demo_continues(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has no --resume."""
    source, out = save_llama(tmp_path / "llama"), tmp_path / "out" / "gda"

    def interrupt(*arguments: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(write_module, "write_provenance", interrupt)
        with pytest.raises(KeyboardInterrupt):
            gda.demo(source=source, out=out)
    assert os.listdir(out.parent) == [".gda.partial"]
    report = gda.demo(source=source, out=out)
    assert report.verification.passed
    assert os.listdir(out.parent) == ["gda"]


def test_tokenizer_that_gives_more_than_ids(tmp_path: Path) -> None:
    """No Llama reads token types."""
    source = save_llama(tmp_path / "llama")
    config = source / "tokenizer_config.json"
    names = {"model_input_names": ["input_ids", "token_type_ids", "attention_mask"]}
    config.write_text(json.dumps(json.loads(config.read_text()) | names))
    for ours, theirs in gda.demo(source=source).texts.values():
        assert ours == theirs
