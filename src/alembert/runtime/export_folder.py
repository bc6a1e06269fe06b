"""The folder of an exported model: never half-written, and never lost when another export replaces it."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from alembert.common.errors import InputError
from alembert.runtime.calibration_file import CALIBRATION_FILE
from alembert.runtime.manifest import MANIFEST_FILE

_EXPORTING, _REPLACING = ".alembert-export.", ".alembert-replacing."
"""Before the names of folders that are there while a model is exported: beside a new folder, in one that was there."""
_EXPORTED = {
    MANIFEST_FILE,
    "README.md",
    "quality.json",
    CALIBRATION_FILE,
    "special_tokens_map.json",
    "added_tokens.json",
}
_EXPORTED_PATTERNS = ("*.onnx", "tokenizer*", "vocab.*", "merges.txt", "*.model")
"""What belongs to an export that is replaced; all else in its folder stays."""


def check_output(output: str | Path, overwrite: bool) -> Path:
    """The folder to export to, as an absolute path. What a killed export has left there is put in order first.

    Raises:
        InputError: it is a file, holds something else than an exported model, or holds one and `overwrite` is not set;
            nothing can be written there.
    """
    folder = Path(output).resolve()
    # Unlike Path.exists it does not raise where a folder above cannot be searched.
    there = next(path for path in (folder, *folder.parents) if os.access(path, os.F_OK))
    if not there.is_dir():
        raise InputError(f"{output}: {there} is a file: name a folder for the exported model")
    if not os.access(there, os.W_OK | os.X_OK):
        raise InputError(f"{output}: nothing can be written to {there}: choose another folder")
    if there != folder:
        return folder
    _tidy(folder)
    if not _content(folder):
        return folder
    if not (folder / MANIFEST_FILE).is_file():
        # Nothing but an export is ever replaced: a slip in the path must not cost a run or a home folder.
        raise InputError(f"{output}: holds files and no exported model: choose another folder")
    if not overwrite:
        raise InputError(
            f"{output}: holds an exported model already: choose another folder, or give --overwrite"
        )
    return folder


@contextmanager
def written_whole(output: Path) -> Iterator[Path]:
    """Yields an empty folder, whose content is `output`'s when the block ends well; else `output` stays as it was."""
    there = output.is_dir()
    if not there:
        output.parent.mkdir(parents=True, exist_ok=True)
    where = (output, _REPLACING) if there else (output.parent, _EXPORTING)
    temporary = Path(tempfile.mkdtemp(dir=where[0], prefix=where[1]))
    folder = temporary / output.name
    folder.mkdir()
    try:
        yield folder
        if there:
            _replace_content(output, folder)
        else:
            folder.replace(output)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _replace_content(output: Path, folder: Path) -> None:
    """Moves what lies in `folder` to `output`, in place of the export there, which comes back when that fails."""
    before = Path(tempfile.mkdtemp(dir=output, prefix=_REPLACING))

    def is_manifest(path: Path) -> bool:
        return path.name == MANIFEST_FILE

    # Without its manifest a folder is no export: nobody reads it while it is neither the old nor the new one.
    new = sorted(folder.iterdir(), key=is_manifest)
    old = _of_an_export(output, {path.name for path in new})
    moves = [(path, before / path.name) for path in sorted(old, key=is_manifest, reverse=True)]
    moves += [(path, output / path.name) for path in new]
    try:
        for path, target in moves:
            path.rename(target)
    except BaseException:
        # The manifest is the last: where something cannot be put back, `_tidy` goes on with what is set aside.
        with suppress(OSError):
            for path, target in reversed(moves):
                if target.exists() and not path.exists():
                    target.rename(path)
            before.rmdir()
        raise
    shutil.rmtree(before, ignore_errors=True)


def _of_an_export(folder: Path, new: set[str]) -> list[Path]:
    """What an export, its tokenizer and its measurements left there, and what bears a new file's name."""
    return [
        path
        for path in _content(folder)
        if path.name in new | _EXPORTED or any(path.match(pattern) for pattern in _EXPORTED_PATTERNS)
    ]


def _content(folder: Path) -> list[Path]:
    """What lies there, but for folders of an export at work and for what a file system keeps at its root."""
    return [
        path
        for path in folder.iterdir()
        if not path.name.startswith(_REPLACING) and path.name != "lost+found"
    ]


def _tidy(folder: Path) -> None:
    """Removes what a killed export has left there; a model that it had begun to replace is put back."""
    for leftover in folder.glob(f"{_REPLACING}*"):
        if (leftover / MANIFEST_FILE).is_file() and not (folder / MANIFEST_FILE).exists():
            for path in leftover.iterdir():
                path.replace(folder / path.name)
        shutil.rmtree(leftover, ignore_errors=True)
