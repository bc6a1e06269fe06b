"""Methods that compare hidden states without a projection of their own."""

from __future__ import annotations

from transformers import PreTrainedModel

from alembert.common.errors import InputError
from alembert.methods.student_distillation import widths


def check_equal_widths(student: PreTrainedModel, teacher: PreTrainedModel) -> None:
    """Raises InputError when the hidden sizes differ."""
    own, other = widths(student, teacher)
    if own != other:
        raise InputError(
            f"the student is {own} wide, the teacher {other}, and this compares their hidden states as they are: "
            f"choose a student of width {other} (such as 6x{other}), or learn a projection (--set project=true)"
        )
