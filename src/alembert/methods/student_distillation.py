"""What all teacher–student methods share: building the student, and choosing among the method's stages."""

from __future__ import annotations

import logging
from abc import abstractmethod
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar

from huggingface_hub import try_to_load_from_cache
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from alembert.common.errors import InputError
from alembert.methods.base import Method, MethodOptions, Preset, Sources
from alembert.models.layered import LayeredEncoder
from alembert.models.loading import load_tokenizer
from alembert.models.multi_exit import STOCK_HEAD, MultiExitModel
from alembert.models.projections import carry_projection
from alembert.models.student_configuration import looks_like_shape
from alembert.models.students import BILSTM, build_student, has_weights
from alembert.models.vocabulary import check_vocabulary
from alembert.training.objective import Objective
from alembert.training.settings import TrainingSettings
from alembert.training.stage import Stage

GENERAL = "general"
TASK_INTERMEDIATE = "task-intermediate"
TASK_PREDICTION = "task-prediction"
logger = logging.getLogger("alembert")


class StudentOptions(MethodOptions):
    """Options of every method that trains a student of its own.

    Attributes:
        student: a shape `LxH` (layers × hidden size), a configuration file, or a checkpoint, and for `kd` also
            `bilstm`; `--student` sets it.
        initialise: a student that is no checkpoint: `random`, `embeddings` (the teacher's, on their principal
            components where the widths differ) or `layers` (the teacher's embeddings and some of its layers). None =
            a checkpoint's own weights, else `embeddings`.
        init_layers: for `layers`, the teacher's layers to copy; None = evenly spread.
        student_heads: attention heads of a shape; None = the teacher's number where it divides the width.
        student_intermediate_size: of a shape; None = 1200 for width 312, else four times the width.
        stages: some of the method's stages; None = those on the task.
    """

    student: str | None = None
    initialise: Literal["random", "embeddings", "layers"] | None = None
    init_layers: tuple[int, ...] | None = None
    student_heads: int | None = None
    student_intermediate_size: int | None = None
    stages: tuple[str, ...] | None = None


StudentOptionsT = TypeVar("StudentOptionsT", bound=StudentOptions)


class StudentDistillation(Method[StudentOptionsT]):
    """A method whose student is a model of its own, smaller than the teacher.

    Class attributes:
        general_head: the head of the student in the stage on plain text.
        stage_options: the options that take the place of training settings in a stage, by stage and setting.
        options_of_stages: other options that one stage alone reads, by stage.
    """

    general_head: ClassVar[Literal["encoder", "masked_lm"]] = "encoder"
    stage_options: ClassVar[dict[str, dict[str, str]]] = {}
    options_of_stages: ClassVar[dict[str, tuple[str, ...]]] = {}

    @abstractmethod
    def objective(self, stage: str, student: PreTrainedModel, sources: Sources) -> Objective:
        """The objective of one of the stages. Raises InputError for a student that it cannot serve."""

    def stage_settings(self, stage: str, settings: TrainingSettings) -> TrainingSettings:
        """The settings of one of the stages; those given, unless a method's options say otherwise."""
        return settings

    def stage_fields(self, stage: str) -> dict[str, Any]:
        """Further fields of a stage."""
        return {}

    def chosen_stages(self) -> tuple[str, ...]:
        """The stages to run, in order. Raises InputError for unknown ones, and for general and task stages mixed."""
        if not self.stage_names:
            if self.options.stages:
                raise InputError(f"method {self.name} has one stage: leave --stages out")
            return ("task",)
        if self.options.stages is None:
            return tuple(name for name in self.stage_names if name not in self.general_stages)
        unknown = [name for name in self.options.stages if name not in self.stage_names]
        if unknown or not self.options.stages:
            raise InputError(
                f"method {self.name} has no stage {', '.join(unknown) or '(none given)'}: "
                f"choose from {', '.join(self.stage_names)}"
            )
        chosen = tuple(name for name in self.stage_names if name in self.options.stages)
        general = set(chosen) & set(self.general_stages)
        if general and len(general) < len(chosen):
            raise InputError(
                f"the stages {', '.join(chosen)} have different teachers: run {', '.join(sorted(general))} by itself "
                "on a pretrained encoder, and pass its output as --student to the stages on the task"
            )
        return chosen

    def warn_of_unused(self, options: dict[str, Any], settings: dict[str, Any]) -> None:
        """As for every method, and by stages."""
        chosen = self.chosen_stages()
        for stage, names in self.stage_options.items():
            for setting, option in names.items():
                if chosen == (stage,) and setting in settings:
                    logger.warning("%s has no part in the stage %s: set %s instead.", setting, stage, option)
        for stage in self.stage_names:
            of_stage = (*self.stage_options.get(stage, {}).values(), *self.options_of_stages.get(stage, ()))
            for option in of_stage:
                if stage not in chosen and option in options:
                    logger.warning("%s is of the stage %s, which does not run.", option, stage)
        super().warn_of_unused(options, settings)

    def is_general(self) -> bool:
        """Whether the chosen stages read plain text, and the student has no classification head."""
        return set(self.chosen_stages()) <= set(self.general_stages)

    @classmethod
    def preset_options(cls, preset: Preset, options: dict[str, Any]) -> dict[str, Any]:
        """A student that comes with weights keeps them: the preset's initialisation is for the others."""
        chosen = super().preset_options(preset, options)
        student = chosen.get("student")
        if "initialise" not in options and isinstance(student, str) and is_checkpoint(student):
            chosen.pop("initialise", None)
        return chosen

    def build_model(self, sources: Sources) -> PreTrainedModel:
        options = self.options
        if options.student is None:
            raise InputError(
                f"method {self.name} trains a student: name one with --student, as a shape such as 4x312 "
                "(layers × hidden size), a configuration file or a checkpoint"
            )
        task = sources.task
        if options.student == BILSTM:
            return self.build_bilstm(sources)
        student = build_student(
            options.student,
            full_model(sources.teacher),
            task_head=self.general_head if self.is_general() else "classification",
            initialise=options.initialise or ("random" if is_checkpoint(options.student) else "embeddings"),
            init_layers=options.init_layers,
            heads=options.student_heads,
            intermediate_size=options.student_intermediate_size,
            label_names=() if task is None else task.label_names,
            problem_type=None if task is None else task.problem_type,
        )
        check_vocabulary(
            options.student, student.config, tokenizer_beside(options.student), sources.tokenizer
        )
        if task is not None and task.is_pair:
            check_token_types(student, sources.tokenizer)
        for stage in self.chosen_stages():
            self.objective(stage, student, sources)
        return student

    def build_bilstm(self, sources: Sources) -> PreTrainedModel:
        """The student `bilstm`, for methods that compare nothing but answers."""
        raise InputError(
            f"method {self.name} compares layers, and a BiLSTM has none to compare with the teacher's: "
            "use --method kd for it, or choose a student such as 4x312"
        )

    def stages(self, model: PreTrainedModel, sources: Sources, settings: TrainingSettings) -> list[Stage]:
        stages = [
            Stage(
                name,
                self.objective(name, model, sources),
                self.stage_settings(name, settings),
                teacher=full_model(sources.teacher),
                teacher_cache=None if name in self.general_stages else sources.teacher_cache,
                texts=None if name in self.general_stages else sources.augmented,
                corpus=sources.corpus if name in self.general_stages else None,
                **self.stage_fields(name),
            )
            for name in self.chosen_stages()
        ]
        student = self.options.student
        checkpoint = Path(student) if student is not None and is_checkpoint(student) else None
        carry_projection([stage.objective for stage in stages], checkpoint)
        return stages


def is_checkpoint(student: str) -> bool:
    """Whether a student comes with weights."""
    return not looks_like_shape(student) and has_weights(student)


def tokenizer_beside(student: str) -> PreTrainedTokenizerBase | None:
    """The tokenizer that a student comes with; of a checkpoint without one a warning is logged."""
    path = Path(student)
    folder = path.parent if path.name == "config.json" and path.is_file() else path
    if looks_like_shape(student) or folder.is_file():
        return None
    reason = "it has none"
    try:
        tokenizer = load_tokenizer(str(folder))
        # Where there is no file of words, transformers makes up a tokenizer of special tokens alone.
        if any(_has_file(folder, name) for name in tokenizer.vocab_files_names.values()):
            return tokenizer
    except InputError as error:
        reason = str(error)
    if is_checkpoint(student):
        logger.warning(
            "The tokenizer of the student %s could not be compared with the teacher's (%s): make sure that both "
            "give a text the same token ids.",
            student, reason,
        )  # fmt: skip
    return None


def _has_file(source: Path, name: str) -> bool:
    """Whether a folder has a file, or the hub's cache has it of a hub id."""
    if source.exists():
        return (source / name).is_file()
    return isinstance(try_to_load_from_cache(str(source), name), str)


def check_token_types(student: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises InputError when the tokenizer tells a pair's texts apart by types that the student does not know."""
    needed = 1 + max(tokenizer("a", "b").get("token_type_ids", [0]))
    known = getattr(student.config, "type_vocab_size", None) or 0
    if 0 < known < needed:
        raise InputError(
            f"the student knows {known} token type, and the teacher's tokenizer gives the texts of a pair {needed}: "
            f"set type_vocab_size to {needed} in its config.json, or choose a shape such as 4x312"
        )


def full_model(teacher: PreTrainedModel) -> PreTrainedModel:
    """A teacher as the stock model it is. Raises InputError for one whose final head is not its family's."""
    if not isinstance(teacher, MultiExitModel):
        return teacher
    if teacher.config.final_head != STOCK_HEAD:
        raise InputError(
            f"the teacher's final head is {teacher.config.final_head!r}: a student needs a teacher with its family's "
            "own head (alembert finetune --head stock)"
        )
    stock: PreTrainedModel = teacher.full_model
    return stock


def depths(student: PreTrainedModel, teacher: PreTrainedModel) -> tuple[int, int]:
    """Layers of student and teacher. Raises InputError for a student that is deeper."""
    layers = LayeredEncoder(student).num_layers, LayeredEncoder(full_model(teacher)).num_layers
    if layers[0] > layers[1]:
        raise InputError(
            f"the student has {layers[0]} layers, the teacher {layers[1]}: choose a student that is no deeper"
        )
    return layers


def widths(student: PreTrainedModel, teacher: PreTrainedModel) -> tuple[int, int]:
    """Hidden sizes of student and teacher."""
    return int(student.config.hidden_size), int(full_model(teacher).config.hidden_size)


def check_equal_heads(student: PreTrainedModel, teacher: PreTrainedModel, way_out: str) -> None:
    """Raises InputError, ending in `way_out`, when the numbers of attention heads differ."""
    heads = student.config.num_attention_heads, full_model(teacher).config.num_attention_heads
    if heads[0] != heads[1]:
        raise InputError(
            f"the student has {heads[0]} attention heads, the teacher {heads[1]}, and this compares them head by "
            f"head: choose a student with {heads[1]} heads (--set student_heads={heads[1]} for a shape), or {way_out}"
        )
