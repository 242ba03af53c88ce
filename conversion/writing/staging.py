"""Create a model folder: fill it under another name, and rename it when it is whole."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from gda.common.errors import CheckFailed
from gda.common.files import StagedFolder
from gda.conversion.writing.stream import MANIFEST_FILE


@contextlib.contextmanager
def staged_model(
    out: Path, *, overwrite: bool = False, resumable: bool = False, resume: bool = False
) -> Iterator[Path]:
    """Yield a folder to fill by `write_checkpoint`, and rename it to `out` when the block ends.

    If the block fails, the folder is removed. Resumable work is kept if it is interrupted, or if continuing it fails,
    unless its result failed a check. Errors are those of `StagedFolder`.
    """
    staged = StagedFolder(out, overwrite=overwrite, resume=resume, resumable=resumable)
    try:
        yield staged.folder
        (staged.folder / MANIFEST_FILE).unlink()
        staged.finish()
    except BaseException as error:
        interrupted = isinstance(error, KeyboardInterrupt) or (resume and not isinstance(error, CheckFailed))
        staged.keep() if resumable and interrupted else staged.discard()
        raise
