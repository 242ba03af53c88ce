"""Run transformers' common model tests on GDA and Llama, and report the tests that GDA does not pass.

The wheel of transformers contains no tests. Its sdist contains the common ones, but lacks some helper modules that they
import. This script unpacks the tests to a temporary folder, adds `stand_ins/` for the missing modules, and runs pytest
there.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections import Counter, defaultdict
from importlib.metadata import version
from pathlib import Path
from xml.etree import ElementTree

HERE = Path(__file__).resolve().parent
BASELINE = "LlamaTest"
PYTEST_INI = """[pytest]
markers =
    flash_attn_test
    flash_attn_3_test
    flash_attn_4_test
    is_fsdp_test
    is_tensor_parallel_test
    is_training_test
    generate
    torch_compile_test
    torch_export_test
"""

Outcomes = dict[str, dict[str, tuple[str, str]]]  # class → test → (outcome, reason)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], epilog="Other options go to pytest, e.g. -k fsdp, -x, -n 2."
    )
    parser.add_argument(
        "--source",
        type=Path,
        metavar="PATH",
        help="sdist (.tar.gz), unpacked sdist or git checkout of the installed transformers; by default the sdist is "
        "downloaded with pip. A checkout holds the generation and export tests too, and they run",
    )
    parser.add_argument(
        "--cache",
        type=Path,
        metavar="FOLDER",
        default=Path.home() / ".cache" / "gda-upstream-tests",
        help="where the downloaded sdist is kept (default: %(default)s)",
    )
    parser.add_argument(
        "--no-distributed", action="store_true", help="leave out what starts several processes: TP and FSDP"
    )
    arguments, arguments.pytest = parser.parse_known_args()
    return arguments


def download_sdist(cache: Path) -> Path:
    """Return the sdist of the installed transformers, from `cache` or downloaded by pip."""
    requirement = f"transformers=={version('transformers')}"
    sdist = cache / f"transformers-{version('transformers')}.tar.gz"
    if not sdist.exists():
        print(f"Downloading the sdist of {requirement} to {cache}", flush=True)
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", ":all:", "--dest", str(cache)]
        subprocess.run([*command, "--quiet", requirement], check=True)
    return sdist


def copy_tests(source: Path, folder: Path) -> Path:
    """Copy transformers' tests, stand-ins for missing modules and our test module to `folder / "tests"`."""
    tests = folder / "tests"
    if source.is_dir():
        shutil.copytree(source / "tests", tests)
    else:
        with tarfile.open(source) as archive:
            members = [member for member in archive if "/tests/" in member.name]
            for member in members:
                member.name = member.name.split("/", 1)[1]
            archive.extractall(folder, members, filter="data")
    for stand_in in (HERE / "stand_ins").rglob("*.py"):
        target = tests / stand_in.relative_to(HERE / "stand_ins")
        if not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(stand_in, target)
    shutil.copy(HERE / "test_modeling_gda.py", tests)
    for package in [tests, *(path for path in tests.rglob("*") if path.is_dir())]:
        (package / "__init__.py").touch()
    (folder / "pytest.ini").write_text(PYTEST_INI)
    return tests / "test_modeling_gda.py"


def run_pytest(test_file: Path, folder: Path, report: Path, distributed: bool, options: list[str]) -> int:
    python_path = os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = os.environ | {"PYTHONPATH": python_path, "HF_HUB_OFFLINE": "1"}
    environment.setdefault("OMP_NUM_THREADS", "1")
    if not distributed:
        environment |= {"RUN_FSDP_TESTS": "0", "RUN_TENSOR_PARALLEL_TESTS": "0"}
    command = [sys.executable, "-m", "pytest", str(test_file), f"--junit-xml={report}", "-p", "no:cacheprovider"]
    command += ["-q", "-W", "ignore", "--tb=short", *options]
    return subprocess.run(command, cwd=folder, env=environment).returncode


def read_report(report: Path) -> Outcomes:
    """The outcome of each test of each class. A test with a failed subtest has failed."""
    outcomes: Outcomes = defaultdict(dict)
    for case in ElementTree.parse(report).iter("testcase"):
        tests = outcomes[case.get("classname", "").rsplit(".", 1)[-1]]
        name = re.sub(r" ?[\[(].*", "", case.get("name", ""))
        found = case.find("failure") if case.find("error") is None else case.find("error")
        if found is not None:
            tests[name] = "failed", _reason(found)
        elif (skipped := case.find("skipped")) is not None:
            tests.setdefault(name, ("skipped", _reason(skipped)))
        else:
            tests.setdefault(name, ("passed", ""))
    return outcomes


def _reason(element: ElementTree.Element) -> str:
    """The first line of the message or, if another process raised the error, the original error."""
    errors = re.findall(r"^E +(\w*(?:Error|Exception): .+)", element.text or "", re.MULTILINE)
    return (errors[-1:] + element.get("message", "").strip().splitlines() + [""])[0]


def print_summary(outcomes: Outcomes) -> None:
    """Print counts by class, then each test that did not pass, with its outcome on Llama."""
    print("\n| class | passed | skipped | failed |\n| --- | --- | --- | --- |")
    for name, tests in outcomes.items():
        counts = Counter(outcome for outcome, _ in tests.values())
        print(f"| {name} | {counts['passed']} | {counts['skipped']} | {counts['failed']} |")

    baseline = outcomes.get(BASELINE, {})
    rows: dict[tuple[str, str, str, str], list[str]] = defaultdict(list)
    for name, tests in outcomes.items():
        for test, (outcome, reason) in tests.items():
            if outcome != "passed":
                llama = baseline.get(test, ("not run", ""))[0]
                reason = re.sub(r"\b(GDA|Llama)(?=[A-Z])", "", reason).replace("|", "/")[:150]
                rows[outcome, reason, llama, test].append(name)
    print("\n| test | outcome | in | Llama | reason |\n| --- | --- | --- | --- | --- |")
    for (outcome, reason, llama, test), names in sorted(rows.items()):
        if names != [BASELINE]:
            classes = ", ".join(name for name in names if name != BASELINE)
            print(f"| {test} | {outcome} | {classes} | {llama} | {reason} |")


def main() -> int:
    arguments = parse_arguments()
    source = arguments.source or download_sdist(arguments.cache)
    with tempfile.TemporaryDirectory(prefix="gda-upstream-") as name:
        folder = Path(name)
        test_file = copy_tests(source, folder)
        report = folder / "report.xml"
        status = run_pytest(test_file, folder, report, not arguments.no_distributed, arguments.pytest)
        if report.exists():
            print_summary(read_report(report))
    return status


if __name__ == "__main__":
    sys.exit(main())
