"""Bad arguments are refused before torch is imported, in one line that names the remedy."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import gda

from ..support.llamas import save_llama

# Runs each command in a fork of one process, which has imported what `gda` imports, and prints what came of it.
IN_CHILD = """
import json, os, sys
sys.argv = ["gda"]  # by which `import gda` knows that the command is run
from gda.cli import main

outcomes = {}
for command, arguments in json.load(sys.stdin).items():
    before, (read, write) = sorted(os.listdir()), os.pipe()
    if (child := os.fork()) == 0:
        os.dup2(write, 2)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.argv, code = ["gda", *arguments], "none"
        try:
            main()
        except SystemExit as ended:
            code = ended.code
        finally:
            sys.stderr.flush()
            os._exit(99 if "torch" in sys.modules or not isinstance(code, int) else code)
    os.close(write)
    with open(read) as pipe:
        error = pipe.read()
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    outcomes[command] = {"code": status, "error": error, "changed": sorted(os.listdir()) != before}
print(json.dumps(outcomes))
"""
# What a user types, and what the line on standard error says.
REFUSED = {
    "convert LLAMA OUT --mode spilt": "--mode spilt is not one of expand, split, map",
    "convert ./missing OUT": "./missing does not exist",
    "convert models/missing OUT": "a Hub id, OWNER/NAME; the folder models here hides a Hub id models/missing",
    "convert missing OUT": "missing does not exist; name a folder, a GGUF file or a Hub id",
    "convert notes.gguf OUT": "notes.gguf is not a GGUF file",
    "convert models OUT": "models/config.json is missing",
    "convert LLAMA ''": "OUT is empty",
    "convert LLAMA models": "models already exists; choose another path or pass --overwrite",
    "convert LLAMA OUT --mode split --calibration none.txt": "--calibration none.txt is not a file",
    "verify GDA LLAMA": "GDA is converted and LLAMA is not; swap them: gda verify LLAMA GDA",
    "grow GDA OUT --signal 0": "--signal 0 is not an integer of at least 2",
    "train GDA OUT --data notes.gguf --lr 1": "there is no option --lr; did you mean --lora-rank or --learning-rate?",
    "train GDA OUT --data notes.gguf --num-epochs 1": "there is no option --num-epochs; did you mean --epochs?",
    "train GDA OUT --data notes.gguf --zzz": "there is no option --zzz; `gda train --help` lists the options",
    "convert LLAMA OUT --no-verfy": "there is no option --no-verfy; did you mean --no-verify or --verify?",
    "train GDA OUT --data missing.txt": "--data missing.txt does not exist; name a file, a folder",
    "train GDA OUT --data notes.gguf --teacher ./none": "--teacher ./none does not exist",
    "train GDA OUT --data nothere": "--data nothere is not a file, nor a dataset on the Hub, which would be OWNER/NAME",
    "convert LLAMA OUT --max-shard-size huge": "--max-shard-size 'huge' is not a size such as 5GB or 400MB",
    "convert LLAMA OUT --ratio banana": "--ratio banana is not a ratio such as 4 or 4:1",
    "convert LLAMA OUT --ratio 2 --noise-heads 2": "--ratio and --noise-heads set the same number",
    "convert LLAMA OUT --calibration notes.gguf": "--calibration is only for --mode split",
    "convert LLAMA .. --no-verify --overwrite": ".. is the source, is inside it or contains it",
    "convert someone/llama .. --overwrite": ".. is the working folder or contains it, and is not replaced",
    "convert LLAMA OUT --effort fast": "--effort is only for --mode split",
    "convert LLAMA OUT --mode expand --calibration-tokens 9": "--calibration-tokens is only for --mode split",
    "verify LLAMA real.gguf": "real.gguf is a GGUF file, which can only be SOURCE; perhaps swap: gda verify real.gguf",
    "grow GDA OUT --depth 2": "--depth 2 is not more than the 2 layers of the source",
    "eval GDA --perplexity notes.gguf --device cuba": "--device cuba is not a device such as cpu, cuda or cuda:0",
    "eval GDA --perplexity notes.gguf --html": "--html writes report.html to the folder of --output; name one",
    "eval GDA --perplexity notes.gguf --limit 5": "--limit belongs to --tasks; name some",
    "eval GDA --diagnostics --num-fewshot 5": "--num-fewshot belongs to --tasks; name some",
    "eval GDA --perplexity notes.gguf --batch-size 8": "--batch-size belongs to --tasks; name some",
    "eval GDA --perplexity notes.gguf --show-prompts 1": "--show-prompts belongs to --tasks; name some",
    "eval GDA --perplexity notes.gguf --metadata {}": "--metadata belongs to --tasks and --diagnostics",
    "convert projector OUT": "projector/config.json is missing",
    "attention GDA --text a --layers 7 --json": "--layers 7 is not between 0 and 1",
    "push GDA me/model --private --public": "--private and --public exclude each other; pass one of them",
    "eval missing/ --perplexity notes.gguf": "missing/ does not exist",
    "eval GDA --perplexity missing.txt": "--perplexity missing.txt is not a file",
    "eval GDA --baseline ./none --perplexity notes.gguf": "--baseline ./none does not exist",
    "attention GDA --text a": "nothing to write",
    "demo --out ''": "OUT is empty",
    "demo --out models": "models already exists; choose another path or pass --overwrite",
    "demo --source ./none": "--source ./none does not exist",
    "convert LLAMA OUT --mode split --kv-layout paired": "--kv-layout is only for --mode expand",
    "convert LLAMA OUT --mode split --qk-rank 4": "--qk-rank can't be combined with --mode split",
    "convert LLAMA OUT --ratio 3": "--ratio 3 does not fit the 4 query heads of the source; possible",
    "convert LLAMA OUT --noise-heads 3": "3 noise heads cannot be added to 4 query heads over 2 KV heads; possible",
    "convert LLAMA OUT --mode split --noise-heads 3": "3 of 4 query heads cannot become noise heads; possible",
    "grow LLAMA OUT --signal 2 --ratio 3": "--ratio 3 does not fit the 4 query heads",
    "convert LLAMA OUT --qk-rank 0": "--qk-rank 0 is below 1",
    "convert GDA OUT": "GDA is already a GDA model; grow it with `gda grow`, train it with `gda train`, or fact",
    "convert LLAMA OUT --push-to-hub a/b/c": "--push-to-hub 'a/b/c' is not a valid repository name",
    "export LLAMA OUT": "LLAMA/config.json has model_type 'llama', so this is not a GDA model",
    "inspect LLAMA": "LLAMA/config.json has model_type 'llama', so this is not a GDA model",
    "serve LLAMA": "LLAMA/config.json has model_type 'llama', so this is not a GDA model",
    "push LLAMA me/model": "LLAMA/config.json has model_type 'llama', so this is not a GDA model",
    "push GDA a/b/c": "'a/b/c' is not a valid repository name",
    "train LLAMA OUT --data notes.gguf": "LLAMA/config.json has model_type 'llama', so this is not a GDA model",
    "train GDA models --data notes.gguf": "models already exists; choose another path or pass --overwrite",
    "train GDA GDA --data notes.gguf --overwrite": "GDA is the model, is inside it or contains it",
    "train GDA LLAMA --data notes.gguf --teacher LLAMA --overwrite": "LLAMA is the teacher LLAMA, is inside it or",
    "train GDA OUT --data notes.gguf --context 99999": "--context 99999 is above 128, the model's max_pos",
    "eval GDA --tasks gda_task,helaswag": "unknown task 'gda_task'; did you mean gda_tasks",
    "eval GDA --tasks gda_tasks --dataset-root ./none": "--dataset-root ./none is not a folder",
    "attention GDA --text a --out notes.gguf": "notes.gguf already exists; choose another path or pass --overwrite",
    "push ./none me/model": "none is not a folder",
    "serve ./none": "./none does not exist",
    "serve --port 8001 GDA": "--port stands where MODEL belongs; options of `transformers serve` come after MODEL",
    "serve GDA --prot 8001": "there is no option --prot; did you mean --port?",
    "convert LLAMA OUT --mode map": "LLAMA is a 'llama' model: --mode map needs a model with noise heads; use --mode",
    "convert LLAMA OUT --mode restore": "LLAMA has no conversion.json of an export with noise heads; omit --mode",
    "fold GDA OUT": "GDA has no qk_rank: its projections are dense, so there is nothing to fold",
    "demo --source GDA": "--source GDA is already a GDA model; name a Llama, Mistral, Qwen2 or Qwen3",
    "train GDA OUT --data notes.gguf --report-to dvclive": "--report-to dvclive is not installed; pip install dvclive",
    "train GDA OUT --data notes.gguf --report-to wandbb": "--report-to wandbb is not installed; use tensorboard, tr",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("arguments")
    save_llama(folder / "LLAMA")
    gda.convert(folder / "LLAMA", folder / "GDA", verify=False)
    (folder / "models").mkdir()
    (folder / "real.gguf").write_bytes(b"GGUF")
    (folder / "projector").mkdir()
    (folder / "projector/mmproj-model-f16.gguf").write_bytes(b"GGUF")
    (folder / "notes.gguf").write_text("These are notes.\n")
    return folder


@pytest.fixture(scope="module")
def outcomes(folder: Path) -> dict[str, dict[str, Any]]:
    """What came of each command."""
    commands = {command: ["" if word == "''" else word for word in command.split()] for command in REFUSED}
    child = [sys.executable, "-c", IN_CHILD]
    ran = subprocess.run(child, input=json.dumps(commands), cwd=folder, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(ran.stdout)


@pytest.mark.sampled
@pytest.mark.parametrize("command", REFUSED)
def test_bad_argument_is_refused(command: str, outcomes: dict[str, dict[str, Any]]) -> None:
    """Exit code 2 and one line, before torch is imported and before anything is written."""
    outcome = outcomes[command]
    (line,) = outcome["error"].splitlines()
    assert REFUSED[command] in line
    assert outcome["code"] == 2
    assert not outcome["changed"]


def test_folder_that_cannot_be_created(folder: Path) -> None:
    """No folder can be created in /proc. The message names the path and the remedy."""
    with pytest.raises(OSError, match=r"/proc/x cannot be created: .*; choose a path that you can write to"):
        gda.convert(folder / "LLAMA", "/proc/x")


def test_wrong_types_in_conversion_json(folder: Path, tmp_path: Path) -> None:
    """conversion.json is untrusted input."""
    grown = tmp_path / "grown"
    gda.grow(folder / "GDA", grown, depth=3, verify=False)
    provenance = grown / "conversion.json"
    provenance.write_text(provenance.read_text().replace('"depth": 3', '"depth": "three"'))
    with pytest.raises(ValueError, match=r"conversion\.json holds an unknown growth or setting"):
        gda.verify(folder / "GDA", grown, method="tensors")
