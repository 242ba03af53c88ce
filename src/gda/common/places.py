"""Checks of the models and files that a user names. Options run them before anything heavy is imported."""

import re
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import TypeVar

from gda.common.dataset_folders import COMPRESSED, READERS
from gda.common.errors import errors_as
from gda.common.files import read_json, refuse_existing

HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")
GGUF_MAGIC = b"GGUF"
GGUF_PART = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf")  # one file of a model that llama.cpp has split
VISION_PROJECTOR = "mmproj"  # in the name of a GGUF file that llama.cpp uses beside a model
ADAPTER_CONFIG = "adapter_config.json"  # in a folder with a LoRA or another adapter of PEFT
REPORTERS = ("tensorboard", "trackio", "wandb")
# The others of transformers that are named as their packages; more of them depend on services of their own.
OTHER_REPORTERS = ("clearml", "codecarbon", "comet_ml", "dvclive", "mlflow", "neptune", "swanlab")
DEVICE = re.compile(r"cpu|mps|cuda(:\d+)?")
IS_GDA = "is already a GDA model"
GDA_REMEDY = "grow it with `gda grow`, train it with `gda train`, or factorize its queries with --qk-rank"
MAX_NAMES = 8  # in a message
T = TypeVar("T")
# Endings by which a mistyped file name is distinguished from the name of a dataset on the Hub.
DATA_ENDINGS = (".txt", ".md", *READERS, *COMPRESSED)


def check_model(location: str | Path) -> None:
    """Check that `location` can be a model: a folder, a GGUF file or a Hub id.

    A Hub id has the form OWNER/NAME, and no local folder OWNER exists.

    Raises:
        FileNotFoundError, ValueError: naming the location and the alternatives.
    """
    if not str(location).strip():  # an empty path would be the current folder
        raise ValueError("the name of a model is empty; name a folder, a Hub id or a GGUF file")
    path = Path(location)
    if path.is_dir():
        if gguf_file(path) is None and not any((path / name).is_file() for name in ("config.json", ADAPTER_CONFIG)):
            raise FileNotFoundError(f"{path / 'config.json'} is missing; a model folder must have one")
    elif path.is_file():
        if gguf_file(path) is None:
            if path.suffix == ".gguf":
                raise ValueError(f"{path} is not a GGUF file: it does not begin with the letters GGUF")
            raise ValueError(f"{path} is neither a model folder nor a GGUF file")
    elif not is_hub_id(location):
        remedy = "name a folder, a GGUF file or a Hub id, OWNER/NAME"
        if HUB_ID.fullmatch(str(location)) and path.parent.is_dir():
            remedy += f"; the folder {path.parent} here hides a Hub id {location}"
        raise FileNotFoundError(f"{location} does not exist; {remedy}")


def gguf_file(location: str | Path) -> Path | None:
    """The GGUF file that `location` names: a file, whatever its name, or the only model in a folder of GGUF files.

    Raises:
        ValueError: for a folder of several, naming them.
    """
    path = Path(location)
    if path.is_file():
        with open(path, "rb") as opened:
            return path if opened.read(len(GGUF_MAGIC)) == GGUF_MAGIC else None
    if not path.is_dir() or (path / ADAPTER_CONFIG).is_file() or any(path.glob("*.safetensors")):
        return None
    models: dict[str, Path] = {}
    for file in sorted(file for file in path.glob("*.gguf") if VISION_PROJECTOR not in file.name.lower()):
        match = GGUF_PART.fullmatch(file.name)
        models.setdefault(match[1] if match else file.name, file)  # the parts of a split model are one
    files = list(models.values())
    if len(files) > 1:
        names = ", ".join(file.name for file in files[:MAX_NAMES]) + (", …" if len(files) > MAX_NAMES else "")
        raise ValueError(f"{path} holds {len(files)} GGUF models, so name one, such as {files[0]}; they are {names}")
    return files[0] if files else None


def is_hub_id(location: str | Path) -> bool:
    """Whether `location`, which is no file or folder, can be a Hub id."""
    name = str(location)
    return bool(HUB_ID.fullmatch(name)) and not name.endswith(".gguf") and not Path(name).parent.is_dir()


def config_entry(location: str | Path, name: str, kind: type[T]) -> T | None:
    """An entry of the config.json in a model folder; None if it can't be told at a glance."""
    config = Path(location) / "config.json"
    read = read_json(config) if config.is_file() else None
    value = read.get(name) if isinstance(read, dict) else None
    return value if isinstance(value, kind) else None


def layers_of(location: str | Path) -> int | None:
    """The number of layers of a model folder; None if it can't be told at a glance."""
    return config_entry(location, "num_hidden_layers", int)


def check_gda_model(location: str | Path) -> None:
    """`check_model` for a GDA model. The type of one on the Hub is checked later."""
    check_model(location)
    if (model_type := config_entry(location, "model_type", str)) not in (None, "gda"):
        config = Path(location) / "config.json"
        raise ValueError(
            f"{config} has model_type {model_type!r}, so this is not a GDA model; convert it with `gda convert`"
        )


def check_plain_model(location: str | Path) -> None:
    """`check_model` for a model that is not a GDA model yet. The type of one on the Hub is checked later."""
    check_model(location)
    refuse_gda(location, "name a Llama, Mistral, Qwen2 or Qwen3")


def refuse_gda(location: str | Path, remedy: str) -> None:
    """Raise ValueError with the remedy for the folder of a GDA model. An adapter of one is allowed."""
    if config_entry(location, "model_type", str) == "gda" and not (Path(location) / ADAPTER_CONFIG).is_file():
        raise ValueError(f"{location} {IS_GDA}; {remedy}")


def check_reporter(name: str) -> None:
    """Raise ValueError unless there is a package `name`, to which transformers' Trainer may report."""
    if not name.isidentifier() or find_spec(name) is None:
        remedy = f"pip install {name}" if name in REPORTERS + OTHER_REPORTERS else f"use {', '.join(REPORTERS)}"
        raise ValueError(f"{name} is not installed; {remedy}")


def check_device(device: str) -> None:
    """Raise ValueError unless `device` is the name of a device; whether it exists takes PyTorch to tell."""
    if not DEVICE.fullmatch(device):
        raise ValueError(f"{device} is not a device such as cpu, cuda or cuda:0")


def check_served(location: str) -> None:
    """`check_gda_model` for a name that may end with @REVISION, and that is no option."""
    if location.startswith("-"):
        raise ValueError(f"{location} stands where MODEL belongs; options of `transformers serve` come after MODEL")
    check_gda_model(at_revision(location)[0])


def at_revision(location: str) -> tuple[str, str | None]:
    """A Hub id and its revision, for OWNER/NAME@REVISION; a path, which may contain an @, and None."""
    if "@" not in location or Path(location).exists():
        return location, None
    name, _, revision = location.rpartition("@")
    return name, revision or None


def check_folder(path: str | Path) -> None:
    """Raise FileNotFoundError unless `path` is a folder."""
    if not Path(path).is_dir():
        raise FileNotFoundError(f"{path} is not a folder; name one that holds a GDA model")
    check_gda_model(path)


def check_repository(name: str) -> None:
    """Raise ValueError unless the Hub allows `name` as the name of a repository."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    with errors_as(f"{name!r} is not a valid repository name", HFValidationError):
        validate_repo_id(name)


def check_text(path: str | Path) -> None:
    """Raise FileNotFoundError unless `path` is a file."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path} is not a file")


def check_data(name: str) -> None:
    """Raise FileNotFoundError if `name` neither exists nor can be a dataset OWNER/NAME[:CONFIG[:SPLIT]] on the Hub."""
    repository = name.split(":", 1)[0]
    if Path(name).exists():  # perhaps a pipe or a device, which is refused when it is opened
        return
    looks_like_a_path = name.startswith((".", "/", "~")) or repository.count("/") > 1
    if not repository or looks_like_a_path or Path(repository).suffix in DATA_ENDINGS:
        raise FileNotFoundError(f"{name} does not exist; name a file, a folder or a dataset OWNER/NAME")
    if not HUB_ID.fullmatch(repository):
        raise FileNotFoundError(f"{name} is not a file, nor a dataset on the Hub, which would be OWNER/NAME")


def check_output(out: str | Path, overwrite: bool, option: str) -> Path:
    """The path of a file to write; an error that names the option if it cannot be written there."""
    path = Path(out)
    if not str(out) or path.is_dir():
        raise ValueError(f"{option} {str(out) or '(empty)'} is not a file; name one, such as report.html")
    refuse_existing(path, overwrite)
    check_writable(path.parent, option)
    return path


def check_writable(folder: Path, option: str) -> None:
    """Try to write to `folder`, or to the nearest folder above it that exists; ValueError if that fails."""
    existing = next(place for place in (folder.absolute(), *folder.absolute().parents) if place.exists())
    try:
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        raise ValueError(f"{option}: cannot write to {existing}: {error.strerror}") from None
