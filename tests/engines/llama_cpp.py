"""llama.cpp, which runs exported GGUF files: how it is installed and started.

It comes from npm's node-llama-cpp, which has a prebuilt binary, and is kept in a cache folder (85 MB).
"""

import json
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from filelock import FileLock

import gda

from ..support.llamas import byte_tokenizer
from ..support.packages import cache_folder
from .engines import Config, Results, has_windows

VERSION = "3.22.1"
BINARIES = {
    ("linux", "x86_64"): "linux-x64",
    ("linux", "aarch64"): "linux-arm64",
    ("darwin", "arm64"): "mac-arm64-metal",
}


def install_llama_cpp() -> Path:
    """The folder with node-llama-cpp, from an earlier run or else by npm.

    Raises:
        RuntimeError: if it cannot be installed.
    """
    binary = BINARIES.get((sys.platform, platform.machine()))
    if binary is None or shutil.which("npm") is None:
        raise RuntimeError("llama.cpp needs Node.js with npm on Linux or an Apple processor")
    folder = cache_folder("gda-engines") / f"node-llama-cpp-{VERSION}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_name(f"{folder.name}.lock")):
        if not folder.exists():
            wanted = [f"node-llama-cpp@{VERSION}", f"@node-llama-cpp/{binary}@{VERSION}"]
            options = ["--ignore-scripts", "--omit=optional", "--no-audit", "--no-fund"]
            with tempfile.TemporaryDirectory(dir=folder.parent) as work:
                packages = Path(work, "packages")
                packages.mkdir()
                command = ["npm", "install", "--prefix", str(packages), *options, *wanted]
                done = subprocess.run(command, capture_output=True, text=True, check=False)
                if done.returncode:
                    raise RuntimeError(f"npm cannot install {wanted[0]}: {done.stderr.strip().splitlines()[-1:]}")
                packages.rename(folder)  # a kill leaves nothing that looks installed
    return folder


def run_llama_cpp(packages: Path, files: dict[str, dict[str, Any]], work: Path) -> dict[str, Any]:
    """Run the GGUF files. `llama_cpp.mjs` documents the request and the result of each."""
    task, out = work / "task.json", work / "out.json"
    task.write_text(json.dumps({"packages": str(packages), "files": files}))
    script = Path(__file__).with_name("llama_cpp.mjs")
    done = subprocess.run(["node", str(script), str(task), str(out)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    results: dict[str, Any] = json.loads(out.read_text())
    for name, result in results.items():
        assert "error" not in result, f"{name}: {result['error']}"
    return results


def llama_cpp_limit(config: Config) -> str | None:
    """Why llama.cpp cannot run a model; None if it can."""
    return "its Llama and Qwen have no sliding windows" if has_windows(config) else None


def continue_prompts(folders: Iterable[Path], prompts: list[str], num_tokens: int) -> Results:
    """Continue the prompts greedily with each exported model as a GGUF file, as `run_engine` does, but without logits.

    Raises:
        RuntimeError: if llama.cpp cannot be installed.
    """
    packages, files = install_llama_cpp(), {}
    ids = [byte_tokenizer().encode(prompt) for prompt in prompts]
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        for number, folder in enumerate(folders):
            report = gda.export(folder.with_name("gda"), work / f"{number}.gguf", format="gguf", verify=False)
            files[folder.parent.name] = {"path": str(report.out), "prompts": ids, "numTokens": num_tokens}
        results = run_llama_cpp(packages, files, work)
    return {name: {"tokens": [each["tokens"] for each in got["continued"]]} for name, got in results.items()}


def same_text(got: list[int], expected: list[int]) -> bool:
    """Whether tokens are the same. llama.cpp does not return the token that ends the text."""
    ended = len(got) < len(expected) and expected[len(got)] == byte_tokenizer().eos_token_id
    return got == expected[: len(got)] and (ended or len(got) == len(expected))
