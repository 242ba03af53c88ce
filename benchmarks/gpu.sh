#!/usr/bin/env bash
# Everything that a GPU has to show, in one command and at most --budget seconds. `--help` says more.
set -euo pipefail

usage() {
  cat <<'HELP'
usage: bash benchmarks/gpu.sh [--out DIR] [--budget SECONDS] [--only PART] [--smoke]

Runs this checkout on one GPU, with the python3, torch and transformers that are there and no network:

  correctness  logits, gradients and greedy text of each attention implementation and cache
  speed        one layer and whole models against Llama and DiffLlama; peak memory
  sweep        ratios of signal to noise heads on key retrieval, trained from scratch, with the time that is left

  --out DIR         folder of gpu_correctness.json, gpu_speed.json and gpu_sweep.json (default: gpu-results)
  --budget SECONDS  for everything; default 470. Correctness gets at most 120 of it, speed 210, sweep the rest
  --only PART       correctness, speed or sweep; with the whole budget
  --smoke           tiny sizes, on a CPU too: does everything run? Its figures mean nothing
  --python PROGRAM  the Python that has torch (default: python3)

Each part is a process of its own and saves its file after every row, so a crash or a kill loses little; what it
prints is also in gpu_PART.log. Wheels in a folder .whl at the top of the checkout are unpacked into a temporary folder
and used. A table of everything ends the output; `report.py DIR --write docs/performance.md` puts it into the
documentation.
HELP
}

root=$(cd "$(dirname "$0")/.." && pwd)
out=gpu-results budget=470 only="" smoke="" python=python3
while [ $# -gt 0 ]; do
  case "$1" in
    --out) out=${2:?--out needs a folder}; shift 2 ;;
    --budget) budget=${2:?--budget needs seconds}; shift 2 ;;
    --only) only=${2:?--only needs a part}; shift 2 ;;
    --python) python=${2:?--python needs a program}; shift 2 ;;
    --smoke) smoke=--smoke; shift ;;
    -h | --help) usage; exit 0 ;;
    *) echo "gpu.sh: unknown option $1; see --help" >&2; exit 2 ;;
  esac
done
[[ "$budget" =~ ^[0-9]+$ ]] || { echo "gpu.sh: --budget $budget must be whole seconds" >&2; exit 2; }
case "$only" in
  "" | correctness | speed | sweep) ;;
  *) echo "gpu.sh: --only $only must be correctness, speed or sweep" >&2; exit 2 ;;
esac

scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
mkdir -p "$out" "$scratch/tree/gda" "$scratch/wheels"

# The rooms where the import package has them: a tree of links stands in for an installation.
ln -s "$root"/src/gda/* "$scratch/tree/gda"/
for room in configuration modeling_gda conversion training eval; do ln -s "$root/$room" "$scratch/tree/gda/$room"; done
for wheel in "$root"/.whl/*.whl; do
  [ -e "$wheel" ] && "$python" -m zipfile -e "$wheel" "$scratch/wheels"
done
export PYTHONPATH="$scratch/tree:$root/benchmarks:$root/tests/support:$scratch/wheels${PYTHONPATH:+:$PYTHONPATH}"
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false PYTHONUNBUFFERED=1

left() { echo $((budget - SECONDS)); }
failed=0

part() { # name, seconds at most
  local seconds=$2
  [ "$(left)" -lt "$seconds" ] && seconds=$(left)
  if [ "$seconds" -lt 30 ]; then
    echo "== $1: skipped, $seconds s are left"
    return
  fi
  local begun=$SECONDS
  echo "== $1: at most $seconds s"
  # The part ends by itself, 5 s early; one that hangs is ended, so that the next has its time.
  timeout -k 5 "$seconds" "$python" "$root/benchmarks/gpu/$1.py" --out "$out" --budget $((seconds - 5)) $smoke 2>&1 |
    tee "$out/gpu_$1.log" || { echo "== $1: ended with exit code $?"; failed=1; }
  echo "== $1: $((SECONDS - begun)) s; $(left) s are left"
}

if [ -n "$only" ]; then
  part "$only" "$budget"
else
  part correctness 120
  part speed 210
  part sweep $(($(left) - 8)) # so that the table is printed within the budget
fi
"$python" "$root/benchmarks/gpu/report.py" "$out"
exit $failed
