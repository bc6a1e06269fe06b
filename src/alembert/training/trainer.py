"""transformers' Trainer with objectives, logged terms, and an order of data that survives a crash."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from datasets import Dataset
from torch import Tensor
from transformers import (
    DataCollatorWithPadding,
    EarlyStoppingCallback,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from alembert.common.errors import InputError
from alembert.training.checkpoints import complete_checkpoints, mark_complete, mark_last, remove_checkpoints
from alembert.training.processes import in_any_process
from alembert.training.sampling import EpochSampler
from alembert.training.stage import Stage
from alembert.training.stage_model import StageModel, encoder_parameters
from alembert.training.teachers import LiveTeacher, Teacher

_KEPT = 2  # newest checkpoints kept, beside the best: the older one is there should the newer be damaged
MODEL_INPUTS = ("input_ids", "attention_mask", "token_type_ids", "labels")
ROW = "row"  # column of row numbers, for teachers that look them up


class DistillationTrainer(Trainer):  # type: ignore[misc]
    """Runs one `Stage`: the objective's terms are summed to the loss and logged by name.

    Checkpoints, resuming, accumulation, mixed precision, distribution and tracking are transformers'.

    Args:
        model: the model that learns.
        stage: objective, settings, trainable weights.
        train_dataset: tokenised, with `length` column when the settings group by length.
        eval_dataset: tokenised dev split, or None.
        tokenizer: pads batches to their longest text.
        output_dir: holds the checkpoints.
        score: logits (rows, exits, labels) and labels to metrics; the first metric picks the best epoch.
        callbacks: further transformers callbacks.
        report_to: trackers, as in TrainingArguments.
        teacher: where the teacher's features come from; None = from the stage's teacher, anew for each batch.
        shards: rows per shard of a data set that is gone through shard by shard.
        stop_at: `time.monotonic()` after which it stops with the weights that it has; None = it ends with its epochs.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        stage: Stage,
        train_dataset: Dataset,
        eval_dataset: Dataset | None,
        tokenizer: PreTrainedTokenizerBase,
        output_dir: str | Path,
        score: Callable[[np.ndarray, np.ndarray], dict[str, float]] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        report_to: list[str] | None = None,
        teacher: Teacher | None = None,
        shards: Sequence[int] | None = None,
        stop_at: float | None = None,
    ) -> None:
        stage.prepare(model)
        self.stage, self._shards = stage, shards
        self.objective = stage.objective
        self._terms: dict[str, Tensor] = {}
        self._term_batches = 0
        evaluates = eval_dataset is not None and stage.settings.evaluate_every_epoch
        pad = DataCollatorWithPadding(tokenizer)
        super().__init__(
            model=StageModel(model, stage.objective, teacher or _live_teacher(stage), stage.perturbation),
            args=training_arguments(stage, output_dir, evaluates, report_to),
            data_collator=lambda rows: pad(
                [{key: row[key] for key in (*MODEL_INPUTS, ROW) if key in row} for row in rows]
            ),
            train_dataset=train_dataset,
            eval_dataset=eval_dataset if evaluates else None,
            compute_metrics=None
            if score is None
            else lambda output: score(output.predictions, output.label_ids),
            callbacks=[_Checkpoints(stage.checkpoint_steps), _SetEpoch(self), *(callbacks or [])],
        )
        self.processing_class = tokenizer
        self.model_accepts_loss_kwargs = False
        self.remove_callback(PrinterCallback)
        self.remove_callback(ProgressCallback)
        if stop_at is not None:
            self.add_callback(_TimeLimit(stop_at))
        if stage.settings.early_stopping_patience is not None and evaluates:
            self.add_callback(EarlyStoppingCallback(stage.settings.early_stopping_patience))
        if stage.teacher is not None and teacher is None:
            stage.teacher.to(self.args.device)

    def create_optimizer(self, model: torch.nn.Module | None = None) -> torch.optim.Optimizer:
        is_new, rate = self.optimizer is None, self.stage.settings.head_learning_rate
        optimizer: torch.optim.Optimizer = super().create_optimizer(model)
        if is_new and rate is not None:
            _set_rate_of_heads(optimizer, encoder_parameters(self.model.student), rate)
        return optimizer

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        output = model(**inputs)
        loss = torch.stack(list(output["terms"].values())).sum()
        self._record(output["terms"])
        return (loss, output) if return_outputs else loss

    def prediction_step(
        self, model: Any, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            return None, model(**inputs)["logits"], inputs.get("labels")

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        super()._save(output_dir, without_aliases(state_dict or self.model.state_dict()))

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs and self._term_batches:
            names = sorted(self._terms)
            values = torch.stack([self._terms[name] for name in names]) / self._term_batches
            values = self.accelerator.reduce(values, reduction="mean")
            logs |= {f"terms/{name}": float(value) for name, value in zip(names, values, strict=True)}
            self._terms, self._term_batches = {}, 0
        super().log(logs, start_time)
        snapshot = self.objective.snapshot() if "loss" in logs else None
        if snapshot is not None:
            # After the trackers have had their scalars: they cannot draw lists.
            self.state.log_history[-1]["snapshot"] = snapshot

    def _record(self, terms: Mapping[str, Tensor]) -> None:
        for name, value in terms.items():
            self._terms[name] = self._terms.get(name, torch.zeros((), device=value.device)) + value.detach()
        self._term_batches += 1

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> EpochSampler:
        dataset = self.train_dataset if train_dataset is None else train_dataset
        settings = self.stage.settings
        lengths: Any = None
        if settings.group_by_length and self._shards is None:
            lengths = list(dataset["length"])
        elif settings.group_by_length:
            lengths = lambda start, stop: dataset.select(range(start, stop))["length"]  # noqa: E731
        self.sampler = EpochSampler(
            len(dataset), settings.batch_size, settings.seed, lengths, shards=self._shards
        )
        return self.sampler


class _Checkpoints(TrainerCallback):  # type: ignore[misc]
    """Saves every so many steps, marks what is wholly written, and only then removes what is no longer needed."""

    def __init__(self, steps: int | None) -> None:
        self.steps = steps

    def on_step_end(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        # The Trainer evaluates and saves at one rhythm; checkpoints within an epoch must not wait for it.
        # An epoch's end has its own, which holds the evaluation too.
        ends_epoch = float(state.epoch).is_integer() or state.global_step == state.max_steps
        if self.steps is not None and state.global_step % self.steps == 0 and not ends_epoch:
            control.should_save = True

    def on_save(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        # Each process writes the state of its random numbers.
        PartialState().wait_for_everyone()
        if not state.is_world_process_zero:
            return
        checkpoint = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if control.should_training_stop:
            mark_last(checkpoint)
        mark_complete(checkpoint)
        best = [] if state.best_model_checkpoint is None else [Path(state.best_model_checkpoint)]
        remove_checkpoints(args.output_dir, keep=[*complete_checkpoints(args.output_dir)[-_KEPT:], *best])


class _TimeLimit(TrainerCallback):  # type: ignore[misc]
    """Ends the training, with a checkpoint that says so, after the step in which the time has come."""

    def __init__(self, stop_at: float) -> None:
        self.stop_at = stop_at

    def on_step_end(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        # All processes must stop at the same step.
        if in_any_process(time.monotonic() >= self.stop_at):
            control.should_training_stop = True
            # Where epochs end in a checkpoint this one does too, after its evaluation.
            control.should_save = args.save_strategy != "epoch"


class _SetEpoch(TrainerCallback):  # type: ignore[misc]
    """Tells the sampler the epoch, however deep accelerate has wrapped it."""

    def __init__(self, trainer: DistillationTrainer) -> None:
        self.trainer = trainer

    def on_epoch_begin(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.sampler.set_epoch(int(state.epoch or 0))


def check_rate_of_heads(stage: Stage, model: PreTrainedModel) -> None:
    """Raises InputError where the settings name a rate for heads and the stage trains none."""
    rate, encoder = stage.settings.head_learning_rate, {id(weight) for weight in encoder_parameters(model)}
    if rate is not None and all(id(weight) in encoder for weight in stage.trained(model)):
        raise InputError(
            f"head_learning_rate={rate}: stage {stage.name!r} trains nothing outside the encoder"
        )


def _set_rate_of_heads(
    optimizer: torch.optim.Optimizer, encoder: Sequence[torch.nn.Parameter], rate: float
) -> None:
    """Splits every group of parameters in two, and gives the part that is not the encoder's a rate of its own."""
    encoder_ids = {id(parameter) for parameter in encoder}
    groups = []
    for group in optimizer.param_groups:
        inside = [parameter for parameter in group["params"] if id(parameter) in encoder_ids]
        outside = [parameter for parameter in group["params"] if id(parameter) not in encoder_ids]
        groups += [group | {"params": inside}, group | {"params": outside, "lr": rate}]
    optimizer.param_groups[:] = groups


def _live_teacher(stage: Stage) -> LiveTeacher | None:
    request = stage.objective.teacher_request
    return None if stage.teacher is None or request is None else LiveTeacher(stage.teacher, request)


def without_aliases(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """Each tensor once: a masked language model's output weights are its embeddings, which safetensors refuses."""
    known: set[tuple[int, int]] = set()
    kept = {}
    for name, tensor in state_dict.items():
        place = (tensor.data_ptr(), tensor.numel())
        if tensor.numel() and place in known:
            continue
        known.add(place)
        kept[name] = tensor
    return kept


def training_arguments(
    stage: Stage, output_dir: str | Path, evaluates: bool, report_to: list[str] | None
) -> TrainingArguments:
    """transformers' TrainingArguments for a stage; the batch size is divided over processes and accumulation."""
    settings = stage.settings
    bf16 = settings.autocast_dtype() == "bf16"
    distributed = PartialState().num_processes > 1
    arguments = TrainingArguments(
        output_dir=str(output_dir),
        num_train_epochs=settings.epochs,
        gradient_accumulation_steps=settings.gradient_accumulation_steps,
        learning_rate=settings.learning_rate,
        weight_decay=settings.weight_decay,
        warmup_steps=settings.warmup_ratio,
        lr_scheduler_type=settings.scheduler,
        max_grad_norm=settings.max_grad_norm,
        bf16=bf16,
        use_cpu=not torch.cuda.is_available(),
        ddp_backend="gloo" if distributed and not torch.cuda.is_available() else None,
        seed=settings.seed,
        data_seed=settings.seed,
        eval_strategy="epoch" if evaluates else "no",
        save_strategy="epoch" if evaluates or stage.checkpoint_steps is None else "steps",
        save_steps=stage.checkpoint_steps or 500,
        load_best_model_at_end=evaluates,
        metric_for_best_model="score" if evaluates else None,
        greater_is_better=True if evaluates else None,
        logging_strategy="steps",
        logging_steps=10,
        logging_first_step=True,
        disable_tqdm=True,
        report_to=report_to or [],
        remove_unused_columns=False,
        label_names=["labels"],
        dataloader_pin_memory=torch.cuda.is_available(),
        restore_callback_states_from_checkpoint=True,
        average_tokens_across_devices=False,
    )
    share = arguments.world_size * settings.gradient_accumulation_steps
    if settings.batch_size % share:
        raise InputError(
            f"batch size {settings.batch_size} is not a multiple of {arguments.world_size} process(es) × "
            f"{settings.gradient_accumulation_steps} accumulated step(s): choose a multiple of {share}"
        )
    # Several GPUs are torchrun's: replicas of nn.DataParallel would share the first one's layers.
    arguments._n_gpu = min(arguments.n_gpu, 1)
    arguments.per_device_train_batch_size = settings.batch_size // share
    arguments.per_device_eval_batch_size = max(32, settings.batch_size // share)
    return arguments
