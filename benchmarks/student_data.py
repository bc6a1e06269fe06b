"""Makes the cuts of public data sets that the student study trains on, always the same.

    python benchmarks/student_data.py DATA OUTPUT

`DATA` holds glue_sst2, glue_stsb, glue_cola, glue_rte and lcqmc as published (TSV with a header). SST-2 and STS-B keep
4,000 and 3,000 rows of train. CoLA and RTE have no public test labels: their dev file becomes test, and 800 and 290
rows of train become dev; 4,000 of CoLA's others are train. LCQMC's published test file serves as train (4,000 rows),
its dev file as test (3,000) and dev (800).
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Sequence
from pathlib import Path

from alembert.common.files import write_text

SEED = 1


def main(arguments: Sequence[str] | None = None) -> None:
    """Writes the folders; one that is there is written anew, with the same rows."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("data", type=Path)
    parser.add_argument("output", type=Path)
    given = parser.parse_args(arguments)
    data, output = given.data, given.output
    for name, kept in (("sst2", 4000), ("stsb", 3000)):
        header, train = read(data / f"glue_{name}" / "train.tsv")
        whole = {split: read(data / f"glue_{name}" / f"{split}.tsv")[1] for split in ("dev", "test")}
        write(output / f"{name}-{kept}", header, {"train": shuffled(train)[:kept]} | whole)
    # CoLA and RTE are drawn one after the other from one stream of random numbers.
    numbers = random.Random(SEED)
    for name, held_out in (("cola", 800), ("rte", 290)):
        header, rows = read(data / f"glue_{name}" / "train.tsv")
        rows = shuffled(rows, numbers)
        splits = {
            "train": rows[held_out:],
            "dev": rows[:held_out],
            "test": read(data / f"glue_{name}" / "dev.tsv")[1],
        }
        write(output / name, header, splits)
        if name == "cola":
            write(output / "cola-4000", header, splits | {"train": splits["train"][:4000]})
    header, published_test = read(data / "lcqmc" / "test.tsv")
    published_dev = read(data / "lcqmc" / "dev.tsv")[1]
    write(output / "lcqmc", header, {"train": published_test, "test": published_dev})
    held_out_rows = shuffled(published_dev)
    splits = {
        "train": shuffled(published_test)[:4000],
        "dev": held_out_rows[3000:3800],
        "test": held_out_rows[:3000],
    }
    write(output / "lcqmc-4000", header, splits)


def read(path: Path) -> tuple[str, list[str]]:
    """Header and rows of a TSV file."""
    header, *rows = [line for line in path.read_text(encoding="utf-8").split("\n") if line]
    return header, rows


def shuffled(rows: Sequence[str], numbers: random.Random | None = None) -> list[str]:
    """The rows in a random order."""
    mixed = list(rows)
    (numbers or random.Random(SEED)).shuffle(mixed)
    return mixed


def write(folder: Path, header: str, splits: dict[str, list[str]]) -> None:
    """One TSV file a split."""
    folder.mkdir(parents=True, exist_ok=True)
    for split, rows in splits.items():
        write_text(folder / f"{split}.tsv", "\n".join([header, *rows]) + "\n")


if __name__ == "__main__":
    main()
