"""Engines that run exported models: their packages, what they cannot run, and how to start them.

Each engine runs in its own process, with its packages first on the path. Nothing is installed.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..support.packages import cache_folder, install

HERE = Path(__file__).parent
Config = dict[str, Any]  # the fields of config.json
Results = dict[str, dict[str, Any]]  # by kind: "tokens" of each prompt and "logits" of the first, or "error"


def has_wide_heads(config: Config) -> bool:
    """Whether head_dim is not hidden_size / num_attention_heads."""
    usual = config["hidden_size"] // config["num_attention_heads"]
    return config.get("head_dim", usual) != usual


def has_windows(config: Config) -> bool:
    """Whether a layer has a sliding window."""
    return (
        config["model_type"] != "llama"
        and bool(config.get("sliding_window"))
        and config.get("use_sliding_window", True)
    )


def mlx_limit(config: Config) -> str | None:
    """Why mlx-lm cannot run a model; None if it can."""
    if config["model_type"] == "qwen2" and has_wide_heads(config):
        return "its Qwen2 ignores head_dim"
    return "it ignores sliding windows" if has_windows(config) else None


def ctranslate2_limit(config: Config) -> str | None:
    """Why CTranslate2 cannot run a model; None if it can."""
    if has_windows(config):
        return "its text is wrong if the prompt is longer than the window"
    if config["model_type"] in ("llama", "qwen2") and has_wide_heads(config):
        return f"its {config['architectures'][0].removesuffix('ForCausalLM')} ignores head_dim"
    if (config["rope_scaling"] or {}).get("rope_type") == "llama3":
        return "it ignores llama3 scaling"
    return None


@dataclass(frozen=True)
class Engine:
    """An engine.

    Attributes:
        packages: What pip installs, without dependencies, beside the packages of this environment.
        script: The script that runs it, in this folder.
        limit: Why it cannot run a model with this config.json; None if it can.
    """

    packages: tuple[str, ...]
    script: str
    limit: Callable[[Config], str | None]


ENGINES = {
    "mlx-lm": Engine(("mlx-lm==0.32.2", "mlx==0.32.4", "mlx-cpu==0.32.4"), "generate_mlx.py", mlx_limit),
    "CTranslate2": Engine(("ctranslate2==4.8.5",), "generate_ctranslate2.py", ctranslate2_limit),
}


def run_engine(name: str, folders: Iterable[Path], prompts: list[str], num_tokens: int) -> Results:
    """Continue the prompts greedily with each exported model, in a new process.

    The result is keyed by the name of the folder's parent. RuntimeError if the engine's packages cannot be installed.
    """
    engine = ENGINES[name]
    packages = install(cache_folder("gda-engines") / "+".join(engine.packages), *engine.packages)
    python_path = os.pathsep.join([str(packages), *filter(None, [os.environ.get("PYTHONPATH")])])
    with tempfile.TemporaryDirectory() as work:
        task, out = Path(work, "task.json"), Path(work, "out.json")
        by_name = {folder.parent.name: str(folder) for folder in folders}
        task.write_text(json.dumps({"folders": by_name, "prompts": prompts, "num_tokens": num_tokens}))
        done = subprocess.run(
            [sys.executable, "-W", "ignore", str(HERE / engine.script), str(task), str(out)],
            env=os.environ | {"PYTHONPATH": python_path, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        results: Results = json.loads(out.read_text())
        return results
