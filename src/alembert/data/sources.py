"""Finds the tables of a task: a folder of splits, a single file, or a data set of the hub."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from alembert.common.errors import InputError
from alembert.data.cache import quiet_unless_terminal
from alembert.data.reading import FORMATS, Table, arrow_rows, open_table

_HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*(:[^/]+)?|:[^/]+)")

SPLIT_NAMES = {
    "train": ("train",),
    "dev": ("dev", "valid", "validation", "val", "eval"),
    "test": ("test",),
}


def open_splits(source: str | Path, required_splits: Sequence[str]) -> dict[str, Table]:
    """The tables of `source` by split ("train", "dev", "test", in this order).

    A folder's splits are its files ``train.*``, ``dev.*`` (or ``valid``, ``validation``, ``val``, ``eval``)
    and ``test.*`` with a known ending, else those with ``_matched`` behind the name (MNLI); other files
    are left alone. A single file is "train" if that is required, else the first split required, else "test".
    Where no such path is, `source` is taken for a data set of the hub, ``organisation/name``,
    ``name:configuration`` or both.

    Raises:
        InputError: nothing is there, a folder holds no split or two files for one, or a file is unusable.
    """
    path = Path(source)
    if path.is_dir():
        return _folder(path)
    if path.exists():
        name = "train" if "train" in required_splits else next(iter(required_splits), "test")
        return {name: open_table(path)}
    text = str(source)
    if not _HUB_ID.fullmatch(text) or path.suffix.lower() in FORMATS:
        hub = "" if "/" in text or "." in text else " A data set of the hub is named organisation/name."
        raise InputError(f"{text}: no such file or folder.{hub}")
    return _hub(text)


def _folder(folder: Path) -> dict[str, Table]:
    files = sorted(path for path in folder.iterdir() if path.suffix.lower() in FORMATS and path.is_file())
    tables = {}
    for split, names in SPLIT_NAMES.items():
        # MNLI has two dev and test splits; the matched ones are of the domains of train.
        found = [path for path in files if path.stem.lower() in names] or [
            path for path in files if path.stem.lower() in [f"{name}_matched" for name in names]
        ]
        if len(found) > 1:
            listed = ", ".join(path.name for path in found)
            raise InputError(f"{folder}: {len(found)} files for the {split} split ({listed}); keep one.")
        if found:
            tables[split] = open_table(found[0])
    if not tables:
        there = ", ".join(path.name for path in sorted(folder.iterdir())[:10]) or "nothing"
        raise InputError(
            f"{folder}: no train, dev or test file (e.g. train.tsv; endings: {', '.join(FORMATS)}); "
            f"there is {there}."
        )
    return tables


def _hub(source: str) -> dict[str, Table]:
    import datasets
    from huggingface_hub import HfApi, constants

    name, _, configuration = source.partition(":")
    try:
        if not constants.HF_HUB_OFFLINE:
            # Loading tries for half a minute to reach a hub that cannot be reached; this tells at once.
            HfApi().dataset_info(name, timeout=10)
        with quiet_unless_terminal():
            loaded = datasets.load_dataset(name, configuration or None)
    except Exception as error:  # the hub's client raises many kinds, offline and online
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(
            f"{source}: no such file or folder, and the hub gave no data set of that name: {reason}"
        ) from error
    tables = {}
    for split, names in SPLIT_NAMES.items():
        candidates = [*names, *(f"{name}_matched" for name in names)]
        found = next((loaded[candidate] for candidate in candidates if candidate in loaded), None)
        if found is not None and found.num_rows and not _labels_are_hidden(found):
            tables[split] = Table(
                source=f"{source} ({split})",
                columns=tuple(found.column_names),
                content_key=f"hub-{found._fingerprint}",
                attempt=partial(arrow_rows, partial(_batches, found)),
                class_names={
                    name: known
                    for name, feature in found.features.items()
                    if (known := _class_names(feature)) is not None
                },
            )
    if not tables:
        raise InputError(f"{source}: no train, dev or test split with labels; there are {', '.join(loaded)}.")
    return tables


def _class_names(feature: Any) -> tuple[str, ...] | None:
    """The names behind a column's numbers, or behind those of its lists; None where it has none."""
    inner = getattr(feature, "feature", feature)
    names = getattr(inner, "names", None)
    return None if names is None else tuple(names)


def _named(column: pa.ChunkedArray, names: pa.Array) -> pa.Array:
    """Numbers, or lists of them, as names; a negative number stands for a label that is missing."""
    array = column.combine_chunks()
    if isinstance(array, pa.ChunkedArray):
        array = pa.concat_arrays(array.chunks) if array.num_chunks else pa.array([], array.type)
    if pa.types.is_fixed_size_list(array.type):
        array = array.cast(pa.list_(array.type.value_type))
    if pa.types.is_list(array.type) or pa.types.is_large_list(array.type):
        kind = type(array)
        return kind.from_arrays(
            array.offsets, _named(pa.chunked_array([array.values]), names), mask=array.is_null()
        )
    return names.take(pc.if_else(pc.less(array, 0), None, array))


def _labels_are_hidden(dataset: Any) -> bool:
    """Benchmarks publish test splits whose labels are all -1."""
    import datasets

    return any(
        isinstance(feature, datasets.ClassLabel) and set(dataset.unique(name)) == {-1}
        for name, feature in dataset.features.items()
    )


def _batches(dataset: Any, wanted: Sequence[str]) -> Iterator[pa.Table]:

    selected = dataset.select_columns(list(wanted))
    for batch in selected.with_format("arrow").iter(batch_size=4096):
        for name in wanted:
            feature = dataset.features[name]
            if class_names := _class_names(feature):
                batch = batch.set_column(  # noqa: PLW2901
                    batch.column_names.index(name), name, _named(batch[name], pa.array(class_names))
                )
        yield batch
