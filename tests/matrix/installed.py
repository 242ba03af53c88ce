"""Run the installed package's commands on tiny models with the transformers at hand.

    python installed.py FOLDERS OUT.json

It is run by `run.py` in a process of its own, with FOLDERS from `folders.py`.
"""

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from outcomes import Checks, run_checks

sys.path.append(str(Path(__file__).resolve().parents[2]))
from tests.support.hub_server import TOKEN, Hub

HUB = Hub()  # the only Hub that clients of this process can reach
os.environ |= {"HF_ENDPOINT": HUB.url, "HF_TOKEN": TOKEN, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
STARTING = 300  # seconds that a server may take before it answers

FOLDERS, OUT = Path(sys.argv[1]), Path(sys.argv[2])
SOURCES = ("llama", "mistral", "qwen3", "diffllama")
TEXT = FOLDERS / "text.txt"


def gda(*arguments: object) -> None:
    """Run a command as `gda` does; it must exit with 0 and call nothing deprecated."""
    from gda.cli import main

    sys.argv = ["gda", *map(str, arguments)]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        code = main_code(main)
    assert code == 0, f"exit code {code}; --verbose shows why"
    for warning in caught:
        # A warning of transformers names a file of its own or of its caller. huggingface_hub has others, of httpx.
        by_transformers = {"transformers", "gda", "conversion", "training", "eval"} & set(Path(warning.filename).parts)
        if issubclass(warning.category, FutureWarning | DeprecationWarning) and by_transformers:
            raise AssertionError(f"gda {arguments[0]}: {warning.category.__name__}: {warning.message}")


def main_code(main: Callable[[], None]) -> int:
    try:
        main()
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def ask(url: str, body: dict[str, Any] | None = None) -> str:
    """The response of an HTTP server to a JSON body."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=120) as answer:
        return str(answer.read().decode())


def serve(model: Path) -> None:
    """A served model must answer a chat with a text."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    options = ("--device", "cpu", "--host", "127.0.0.1", "--port", address.split(":")[1])
    server = subprocess.Popen([sys.executable, "-m", "gda.cli", "serve", model, *options])
    try:
        until = time.monotonic() + STARTING
        while True:
            assert server.poll() is None, f"the server ended with exit code {server.returncode}"
            assert time.monotonic() < until, f"the server did not answer within {STARTING} s"
            try:
                ask(f"http://{address}/health")
                break
            except urllib.error.URLError:
                time.sleep(0.5)
        messages = [{"role": "user", "content": "the thing in an other"}]
        body = {"model": str(model), "messages": messages, "max_tokens": 6, "temperature": 0}
        answer = json.loads(ask(f"http://{address}/v1/chat/completions", body))
        assert answer["choices"][0]["message"]["content"]
    finally:
        server.terminate()
        server.wait(timeout=60)


def checks(work: Path) -> Checks:
    """The checks by name. Later ones use files of earlier ones in `work`."""
    perplexity = ("--perplexity", TEXT, "--context", 32)
    training = ("--data", TEXT, "--steps", 3, "--context", 16, "--batch-size", 2)

    def convert() -> None:
        for name in SOURCES:
            gda("convert", FOLDERS / name / "source", work / name)

    def verify() -> None:
        for name in SOURCES:
            gda("verify", FOLDERS / name / "source", work / name)
            gda("verify", FOLDERS / name / "source", work / name, "--method", "layers")

    def export() -> None:
        for name in SOURCES:
            gda("export", work / name, work / f"{name}-again", "--format", name)

    def fold() -> None:
        gda("convert", work / "llama", work / "factored", "--qk-rank", 4)
        gda("fold", work / "factored", work / "folded")

    def grow() -> None:
        gda("grow", work / "llama", work / "wider", "--signal", 2, "--width", 2)
        gda("grow", work / "qwen3", work / "deeper", "--depth", 3, "--masked", "--signal", 2)

    def split() -> None:
        options = ("--mode", "split", "--calibration", TEXT, "--calibration-tokens", 1024, "--effort", "fast")
        gda("convert", FOLDERS / "llama" / "source", work / "split", *options)

    def train() -> None:
        gda("train", work / "llama", work / "trained", *training, "--gradient-checkpointing")
        gda("train", work / "deeper", work / "grown", *training, "--train", "new")
        gda("train", work / "split", work / "taught", *training, "--teacher", FOLDERS / "llama" / "source")

    def evaluate() -> None:
        gda("eval", work / "llama", *perplexity, "--output", work / "scores")
        metadata = '{"length": 320}'  # tokens of the synthetic prompts
        gda("eval", work / "qwen3", "--diagnostics", "--metadata", metadata, "--output", work / "maps")

    def push() -> None:
        gda("push", work / "llama", "me/llama-gda")
        for name in ("model.safetensors", "config.json", "modeling_gda.py", "README.md"):
            assert name in HUB.files("me/llama-gda"), f"{name} was not pushed"

    return {
        "convert": convert,
        "verify": verify,
        "inspect": partial(gda, "inspect", work / "llama"),
        "export": export,
        "fold": fold,
        "grow": grow,
        "split": split,
        "train": train,
        "eval": evaluate,
        "attention": partial(gda, "attention", work / "llama", "--text", "A cat.", "--out", work / "a.html"),
        "push": push,
        "demo": partial(gda, "demo", "--source", FOLDERS / "llama" / "source", "--out", work / "demo"),
        "serve": partial(serve, work / "llama"),
    }


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        run_checks(checks(Path(folder)), OUT)
