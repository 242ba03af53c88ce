"""Check many releases of transformers: the code saved beside a model's weights, and the installed package.

Each release is checked in a process of its own. Exit code 0 if all passes, 1 if a check failed, 2 for bad input.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path.insert(0, str(ROOT))

from tests.matrix.releases import LOWEST_INSTALLED, choose, default_cache, numbers, overlay  # noqa: E402

PAGE = ROOT / "docs" / "compatibility.md"
BEGIN, END = "<!-- matrix: begin -->", "<!-- matrix: end -->"
SIGNS = {"ok": "✓", "failed": "✗", "absent": "–"}
MOST_PROCESSES = 4  # each takes about 1 GB
TITLES = {"bundled": "Code saved beside the weights", "installed": "Installed package"}

Results = dict[str, dict[str, dict[str, Any]]]  # part → release → check → how it ended


def main() -> int:
    arguments = parse_arguments()
    try:
        releases = choose(arguments.releases)
        overlays = {release: overlay(release, arguments.cache) for release in releases}
    except (ValueError, RuntimeError) as error:
        print(error, file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory(prefix="gda-matrix-") as name:
        folders = Path(name) / "folders"
        make_folders(folders)
        jobs = [
            (part, release, folder)
            for part in arguments.parts
            for release, folder in overlays.items()
            if part == "bundled" or numbers(release) >= numbers(LOWEST_INSTALLED)
        ]
        with ThreadPoolExecutor(1 if arguments.verbose else min(os.cpu_count() or 1, MOST_PROCESSES)) as pool:
            outcomes = pool.map(lambda job: check(*job, folders, arguments.verbose), jobs)
            results: Results = {part: {} for part in arguments.parts}
            for (part, release, _), outcome in zip(jobs, outcomes, strict=True):
                results[part][release] = outcome
    failures = list_failures(results)
    if arguments.json:
        print(json.dumps(results, indent=2))
    else:
        print("\n".join([as_markdown(results), *failures]))
    if arguments.markdown:
        write_page(as_markdown(results))
    return 1 if failures else 0


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument(
        "--releases",
        metavar="LIST",
        default="lowest,package,sglang,pinned,newest",
        help="version numbers or names of them, separated by commas, or all (default: %(default)s)",
    )
    parser.add_argument(
        "--parts",
        nargs="+",
        choices=[*TITLES],
        default=[*TITLES],
        help="the code saved beside the weights, the installed package, or both (default: both)",
    )
    parser.add_argument(
        "--cache",
        type=Path,
        metavar="FOLDER",
        default=default_cache(),
        help="where installed releases are kept between runs (default: %(default)s)",
    )
    parser.add_argument("--json", action="store_true", help="print the results as JSON, with tracebacks")
    parser.add_argument("--markdown", action="store_true", help=f"write the table into {PAGE.relative_to(ROOT)}")
    parser.add_argument("--verbose", action="store_true", help="show what the checks print")
    return parser.parse_args()


def make_folders(folders: Path) -> None:
    """Create the tested models with the installed package, in another process."""
    code = "import sys, pathlib; from tests.matrix.folders import make; make(pathlib.Path(sys.argv[1]))"
    child = subprocess.run(
        [sys.executable, "-c", code, str(folders)],
        cwd=ROOT,
        env=environment(folders.parent, os.environ.get("PYTHONPATH", "")),
        capture_output=True,
        text=True,
        check=False,
    )
    if child.returncode:
        sys.exit(f"the models to check cannot be made:\n{child.stderr}")


def check(part: str, release: str, folder: Path | None, folders: Path, verbose: bool) -> dict[str, dict[str, Any]]:
    """The outcome of each check of `bundled.py` or `installed.py` with this release."""
    out = folders.parent / f"{part}-{release}.json"
    own = os.environ.get("PYTHONPATH") if part == "installed" else None
    began = time.monotonic()
    child = subprocess.run(
        [sys.executable, str(HERE / f"{part}.py"), str(folders), str(out)],
        cwd=folders,
        env=environment(
            folders.parent / f"home-{part}-{release}", os.pathsep.join(filter(None, [str(folder or ""), own]))
        ),
        stdout=None if verbose else subprocess.PIPE,
        stderr=None if verbose else subprocess.STDOUT,
        text=True,
        check=False,
    )
    results: dict[str, dict[str, Any]] = json.loads(out.read_text()) if out.exists() else {}
    if child.returncode:
        message = child.stdout or ""
        last = (message.strip().splitlines() or ["nothing said"])[-1]
        results["run"] = {"state": "failed", "reason": last, "traceback": message[-4000:], "seconds": 0}
    seconds = time.monotonic() - began
    print(f"{part}, transformers {release}: {seconds:.0f} s", file=sys.stderr, flush=True)
    return results


def environment(home: Path, python_path: str) -> dict[str, str]:
    """Environment of a child: offline, one thread, its own cache folder."""
    return os.environ | {
        "HF_HOME": str(home),
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": python_path,
        "TOKENIZERS_PARALLELISM": "false",
    }


def list_failures(results: Results) -> list[str]:
    """One line for each reason for which checks of a release failed."""
    reasons: dict[tuple[str, str, str], list[str]] = {}
    for part, releases in results.items():
        for release, checks in releases.items():
            for name, result in checks.items():
                if result["state"] == "failed":
                    reasons.setdefault((part, release, result["reason"]), []).append(name)
    return [
        f"{part}, transformers {release}, {', '.join(names)}: {reason}"
        for (part, release, reason), names in reasons.items()
    ]


def as_markdown(results: Results) -> str:
    """A table for each part: releases by checks."""
    tables = []
    for part, releases in results.items():
        names = list(dict.fromkeys(name for checks in releases.values() for name in checks))
        rows = [["transformers", *names], ["---", *(":-:" for _ in names)]]
        for release, checks in releases.items():
            rows.append([release, *(SIGNS[checks[name]["state"]] if name in checks else "" for name in names)])
        tables.append(f"### {TITLES[part]}\n\n" + "\n".join(f"| {' | '.join(row)} |" for row in rows) + "\n")
    return "\n".join(tables)


def write_page(table: str) -> None:
    """Put the table between the markers in docs/compatibility.md."""
    before, rest = PAGE.read_text().split(BEGIN)
    after = rest.split(END)[1]
    stamp = f"torch {version('torch').split('+')[0]}, Python {sys.version_info.major}.{sys.version_info.minor}, CPU"
    PAGE.write_text(f"{before}{BEGIN}\n\nChecked with {stamp}.\n\n{table}\n{END}{after}")


if __name__ == "__main__":
    sys.exit(main())
