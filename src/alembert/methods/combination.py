"""Methods in turn: `tinybert+ms-bert` distils a student, then gives it exits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from alembert.common.errors import InputError
from alembert.methods.base import Method, resolve
from alembert.methods.registry import find_method
from alembert.models.students import BILSTM
from alembert.training.run_directory import STEPS, RunDirectory, previous_configuration
from alembert.training.settings import TrainingSettings


def distill_in_turn(
    methods: Sequence[str],
    teacher: str,
    task: Any,
    output_dir: Path,
    *,
    preset: str,
    options: Mapping[str, Any],
    settings: Mapping[str, Any],
    **more: Any,
) -> PreTrainedModel:
    """Runs the methods one after another; each takes the one before as its teacher.

    All but the last leave their runs in `output_dir/steps/`; the last one's is `output_dir` itself. A name of
    `options` or `settings` may be preceded by a method (`ms-bert.epochs`); without one it goes to every method that
    has such an option. A preset that a method lacks is its default.

    Raises InputError for unknown methods and names, and as `alembert.distill`.
    """
    from alembert.methods.distillation import distill

    classes = [find_method(name) for name in methods]
    if task is None:
        raise InputError(f"{'+'.join(methods)} needs a task: pass --data, and no --corpus")
    if len(set(methods)) < len(methods):
        raise InputError(f"{'+'.join(methods)} names a method twice")
    chosen_options = _divide(
        classes, options, lambda method: set(method.options_class.model_fields), "option"
    )
    chosen_settings = _divide(
        classes, settings, lambda _: set(TrainingSettings.model_fields), "training setting"
    )
    if not any(preset in method.presets for method in classes):
        everything = sorted(set().union(*(method.presets for method in classes)))
        raise InputError(
            f"{'+'.join(methods)} has no preset {preset!r}: choose one of {', '.join(everything)}"
        )
    presets = {method: preset if preset in method.presets else "default" for method in classes}
    for method in classes:
        # Wrong values of a later method are refused before an earlier one has trained for hours.
        resolved, _ = resolve(
            method, presets[method], chosen_options[method.name], chosen_settings[method.name]
        )
        if getattr(resolved, "student", None) == BILSTM:
            raise InputError(
                f"{'+'.join(methods)}: a BiLSTM has no layers that a further method could use: choose another student"
            )
    folders = [output_dir / STEPS / f"{step}-{method.name}" for step, method in enumerate(classes[:-1], 1)]
    _check_output(output_dir, classes[-1].name, folders[-1], overwrite=more["overwrite"])
    source = teacher
    for step, (method, folder) in enumerate(zip(classes, [*folders, output_dir], strict=True), 1):
        model = distill(
            method.name,
            source,
            task,
            folder,
            preset=presets[method],
            options=chosen_options[method.name],
            settings=chosen_settings[method.name],
            **(more if step == 1 else more | {"teacher_cache": None}),
        )
        source = str(folder)
    return model


def _check_output(output_dir: Path, method: str, source: Path, *, overwrite: bool) -> None:
    """Raises InputError for a folder that the last step would refuse, before an earlier one has trained for hours."""
    record = previous_configuration(output_dir)
    if record is None:
        RunDirectory(output_dir, {})
    elif not overwrite and (
        record.get("method") != method or Path(record["teacher"]).resolve() != source.resolve()
    ):
        raise InputError(
            f"{output_dir} holds a run with another configuration (method: {record.get('method')!r} there, the last "
            f"of several now): choose another --output, or pass --overwrite to replace it"
        )


def _divide(
    methods: Sequence[type[Method[Any]]], values: Mapping[str, Any], known: Any, what: str
) -> dict[str, dict[str, Any]]:
    """Each method's share of `values`."""
    shares: dict[str, dict[str, Any]] = {method.name: {} for method in methods}
    names = {method.name: known(method) for method in methods}
    for key, value in values.items():
        prefix, dot, name = key.rpartition(".")
        # The command line writes option names with underscores throughout.
        owner = prefix.replace("_", "-")
        if dot and owner not in shares:
            raise InputError(f"{what} {key!r}: no method {owner!r} in {'+'.join(shares)}")
        takers = [owner] if dot else [method for method in shares if key in names[method]]
        if not takers or (dot and name not in names[owner]):
            everything = sorted(set().union(*names.values()))
            raise InputError(f"unknown {what} {key!r}: choose from {', '.join(everything)}")
        for taker in takers:
            # What is said of one method in particular counts more than what is said of all.
            if dot or f"{taker}.{key}" not in {_normal(other) for other in values}:
                shares[taker][name if dot else key] = value
    return shares


def _normal(key: str) -> str:
    prefix, dot, name = key.rpartition(".")
    return f"{prefix.replace('_', '-')}{dot}{name}"
