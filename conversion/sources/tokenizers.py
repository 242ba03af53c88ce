"""The one place where tokenizers are read."""

import copy
from pathlib import Path

from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase

from gda.common.assets import VOCABULARY_PATTERNS, own_code
from gda.common.errors import first_line
from gda.common.extras import needed_by
from gda.common.screen import quiet_transformers

# Every release of transformers has this class, for every model type. It runs tokenizer.json as it is.
ANY_TOKENIZER = "PreTrainedTokenizerFast"
SENTENCEPIECE_START = b"\x0a"  # the key of a protobuf's first field; a `tokenizer.model` of tiktoken is base64


class NoTokenizerError(ValueError):
    """A tokenizer cannot be read. `reason` says why without a path, and `detail` is transformers' own message."""

    def __init__(self, location: str | Path, reason: str, detail: str | None = None):
        self.reason, self.detail = reason, detail
        super().__init__(f"{location}: {reason}{'' if detail is None else f': {detail}'}")


def read_tokenizer(
    location: str | Path, *, config: PreTrainedConfig | None = None, hub_id: str | None = None
) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model folder or a Hub id. Code beside it is never run.

    transformers chooses the tokenizer class by `tokenizer_class` of tokenizer_config.json, by the `model_type` of
    config.json and, for some models, by the Hub id. So the same files can give other token ids elsewhere. Whether
    mistral-common is installed makes no difference here.

    Args:
        location: A folder or a Hub id.
        config: The config of the model. Default: config.json of the folder.
        hub_id: The repository that the folder was downloaded from.

    Raises:
        ImportError: naming the remedy, if the files need a package that is missing.
        NoTokenizerError: if there is no tokenizer, or it cannot be loaded without its own code.
    """
    folder = Path(location)
    if folder.is_dir():
        if not has_vocabulary(folder) and not own_code(folder):
            raise NoTokenizerError(location, "the model holds no tokenizer")
        require_packages(folder)
    try:
        with quiet_transformers():
            if hub_id is not None:
                config = copy.deepcopy(config or AutoConfig.from_pretrained(location, trust_remote_code=False))
                config._name_or_path = hub_id
            return AutoTokenizer.from_pretrained(location, config=config, mistral_format=False, trust_remote_code=False)
    except Exception as error:  # transformers has no common error for this
        if folder.is_dir() and (code := own_code(folder)):
            raise NoTokenizerError(
                location, f"the tokenizer needs its own code ({code[0]}), which is not run"
            ) from None
        raise NoTokenizerError(location, "the tokenizer cannot be loaded", first_line(error)) from None


def has_vocabulary(folder: Path) -> bool:
    """Whether the folder holds a tokenizer's vocabulary."""
    return any(any(folder.glob(pattern)) for pattern in VOCABULARY_PATTERNS)


def require_packages(folder: Path) -> None:
    """Raise ImportError, naming the remedy, if a package is missing that translates the tokenizer's files."""
    model = folder / "tokenizer.model"
    if (folder / "tokenizer.json").is_file() or not model.is_file():
        return
    with needed_by(f"reading {model}, which has no tokenizer.json beside it,", "tokenizers"):
        with open(model, "rb") as file:
            is_sentencepiece = file.read(1) == SENTENCEPIECE_START
        if is_sentencepiece:
            import sentencepiece  # noqa: F401, I001 - the package that more people know is named first
            import google.protobuf  # noqa: F401
        else:
            import tiktoken  # noqa: F401
