"""`alembert augment`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from alembert.cli import options as o


def augment(
    data: o.DataOption,
    model: Annotated[
        str,
        typer.Option(help="Folder or hub id of a model for masked language modelling, e.g. the teacher's."),
    ],
    output: Annotated[Path, typer.Option("--output", help="The TSV file to write.")],
    vectors: Annotated[
        Path | None, typer.Option(help="Word vectors in GloVe's text format, for words of several pieces.")
    ] = None,
    copies: Annotated[int | None, typer.Option(help="Varied copies of each text; 20 unless given.")] = None,
    probability: Annotated[
        float | None, typer.Option(help="Chance of a word to be replaced; 0.4 unless given.")
    ] = None,
    candidates: Annotated[
        int | None, typer.Option(help="Words that a replacement is drawn from; 15 unless given.")
    ] = None,
    context: Annotated[
        str | None,
        typer.Option(help="single: the masked text alone is read; pair: the unchanged text beside it."),
    ] = None,
    skip_stop_words: Annotated[bool, typer.Option(help="Leave function words in their places.")] = True,
    bf16: Annotated[
        bool | None, typer.Option(help="Run the model in bfloat16; where the hardware has it unless given.")
    ] = None,
    max_vectors: Annotated[int, typer.Option(min=2, help="Lines of the word vectors to read.")] = 100_000,
    split: Annotated[str, typer.Option(help="The split of a folder or hub data set.")] = "train",
    config: o.ConfigOption = None,
    task: o.TaskOption = None,
    text_column: o.TextColumnOption = None,
    text_pair_column: o.PairColumnOption = None,
    label_column: o.LabelColumnOption = None,
    problem_type: o.ProblemTypeOption = None,
    label_separator: o.LabelSeparatorOption = None,
    label_type: o.LabelTypeOption = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Masked texts in a forward pass.")] = 64,
    max_length: Annotated[
        int | None, typer.Option(help="Tokens of a text that the model reads; 128 unless given.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Of all draws.")] = None,
    resume: Annotated[
        o.Resume,
        typer.Option(help="auto goes on after the last chunk of an interrupted run; never begins anew."),
    ] = o.Resume.auto,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the file.")] = False,
    json_output: o.JsonOption = False,
) -> None:
    """Writes a task's texts and varied copies of them, with words replaced by others that fit."""
    o.quiet_libraries()
    from alembert.data.augmentation import AugmentationOptions
    from alembert.data.augmentation import augment as run_augment
    from alembert.data.augmentation.vectors import load_word_vectors
    from alembert.data.augmentation.writing import (
        check_label_names,
        check_output,
        record_path,
        write_augmented,
    )
    from alembert.models.loading import load_masked_lm, load_tokenizer
    from alembert.training.settings import bf16_pays, validated

    given = {
        "copies": copies,
        "probability": probability,
        "candidates": candidates,
        "context": context,
        "max_length": max_length,
        "seed": seed,
    }
    options = validated(
        AugmentationOptions,
        {name: value for name, value in given.items() if value is not None}
        | {"skip_stop_words": skip_stop_words, "bf16": bf16_pays() if bf16 is None else bf16},
        "augmentation option",
    )
    loaded, rows = _load(
        data,
        split,
        preset=task,
        text_column=text_column,
        text_pair_column=text_pair_column,
        label_column=label_column,
        problem_type=problem_type,
        label_separator=label_separator,
        label_type=label_type,
        seed=options.seed,
    )
    check_label_names(loaded, output, label_separator or "|")
    configuration = {
        "data": data,
        "split": split,
        "rows_fingerprint": rows._fingerprint,
        "model": _identity(model),
        "vectors": None if vectors is None else _file_identity(vectors),
        "max_vectors": max_vectors,
        "label_separator": label_separator,
        **options.model_dump(),
    }
    if not check_output(output, configuration, overwrite=overwrite, resume=resume is o.Resume.auto):
        masked_lm, tokenizer = load_masked_lm(model), load_tokenizer(model)
        augmented = run_augment(
            rows,
            _on_device(masked_lm),
            tokenizer,
            None if vectors is None else load_word_vectors(vectors, max_vectors),
            options,
            batch_size=batch_size,
            resume=resume is o.Resume.auto,
        )
        record = {
            "configuration": configuration,
            "rows": {"source": rows.num_rows, "augmented": augmented.num_rows},
            "problem_type": loaded.problem_type,
            "label_names": list(loaded.label_names),
            "versions": _versions(),
        }
        write_augmented(augmented, loaded, output, record, label_separator or "|")
    _report(output, record_path(output), json_output)


def _load(data: str, split: str, **columns: Any) -> tuple[Any, Any]:
    """The task and the rows to vary: a file's all, or a folder's split as a training would see it."""
    from alembert.data import load_task

    single_file = Path(data).is_file()
    loaded = load_task(data, required_splits=() if single_file else (split,), **columns)
    return loaded, loaded.dataset(next(iter(loaded.splits)) if single_file else split)


def _identity(model: str) -> Any:
    from alembert.models.loading import weights_fingerprint

    return {"source": model, "sha256": weights_fingerprint(model)}


def _file_identity(path: Path) -> dict[str, str]:
    from alembert.common.errors import InputError
    from alembert.common.files import file_sha256

    if not path.is_file():
        raise InputError(f"--vectors {path}: no such file")
    return {"source": str(path), "sha256": file_sha256(path)}


def _on_device(model: Any) -> Any:
    import torch

    return model.to("cuda") if torch.cuda.is_available() else model


def _versions() -> dict[str, str]:
    from importlib.metadata import version

    names = ("alembert", "torch", "transformers", "tokenizers", "numpy", "scikit-learn")
    return {name: version(name) for name in names}


def _report(output: Path, record: Path, json_output: bool) -> None:
    from rich.console import Console

    from alembert.common.files import read_json

    rows = read_json(record)["rows"]
    if json_output:
        typer.echo(json.dumps({"output": str(output), "record": str(record), "rows": rows}))
        return
    console = Console(highlight=False, soft_wrap=True)
    console.print(f"[bold]{output}[/] holds {rows['augmented']} rows made from {rows['source']}.")
