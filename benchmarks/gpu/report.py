"""Print the GPU figures as tables, or write them to docs/performance.md between its two markers.

    python benchmarks/gpu/report.py FOLDER                                  # a short table of everything
    python benchmarks/gpu/report.py FOLDER --write docs/performance.md      # rewrites the section on GPUs

FOLDER has the JSON files that benchmarks/gpu.sh writes. Without any, the section says that there are no figures yet.
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NoReturn

BEGIN, END = "<!-- gpu: begin -->", "<!-- gpu: end -->"
PARTS = ("correctness", "speed", "sweep")
Row = dict[str, Any]
Lines = list[str]

NO_FIGURES = """There are no figures from a GPU yet. `bash benchmarks/gpu.sh --out FOLDER` measures them on a machine
that has one, and `python benchmarks/gpu/report.py FOLDER --write docs/performance.md` puts them here."""


def read(folder: Path) -> dict[str, Row]:
    """The existing parts, by name."""
    files = {part: folder / f"gpu_{part}.json" for part in PARTS}
    return {part: json.loads(file.read_text(encoding="utf-8")) for part, file in files.items() if file.exists()}


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> Lines:
    return [
        f"| {' | '.join(header)} |",
        "|" + "---|" * len(header),
        *(f"| {' | '.join(cell.replace('|', '/') for cell in row)} |" for row in rows),
    ]


def unique(values: Iterable[Any]) -> list[Any]:
    return list(dict.fromkeys(values))


def excuse(row: Row) -> str:
    """The reason why a row has no figure."""
    return (
        "out of memory"
        if "OutOfMemory" in row.get("error", "")
        else (row.get("error") or row.get("skipped") or "")[:120]
    )


# -------------------------------------------------------------------------------------------------------- correctness


def correctness(content: Row) -> Lines:
    """One line per check and dtype, with the worst result over all configs."""
    rows = content["rows"]
    lines = []
    for check, backend, dtype in unique((row["check"], row["backend"], row["dtype"]) for row in rows):
        own = [row for row in rows if (row["check"], row["backend"], row["dtype"]) == (check, backend, dtype)]
        ran = [row for row in own if not excuse(row)]
        if any("relative_error" in row for row in ran):
            errors = [row["relative_error"] for row in ran]
            worst = next((error for error in errors if error != error), max(errors))  # a NaN is the worst
            result = f"error {worst:.1e} (limit {ran[0]['limit']:.0e})"
        elif ran:
            result = f"{min(row['equal_tokens'] for row in ran):.1%} of tokens equal"
            if gap := max(row["gap"] for row in ran):
                result += f", apart by {gap:.3f} σ"
        else:
            result = ""
        excuses = unique(excuse(row) for row in own if excuse(row))
        failed = any(row.get("ok") is False or row.get("error") for row in own)
        found = "; ".join([result, *excuses] if result else excuses)
        verdict = "failed" if failed else "ok" if ran else "–"
        lines.append((check, backend, dtype, f"{len(ran)} of {len(own)}", found, verdict))
    return table(("check", "attention", "dtype", "configs", "worst", ""), lines)


# --------------------------------------------------------------------------------------------------------------- speed


def speed(content: Row) -> Lines:
    """A line for each case; a column for each contestant: speed relative to Llama (what counting allows)."""
    lines: Lines = []
    for kind, title in (("layer", "One attention layer"), ("model", "Whole models")):
        rows = [row for row in content["rows"] if row["kind"] == kind and (row["case"] != "build" or "error" in row)]
        names = unique(row["name"] for row in rows if row["name"] not in ("(case)", "Llama"))
        body = []
        for case in unique(row["case"] for row in rows):
            by_name = {row["name"]: row for row in rows if row["case"] == case}
            peer = by_name.get("Llama", by_name.get("(case)", {}))
            memory = f", {peer['peak_mb']:,.0f} MB" if peer.get("peak_mb") else ""
            llama = f"{peer['ms']:,.2f} ms{memory}" if "ms" in peer else excuse(peer)
            body.append((case, llama, *(_speed_cell(by_name.get(name, {}), peer) for name in names)))
        if body:
            lines += [f"**{title}**", "", *table(("case", "Llama", *names), body), ""]
    return lines


def _speed_cell(row: Row, peer: Row) -> str:
    if "ms" not in row:
        return excuse(row)
    if "speed" not in row:
        return f"{row['ms']:,.2f} ms"
    limit = f" ({row['limit']:.2f})" if row.get("limit") else ""
    peaks = row.get("peak_mb"), peer.get("peak_mb")
    memory = f", memory {peaks[0] / peaks[1]:.2f}" if all(peaks) else ""
    return f"{row['speed']:.2f}{limit}{memory}"


# --------------------------------------------------------------------------------------------------------------- sweep


def sweep(content: Row) -> Lines:
    """The difficulty that was chosen, and a line for each variant."""
    lines: Lines = []
    ladder = [row for row in content["rows"] if row["stage"] == "ladder"]
    if ladder:
        accuracies = [f"{row['difficulty']}: {row['accuracy']:.2f}" for row in ladder if "accuracy" in row]
        lines += [f"Accuracy of the Transformer by difficulty, two seeds each: {'; '.join(accuracies)}.", ""]
    if "difficulty" in content:
        chosen, size = content["difficulty"], content["size"]
        lines += [
            f"Chosen: {chosen['pairs']} pairs in {chosen['cells']} cells, {chosen['questions']} questions. "
            f"{size['layers']} layers, hidden size {size['hidden']}, {size['steps']} steps of {size['batch']} rows.",
            "",
        ]
    body = []
    for row in content.get("summary", []):
        differences = [_interval(row.get(f"{measure}_difference")) for measure in ("accuracy", "loss")]
        body.append((row["name"], str(row["seeds"]), str(row["mlp"]), f"{row['flops']:.3f}", f"{row['accuracy']:.3f}",
                     differences[0], f"{row['loss']:.3f}", differences[1]))  # fmt: skip
    header = ("variant", "seeds", "MLP", "FLOPs", "accuracy", "− Transformer", "loss", "− Transformer")
    failed = unique(f"{row.get('name', 'block')}: {row['error']}" for row in content["rows"] if "error" in row)
    return lines + (table(header, body) if body else []) + [f"Failed: {each}" for each in failed]


def _interval(difference: Row | None) -> str:
    if difference is None:
        return ""
    if difference["half_width"] is None:
        return f"{difference['mean']:+.3f}"
    return f"{difference['mean']:+.3f} ± {difference['half_width']:.3f}"


# ------------------------------------------------------------------------------------------------------------- section

INTRODUCTIONS = {
    "correctness": """Errors are ‖got − expected‖ / ‖expected‖ against a float64 reference on the CPU
(`tests/support/naive.py`) of the same weights. Text is compared token by token with the model's own argmax without a
cache. Where a text in bfloat16 first differs, the two tokens' logits must be a near tie, less than 0.1 standard
deviations apart. A line has the worst of all configs: shared, shared with fewer noise heads than KV heads, shared with
tanh λ, paired with head norm.""",
    "speed": """bfloat16, sdpa unless said otherwise. Speed is Llama's time over the own, so above 1 is faster; in
brackets what counting allows (FLOPs for prefill and training, bytes for decoding); memory is the peak of one run
relative to Llama's. CUDA graphs are replayed over a static cache, where the Llama packs its query heads as GDA does,
also in releases of transformers that don't; DiffLlama has its own attention. Shared GDA keeps the Llama's 32 query
heads and adds 8 noise heads; paired has 16 + 4 heads with values twice as wide, so its o_proj and KV cache have the
Llama's size.""",
    "sweep": """Key retrieval among distractors, tiny models from scratch, equal data, MLP widths set so that FLOPs
agree. Differences to the Transformer are paired by seed, with 95 % t-intervals.""",
}
TITLES = {"correctness": "Correctness", "speed": "Speed and memory", "sweep": "Ratio of signal to noise heads"}
TABLES: dict[str, Callable[[Row], Lines]] = {"correctness": correctness, "speed": speed, "sweep": sweep}


def body(name: str, content: Row) -> Lines:
    """The tables of a part, and what it was doing if it was interrupted."""
    ended = [f"Ended during: {content['running']}"] if "running" in content else []
    return [*TABLES[name](content), *ended]


def section(parts: dict[str, Row]) -> str:
    """Markdown of everything that was measured."""
    if not parts:
        return NO_FIGURES
    output = next(iter(parts.values()))["environment"]
    lines = [
        f"{output['device']}, torch {output['torch']}, transformers {output['transformers']}, {output['date']}. "
        "`bash benchmarks/gpu.sh --out FOLDER`, one run.",
        "",
    ]
    for name, content in parts.items():
        lines += [f"### {TITLES[name]}", "", INTRODUCTIONS[name], "", *body(name, content), ""]
    return "\n".join(lines).rstrip()


def refuse(message: str) -> NoReturn:
    print(message, file=sys.stderr)
    sys.exit(2)


def write(document: Path, text: str) -> None:
    """Replace the text between the markers."""
    whole = document.read_text(encoding="utf-8")
    if whole.count(BEGIN) != 1 or whole.count(END) != 1 or whole.index(BEGIN) > whole.index(END):
        refuse(f"{document}: needs one line {BEGIN} and, after it, one line {END}")
    before, after = whole.split(BEGIN)[0], whole.split(END)[1]
    document.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}", encoding="utf-8")


def screen(parts: dict[str, Row]) -> str:
    """The tables without prose, for the end of a log."""
    lines: Lines = []
    for name, content in parts.items():
        lines += ["", f"== {name} ({content['seconds']} s, {content['environment']['device']})", *body(name, content)]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--write", type=Path, metavar="MARKDOWN", help="Rewrite the section in this file.")
    arguments = parser.parse_args()
    parts = read(arguments.folder)
    if not arguments.write:
        print(screen(parts))
        return
    if any(content["smoke"] for content in parts.values()):
        refuse(f"{arguments.folder}: holds a --smoke run, whose figures mean nothing; run without --smoke")
    write(arguments.write, section(parts))


if __name__ == "__main__":
    main()
