"""From a model and data to the fastest model within an accuracy budget: train, export, calibrate, measure, choose."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from alembert.benchmarks.comparison import benchmark
from alembert.benchmarks.comparison_engines import short_names
from alembert.benchmarks.comparison_settings import BenchmarkSettings
from alembert.benchmarks.risk_budget import CERTIFIED, RiskBudget
from alembert.benchmarks.timing import machine_description
from alembert.common.errors import InputError
from alembert.common.files import read_json, remove, write_json, write_text
from alembert.common.locks import FolderLock
from alembert.compression.candidates import (
    Certificate,
    certify,
    dominated,
    export_once,
    reference_logits,
    split_confidence,
    timed_speeds,
    without_learned_rows,
)
from alembert.compression.card import compression_card
from alembert.compression.choice import describe_candidate, unsure, verdict
from alembert.compression.plan import (
    RECIPES,
    TEACHER,
    PlannedTraining,
    announce_plan,
    make_plan,
    measure_pace,
    measuring,
    reserve,
)
from alembert.compression.work_clock import WorkClock
from alembert.compression.work_inputs import check_inputs
from alembert.compression.work_report import write_work_report
from alembert.compression.work_state import BEST, STATE, SUMMARY, open_state
from alembert.compression.work_trainings import Trainings
from alembert.data.metrics import compute_metrics
from alembert.data.task import Task
from alembert.methods.distillation import check_teacher_score
from alembert.models.loading import (
    NoTrainedHeadError,
    check_max_length,
    load_classifier,
    load_encoder,
    load_tokenizer,
    run_configuration,
    weights_fingerprint,
)
from alembert.models.multi_exit import MultiExitModel
from alembert.runtime.calibration_file import model_files_fingerprint
from alembert.training.processes import process_state
from alembert.training.settings import TrainingSettings, validated

Progress = Callable[[str, int, int], None]
CLOCK = "clock.json"
_STATE_VERSION = 3
_DEFAULT_MAX_LENGTH = 128
_SUFFIX = "-int8"
logger = logging.getLogger("alembert")


def compress(
    model: str,
    task: Task,
    output_dir: str | Path,
    *,
    max_drop: float = 0.01,
    confidence: float = 0.95,
    mode: str = CERTIFIED,
    min_speedup: float | None = None,
    budget: float | None = None,
    max_length: int | None = None,
    scale: float | None = None,
    seed: int = 42,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Leaves in `best/` the fastest model found whose accuracy is at most `max_drop` below the teacher's.

    Whatever is finished stays: after a crash, Ctrl-C or a reboot the same call goes on. With another `max_drop`,
    `confidence`, `mode` or `min_speedup` it keeps what it has trained, and tests, measures and chooses anew; with
    another `budget` it also trains what there was no time for.

    Args:
        model: folder or hub id of a fine-tuned classifier, the teacher; or of a pretrained encoder, which is fine-tuned
            first.
        task: with train and dev splits. Dev is for calibration alone: nothing is trained or chosen on it but the
            models' speeds. Rows of dev that stand in train too are left out. A test split, where there is one, gives
            the figures of the summary.
        output_dir: for everything.
        max_drop: the most accuracy that may be lost, as a share: 0.01 is one point.
        confidence: how sure that must be, over all models tried together.
        mode: "certified", or "empirical": the drop seen on dev itself must keep to `max_drop`, with no guarantee.
        min_speedup: texts per second that the result must have at least, as a multiple of the teacher's.
        budget: seconds for the whole work, over all sessions; None = as long as it takes.
        max_length: the candidates read this many tokens of a text; as many as the teacher was trained with, else 128,
            when absent. The teacher that they are held against reads as many as it always does.
        scale: for regression, the difference in the label's unit that counts as a whole mistake.
        seed: of all trainings and samples.
        overwrite: begin anew where `output_dir` holds a work of this command; nothing else is ever replaced.
        progress: called with a description, steps done and steps in all.

    Returns:
        What summary.json holds: "model", "data" (name and rows), "seed", "max_length", "machine", "verdict", "met",
        "best", "unsure" (what more dev rows might add), "candidates", "trainings", "plan", "report" (the page),
        "seconds".

    Raises:
        InputError: something given cannot serve; dev has too few rows to certify anything; another work lies in
            `output_dir`; the ONNX extra is missing.

    Examples:
        >>> from alembert.compression.compress import compress  # doctest: +SKIP
        >>> compress("runs/teacher", task, "small", max_drop=0.01)["verdict"]  # doctest: +SKIP
    """
    work = _Work(
        model, task, Path(output_dir),
        RiskBudget(most=max_drop, confidence=confidence, mode=mode, scale=scale), min_speedup, budget, max_length, seed,
        overwrite, progress or (lambda *_: None),
    )  # fmt: skip
    try:
        with WorkClock(work.folder / CLOCK) as clock:
            return work.run(clock)
    finally:
        work.lock.release()


class _Work:
    """One call of `compress`: its inputs, and the record of what is done."""

    def __init__(
        self,
        model: str,
        task: Task,
        folder: Path,
        risk: RiskBudget,
        min_speedup: float | None,
        budget: float | None,
        max_length: int | None,
        seed: int,
        overwrite: bool,
        progress: Progress,
    ) -> None:
        self.model, self.folder, self.risk = model, folder, risk
        self.task = task = without_learned_rows(task)
        self.min_speedup, self.budget, self.seed, self.progress = min_speedup, budget, seed, progress
        check_inputs(model, task, folder, risk, min_speedup)
        trained = run_configuration(model).get("settings", {}).get("max_length")
        if max_length is not None and trained is not None and max_length > trained:
            raise InputError(
                f"max_length is {max_length}, and {model} was trained with {trained}: give that or less"
            )
        self.max_length = (trained or _DEFAULT_MAX_LENGTH) if max_length is None else max_length
        validated(TrainingSettings, {"max_length": self.max_length, "seed": seed}, "setting")
        self.lock = FolderLock(folder)
        self.lock.acquire()
        try:
            self.state = self._open(overwrite)
        except BaseException:
            self.lock.release()
            raise
        self.trainings = Trainings(model, task, folder, self.state, self._save, budget)

    def _open(self, overwrite: bool) -> dict[str, Any]:
        configuration = {
            "version": _STATE_VERSION,
            "model": str(self.model),
            "model_files": weights_fingerprint(str(self.model)),
            "task": self.task.describe(),
            "max_length": self.max_length,
            "seed": self.seed,
        }
        aims = {
            "max_drop": self.risk.most,
            "confidence": self.risk.confidence,
            "mode": self.risk.mode,
            "scale": self.risk.scale,
            "min_speedup": self.min_speedup,
            "budget_seconds": self.budget,
        }
        return open_state(self.folder, configuration, aims, overwrite)

    def run(self, clock: WorkClock) -> dict[str, Any]:
        if self.state.get("finished") and (self.folder / SUMMARY).exists():
            finished: dict[str, Any] = read_json(self.folder / SUMMARY)
            if not finished["met"] or (self.folder / BEST).exists():
                return finished
            for result in ("finished", "certificates", "benchmarked"):
                self.state.pop(result, None)
            self._save()
        self.trainings.run(self._plan(clock), clock)
        exports = self._export()
        certificates = self._certify(exports)
        rows = self._benchmark(exports, certificates)
        summary = self._choose(exports, certificates, rows, clock)
        summary["report"] = self._report(exports, certificates, summary)
        summary["seconds"] = round(clock.seconds)
        write_json(self.folder / SUMMARY, summary)
        self.state["finished"] = True
        self._save()
        for candidate in summary["candidates"]:
            if candidate["dominated"]:
                remove(exports[candidate["name"]])
        return summary

    def _plan(self, clock: WorkClock) -> list[PlannedTraining]:
        """Made once for a budget, so that a resumed work does what was announced; what is trained stays as it is."""
        known = self.state["trainings"]
        if self.state["plan"] is None:
            try:
                teacher, needs_finetuning = load_classifier(self.model), False
            except NoTrainedHeadError:
                names, kind = self.task.label_names, self.task.problem_type
                teacher, needs_finetuning = (
                    load_encoder(self.model, label_names=names, problem_type=kind),
                    True,
                )
            if isinstance(teacher, MultiExitModel) and teacher.exit_layers:
                raise InputError(f"{self.model} has exits already: give the classifier that it was made from")
            tokenizer = load_tokenizer(self.model)
            check_max_length(self.max_length, teacher, tokenizer)
            if self.max_length == _DEFAULT_MAX_LENGTH and "settings" not in run_configuration(self.model):
                logger.info("Texts are cut to %d tokens; --max-length says otherwise.", self.max_length)
            teacher.to(process_state().device)
            pace = measure_pace(teacher, tokenizer, self.task, self.max_length, self.seed)
            recipes = [recipe for recipe in RECIPES if recipe.name not in known]
            after = reserve(self.task, pace, len(RECIPES))
            plan = make_plan(
                teacher,
                self.task,
                pace,
                needs_finetuning=needs_finetuning and TEACHER not in known,
                max_length=self.max_length,
                seconds=None if self.budget is None else self.budget - clock.seconds - after,
                seed=self.seed,
                recipes=recipes,
            )
            before = [self.state["started"][name]["training"] for name in known]
            self.state |= {
                "plan": [*before, *(training.as_json() for training in plan)],
                "needs_finetuning": needs_finetuning,
                "seconds_after_training": after,
                "seconds_to_measure": measuring(self.task, pace),
            }
            self._save()
        plan = [PlannedTraining(**training) for training in self.state["plan"]]
        to_come = [training for training in plan if training.name not in known]
        left = None if self.budget is None else self.budget - clock.seconds
        announce_plan(to_come, self.state["seconds_after_training"], left)
        return plan

    def _export(self) -> dict[str, Path]:
        exports = {}
        # Exits of regression compare themselves with each other, which no merged graph does.
        merged = {
            recipe.name for recipe in RECIPES if recipe.exits and self.task.problem_type != "regression"
        }
        for name in self.trainings.trained():
            folder = self.folder / "exports" / f"{name}{_SUFFIX}"
            try:
                export_once(
                    self.trainings.folder_of(name),
                    folder,
                    self.progress,
                    merge_exits=name in merged,
                    max_length=self.max_length,
                )
            except InputError as error:
                logger.warning("%s cannot be exported: %s", name, error)
                continue
            exports[name] = folder
        if not exports:
            raise InputError(f"{self.folder}: none of the models can be exported; the messages above say why")
        return exports

    def _certify(self, exports: dict[str, Path]) -> dict[str, Certificate]:
        """Tests every export against the teacher; made anew when another model has come, since all share one δ."""
        known = self.state.get("certificates", {})
        if set(known) == set(exports):
            return {name: Certificate(**value) for name, value in known.items()}
        confidence = split_confidence(self.risk.confidence, len(exports))
        budget = replace(self.risk, confidence=confidence)
        folder = self.trainings.folder_of(TEACHER)
        reference = reference_logits(folder, self.task, self.max_length, self.progress)
        labels = np.asarray(self.task.dataset("dev")["labels"])
        score = compute_metrics(self.task.problem_type, self.task.metrics, reference, labels)
        check_teacher_score(self.task, score[self.task.main_metric], "dev")
        certificates = {
            name: certify(
                exported,
                reference,
                self.task,
                budget,
                self.progress,
                reference_files=model_files_fingerprint(folder),
                max_length=self.max_length,
            )
            for name, exported in exports.items()
        }
        self.state["certificates"] = {name: it.as_json() for name, it in certificates.items()}
        self._save()
        return certificates

    def _benchmark(
        self, exports: dict[str, Path], certificates: dict[str, Certificate]
    ) -> dict[str, dict[str, Any]]:
        """Rows of the benchmark by model, at its speed: those within the budget on dev, and the teacher in fp32.

        Models with exits are measured at further speeds too, 0 among them, for the page's slider.
        """
        path = self.folder / "benchmark" / "benchmark.json"
        measured = [name for name in exports if certificates[name].within_on_dev]
        models = [str(self.trainings.folder_of(TEACHER)), *(str(exports[name]) for name in measured)]
        names = dict(zip(short_names(models)[1:], measured, strict=True))
        speeds = {name: certificates[name].speed for name in measured}
        if not path.exists() or self.state.get("benchmarked") != speeds:
            split = "test" if "test" in self.task.splits else "dev"
            settings = BenchmarkSettings(
                peers=("onnx-int8",),
                repeats=3,
                timing_rows=256,
                latency_rows=32,
                model_speeds={
                    str(exports[name]): timed_speeds(exports[name], speeds[name]) for name in measured
                },
                seed=self.seed,
            )
            run = partial(
                benchmark, models, self.task, split, data_name=self.task.name, progress=self.progress
            )
            try:
                results = run(settings=settings)
            except InputError as error:
                # After hours of training nothing is to fail for want of a comparison.
                logger.warning("Measured without a plain int8 export: %s", error)
                results = run(settings=replace(settings, peers=()))
            write_json(path, results)
            self.state["benchmarked"] = speeds
            self._save()
        rows = read_json(path)["results"]
        found = {
            names[row["name"]]: row
            for row in rows
            if row["name"] in names
            and row["backend"] == "onnx"
            and (row["speed"] or 0.0) == certificates[names[row["name"]]].speed
        }
        return {"baseline": rows[0]} | found

    def _choose(
        self,
        exports: dict[str, Path],
        certificates: dict[str, Certificate],
        rows: dict[str, dict[str, Any]],
        clock: WorkClock,
    ) -> dict[str, Any]:
        baseline = rows["baseline"]
        measured = {name: row for name, row in rows.items() if name != "baseline"}
        beaten = dominated({name: row for name, row in measured.items() if certificates[name].kept})
        candidates = [
            describe_candidate(name, certificates[name], measured.get(name), baseline, name in beaten)
            for name in exports
        ]
        fitting = [
            candidate
            for candidate in candidates
            if candidate["kept"] and candidate["ratio"] >= (self.min_speedup or 0.0)
        ]
        best = max(fitting, key=lambda candidate: float(candidate["ratio"]), default=None)
        summary = {
            "alembert_version": version("alembert"),
            "model": Path(self.model).name,
            "data": {name: rows.num_rows for name, rows in self.task.splits.items()}
            | {"name": self.task.name},
            "seed": self.seed,
            "max_length": self.max_length,
            "machine": machine_description(),
            "met": best is not None,
            "verdict": verdict(best, candidates, self.risk, self.min_speedup, self.task.main_metric),
            "best": best,
            "unsure": unsure(
                best, candidates, self.task.dataset("dev").num_rows, min_speedup=self.min_speedup
            ),
            "split": "test" if "test" in self.task.splits else "dev",
            "max_drop": self.risk.most,
            "confidence": self.risk.confidence,
            "mode": self.risk.mode,
            "min_speedup": self.min_speedup,
            "candidates": candidates,
            "trainings": self.state["trainings"],
            "plan": self.state["plan"],
            "seconds": round(clock.seconds),
            "budget_seconds": self.budget,
        }
        if best is None:
            remove(self.folder / BEST)
        else:
            self._leave(best["name"], exports, compression_card(summary, self.task.describe()))
        return summary

    def _leave(self, name: str, exports: dict[str, Path], card: str) -> None:
        """Copies the model to best/, whole or not at all."""
        best, fresh = self.folder / BEST, self.folder / ".best"
        shutil.rmtree(fresh, ignore_errors=True)
        shutil.copytree(exports[name], fresh / "onnx")
        run = self.trainings.folder_of(name)
        if run.is_dir():
            leave_out = shutil.ignore_patterns("checkpoints", "checkpoint-*")
            shutil.copytree(run, fresh / "torch", ignore=leave_out)
        else:  # a teacher from the hub
            load_classifier(self.model).save_pretrained(fresh / "torch")
            load_tokenizer(self.model).save_pretrained(fresh / "torch")
        write_text(fresh / "README.md", card)
        remove(best)
        fresh.rename(best)

    def _report(
        self, exports: dict[str, Path], certificates: dict[str, Certificate], summary: dict[str, Any]
    ) -> str | None:
        shown = {name: folder for name, folder in exports.items() if certificates[name].within_on_dev}
        page = write_work_report(
            self.folder / "report",
            summary,
            self.task,
            self.risk,
            benchmark=read_json(self.folder / "benchmark" / "benchmark.json"),
            teacher=self.trainings.folder_of(TEACHER),
            exports=shown,
            runs={name: self.trainings.folder_of(name) for name in shown},
            progress=self.progress,
        )
        return None if page is None else page.relative_to(self.folder).as_posix()

    def _save(self) -> None:
        write_json(self.folder / STATE, self.state)
