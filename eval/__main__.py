"""`python -m gda.eval run --model gda …`: lm-eval's own command line, with the model type "gda" and our tasks.

All options are lm-eval's, plus one: `--dataset_root DIR` reads the datasets of tasks from local files.
"""

import argparse
import sys


def main() -> None:
    """Run lm-eval's command line."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--dataset_root", "--dataset-root")
    options, sys.argv[1:] = parser.parse_known_args()
    try:
        import gda.eval.lm_eval.harness  # noqa: F401 - registers the model type; names the remedy without lm-eval

        _run(options.dataset_root)
    except (FileNotFoundError, ImportError, ValueError) as error:
        print(f"gda.eval: {error}", file=sys.stderr)
        sys.exit(2)


def _run(dataset_root: str | None) -> None:
    import lm_eval.tasks
    from lm_eval.__main__ import cli_evaluate

    from gda.eval.lm_eval.find_tasks import TaskManagerWithOurs
    from gda.eval.lm_eval.local_data import data_from

    lm_eval.tasks.TaskManager = TaskManagerWithOurs  # the name by which lm-eval's commands find it
    with data_from(dataset_root):
        cli_evaluate()


if __name__ == "__main__":
    main()
