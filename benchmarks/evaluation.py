"""Compare the time of `gda eval` with that of lm-eval's own command, on the same Llama, tasks and data.

    python benchmarks/evaluation.py LLAMA --tasks blimp_passive_1 --dataset-root DIR --repeat 5

The two commands alternate, each in its own process, start-up included. lm-eval alone cannot read local files: with
`--dataset-root`, it runs with `datasets.load_dataset` replaced and no other code of this package.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

PLAIN = """
import sys
from lm_eval.__main__ import cli_evaluate
root = sys.argv.pop()
if root:
    import datasets, json, pathlib
    def load_dataset(path, name=None, **_):
        files = (pathlib.Path(root) / path / (name or "")).glob("*.jsonl")
        read = lambda file: datasets.Dataset.from_list([json.loads(line) for line in open(file)])
        return datasets.DatasetDict({file.stem: read(file) for file in files})
    datasets.load_dataset = load_dataset
cli_evaluate()
"""


def main() -> None:
    """Time both, and print medians, the ratio pair by pair, and whether the scores are the same."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--tasks", required=True)
    parser.add_argument("--dataset-root", default="")
    parser.add_argument("--limit", default="1000")
    parser.add_argument("--batch-size", default="16")
    parser.add_argument("--repeat", type=int, default=5)
    args = parser.parse_args()
    same = ["--tasks", args.tasks, "--limit", args.limit]
    plain = [sys.executable, "-c", PLAIN, "run", "--model", "hf", "--model_args", f"pretrained={args.model}", *same]
    plain += ["--batch_size", args.batch_size, "--device", "cpu"]
    ours = [sys.executable, "-m", "gda.cli", "eval", args.model, *same, "--batch-size", args.batch_size]
    ours += ["--device", "cpu"] + (["--dataset-root", args.dataset_root] if args.dataset_root else [])
    times: dict[str, list[tuple[float, float]]] = {"lm_eval --model hf": [], "gda eval": []}
    with tempfile.TemporaryDirectory() as scratch:
        for repeat in range(args.repeat):
            out = Path(scratch) / str(repeat)
            times["lm_eval --model hf"].append(timed([*plain, "--output_path", str(out), args.dataset_root]))
            times["gda eval"].append(timed([*ours, "--output", str(out / "ours"), "--overwrite"]))
        (file,) = out.rglob("results_*.json")
        scores = [json.loads(path.read_text())["results"] for path in (file, out / "ours" / "results.json")]
    for kind, what in enumerate(("elapsed", "processor")):
        for name, pairs in times.items():
            seconds = [pair[kind] for pair in pairs]
            output = ", ".join(f"{one:.2f}" for one in seconds)
            print(f"{name:20} {statistics.median(seconds):8.2f} s {what} time, of {output}")
        ratios = [ours[kind] / plain[kind] for plain, ours in zip(*times.values(), strict=True)]
        print(f"ratio, median pair   {statistics.median(ratios):8.3f}")
    print(f"the same scores: {'yes' if scores[0] == scores[1] else 'NO'}")


def timed(command: list[str]) -> tuple[float, float]:
    """Elapsed and processor seconds of a command. The latter hardly depend on other load."""
    begun, before = time.monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN)
    ran = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"HF_HUB_OFFLINE": "1"})
    if ran.returncode:
        sys.exit(ran.stderr[-2000:])
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.monotonic() - begun, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


if __name__ == "__main__":
    main()
