"""Run named checks in order and record their outcomes. Needs only Python."""

import json
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

Checks = dict[str, Callable[[], None]]


class Absent(Exception):
    """The release has no such feature, or its own models fail too."""


def run_checks(checks: Checks, out: Path) -> None:
    """Run each check, and write {name: {"state", "reason", "traceback", "seconds"}} to the JSON file `out`.

    A check passes if it returns. The file is written after each check, so that a crash loses nothing.
    """
    results: dict[str, Any] = {}
    for name, check in checks.items():
        began = time.monotonic()
        state, reason, trace = "ok", "", ""
        try:
            check()
        except Absent as error:
            state, reason = "absent", str(error)
        except (Exception, SystemExit) as error:
            state, reason, trace = "failed", _first_line(error), traceback.format_exc()
        results[name] = {
            "state": state,
            "reason": reason,
            "traceback": trace,
            "seconds": round(time.monotonic() - began, 1),
        }
        out.write_text(json.dumps(results))
    print(f"{len(checks)} checks", file=sys.stderr)


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = lines[0] if lines else ""
    if isinstance(error, AssertionError):
        return text or f"assertion, line {error.__traceback__ and _line(error)}"
    return f"{type(error).__name__}: {text}"


def _line(error: BaseException) -> int | None:
    return traceback.extract_tb(error.__traceback__)[-1].lineno
