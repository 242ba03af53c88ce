"""Compare a GDA model with its source, task by task, from Python.

    pip install lm-eval datasets
    python examples/evaluate.py ./llama-gda ./llama --tasks gda_mqar_pairs_4,gda_copy_length_64 --limit 50
    python examples/evaluate.py --smoke

The tasks in this default generate their data. Those of lm-eval work too; their data comes from the Hub. To read
it from a folder, pass `dataset_root` to `gda.evaluate`.
"""

import argparse
import tempfile
from pathlib import Path

import gda

TASKS = "gda_mqar_pairs_4,gda_copy_length_64"


def compare(model: Path, source: Path, tasks: str, limit: int) -> None:
    """Print each score of both models, with its standard error."""
    results = [gda.evaluate(each, tasks=tasks, limit=limit, batch_size=8) for each in (model, source)]
    print(f"{'task':24} {'metric':20} {'model':>18} {'source':>18}")
    for task, metrics in results[0]["results"].items():
        for metric, value in metrics.items():
            name, _, filter_name = metric.partition(",")
            if not isinstance(value, float) or name.endswith("_stderr"):
                continue
            cells = []
            for each in results:
                error = each["results"][task].get(f"{name}_stderr,{filter_name}")  # "N/A" if unknown
                known = f" ± {error:.4f}" if isinstance(error, float) else ""
                cells.append(f"{each['results'][task][metric]:.4f}{known}")
            label = name if filter_name == "none" else f"{name} {filter_name}"
            print(f"{task:24} {label:20} {cells[0]:>18} {cells[1]:>18}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", type=Path, help="folder of a GDA model")
    parser.add_argument("source", nargs="?", type=Path, help="folder of the model that it was converted from")
    parser.add_argument("--tasks", default=TASKS)
    parser.add_argument("--limit", type=int, default=50, help="documents per task")
    parser.add_argument("--smoke", action="store_true", help="a tiny model, and four documents per task")
    options = parser.parse_args()
    if not options.smoke:
        if options.source is None:
            parser.error("name MODEL and SOURCE, or try --smoke")
        compare(options.model, options.source, options.tasks, options.limit)
        return
    from tiny import tiny_models

    with tempfile.TemporaryDirectory() as folder:
        source, model = tiny_models(Path(folder))
        compare(model, source, TASKS, limit=4)


if __name__ == "__main__":
    main()
