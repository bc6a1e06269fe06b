"""Options that several commands share, and what they turn into."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Sequence
from contextvars import ContextVar
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml

from alembert.common.errors import InputError

_ASSIGNED = "alembert.assigned."
"""Before the name of a flag, in a context's `meta`: the assignments that a configuration file has for it."""
_ASSIGNMENTS = {"set_": "--set", "training": "--training"}
"""Flags of `name=value`, by parameter: the only ones that take a mapping."""
_CONTEXT: ContextVar[typer.Context | None] = ContextVar("command", default=None)
"""Of the command that runs."""


def read_config(context: typer.Context, path: Path | None) -> Path | None:
    """Makes a YAML file's entries the defaults of the options of the same name; flags override them."""
    _CONTEXT.set(context)
    if path is None:
        return None
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except OSError as error:
        raise InputError(f"--config {path}: cannot be read ({error.strerror})") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"--config {path}: is no valid YAML ({error})") from error
    if not isinstance(values, dict):
        raise InputError(f"--config {path}: must hold `name: value` lines")
    # By the flags' names, which are not always those of the parameters.
    names = {
        flag.lstrip("-"): parameter
        for parameter in context.command.params
        for flag in ((parameter.name or "").replace("_", "-"), *parameter.opts)
    }
    defaults: dict[str, Any] = {}
    for key, entry in values.items():
        parameter = names.get(str(key).replace("_", "-"))
        if parameter is None:
            flags = {flag for each in context.command.params for flag in each.opts if flag.startswith("--")}
            known = ", ".join(sorted(flag.lstrip("-") for flag in flags))
            raise InputError(f"--config {path}: unknown entry {key!r}; this command knows {known}")
        if isinstance(entry, dict) and parameter.name not in _ASSIGNMENTS:
            raise InputError(f"--config {path}: entry {key!r} takes no mapping")
        if isinstance(entry, dict):
            # Beside the parameter's own: one assignment on the command line must not displace all of these.
            context.meta[_ASSIGNED + _ASSIGNMENTS[parameter.name]] = {
                str(name).replace("-", "_"): value for name, value in entry.items()
            }
        else:
            defaults[str(parameter.name)] = _as_flag(entry)
    context.default_map = {**(context.default_map or {}), **defaults}
    return path


def _as_flag(entry: Any) -> Any:
    """A YAML value as its flag takes it: a list of numbers is separated by commas."""
    if isinstance(entry, list) and all(isinstance(item, int | float) for item in entry):
        return ",".join(str(item) for item in entry)
    return entry


ConfigOption = Annotated[
    Path | None,
    typer.Option(
        "--config", callback=read_config, is_eager=True, help="YAML file of options; flags override it."
    ),
]
DataOption = Annotated[
    str,
    typer.Option(
        "--data", help="Folder with train/dev/test files, one file, or a hub id (TSV, CSV, JSONL, Parquet)."
    ),
]
OptionalDataOption = Annotated[
    str | None,
    typer.Option(
        "--data", help="Folder with train/dev/test files, one file, or a hub id (TSV, CSV, JSONL, Parquet)."
    ),
]
OutputOption = Annotated[Path, typer.Option("--output", help="The run directory.")]
OverwriteOption = Annotated[bool, typer.Option("--overwrite", help="Replace whatever the folder holds.")]
TaskOption = Annotated[
    str | None, typer.Option("--task", help="A GLUE task: its columns, labels and metrics.")
]
TextColumnOption = Annotated[str | None, typer.Option(help="Column of the text.")]
PairColumnOption = Annotated[str | None, typer.Option(help="Column of the second text of pairs.")]
LabelColumnOption = Annotated[str | None, typer.Option(help="Column of the label.")]
ProblemTypeOption = Annotated[
    str | None,
    typer.Option(
        help="single_label_classification, multi_label_classification or regression; found from the labels."
    ),
]
LabelSeparatorOption = Annotated[
    str | None, typer.Option(help="Separates the labels of a multi-label field.")
]
LabelTypeOption = Annotated[
    str | None, typer.Option(help="string: take labels as written, even mixed with numbers.")
]
MaxTrainRowsOption = Annotated[
    int | None, typer.Option(min=1, help="Use this many train rows, drawn by seed.")
]
MaxDevRowsOption = Annotated[int | None, typer.Option(min=1, help="Use this many dev rows, drawn by seed.")]
MaxTestRowsOption = Annotated[int | None, typer.Option(min=1, help="Use this many test rows, drawn by seed.")]
EpochsOption = Annotated[float | None, typer.Option(help="Passes over the train split.")]
BatchSizeOption = Annotated[int | None, typer.Option(help="Texts per optimiser step, over all processes.")]
LearningRateOption = Annotated[float | None, typer.Option(help="Peak learning rate.")]
MaxLengthOption = Annotated[int | None, typer.Option(help="Cut texts to this many tokens.")]
SeedOption = Annotated[int | None, typer.Option(help="Of initialisation, order and dropout.")]
SettingOption = Annotated[
    list[str] | None,
    typer.Option(
        "--training",
        metavar="NAME=VALUE",
        help="Any other training setting, as listed by `alembert methods`.",
    ),
]
ReportToOption = Annotated[list[str] | None, typer.Option(help="Trackers: tensorboard, wandb, mlflow.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print results as JSON on standard output.")]


StudentOption = Annotated[
    str | None,
    typer.Option(help="A shape such as 4x312 (layers x hidden size), a configuration file, or a checkpoint."),
]
StagesOption = Annotated[str | None, typer.Option(help="Some of the method's stages, separated by commas.")]
AugmentedOption = Annotated[
    str | None,
    typer.Option(help="File made by `alembert augment`, to train on in place of the train split."),
]
TeacherCacheOption = Annotated[
    Path | None, typer.Option(help="Folder for the teacher's outputs, computed once for all epochs and runs.")
]
PresetOption = Annotated[str, typer.Option(help="default, paper or code.")]
MethodSetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="NAME=VALUE", help="An option of the method; repeatable."),
]
PolicyOption = Annotated[
    str | None,
    typer.Option(
        help="entropy, top_k_entropy, max_probability, margin, patience or learned; by the task unless given."
    ),
]
TopKOption = Annotated[int | None, typer.Option(help="K of the policy top_k_entropy.")]
RenormaliseOption = Annotated[
    bool | None, typer.Option(help="Whether top_k_entropy divides the K probabilities by their sum.")
]
ToleranceOption = Annotated[
    float | None, typer.Option(help="Regression values closer than this agree (policy patience).")
]
ExitsOption = Annotated[
    str | None,
    typer.Option(help="Use only the exits after these layers, separated by commas; all unless given."),
]
ThreadsOption = Annotated[int | None, typer.Option(min=1, help="Threads of the processor.")]
DeviceOption = Annotated[
    str | None, typer.Option(help="cpu or cuda, of a run; CUDA where there is one, unless given.")
]
BatchTokensOption = Annotated[
    int | None,
    typer.Option(min=1, help="Rows × longest row of a batch; 512 on a processor, 4096 on CUDA unless given."),
]


class Precision(StrEnum):
    """Of a model of torch."""

    fp32 = "fp32"
    bf16 = "bf16"


class Resume(StrEnum):
    """What to do with an earlier run in the same folder."""

    auto = "auto"
    never = "never"


ResumeOption = Annotated[
    Resume, typer.Option(help="auto goes on with an interrupted run; never refuses a folder that holds one.")
]


def parse_assignments(pairs: list[str] | None, flag: str) -> dict[str, Any]:
    """`name=value` strings as a dictionary, over those of a configuration file; values are read as YAML."""
    context = _CONTEXT.get()
    result: dict[str, Any] = {} if context is None else dict(context.meta.get(_ASSIGNED + flag, {}))
    for pair in pairs or []:
        name, equals, value = pair.partition("=")
        if not equals or not name:
            raise InputError(f"{flag} {pair!r}: must be name=value")
        try:
            result[name.strip().replace("-", "_")] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise InputError(f"{flag} {pair!r}: the value is no valid YAML") from error
    return result


def training_settings(**given: Any) -> dict[str, Any]:
    """The training settings that were given, `training` assignments included; the command line's win over a file's."""
    context, pairs = _CONTEXT.get(), given.pop("training", None)
    given = {name: value for name, value in given.items() if value is not None}
    of_file = {
        name: value
        for name, value in given.items()
        if context is not None and getattr(context.get_parameter_source(name), "name", "") == "DEFAULT_MAP"
    }
    if of_file:
        named = {str(pair).partition("=")[0].strip().replace("-", "_") for pair in pairs or ()}
        given = {name: value for name, value in given.items() if name not in of_file or name not in named}
    return parse_assignments(pairs, "--training") | given


def limit_rows(task: Any, limits: dict[str, int | None], seed: int) -> Any:
    """The task with splits cut to the given numbers of rows, drawn by seed."""
    from dataclasses import replace

    splits = dict(task.splits)
    for split, limit in limits.items():
        if limit is not None and split in splits and limit < splits[split].num_rows:
            splits[split] = splits[split].shuffle(seed=seed).select(range(limit))
    return replace(task, splits=splits)


def quiet_libraries() -> None:
    """Leaves progress and warnings to Alembert: other libraries' bars show on a terminal only."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    import datasets
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()


def load_adaptive(run: str, **options: Any) -> Any:
    """The classifier in a run directory; options that are None keep its defaults."""
    from alembert.runtime.adaptive import AdaptiveClassifier

    given = {name: value for name, value in options.items() if value is not None}
    if "exits" in given:
        given["exits"] = parse_layers(given["exits"])
    return AdaptiveClassifier.from_pretrained(run, **given)


def parse_layers(text: str, flag: str = "--exits") -> list[int]:
    """Comma-separated layers; InputError names the flag where one is no whole number."""
    layers = [part.strip() for part in text.split(",") if part.strip()]
    wrong = [part for part in layers if not part.isdecimal()]
    if wrong or not layers:
        raise InputError(f"{flag} {text!r}: give layer numbers separated by commas")
    return [int(part) for part in layers]


def pair_column(text_column: str | None, text_pair_column: str | None, is_pair: bool | None) -> str | None:
    """The column of second texts to read for a model: one by name, "" for none, None for the first of a usual name.

    A model of single texts reads none. Where it is not known what the model reads, none is guessed beside a text
    column that was named.
    """
    if text_pair_column is None and (is_pair is False or (is_pair is None and text_column is not None)):
        return ""
    return text_pair_column


def refuse_columns(columns: dict[str, str | None], why: str) -> None:
    """Raises InputError, with the reason, for a column given by name, by parameter, where none is read."""
    for parameter, name in columns.items():
        if name is not None:
            raise InputError(f"--{parameter.replace('_', '-')} {name}: {why}, or leave it out")


def load_evaluation_task(
    data: str, run: str, classifier: Any, split: str | None, *, others: Sequence[str] = (), **columns: Any
) -> tuple[Any, str, list[str]]:
    """Labelled data read with a model's labels and problem type, the split to score, and doubts about its rows.

    Without `split` that is test, else dev. Data without dev has the rows that the run held out of train. Where it is
    not known that they are new to it, and to the `others` that are scored with it, a warning says so, as a doubt does.
    """
    task, wanted, doubts = _load_labelled(data, (run, *others), classifier, split, ("test", "dev"), columns)
    for doubt in doubts:
        logging.getLogger("alembert").warning("%s: scores on them may flatter it", doubt)
    return task, wanted, doubts


def load_calibration_task(
    data: str, run: str, classifier: Any, split: str | None, **columns: Any
) -> tuple[Any, str]:
    """Labelled data read with a model's labels and problem type, and the split to calibrate on.

    Without `split` that is dev, else test. Data without dev has the rows that the run held out of train.

    Raises InputError where it is not known which these are, and for train.
    """
    if split == "train":
        raise InputError(
            "--split train: models learn these rows; calibrate on dev, test or a file of other rows"
        )
    task, wanted, doubts = _load_labelled(data, (run,), classifier, split, ("dev", "test"), columns)
    if doubts:
        test = (
            ", or take --split test, which then no longer measures the result"
            if "test" in task.splits
            else ""
        )
        raise InputError(
            f"{doubts[0]}, and on rows that a model has learned every speed looks safe. Put rows that were kept apart "
            f"from all training into a dev file, or name their file with --data{test}. An export of an earlier version "
            "does not say what its run held out: export the run again"
        )
    if wanted == "test" and not Path(data).is_file():
        logging.getLogger("alembert").warning(
            "%s: the speed is chosen on test, which therefore no longer measures the result: keep other rows for that",
            data,
        )
    return task, wanted


def check_output_folder(output: Path) -> None:
    """Raises InputError, before anything is measured, where a file has the name of the folder to be written."""
    if output.exists() and not output.is_dir():
        raise InputError(f"--output {output}: is a file; name a folder")


def _load_labelled(
    data: str,
    runs: Sequence[str],
    classifier: Any,
    split: str | None,
    order: tuple[str, ...],
    columns: dict[str, Any],
) -> tuple[Any, str, list[str]]:
    """The task, a split (the first of `order` unless given), and to which models its rows may not be new, and why.

    Rows are held out as by the first.
    """
    from alembert.data import load_task
    from alembert.runtime.hold_out import held_out_alike, read_hold_out

    hold_out = read_hold_out(runs[0])
    seed = 42 if hold_out is None else hold_out.seed

    def read(required: tuple[str, ...]) -> Any:
        return load_task(
            data,
            problem_type=classifier.facts.problem_type,
            label_names=classifier.facts.label_names,
            required_splits=required,
            seed=seed,
            **columns,
        )

    # A single file is the split that is asked for.
    task = read((split,) if split in ("dev", "test") and Path(data).is_file() else ())
    doubts: list[str] = []
    there = {*task.splits, *(("dev",) if "train" in task.splits else ())}
    wanted = split or next((name for name in order if name in there), "dev")
    if wanted == "dev" and "dev" not in task.splits and "train" in task.splits:
        task = read(("dev",))
        doubts = [
            f"{data}: has no dev split, and the rows that seed {seed} holds out of train are not known to be new "
            f"to {run} and its teacher"
            for run in runs
            if not held_out_alike(task, hold_out if run == runs[0] else read_hold_out(run))
        ]
    task.dataset(wanted)
    if wanted == "train" and not doubts:
        doubts = [f"{data}: train holds the rows that models learn"]
    return task, wanted, doubts
