"""The nine GLUE tasks: columns, problem type, label names and metrics (Wang et al. 2018, Table 1)."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from alembert.common.errors import InputError


@dataclass(frozen=True)
class Preset:
    """What is known of a task before its files are opened.

    Attributes:
        text_column, text_pair_column: GLUE's own column names; files may also use the general ones.
        label_names: in the order of GLUE's integer labels; () for regression.
        metrics: GLUE's metrics, the main one first.
    """

    text_column: str
    text_pair_column: str | None
    label_names: tuple[str, ...]
    metrics: tuple[str, ...] = ("accuracy",)

    @property
    def problem_type(self) -> str:
        """Single-label classification where there are label names, else regression."""
        return "single_label_classification" if self.label_names else "regression"

    def text_column_in(self, columns: Collection[str]) -> str | None:
        """GLUE's name of the text column, if it is among `columns`."""
        return self.text_column if self.text_column in columns else None

    def text_pair_column_in(self, columns: Collection[str]) -> str | None:
        """GLUE's name of the second text column, if it is among `columns`."""
        return self.text_pair_column if self.text_pair_column in columns else None


_ENTAILMENT = ("entailment", "not_entailment")

PRESETS = {
    "cola": Preset("sentence", None, ("unacceptable", "acceptable"), ("matthews",)),
    "sst2": Preset("sentence", None, ("negative", "positive")),
    "mrpc": Preset("sentence1", "sentence2", ("not_equivalent", "equivalent"), ("f1", "accuracy")),
    "qqp": Preset("question1", "question2", ("not_duplicate", "duplicate"), ("f1", "accuracy")),
    "stsb": Preset("sentence1", "sentence2", (), ("pearson", "spearman")),
    "mnli": Preset("premise", "hypothesis", ("entailment", "neutral", "contradiction")),
    "qnli": Preset("question", "sentence", _ENTAILMENT),
    "rte": Preset("sentence1", "sentence2", _ENTAILMENT),
    "wnli": Preset("sentence1", "sentence2", _ENTAILMENT[::-1]),
}


def get_preset(name: str) -> Preset:
    """The preset of that name. Raises InputError, naming those there are, if there is none."""
    try:
        return PRESETS[name.lower().replace("-", "")]
    except KeyError:
        raise InputError(f"Unknown preset '{name}'; known are {', '.join(PRESETS)}.") from None
