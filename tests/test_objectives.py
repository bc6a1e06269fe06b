"""Objectives of the teacher–student methods against the papers' formulas, written out on stock models' outputs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import ot
import pytest
import torch
from torch import Tensor
from torch.nn import functional
from transformers import AutoTokenizer, BertConfig, BertForMaskedLM, BertForSequenceClassification

import alembert.training.stage_model
from alembert.methods.bert_emd import BertEmdObjective, BertEmdOptions
from alembert.methods.distilbert import DistilBertObjective, DistilBertOptions, MaskedLanguageObjective
from alembert.methods.lrc_bert import LrcBertObjective, LrcBertOptions
from alembert.methods.minilm import MiniLmObjective, RelationOptions
from alembert.methods.minilm_v2 import MiniLmV2Objective, MiniLmV2Options
from alembert.methods.pkd import PkdObjective, PkdOptions
from alembert.methods.prediction import PredictionObjective
from alembert.methods.tinybert import TinyBertIntermediateObjective, TinyBertOptions
from alembert.models.capture import capture
from alembert.models.features import FeatureRequest
from alembert.training.objective import Objective
from alembert.training.settings import TrainingSettings
from alembert.training.stage import Stage
from alembert.training.stage_model import StageModel
from alembert.training.teachers import LiveTeacher

SINGLE, MULTI, REGRESSION = (
    "single_label_classification", "multi_label_classification", "regression",
)  # fmt: skip
LENGTHS = (9, 4, 6, 3)
LABELS = torch.tensor([0, 2, 1, 0])
VOCABULARY = 40
Inputs = dict[str, Tensor]


def config(layers: int, width: int, heads: int = 2, dropout: float = 0.0) -> BertConfig:
    return BertConfig(
        vocab_size=VOCABULARY, hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads,
        intermediate_size=2 * width, max_position_embeddings=32, initializer_range=0.3, num_labels=3,
        hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout, problem_type=SINGLE,
    )  # fmt: skip


def model(seed: int, *arguments: Any, **more: Any) -> BertForSequenceClassification:
    torch.manual_seed(seed)
    return BertForSequenceClassification(config(*arguments, **more))


@pytest.fixture
def teacher() -> BertForSequenceClassification:
    return model(1, 4, 32)


@pytest.fixture
def student() -> BertForSequenceClassification:
    return model(2, 2, 16).train()


def batch(padding: int = 0, rows: slice = slice(None)) -> Inputs:
    """Texts of different lengths; there is always some padding within the batch."""
    generator = torch.Generator().manual_seed(5)
    width = max(LENGTHS) + padding
    ids, mask = (
        torch.zeros(len(LENGTHS), width, dtype=torch.long),
        torch.zeros(len(LENGTHS), width, dtype=torch.long),
    )
    for row, length in enumerate(LENGTHS):
        ids[row, :length] = torch.randint(5, VOCABULARY, (length,), generator=generator)
        mask[row, :length] = 1
    return {"input_ids": ids[rows], "attention_mask": mask[rows]}


class Stock:
    """A stock model's outputs, and attention computed from its weights."""

    def __init__(self, model: Any, inputs: Inputs) -> None:
        output = model(**inputs, output_hidden_states=True)
        self.model, self.hidden, self.logits = model, output.hidden_states, output.logits

    def heads(self, layer: int, part: str) -> Tensor:
        """Queries, keys or values of a layer, (B, h, n, d)."""
        attention = self.model.bert.encoder.layer[layer - 1].attention.self
        vectors = getattr(attention, part)(self.hidden[layer - 1])
        return vectors.view(*vectors.shape[:2], self.model.config.num_attention_heads, -1).transpose(1, 2)

    def scores(self, layer: int) -> Tensor:
        queries, keys = self.heads(layer, "query"), self.heads(layer, "key")
        return queries @ keys.transpose(-1, -2) / queries.shape[-1] ** 0.5


def stocks(student: Any, teacher: Any, inputs: Inputs) -> tuple[Stock, Stock]:
    with torch.no_grad():
        target = Stock(teacher.eval(), inputs)
    return Stock(student, inputs), target


def terms_of(objective: Objective, student: Any, teacher: Any, inputs: Inputs, labels: Any = LABELS) -> Any:
    assert objective.teacher_request is not None
    target = LiveTeacher(teacher, objective.teacher_request)(inputs)
    return objective(capture(student, inputs, objective.student_request), target, labels)


def token_mse(student: Tensor, teacher: Tensor, lengths: Any = LENGTHS) -> Tensor:
    """Mean over the batch's tokens and the width."""
    parts = [
        (student[row, :length] - teacher[row, :length]).square().flatten()
        for row, length in enumerate(lengths)
    ]
    return torch.cat(parts).mean()


def score_mse(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean over heads and the batch's pairs of tokens."""
    parts = [
        (student[row, :, :length, :length] - teacher[row, :, :length, :length]).square().flatten()
        for row, length in enumerate(LENGTHS)
    ]
    return torch.cat(parts).mean()


def cosine(first: Tensor, second: Tensor) -> Tensor:
    return (first * second).sum() / (first.norm() * second.norm())


def assert_terms(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(
            actual[name], value, rtol=1e-4, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}"
        )


def assert_same_gradients(first: Tensor, second: Tensor, parameters: list[Tensor]) -> None:
    ones = torch.autograd.grad(first, parameters, allow_unused=True, retain_graph=True)
    others = torch.autograd.grad(second, parameters, allow_unused=True, retain_graph=True)
    assert any(gradient is not None and gradient.abs().max() > 0 for gradient in ones)
    for one, other in zip(ones, others, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)


# --- TinyBERT ---


@pytest.mark.parametrize("projection", ["shared", "per_layer"])
@pytest.mark.parametrize(
    ("mapping", "layers"), [("uniform", (2, 4)), ("top", (3, 4)), ("bottom", (1, 2)), ("explicit", (1, 1))]
)
def test_tinybert_compares_mapped_layers(
    student: Any, teacher: Any, mapping: str, layers: tuple[int, ...], projection: Any
) -> None:
    chosen: dict[str, Any] = {"teacher_layers": layers} if mapping == "explicit" else {"mapping": mapping}
    objective = TinyBertIntermediateObjective(
        student, teacher, TinyBertOptions(projection=projection, **chosen)
    )
    linears = objective.projection.linears
    assert len(linears) == (1 if projection == "shared" else 3)

    def project(hidden: Tensor, layer: int) -> Tensor:
        linear = linears["shared" if projection == "shared" else str(layer)]
        return hidden @ linear.weight.T + linear.bias

    own, other = stocks(student, teacher, batch())
    pairs = [(1, layers[0]), (2, layers[1])]
    expected = {
        "attention": sum(score_mse(own.scores(m), other.scores(g)) for m, g in pairs),
        "hidden": sum(token_mse(project(own.hidden[m], m), other.hidden[g]) for m, g in pairs),
        "embedding": token_mse(project(own.hidden[0], 0), other.hidden[0]),
    }
    actual = terms_of(objective, student, teacher, batch())
    assert_terms(actual, expected)
    parameters = [*student.parameters(), *objective.parameters()]
    assert_same_gradients(sum(actual.values()), sum(expected.values()), parameters)


def test_tinybert_averages_groups_of_heads(teacher: Any) -> None:
    student = model(2, 2, 16, heads=4)
    objective = TinyBertIntermediateObjective(
        student, teacher, TinyBertOptions(heads="average", hidden=False, embedding=False)
    )
    own, other = stocks(student, teacher, batch())
    expected = sum(
        score_mse(torch.stack([scores[:, :2].mean(1), scores[:, 2:].mean(1)], dim=1), other.scores(2 * m))
        for m, scores in ((1, own.scores(1)), (2, own.scores(2)))
    )
    assert_terms(terms_of(objective, student, teacher, batch()), {"attention": expected})
    assert objective.projection is None


# --- predictions ---


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("soft_loss", ["divergence", "cross_entropy", "logits_mse"])
@pytest.mark.parametrize("problem_type", [SINGLE, MULTI, REGRESSION])
def test_predictions(
    student: Any, teacher: Any, problem_type: str, soft_loss: Any, temperature: float
) -> None:
    labels = {SINGLE: LABELS, MULTI: torch.eye(3)[LABELS], REGRESSION: torch.randn(4, 3)}[problem_type]
    objective = PredictionObjective(
        problem_type, soft_weight=0.3, hard_weight=0.7, temperature=temperature, soft_loss=soft_loss
    )
    own, other = stocks(student, teacher, batch())
    z_s, z_t = own.logits, other.logits
    hard = {
        SINGLE: lambda: -z_s.log_softmax(-1)[torch.arange(4), LABELS].mean(),
        MULTI: lambda: functional.binary_cross_entropy(z_s.sigmoid(), labels),
        REGRESSION: lambda: (z_s - labels).square().mean(),
    }[problem_type]()
    if problem_type == REGRESSION or soft_loss == "logits_mse":
        soft = (z_s - z_t).square().mean()
    else:
        if problem_type == SINGLE:
            p_s, p_t = (z_s / temperature).softmax(-1), (z_t / temperature).softmax(-1)
        else:
            p_s, p_t = (
                torch.stack([(z / temperature).sigmoid(), (-z / temperature).sigmoid()], -1)
                for z in (z_s, z_t)
            )
        soft = -(p_t * p_s.log()).flatten(1).sum(1)
        if soft_loss == "divergence":
            soft = soft + (p_t * p_t.log()).flatten(1).sum(1)
        # Several labels: the mean over labels, as in the loss against them.
        soft = soft.mean() * temperature**2 / (3 if problem_type == MULTI else 1)
    actual = terms_of(objective, student, teacher, batch(), labels)
    assert_terms(actual, {"soft": 0.3 * soft, "hard": 0.7 * hard})


def test_regression_against_labels_runs_no_teacher(student: Any) -> None:
    objective = PredictionObjective(REGRESSION, soft_weight=0.4, hard_weight=0.1, regression_target="labels")
    assert objective.teacher_request is None
    features = capture(student, batch(), FeatureRequest())
    labels = torch.randn(4, 3)
    expected = 0.5 * (features.logits - labels).square().mean()
    assert_terms(objective(features, None, labels), {"hard": expected})
    assert PredictionObjective(SINGLE, soft_weight=0.0, hard_weight=1.0).teacher_request is None
    assert set(objective(features, None, labels)) == {"hard"}


# --- BERT-EMD ---


@pytest.mark.parametrize("form", ["paper", "code"])
@pytest.mark.parametrize("separate", [False, True])
def test_bert_emd_transports_layers_and_moves_their_weights(
    student: Any, teacher: Any, form: Any, separate: bool
) -> None:
    beta, theta, tau = 0.3, 0.7, 2.0
    objective = BertEmdObjective(
        student, teacher, SINGLE,
        BertEmdOptions(
            beta=beta, theta=theta, separate=separate, cost_attention_form=form, temperature=3.0,
            **({"cost_attention_temperature": tau} if form == "paper" else {}),
        ),
    )  # fmt: skip
    linear = objective.projection.linears["shared"]
    own, other = stocks(student, teacher, batch())
    projected = [hidden @ linear.weight.T + linear.bias for hidden in own.hidden]
    distances = {
        "attention": torch.stack(
            [torch.stack([score_mse(own.scores(i), other.scores(j)) for j in range(1, 5)]) for i in (1, 2)]
        ),
        "hidden": torch.stack(
            [torch.stack([token_mse(projected[i], other.hidden[j]) for j in range(1, 5)]) for i in (1, 2)]
        ),
    }
    soft = -((other.logits / 3).softmax(-1) * (own.logits / 3).log_softmax(-1)).sum(-1).mean() * 9
    rest = {"embedding": beta * token_mse(projected[0], other.hidden[0]), "soft": soft}
    weights = {kind: (np.full(2, 0.5), np.full(4, 0.25)) for kind in distances}
    # Three steps on the same batch: what a step leaves, the next one starts from.
    for _ in range(3):
        costs = {kind: distance.detach().double().numpy() for kind, distance in distances.items()}
        flows = {kind: ot.emd(*weights[kind], costs[kind]) for kind in distances}
        expected = {
            kind: beta * theta * (torch.as_tensor(flows[kind], dtype=torch.float32) * distances[kind]).sum()
            for kind in distances
        } | rest
        actual = terms_of(objective, student, teacher, batch())
        assert_terms(actual, expected)
        snapshot = objective.snapshot()
        for kind, flow in flows.items():
            np.testing.assert_allclose(snapshot[kind]["flow"], flow, atol=2e-5)

        for kind, flow in flows.items():
            updated = []
            for axis, old in ((1, weights[kind][0]), (0, weights[kind][1])):
                r = (flow * costs[kind]).sum(axis) / old
                u = r.sum() / r
                preference = u if form == "code" else np.exp(u / tau - (u / tau).max())
                updated.append(preference / preference.sum())
            weights[kind] = (updated[0], updated[1])
        if not separate:
            mean = tuple(np.mean(sides, axis=0) for sides in zip(*weights.values(), strict=True))
            weights = dict.fromkeys(weights, mean)
        for kind, (first, second) in weights.items():
            np.testing.assert_allclose(objective.weights[kind].student.numpy(), first, rtol=1e-3, atol=1e-5)
            np.testing.assert_allclose(objective.weights[kind].teacher.numpy(), second, rtol=1e-3, atol=1e-5)
            # float32's rounding of the weights is not to grow from step to step.
            weights[kind] = tuple(
                side.double().numpy() / side.double().numpy().sum() for side in objective.weights[kind].both()
            )
    # The flow is a constant: the gradient is that of Σ F · D with F fixed.
    parameters = [*student.parameters(), *objective.parameters()]
    assert_same_gradients(sum(actual.values()), sum(expected.values()), parameters)
    same = np.allclose(objective.weights["attention"].student, objective.weights["hidden"].student)
    assert same != separate


def test_bert_emd_without_cost_attention_keeps_even_weights(student: Any, teacher: Any) -> None:
    options = BertEmdOptions(cost_attention=False, projection="per_layer", attention=False)
    objective = BertEmdObjective(student, teacher, SINGLE, options)
    assert set(objective.projection.linears) == {"0", "1", "2"}
    assert set(terms_of(objective, student, teacher, batch())) == {"hidden", "embedding", "soft"}
    assert objective.weights["hidden"].student.tolist() == [0.5, 0.5]
    assert objective.weights["hidden"].teacher.tolist() == [0.25] * 4


# --- LRC-BERT ---


def lrc_terms(
    objective: LrcBertObjective,
    own: Stock,
    other: Stock,
    options: LrcBertOptions,
    lengths: Any,
    labels: Tensor,
) -> dict[str, Tensor]:
    """α Σ_m L_C + β L_soft + γ L_hard, every cosine on its own."""
    alpha, beta, gamma = objective.contrastive_weight, objective.soft_weight, objective.hard_weight

    def vector(hidden: Tensor, row: int) -> Tensor:
        width = max(lengths)
        padded = functional.pad(hidden[row, : lengths[row]], (0, 0, 0, width - lengths[row]))
        return {"flatten": padded.flatten(), "cls": hidden[row, 0], "mean": padded.sum(0) / lengths[row]}[
            options.vectors
        ]

    result = {}
    if alpha:
        total = torch.zeros(())
        for m, g in ((1, 2), (2, 4)):
            linear = objective.projection.linears[str(m)]
            projected = own.hidden[m] @ linear.weight.T + linear.bias
            rows = range(len(lengths))
            losses = []
            for row in rows:
                z_s = vector(projected, row)
                positive = 1 - cosine(vector(other.hidden[g], row), z_s)
                negatives = [1 - cosine(vector(other.hidden[g], k), z_s) for k in rows if k != row]
                pushed = sum(2 - (negative - positive) for negative in negatives)
                losses.append(pushed / (2 * len(negatives)) + positive)
            total = total + torch.stack(losses).mean()
        result["contrastive"] = alpha * total
    if beta:
        p_s, p_t = ((z / options.temperature).softmax(-1) for z in (own.logits, other.logits))
        result["soft"] = beta * (p_t * (p_t.log() - p_s.log())).sum(-1).mean()
    if gamma:
        target = torch.eye(3)[labels]
        if options.hard_loss == "softened":
            target = (target / options.temperature).softmax(-1)
        result["hard"] = gamma * -(target * own.logits.log_softmax(-1)).sum(-1).mean()
    return result


@pytest.mark.parametrize("hard_loss", ["plain", "softened"])
@pytest.mark.parametrize("vectors", ["flatten", "cls", "mean"])
@pytest.mark.parametrize("weights", [(1.0, 0.0, 0.0), (1.0, 1.0, 3.0), (0.0, 0.5, 0.0)])
def test_lrc_bert_weighs_its_terms_by_stage(
    student: Any, teacher: Any, weights: tuple[float, float, float], vectors: Any, hard_loss: Any
) -> None:
    options = LrcBertOptions(vectors=vectors, hard_loss=hard_loss, temperature=1.3)
    objective = LrcBertObjective(student, teacher, SINGLE, options, weights)
    own, other = stocks(student, teacher, batch())
    expected = lrc_terms(objective, own, other, options, LENGTHS, LABELS)
    assert_terms(terms_of(objective, student, teacher, batch()), expected)


@pytest.mark.parametrize("problem_type", [MULTI, REGRESSION])
def test_lrc_bert_softens_single_labels_only(student: Any, teacher: Any, problem_type: str) -> None:
    labels = torch.eye(3)[LABELS]
    terms = [
        terms_of(
            LrcBertObjective(
                student, teacher, problem_type, LrcBertOptions(hard_loss=hard_loss), (0.0, 1.0, 1.0)
            ),
            student, teacher, batch(), labels,
        )
        for hard_loss in ("plain", "softened")
    ]  # fmt: skip
    assert_terms(terms[0], terms[1])


@pytest.fixture
def offsets(monkeypatch: pytest.MonkeyPatch) -> list[Tensor | None]:
    """The embedding offsets of the student's passes."""
    seen: list[Tensor | None] = []

    def recording(*arguments: Any, embedding_offset: Tensor | None = None, **more: Any) -> Any:
        seen.append(None if embedding_offset is None else embedding_offset.detach().clone())
        return capture(*arguments, embedding_offset=embedding_offset, **more)

    monkeypatch.setattr(alembert.training.stage_model, "capture", recording)
    return seen


def perturbed_stage(student: Any, teacher: Any, length: float = 1.0) -> tuple[StageModel, LrcBertObjective]:
    torch.manual_seed(3)
    objective = LrcBertObjective(student, teacher, SINGLE, LrcBertOptions(), (1.0, 1.0, 3.0))
    return StageModel(student, objective, LiveTeacher(teacher, objective.teacher_request), length), objective


def manual_gradients(
    student: Any, teacher: Any, objective: LrcBertObjective, rows: slice, length: float
) -> tuple[Tensor, list[Tensor | None]]:
    """The offset, and the gradients of the second pass, by hand on the stock model."""
    inputs, lengths, labels = batch(rows=rows), LENGTHS[rows], LABELS[rows]
    _, other = stocks(student, teacher, inputs)
    embeddings: list[Tensor] = []
    hook = student.bert.embeddings.register_forward_hook(lambda *call: embeddings.append(call[2]))
    loss = sum(
        lrc_terms(objective, Stock(student, inputs), other, LrcBertOptions(), lengths, labels).values()
    )
    hook.remove()
    (gradient,) = torch.autograd.grad(loss, embeddings[0])
    offset = torch.stack([length * part / part.square().sum().sqrt() for part in gradient])
    hook = student.bert.embeddings.register_forward_hook(lambda *call: call[2] + offset)
    second = sum(
        lrc_terms(objective, Stock(student, inputs), other, LrcBertOptions(), lengths, labels).values()
    )
    hook.remove()
    parameters = [*student.parameters(), *objective.parameters()]
    return offset, list(torch.autograd.grad(second, parameters, allow_unused=True))


@pytest.mark.parametrize("length", [1.0, 0.25])
def test_the_pass_that_counts_is_shifted_along_the_gradient(
    student: Any, teacher: Any, offsets: list[Tensor | None], length: float
) -> None:
    stage, objective = perturbed_stage(student, teacher, length)
    stage.train()
    output = stage(labels=LABELS, **batch())
    assert all(parameter.grad is None for parameter in stage.parameters())
    sum(output["terms"].values()).backward()
    offset, gradients = manual_gradients(student, teacher, objective, slice(None), length)
    assert offsets[0] is None
    assert len(offsets) == 2
    torch.testing.assert_close(offsets[1], offset, rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(offsets[1].flatten(1).norm(dim=1), torch.full((4,), length))
    for parameter, expected in zip([*student.parameters(), *objective.parameters()], gradients, strict=True):
        assert (parameter.grad is None) == (expected is None)
        if expected is not None:
            torch.testing.assert_close(parameter.grad, expected, rtol=1e-3, atol=1e-5)


def test_perturbation_accumulates_the_gradients_of_several_batches(student: Any, teacher: Any) -> None:
    stage, objective = perturbed_stage(student, teacher)
    stage.train()
    halves = slice(0, 2), slice(2, 4)
    for rows in halves:
        sum(stage(labels=LABELS[rows], **batch(rows=rows))["terms"].values()).backward()
    first, second = (manual_gradients(student, teacher, objective, rows, 1.0)[1] for rows in halves)
    for parameter, *parts in zip(
        [*student.parameters(), *objective.parameters()], first, second, strict=True
    ):
        if parts[0] is not None:
            torch.testing.assert_close(parameter.grad, parts[0] + parts[1], rtol=1e-3, atol=1e-5)


def test_perturbation_in_half_precision(student: Any, teacher: Any, offsets: list[Tensor | None]) -> None:
    stage, objective = perturbed_stage(student, teacher)
    stage.train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = stage(labels=LABELS, **batch())
    sum(output["terms"].values()).backward()
    offset, gradients = manual_gradients(student, teacher, objective, slice(None), 1.0)
    torch.testing.assert_close(offsets[1].float().flatten(1).norm(dim=1), torch.ones(4), rtol=0.02, atol=0)
    assert functional.cosine_similarity(offsets[1].float().flatten(), offset.flatten(), dim=0) > 0.9
    pairs = [
        (parameter.grad, expected)
        for parameter, expected in zip(
            [*student.parameters(), *objective.parameters()], gradients, strict=True
        )
        if expected is not None
    ]
    actual, expected = (torch.cat([part.flatten() for part in side]) for side in zip(*pairs, strict=True))
    assert functional.cosine_similarity(actual, expected, dim=0) > 0.9


# --- BERT-PKD ---


@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("normalise", [True, False])
@pytest.mark.parametrize(("strategy", "layers"), [("skip", (1, 3)), ("last", (2, 3))])
def test_pkd_follows_first_tokens(
    teacher: Any, strategy: Any, layers: tuple[int, int], normalise: bool, reduction: Any
) -> None:
    student = model(2, 3, 32)
    options = PkdOptions(
        strategy=strategy, normalise=normalise, reduction=reduction, patient_weight=7.0, hard_weight=0.3,
        temperature=5.0,
    )  # fmt: skip
    objective = PkdObjective(student, teacher, SINGLE, options)
    assert list(objective.parameters()) == []
    own, other = stocks(student, teacher, batch())
    patient = torch.zeros(())
    for m, g in zip((1, 2), layers, strict=True):
        for row in range(4):
            first, second = own.hidden[m][row, 0], other.hidden[g][row, 0]
            if normalise:
                first, second = first / first.norm(), second / second.norm()
            squares = (first - second).square()
            patient = patient + (squares.sum() if reduction == "sum" else squares.mean() / 2) / 4
    p_s, p_t = ((z / 5).softmax(-1) for z in (own.logits, other.logits))
    expected = {
        "soft": 0.7 * 25 * (p_t * (p_t / p_s).log()).sum(-1).mean(),
        "hard": 0.3 * functional.cross_entropy(own.logits, LABELS),
        "patient": 7 * patient,
    }
    assert_terms(terms_of(objective, student, teacher, batch()), expected)


# --- DistilBERT ---


def mean_cosine(student: Tensor, teacher: Tensor) -> Tensor:
    return torch.stack(
        [
            1 - cosine(student[row, token], teacher[row, token])
            for row, length in enumerate(LENGTHS)
            for token in range(length)
        ]
    ).mean()


def test_distilbert_on_a_task(student: Any, teacher: Any) -> None:
    objective = DistilBertObjective(student, teacher, SINGLE, DistilBertOptions(project=True))
    own, other = stocks(student, teacher, batch())
    linear = objective.cosine.projection.linears["shared"]
    p_s, p_t = ((z / 2).softmax(-1) for z in (own.logits, other.logits))
    expected = {
        "soft": 5 * 4 * (p_t * (p_t / p_s).log()).sum(-1).mean(),
        "hard": 2 * functional.cross_entropy(own.logits, LABELS),
        "cosine": mean_cosine(own.hidden[2] @ linear.weight.T + linear.bias, other.hidden[4]),
    }
    assert_terms(terms_of(objective, student, teacher, batch()), expected)


@pytest.fixture
def tokenizer(tiny_encoder: Path) -> Any:
    return AutoTokenizer.from_pretrained(tiny_encoder)


@pytest.mark.parametrize("masked_only", [False, True])
def test_distilbert_on_plain_text(tokenizer: Any, masked_only: bool) -> None:
    torch.manual_seed(0)
    student, teacher = BertForMaskedLM(config(2, 32)), BertForMaskedLM(config(4, 32))
    objective = MaskedLanguageObjective(
        student, teacher, tokenizer, DistilBertOptions(masked_only=masked_only, masked_share=0.5)
    )
    inputs, labels = objective.prepare(batch(), None)
    own, other = stocks(student, teacher, inputs)
    guessed = [
        (row, token)
        for row, length in enumerate(LENGTHS)
        for token in range(length)
        if labels[row, token] != -100
    ]
    assert 3 < len(guessed) < sum(LENGTHS)
    compared = guessed if masked_only else [(row, t) for row, n in enumerate(LENGTHS) for t in range(n)]
    soft, words = [], []
    for row, token in compared:
        p_s, p_t = ((z[row, token] / 2).softmax(-1) for z in (own.logits, other.logits))
        soft.append(4 * (p_t * (p_t / p_s).log()).sum())
    for row, token in guessed:
        assert labels[row, token] == batch()["input_ids"][row, token]
        words.append(-own.logits[row, token].log_softmax(-1)[labels[row, token]])
    expected = {
        "soft": 5 * torch.stack(soft).mean(),
        "masked_words": 2 * torch.stack(words).mean(),
        "cosine": mean_cosine(own.hidden[2], other.hidden[4]),
    }
    assert_terms(terms_of(objective, student, teacher, inputs, labels), expected)


def test_masking_statistics(tokenizer: Any) -> None:
    encoder = BertForMaskedLM(config(2, 32))
    objective = MaskedLanguageObjective(encoder, encoder, tokenizer, DistilBertOptions())
    special = set(tokenizer.all_special_ids)
    generator = torch.Generator().manual_seed(0)
    # A fifth of the tokens are special ones.
    ids = torch.randint(0, VOCABULARY, (200, 200), generator=generator)
    is_special = torch.isin(ids, torch.tensor(sorted(special)))
    assert is_special.float().mean() > 0.05
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    torch.manual_seed(11)
    masked, labels = objective.prepare(inputs, None)
    chosen = labels != -100
    assert not (chosen & is_special).any()
    assert masked["input_ids"][~chosen].equal(ids[~chosen])
    assert labels[chosen].equal(ids[chosen])
    assert masked["attention_mask"] is inputs["attention_mask"]
    assert chosen[~is_special].float().mean().item() == pytest.approx(0.15, abs=0.01)
    seen, true = masked["input_ids"][chosen], ids[chosen]
    hidden = (seen == tokenizer.mask_token_id).float().mean().item()
    kept = (seen == true).float().mean().item()
    # One in 40 random words is the mask token, and one the word itself.
    assert hidden == pytest.approx(0.8 + 0.1 / VOCABULARY, abs=0.02)
    assert kept == pytest.approx(0.1 + 0.1 / VOCABULARY, abs=0.02)
    changed = seen[(seen != true) & (seen != tokenizer.mask_token_id)]
    assert len(changed.unique()) > VOCABULARY / 2

    torch.manual_seed(11)
    again, labels_again = objective.prepare(inputs, None)
    assert again["input_ids"].equal(masked["input_ids"])
    assert labels_again.equal(labels)
    assert not objective.prepare(inputs, None)[1].equal(labels)
    assert inputs["input_ids"] is ids


# --- MiniLM ---


def relation(vectors: Tensor, row: int, head: int, length: int) -> Tensor:
    part = vectors[row, head, :length]
    return (part @ part.T / part.shape[-1] ** 0.5).softmax(-1)


def divergence(teacher: Tensor, student: Tensor) -> Tensor:
    """KL(teacher ‖ student), one for each token."""
    return (teacher * (teacher.log() - student.log())).sum(-1)


@pytest.mark.parametrize("teacher_layer", [None, 3])
def test_minilm(student: Any, teacher: Any, teacher_layer: int | None) -> None:
    objective = MiniLmObjective(student, teacher, RelationOptions(teacher_layer=teacher_layer))
    layer = teacher_layer or 4
    own, other = stocks(student, teacher, batch())
    attention, values = [], []
    for row, n in enumerate(LENGTHS):
        rows_values = []
        for head in range(2):
            first, second = (
                side.scores(at)[row, head, :n, :n].softmax(-1) for side, at in ((own, 2), (other, layer))
            )
            attention.append(divergence(second, first))
            rows_values.append(
                divergence(
                    relation(other.heads(layer, "value"), row, head, n),
                    relation(own.heads(2, "value"), row, head, n),
                )
            )
        values.append(torch.cat(rows_values).mean())
    expected = {"attention": torch.cat(attention).mean(), "value_relation": torch.stack(values).mean()}
    actual = terms_of(objective, student, teacher, batch())
    assert_terms(actual, expected)
    assert_same_gradients(sum(actual.values()), sum(expected.values()), list(student.parameters()))


@pytest.mark.parametrize("heads", [None, 8, 1])
def test_minilm_v2_splits_heads_anew(teacher: Any, heads: int | None) -> None:
    student = model(2, 2, 16, heads=4)
    options = MiniLmV2Options(relation_heads=heads, key_weight=0.5, value_weight=0.0)
    objective = MiniLmV2Objective(student, teacher, options)
    count = heads or 16  # the largest number up to 48 that divides 16 and 32
    assert objective.relation_heads == count
    own, other = stocks(student, teacher, batch())
    expected = {}
    for name, part, weight in (("queries", "query", 1.0), ("keys", "key", 0.5)):
        sides = []
        for side, layer in ((own, 2), (other, 4)):
            vectors = side.heads(layer, part)
            joined = torch.cat(list(vectors.unbind(1)), dim=-1)
            sides.append(torch.stack(joined.chunk(count, dim=-1), dim=1))
        rows = [
            torch.cat(
                [
                    divergence(relation(sides[1], row, head, n), relation(sides[0], row, head, n))
                    for head in range(count)
                ]
            ).mean()
            for row, n in enumerate(LENGTHS)
        ]
        expected[name] = weight * torch.stack(rows).mean()
    assert_terms(terms_of(objective, student, teacher, batch()), expected)


# --- all of them ---

OBJECTIVES: dict[str, Callable[[Any, Any], Objective]] = {
    "kd": lambda student, teacher: PredictionObjective(SINGLE, soft_weight=0.5, hard_weight=0.5),
    "tinybert": lambda student, teacher: TinyBertIntermediateObjective(student, teacher, TinyBertOptions()),
    "bert-emd": lambda student, teacher: BertEmdObjective(student, teacher, SINGLE, BertEmdOptions(beta=1.0)),
    "lrc-bert": lambda student, teacher: LrcBertObjective(
        student, teacher, SINGLE, LrcBertOptions(), (1.0, 1.0, 3.0)
    ),
    "distilbert": lambda student, teacher: DistilBertObjective(
        student, teacher, SINGLE, DistilBertOptions(project=True)
    ),
    "pkd": lambda student, teacher: PkdObjective(student, teacher, SINGLE, PkdOptions(project=True)),
    "minilm": lambda student, teacher: MiniLmObjective(student, teacher, RelationOptions()),
    "minilm-v2": lambda student, teacher: MiniLmV2Objective(student, teacher, MiniLmV2Options()),
}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_padding_changes_nothing(student: Any, teacher: Any, name: str) -> None:
    results = []
    for padding in (0, 7):
        torch.manual_seed(4)
        objective = OBJECTIVES[name](student, teacher)
        stage_model = StageModel(student, objective, LiveTeacher(teacher, objective.teacher_request))
        student.zero_grad()
        terms = stage_model.train()(labels=LABELS, **batch(padding))["terms"]
        sum(terms.values()).backward()
        results.append((terms, {name: value.grad for name, value in stage_model.named_parameters()}))
    assert_terms(results[1][0], results[0][0])
    for key, gradient in results[0][1].items():
        if gradient is not None:
            torch.testing.assert_close(results[1][1][key], gradient, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_teacher_is_always_in_evaluation_mode_and_never_learns(student: Any, name: str) -> None:
    teacher = model(1, 4, 32, dropout=0.5)
    stage = Stage("task", OBJECTIVES[name](student, teacher), TrainingSettings(), teacher=teacher)
    stage.prepare(student)
    stage_model = StageModel(
        student, stage.objective, LiveTeacher(teacher, stage.objective.teacher_request)
    ).train()
    before = {key: value.clone() for key, value in teacher.state_dict().items()}
    terms = []
    for _ in range(2):
        teacher.train()
        if name == "bert-emd":
            for weights in stage.objective.weights.values():
                weights.update(torch.full((2,), 0.5), torch.full((4,), 0.25))
        terms.append(stage_model(labels=LABELS, **batch())["terms"])
    assert_terms(terms[0], terms[1])
    sum(terms[1].values()).backward()
    assert not teacher.training
    assert all(not value.requires_grad and value.grad is None for value in teacher.parameters())
    assert all(teacher.state_dict()[key].equal(value) for key, value in before.items())
    # Neither optimiser nor checkpoints know of it.
    owned = {id(value) for value in stage_model.state_dict(keep_vars=True).values()}
    assert not owned & {id(value) for value in teacher.parameters()}


def test_the_teachers_outputs_do_not_depend_on_padding(teacher: Any) -> None:
    request = FeatureRequest(hidden_states=(0, 4), attention_scores=(4,), values=(4,))
    live = LiveTeacher(teacher, request)
    short, long = live(batch()), live(batch(6))
    torch.testing.assert_close(long.logits, short.logits, rtol=1e-4, atol=1e-5)
    for row, n in enumerate(LENGTHS):
        for layer in (0, 4):
            torch.testing.assert_close(
                long.hidden_states[layer][row, :n], short.hidden_states[layer][row, :n], rtol=1e-4, atol=1e-5
            )
        torch.testing.assert_close(
            long.attention_scores[4][row, :, :n, :n], short.attention_scores[4][row, :, :n, :n],
            rtol=1e-4, atol=1e-5,
        )  # fmt: skip
        torch.testing.assert_close(
            long.values[4][row, :, :n], short.values[4][row, :, :n], rtol=1e-4, atol=1e-5
        )
