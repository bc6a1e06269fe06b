"""Augmented rows as a TSV file that `load_task` reads, and the record beside it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from datasets import Dataset

from alembert.common.errors import InputError
from alembert.common.files import read_json, replacing, write_json
from alembert.data.task import Task

_BREAKS = re.compile(r"[\t\r\n]+")
_BATCH_ROWS = 10_000


def record_path(path: Path) -> Path:
    """Where the record of the augmented file `path` lies; never mistaken for a split of a task's folder."""
    return path.with_name(f"{path.stem}.augmentation.json")


def check_output(path: Path, configuration: dict[str, Any], *, overwrite: bool, resume: bool) -> bool:
    """Whether the file is there already, made with the same configuration.

    Raises:
        InputError: the name does not end in .tsv, or something else is there and is not to be overwritten.
    """
    if path.suffix.lower() != ".tsv":
        raise InputError(f"--output {path}: give a name that ends in .tsv")
    if not path.exists() or overwrite:
        return False
    record = record_path(path)
    if record.is_file() and read_json(record).get("configuration") == configuration:
        if resume:
            return True
        raise InputError(
            f"{path}: was made with these very options already: give --overwrite to make it again"
        )
    raise InputError(
        f"{path}: the file exists and was not made by this command with these options; remove it, name another, "
        "or give --overwrite"
    )


def check_label_names(task: Task, path: Path, label_separator: str = "|") -> None:
    """Raises InputError when a label's name holds a tab, a line break or, of several a row, the separator."""
    several = task.problem_type == "multi_label_classification"
    for name in task.label_names:
        if _BREAKS.search(name) or (several and label_separator in name):
            raise InputError(f"The label {name!r} cannot be written to {path}: it holds a separator.")


def write_augmented(
    dataset: Dataset, task: Task, path: str | Path, record: dict[str, Any], label_separator: str = "|"
) -> None:
    """Writes ``label``, ``text`` and, of pairs, ``text_pair`` to a TSV file, and `record` beside it.

    Labels are written by name, scores as numbers, several labels of a row joined by `label_separator`. Tabs
    and line breaks within a text become spaces.

    Raises:
        InputError: as `check_label_names`.
    """
    path = Path(path)
    check_label_names(task, path, label_separator)
    several = task.problem_type == "multi_label_classification"
    fields = [name for name in ("text", "text_pair") if name in dataset.column_names]

    def label(value: Any) -> str:
        if task.problem_type == "regression":
            return repr(float(value))
        if several:
            present = (name for name, on in zip(task.label_names, value, strict=True) if on)
            return label_separator.join(present)
        name: str = task.label_names[value]
        return name

    with replacing(path) as temporary, temporary.open("w", encoding="utf-8", newline="\n") as file:
        file.write("\t".join(["label", *fields]) + "\n")
        for batch in dataset.iter(batch_size=_BATCH_ROWS):
            for value, *texts in zip(batch["labels"], *(batch[name] for name in fields), strict=True):
                file.write("\t".join([label(value), *(_BREAKS.sub(" ", text) for text in texts)]) + "\n")
    write_json(record_path(path), record)
