"""Making a model's folder: filled beside its place, and in its place only when it is whole."""

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
    """Give a folder to fill by `write_checkpoint` and what belongs beside it; rename it to `out` when the block ends.

    If the block fails the folder is removed. What a resumable work has done so far is kept when it is interrupted, and
    when going on with it fails, unless it turned out to be wrong.

    Args:
        out: The place.
        overwrite: Replace what is there.
        resumable: Whether the work can go on from what an earlier process finished.
        resume: Whether it does, this time.

    Raises:
        FileExistsError, BlockingIOError: as `StagedFolder`.
    """
    staged = StagedFolder(out, overwrite=overwrite, resume=resume)
    try:
        yield staged.folder
        (staged.folder / MANIFEST_FILE).unlink()
        staged.finish()
    except BaseException as error:
        interrupted = isinstance(error, KeyboardInterrupt) or (resume and not isinstance(error, CheckFailed))
        staged.keep() if resumable and interrupted else staged.discard()
        raise
