"""What a method is: options, presets, the model it trains and its stages."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

from datasets import Dataset
from pydantic import BaseModel, ConfigDict, Field
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from alembert.common.errors import InputError
from alembert.data.task import Task
from alembert.training.settings import TrainingSettings, validated
from alembert.training.stage import Stage

logger = logging.getLogger("alembert")


class MethodOptions(BaseModel):
    """Options of a method beyond the training settings; set with `--set name=value`."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Preset(BaseModel):
    """Named values for a method's options and training settings; everything else keeps its default.

    Attributes:
        options: of the method.
        settings: of the training.
        general_settings: what differs in them where stages on plain text run.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    options: dict[str, Any] = Field(default_factory=dict)
    settings: dict[str, Any] = Field(default_factory=dict)
    general_settings: dict[str, Any] = Field(default_factory=dict)


@dataclass(frozen=True)
class Sources:
    """What a method distils from.

    Attributes:
        teacher: a classifier; a bare encoder or a masked language model for stages on plain text.
        tokenizer: the teacher's, and so the student's.
        task: labelled rows; None for stages on plain text alone.
        augmented: rows with the task's columns to train on in place of its train split.
        corpus: a file or a folder of plain text.
        teacher_cache: folder for the teacher's outputs; None = they are computed in every epoch.
    """

    teacher: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    task: Task | None = None
    augmented: Dataset | None = None
    corpus: str | None = None
    teacher_cache: Path | None = None


OptionsT = TypeVar("OptionsT", bound=MethodOptions)


class Method(ABC, Generic[OptionsT]):
    """A distillation method: builds the model that learns, and lists the stages that teach it.

    Class attributes:
        name: as given to `--method`.
        paper: the reference.
        options_class: the pydantic model of its options.
        presets: "default", "paper", and "code" where published code differs from the paper.
        stage_names: the stages that `--stages` may choose from, in order; () = there is nothing to choose.
        general_stages: those that read plain text instead of a task.
        separate_teacher: whether a teacher runs beside the model that learns, so that its outputs can be kept.
        conditions: options that are read only under a condition: another option, and the values it then has.
        serves: options that are read only where one of some others is neither 0 nor False.
    """

    name: ClassVar[str]
    paper: ClassVar[str]
    options_class: ClassVar[type[MethodOptions]]
    presets: ClassVar[dict[str, Preset]]
    stage_names: ClassVar[tuple[str, ...]] = ()
    general_stages: ClassVar[tuple[str, ...]] = ()
    separate_teacher: ClassVar[bool] = True
    conditions: ClassVar[dict[str, tuple[str, tuple[Any, ...]]]] = {}
    serves: ClassVar[dict[str, tuple[str, ...]]] = {}

    def __init__(self, options: OptionsT) -> None:
        self.options = options

    @classmethod
    def preset_options(cls, preset: Preset, options: dict[str, Any]) -> dict[str, Any]:
        """The preset's options overridden by those given."""
        return preset.options | options

    @abstractmethod
    def build_model(self, sources: Sources) -> PreTrainedModel:
        """The model that learns, initialised. Raises InputError for one that the method cannot teach."""

    @abstractmethod
    def stages(self, model: PreTrainedModel, sources: Sources, settings: TrainingSettings) -> list[Stage]:
        """The stages in order."""

    def warn_of_unused(self, options: dict[str, Any], settings: dict[str, Any]) -> None:
        """Logs which of the options and settings that were given nothing reads."""
        for option, (other, values) in self.conditions.items():
            value = getattr(self.options, other)
            if option in options and value not in values:
                logger.warning("%s has no part where %s=%s.", option, other, value)
        for option, others in self.serves.items():
            if option in options and not any(getattr(self.options, other) for other in others):
                off = " and ".join(f"{other}={getattr(self.options, other)}" for other in others)
                logger.warning("%s has no part where %s.", option, off)

    def finish(self, model: PreTrainedModel) -> None:
        """Removes from the model what only its training needed."""


def resolve(
    method: type[Method[Any]], preset: str, options: dict[str, Any], settings: dict[str, Any]
) -> tuple[MethodOptions, TrainingSettings]:
    """Preset values overridden by `options` and `settings`, validated.

    Raises InputError naming the preset, option or setting that does not exist or has a wrong value.
    """
    if preset not in method.presets:
        raise InputError(
            f"method {method.name} has no preset {preset!r}: choose one of {', '.join(sorted(method.presets))}"
        )
    chosen = method.presets[preset]
    resolved = validated(
        method.options_class, method.preset_options(chosen, options), f"option of method {method.name}"
    )
    defaults = chosen.settings
    if set(getattr(resolved, "stages", None) or ()) & set(method.general_stages):
        defaults = defaults | chosen.general_settings
    return resolved, validated(TrainingSettings, defaults | settings, "training setting")
