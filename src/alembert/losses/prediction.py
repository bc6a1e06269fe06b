"""Losses on predictions: against labels, and against a teacher's logits.

Problem types are `"single_label_classification"` (one softmax), `"multi_label_classification"` (one sigmoid
per label) and `"regression"` (the raw value). Every loss is a mean over rows, and half-precision logits are
raised to float32 first.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from alembert.common.errors import InputError

PROBLEM_TYPES = ("single_label_classification", "multi_label_classification", "regression")
KL_DIRECTIONS = ("student||teacher", "teacher||student", "symmetric")


def kl_divergence(
    student_logits: Tensor,
    teacher_logits: Tensor,
    direction: str = "student||teacher",
    temperature: float = 1.0,
    reduction: str = "mean",
) -> Tensor:
    """Kullback–Leibler divergence of the two softmaxes at temperature T, times T².

    T² keeps the gradient's size as T grows (Hinton et al., 2015). `"student||teacher"` is Σ p_s ln(p_s /
    p_t), as FastBERT and MS-BERT (Eq. 9) print it; `"teacher||student"` is what FastBERT's published code
    computes; `"symmetric"` is the mean of the two.

    Args:
        student_logits: finite, `(..., classes)`.
        teacher_logits: finite, `(..., classes)`, broadcastable with `student_logits`.
        direction: which distribution comes first, see above.
        temperature: T > 0.
        reduction: `"mean"` over all leading dimensions, or `"none"`.

    Returns:
        A scalar, or `(...)` for `"none"`; in nats, ≥ 0 up to rounding.

    Raises:
        InputError: unknown direction or reduction, or T not positive.
    """
    _check_temperature(temperature)
    student = functional.log_softmax(_full_precision(student_logits) / temperature, dim=-1)
    teacher = functional.log_softmax(_full_precision(teacher_logits) / temperature, dim=-1)
    divergence = (_divergence_weights(student.exp(), teacher.exp(), direction) * (student - teacher)).sum(
        dim=-1
    )
    return _reduce(divergence * temperature**2, reduction)


def bernoulli_kl_divergence(
    student_logits: Tensor,
    teacher_logits: Tensor,
    direction: str = "student||teacher",
    temperature: float = 1.0,
    reduction: str = "mean",
) -> Tensor:
    """Kullback–Leibler divergence between independent labels, mean over labels, times T².

    Each logit is the log-odds of one label. The mean, not the sum, so that soft terms are on the scale of the loss
    against labels (`task_loss`), whatever the number of labels. Arguments, returns and errors as for `kl_divergence`.
    """
    _check_temperature(temperature)
    student = _full_precision(student_logits) / temperature
    teacher = _full_precision(teacher_logits) / temperature
    present = functional.logsigmoid(student) - functional.logsigmoid(teacher)
    absent = functional.logsigmoid(-student) - functional.logsigmoid(-teacher)
    weight_present = _divergence_weights(student.sigmoid(), teacher.sigmoid(), direction)
    weight_absent = _divergence_weights((-student).sigmoid(), (-teacher).sigmoid(), direction)
    divergence = (weight_present * present + weight_absent * absent).mean(dim=-1)
    return _reduce(divergence * temperature**2, reduction)


def distillation_divergence(
    student_logits: Tensor,
    teacher_logits: Tensor,
    problem_type: str,
    *,
    direction: str = "student||teacher",
    temperature: float = 1.0,
    reduction: str = "mean",
) -> Tensor:
    """How far a student's prediction is from its teacher's, by problem type.

    Single label: `kl_divergence`. Several labels: `bernoulli_kl_divergence`. Regression: squared difference
    of the values, mean over the last dimension; direction and temperature have no meaning there and are
    ignored. Arguments, returns and errors as for `kl_divergence`; an unknown problem type is an `InputError`
    too.
    """
    if problem_type == "single_label_classification":
        return kl_divergence(student_logits, teacher_logits, direction, temperature, reduction)
    if problem_type == "multi_label_classification":
        return bernoulli_kl_divergence(student_logits, teacher_logits, direction, temperature, reduction)
    if problem_type == "regression":
        difference = _full_precision(student_logits) - _full_precision(teacher_logits)
        return _reduce(difference.square().mean(dim=-1), reduction)
    raise _unknown("problem_type", problem_type, PROBLEM_TYPES)


def task_loss(logits: Tensor, labels: Tensor, problem_type: str) -> Tensor:
    """The loss against labels, a scalar, as transformers' classification models compute it.

    Single label: cross-entropy, mean over rows. Several labels: binary cross-entropy, mean over rows and
    labels. Regression: mean squared error.

    Args:
        logits: `(rows, classes)`; `(rows, 1)` for regression with one value.
        labels: class indices `(rows,)`; 0 or 1 `(rows, classes)` for several labels; values `(rows,)` or
            `(rows, 1)` for regression.
        problem_type: one of `PROBLEM_TYPES`.

    Raises:
        InputError: unknown problem type, or labels whose shape does not fit the logits'.
    """
    logits = _full_precision(logits)
    if problem_type == "single_label_classification":
        _check_labels(labels, logits, fits=labels.shape == logits.shape[:-1])
        return functional.cross_entropy(logits, labels.long())
    if problem_type == "multi_label_classification":
        _check_labels(labels, logits, fits=labels.shape == logits.shape)
        return functional.binary_cross_entropy_with_logits(logits, labels.to(logits.dtype))
    if problem_type == "regression":
        _check_labels(labels, logits, fits=labels.numel() == logits.numel() and len(labels) == len(logits))
        return functional.mse_loss(logits, labels.to(logits.dtype).reshape(logits.shape))
    raise _unknown("problem_type", problem_type, PROBLEM_TYPES)


def soft_cross_entropy(
    student_logits: Tensor,
    teacher_logits: Tensor,
    problem_type: str,
    temperature: float = 1.0,
    reduction: str = "mean",
) -> Tensor:
    """Cross-entropy of the student's prediction against the teacher's at temperature T, times T².

    TinyBERT's (Eq. 10) and BERT-EMD's prediction loss: −Σ softmax(z_T / T) ln softmax(z_S / T), which has the
    gradient of KL(teacher ‖ student) for the student and the teacher's entropy on top. Several labels: the
    Bernoulli cross-entropy, mean over labels. Regression: squared difference of the values, mean over the
    last dimension; T is ignored. The published codes divide by the number of classes, too, and TinyBERT's has
    no T².

    Args:
        student_logits: finite, `(..., classes)`.
        teacher_logits: finite, `(..., classes)`, broadcastable with `student_logits`.
        problem_type: one of `PROBLEM_TYPES`.
        temperature: T > 0.
        reduction: `"mean"` over all leading dimensions, or `"none"`.

    Returns:
        A scalar, or `(...)` for `"none"`; in nats, ≥ 0.

    Raises:
        InputError: unknown problem type or reduction, or T not positive.
    """
    _check_temperature(temperature)
    student = _full_precision(student_logits) / temperature
    teacher = _full_precision(teacher_logits) / temperature
    if problem_type == "single_label_classification":
        entropy = -(teacher.softmax(dim=-1) * student.log_softmax(dim=-1)).sum(dim=-1)
    elif problem_type == "multi_label_classification":
        present, absent = teacher.sigmoid(), (-teacher).sigmoid()
        entropy = -(present * functional.logsigmoid(student) + absent * functional.logsigmoid(-student))
        entropy = entropy.mean(dim=-1)
    else:
        return distillation_divergence(student_logits, teacher_logits, problem_type, reduction=reduction)
    return _reduce(entropy * temperature**2, reduction)


def softened_label_loss(
    logits: Tensor, labels: Tensor, problem_type: str, temperature: float = 1.1
) -> Tensor:
    """Cross-entropy against softmax(one-hot / τ), mean over rows (LRC-BERT, Eq. 5 as printed).

    This is label smoothing: at τ = 1.1 the right one of two classes gets 0.713, of three 0.554. The student's
    own softmax is at temperature 1.

    Args:
        logits: `(rows, classes)`.
        labels: class indices `(rows,)`.
        problem_type: only `"single_label_classification"`.
        temperature: τ > 0.

    Raises:
        InputError: another problem type, labels whose shape does not fit the logits', or τ not positive.
    """
    _check_temperature(temperature)
    if problem_type != "single_label_classification":
        raise InputError(
            f"Softened labels need one class per text, but the problem type is {problem_type}: use the plain "
            "loss against labels (task_loss)."
        )
    logits = _full_precision(logits)
    _check_labels(labels, logits, fits=labels.shape == logits.shape[:-1])
    one_hot = functional.one_hot(labels.long(), logits.shape[-1]).to(logits.dtype)
    return functional.cross_entropy(logits, (one_hot / temperature).softmax(dim=-1))


def masked_language_modelling_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of the tokens to be guessed, mean over them (BERT's masked language modelling).

    Args:
        logits: `(B, n, vocabulary)`.
        labels: token ids `(B, n)`; −100 where nothing is to be guessed.

    Returns:
        A scalar in nats; 0 where nothing is to be guessed.

    Raises:
        InputError: labels whose shape does not fit the logits'.
    """
    _check_labels(labels, logits, fits=labels.shape == logits.shape[:-1])
    guessed = labels != -100
    # Selected before they are raised to float32: the vocabulary is the widest dimension there is.
    total = functional.cross_entropy(
        _full_precision(logits[guessed]), labels[guessed].long(), reduction="sum"
    )
    return total / guessed.sum().clamp_min(1)


def _divergence_weights(student: Tensor, teacher: Tensor, direction: str) -> Tensor:
    """Factors of ln(student / teacher) in the divergence, from the two sides' probabilities."""
    if direction == "student||teacher":
        return student
    if direction == "teacher||student":
        return -teacher
    if direction == "symmetric":
        return (student - teacher) / 2
    raise _unknown("direction", direction, KL_DIRECTIONS)


def _full_precision(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _reduce(values: Tensor, reduction: str) -> Tensor:
    if reduction == "mean":
        return values.mean()
    if reduction == "none":
        return values
    raise _unknown("reduction", reduction, ("mean", "none"))


def _check_temperature(temperature: float) -> None:
    if not temperature > 0:
        raise InputError(f"temperature must be greater than 0, but is {temperature}.")


def _check_labels(labels: Tensor, logits: Tensor, fits: bool) -> None:
    if not fits:
        raise InputError(
            f"labels of shape {tuple(labels.shape)} do not fit logits of shape {tuple(logits.shape)} "
            "for this problem type."
        )


def _unknown(name: str, value: str, known: tuple[str, ...]) -> InputError:
    return InputError(f"{name} {value!r} is unknown: choose one of {', '.join(known)}.")
