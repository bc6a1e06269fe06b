"""Every exit run once: which one each text takes at any speed, what it then loses, and what it costs."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from alembert.benchmarks.engines import manifest_macs
from alembert.benchmarks.evaluation import ExitAnswers, collect_exit_answers
from alembert.benchmarks.flops import CostModel
from alembert.benchmarks.risk_budget import ACCURACY_DROP, DISAGREEMENT, RiskBudget
from alembert.runtime.adaptive import AdaptiveClassifier, Text
from alembert.runtime.manifest import Manifest
from alembert.runtime.policies import MULTI_LABEL, REGRESSION, ExitPolicy, PolicyHistory
from alembert.runtime.torch_backend import to_probabilities

Array = NDArray[Any]


class ReplayedExits:
    """Which exit each text takes at any speed, and what it then loses; every exit was run once.

    Args:
        answers: of every exit.
        policy: resolved for the model's labels.
        labels: (rows,) class ids or values, (rows, labels) of 0 and 1 for several labels.
        reference: logits (rows, labels) of the model that answers are compared with; the full model's when absent.

    Attributes:
        rows: how many texts there are.
        uncertainties: (rows, exits − 1) float32, as `exit_uncertainties` gives them.
    """

    def __init__(
        self, answers: ExitAnswers, policy: ExitPolicy, labels: Array, reference: Array | None = None
    ) -> None:
        self._reference = answers.logits[:, -1] if reference is None else reference
        self._logits, self._labels, self._problem_type = answers.logits, labels, policy.problem_type
        self.rows = len(labels)
        self.uncertainties = exit_uncertainties(answers, policy)

    def taken(self, speed: float) -> NDArray[np.int64]:
        """Index (rows,) of the exit that each text takes, as `ExitAnswers.replay` says."""
        # Nothing leaves at speed 0: no uncertainty is below it.
        leaves = np.concatenate([self.uncertainties < float(speed), np.ones((self.rows, 1), bool)], axis=1)
        return np.asarray(leaves.argmax(1))

    def logits(self, speed: float) -> Array:
        """The logits (rows, labels) of the exits taken."""
        return np.asarray(self._logits[np.arange(len(self._logits)), self.taken(speed)])

    def losses(self, speed: float, budget: RiskBudget) -> NDArray[np.float64]:
        """The loss (rows,) of each text at a speed; its mean is the risk."""
        early, full = self.logits(speed), self._reference
        if budget.risk == DISAGREEMENT:
            return self._distance(early, self._decisions(full), budget.scale)
        wrong = self._distance(early, self._labels, budget.scale)
        if budget.risk == ACCURACY_DROP:
            wrong -= self._distance(full, self._labels, budget.scale)
        return wrong

    def changed(self, speed: float) -> float:
        """Share of texts answered otherwise than by the full model; of regression values, of those not equal."""
        different = self._decisions(self.logits(speed)) != self._decisions(self._logits[:, -1])
        return float((different.any(-1) if different.ndim > 1 else different).mean())

    def _decisions(self, logits: Array) -> Array:
        if self._problem_type == REGRESSION:
            return logits[:, 0]
        return logits > 0 if self._problem_type == MULTI_LABEL else np.asarray(logits.argmax(-1))

    def _distance(self, logits: Array, target: Array, scale: float | None) -> NDArray[np.float64]:
        """0 for the target's answer, 1 for any other; for regression what lies between counts in proportion."""
        decisions = self._decisions(logits)
        if self._problem_type == REGRESSION:
            assert scale is not None
            differences = np.abs(decisions.astype(float) - target.reshape(len(target))) / scale
            return np.asarray(np.minimum(differences, 1.0))
        different = decisions != target.astype(decisions.dtype)
        return np.asarray(different.any(-1) if self._problem_type == MULTI_LABEL else different, float)


def exit_uncertainties(answers: ExitAnswers, policy: ExitPolicy) -> NDArray[np.float32]:
    """The policy's uncertainty (rows, exits − 1) of each text at each exit, had it not left before.

    What a policy remembers of a text depends on the exits it passed, never on the speed.
    """
    history: PolicyHistory | None = None
    columns = []
    for index in range(len(answers.exit_layers) - 1):
        probabilities = to_probabilities(
            torch.from_numpy(answers.logits[:, index]), policy.problem_type
        ).numpy()
        learned = None if answers.learned_uncertainties is None else answers.learned_uncertainties[:, index]
        uncertainty, history = policy.uncertainty(probabilities, history, learned)
        columns.append(np.asarray(uncertainty, np.float32))
    return np.stack(columns, axis=1) if columns else np.empty((len(answers.logits), 0), np.float32)


class ExitCosts:
    """Mean multiply-accumulates per text, `paper` convention, by the exits that texts take.

    Args:
        classifier: on torch or exported.
        answers: of its exits to the texts.
    """

    def __init__(self, classifier: AdaptiveClassifier, answers: ExitAnswers) -> None:
        self._layers, self._lengths = np.array(answers.exit_layers), answers.lengths
        self._manifest: Manifest | None = getattr(classifier.backend, "manifest", None)
        self._model = None if self._manifest else CostModel.from_model(classifier.backend.model)

    def macs(self, taken: Array, speed: float) -> float | None:
        """Per text, where `taken` are indices (rows,) of exits; None for an export in which nobody counted."""
        layers, active = self._layers[taken], self._layers[:-1].tolist() if speed > 0 else []
        if self._model is not None:
            return float(self._model.macs(layers, self._lengths, active_exits=active).mean())
        assert self._manifest is not None
        if not self._manifest.macs:
            return None
        return float(manifest_macs(self._manifest, layers, self._lengths, active).mean())

    def shares(self, taken: Array) -> dict[str, float]:
        """Share of the texts that leave after each layer."""
        shares = np.bincount(taken, minlength=len(self._layers)) / len(taken)
        return {str(layer): float(share) for layer, share in zip(self._layers, shares, strict=True)}


class _TensorBackend:
    """An exported model's backend whose answers are tensors, as `collect_exit_answers` reads them."""

    def __init__(self, backend: Any) -> None:
        self._backend = backend

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backend, name)

    def run_all_exits(self, batch: dict[str, np.ndarray]) -> tuple[torch.Tensor, torch.Tensor | None]:
        logits, learned = self._backend.run_all_exits(batch)
        return torch.from_numpy(logits), None if learned is None else torch.from_numpy(learned)


def collect_answers(
    classifier: AdaptiveClassifier, texts: Sequence[Text], progress: Callable[[int, int], None] | None = None
) -> ExitAnswers:
    """`collect_exit_answers` for models of torch and exported ones."""
    if not hasattr(classifier.backend, "manifest"):
        return collect_exit_answers(classifier, texts, progress)
    adapted = copy.copy(classifier)
    adapted.backend = _TensorBackend(classifier.backend)
    return collect_exit_answers(adapted, texts, progress)
