"""Compare converted and grown Motifs with Motif's own code for vLLM, on a CPU, and report the differences.

The code is MotifTechnologies/vllm, branch `motif`. Git fetches the few files that are needed into a cache folder. They
are only run, with stand-ins for the rest of vLLM (fork.py).
"""

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from xml.etree import ElementTree

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "support"))
from packages import cache_folder, install

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[2]
URL = "https://github.com/MotifTechnologies/vllm"
COMMIT = "477e4d791899562c067d89c788beaf603f682529"
FILES = (
    "vllm/model_executor/models/motif.py",
    "vllm/v1/attention/backends/grouped_diff_attn.py",
    "vllm/model_executor/layers/layernorm.py",
    "vllm/model_executor/layers/rotary_embedding",
)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], epilog="Other options go to pytest, e.g. -x."
    )
    parser.add_argument("--source", type=Path, metavar="PATH", help=f"git checkout of the fork; by default {URL}")
    arguments, arguments.pytest = parser.parse_known_args()
    return arguments


def git(folder: Path, *command: str) -> bytes:
    return subprocess.run(["git", "-C", str(folder), *command], check=True, stdout=subprocess.PIPE).stdout


def unpack(source: Path | None, folder: Path) -> Path:
    """Return the folder with the fork's files, from an earlier run, a checkout or GitHub."""
    if folder.exists():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as name:
        work = Path(name)
        if source is None:
            source = work / "repository"
            source.mkdir()
            git(source, "init", "--quiet")
            git(source, "remote", "add", "origin", URL)
            git(source, "config", "remote.origin.promisor", "true")  # files are fetched when they are read
            git(source, "fetch", "--quiet", "--depth=1", "--filter=blob:none", "origin", COMMIT)
        (work / "files").mkdir()
        archive = git(source, "archive", COMMIT, *FILES)
        subprocess.run(["tar", "-x", "-C", str(work / "files")], input=archive, check=True)
        (work / "files").rename(folder)
    return folder


def main() -> int:
    arguments = parse_arguments()
    cache = cache_folder("gda-upstream-tests") / "motif"
    fork = unpack(arguments.source, cache / COMMIT)
    python_path = [str(install(cache / "packages", "einops==0.8.1")), os.environ.get("PYTHONPATH")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, python_path)), "GDA_MOTIF_VLLM": str(fork)}
    environment |= {"HF_HUB_OFFLINE": "1"}
    with tempfile.TemporaryDirectory(prefix="gda-motif-") as name:
        report = Path(name) / "report.xml"
        command = [
            sys.executable,
            "-m",
            "pytest",
            str(HERE / "test_motif.py"),
            "--noconftest",
            "-p",
            "no:cacheprovider",
        ]
        command += [f"--junit-xml={report}", "-q", "-W", "ignore", *arguments.pytest]
        status = subprocess.run(command, cwd=ROOT, env=environment).returncode
        print(f"\n{URL} at {COMMIT[:10]}\n\n| model | worst relative Δlogit |\n| --- | --- |")
        for case in ElementTree.parse(report).iter("testcase") if report.exists() else ():
            rows = [each.get("value") for each in case.iter("property") if each.get("name") == "row"]
            print(f"| {rows[0]} |" if rows else f"| {case.get('name')} | did not pass |")
    return status


if __name__ == "__main__":
    sys.exit(main())
