"""The BiLSTM student: its numbers against cells run by hand, padding, and loading with and without Alembert."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    BertConfig,
    BertModel,
    PreTrainedModel,
)

from alembert.common.errors import InputError
from alembert.models.bilstm import BilstmForSequenceClassification
from alembert.models.students import build_bilstm, build_student, describe_student

LABELS = ("no", "maybe", "yes")
ROWS = ([5, 9, 3], [7], [2, 8, 8, 4, 6])


@pytest.fixture(scope="module")
def teacher() -> PreTrainedModel:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8
    )
    return BertModel(config)


@pytest.fixture
def model(teacher: PreTrainedModel) -> BilstmForSequenceClassification:
    return build_bilstm(
        teacher, label_names=LABELS, embedding_size=8, hidden_size=6, head_size=10, dropout=0.3, seed=1
    ).eval()


def batch(padding: int = 2, left: bool = False) -> dict[str, Tensor]:
    width = max(map(len, ROWS)) + padding
    ids, mask = torch.full((len(ROWS), width), 11), torch.zeros(len(ROWS), width, dtype=torch.long)
    for row, tokens in enumerate(ROWS):
        columns = slice(width - len(tokens), width) if left else slice(len(tokens))
        ids[row, columns], mask[row, columns] = torch.tensor(tokens), 1
    return {"input_ids": ids, "attention_mask": mask}


def by_hand(model: BilstmForSequenceClassification, tokens: list[int]) -> Tensor:
    """The logits of one text, cell by cell."""

    def last_state(suffix: str, order: list[int]) -> Tensor:
        weights = [
            getattr(model.lstm, f"{name}_l0{suffix}")
            for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
        ]
        hidden = cell = torch.zeros(weights[1].shape[1])
        for token in order:
            gates = (
                weights[0] @ model.embeddings.weight[token] + weights[2] + weights[1] @ hidden + weights[3]
            )
            enter, forget, candidate, leave = gates.chunk(4)
            cell = forget.sigmoid() * cell + enter.sigmoid() * candidate.tanh()
            hidden = leave.sigmoid() * cell.tanh()
        return hidden

    both = torch.cat([last_state("", tokens), last_state("_reverse", tokens[::-1])])
    return model.classifier(model.dense(both).clamp(min=0))


@pytest.mark.parametrize(("padding", "left"), [(0, False), (4, False), (3, True)])
def test_logits_are_the_papers_equations_whatever_the_padding(
    model: BilstmForSequenceClassification, padding: int, left: bool
) -> None:
    with torch.no_grad():
        actual = model(**batch(padding, left), token_type_ids=torch.zeros(3, 5), unknown=1).logits
        expected = torch.stack([by_hand(model, tokens) for tokens in ROWS])
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-6)


def test_no_mask_means_all_tokens(model: BilstmForSequenceClassification) -> None:
    with torch.no_grad():
        torch.testing.assert_close(model(torch.tensor([[2, 8, 8]])).logits[0], by_hand(model, [2, 8, 8]))


@pytest.mark.parametrize("left", [False, True])
def test_padding_gets_no_gradient(model: BilstmForSequenceClassification, left: bool) -> None:
    model.train()(**batch(left=left), labels=torch.tensor([0, 1, 2])).loss.backward()
    used = {token for tokens in ROWS for token in tokens}
    moved = model.embeddings.weight.grad.abs().sum(dim=1).nonzero().flatten().tolist()
    assert set(moved) == used


def test_losses_of_all_problem_types(teacher: PreTrainedModel) -> None:
    cases = {
        "single_label_classification": (LABELS, torch.tensor([0, 2, 1]), nn.functional.cross_entropy),
        "multi_label_classification": (
            LABELS,
            torch.eye(3),
            nn.functional.binary_cross_entropy_with_logits,
        ),
        "regression": ((), torch.tensor([0.5, 1.0, -1.0]), nn.functional.mse_loss),
    }
    for problem_type, (names, labels, loss) in cases.items():
        model = build_bilstm(
            teacher, label_names=names, problem_type=problem_type, embedding_size=8, seed=1
        ).eval()
        output = model(**batch(), labels=labels)
        expected = loss(output.logits.squeeze(-1) if problem_type == "regression" else output.logits, labels)
        torch.testing.assert_close(output.loss, expected)


def test_trains_in_half_precision(model: BilstmForSequenceClassification) -> None:
    labels, optimizer = torch.tensor([0, 1, 2]), torch.optim.Adam(model.parameters(), 0.02)
    with torch.no_grad():
        expected = model(**batch()).logits
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(model(**batch()).logits.float(), expected, rtol=0, atol=2e-2)
    model.train()
    for _ in range(60):
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(**batch(), labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert float(loss.detach()) < 0.2
    assert torch.equal(model.eval()(**batch()).logits.argmax(dim=1), labels)


def test_embeddings_come_from_the_teachers_principal_components(teacher: PreTrainedModel) -> None:
    tokens = teacher.embeddings.word_embeddings.weight.detach().double()
    narrow = build_bilstm(teacher, label_names=LABELS, embedding_size=8).embeddings.weight.detach().double()
    back = narrow @ torch.linalg.lstsq(narrow, tokens).solution
    optimal = float((torch.linalg.svdvals(tokens)[8:] ** 2).sum())
    assert float(((back - tokens) ** 2).sum()) == pytest.approx(optimal, rel=1e-4)
    copied = build_bilstm(teacher, label_names=LABELS, embedding_size=16).embeddings.weight
    assert torch.equal(copied, teacher.embeddings.word_embeddings.weight)
    drawn = build_bilstm(teacher, label_names=LABELS, embedding_size=30, initialise="random", seed=2)
    assert abs(float(drawn.embeddings.weight.detach().std()) - 0.1) < 0.01


def test_sizes_and_seed(teacher: PreTrainedModel) -> None:
    first, again, other = (
        build_bilstm(teacher, label_names=LABELS, embedding_size=8, hidden_size=6, head_size=10, seed=seed)
        for seed in (1, 1, 2)
    )
    assert torch.equal(first.lstm.weight_hh_l0, again.lstm.weight_hh_l0)
    assert not torch.equal(first.lstm.weight_hh_l0, other.lstm.weight_hh_l0)
    lstm = 2 * (4 * 6 * 8 + 4 * 6 * 6 + 2 * 4 * 6)
    assert describe_student(first) == {
        "model_type": "alembert-bilstm",
        "layers": 1,
        "hidden_size": 6,
        "heads": None,
        "intermediate_size": None,
        "parameters": 50 * 8 + lstm + (12 * 10 + 10) + (10 * 3 + 3),
    }


def test_bilstm_by_name(teacher: PreTrainedModel) -> None:
    student = build_student("bilstm", teacher, label_names=LABELS, initialise="embeddings", seed=1)
    assert isinstance(student, BilstmForSequenceClassification)
    assert (student.config.embedding_size, student.config.num_labels) == (16, 3)


def test_refused(teacher: PreTrainedModel) -> None:
    with pytest.raises(InputError, match=r"17 .* 16"):
        build_bilstm(teacher, label_names=LABELS, embedding_size=17)
    with pytest.raises(InputError, match="without attention heads"):
        build_student("bilstm", teacher, label_names=LABELS, heads=2)
    with pytest.raises(InputError, match=r"layers.*embeddings or random"):
        build_student("bilstm", teacher, label_names=LABELS, initialise="layers")
    with pytest.raises(InputError, match=r"layers.*embeddings or random"):
        build_bilstm(teacher, label_names=LABELS, initialise="layers")


def test_loads_by_the_auto_classes_without_trusting_code(
    model: BilstmForSequenceClassification, tmp_path: Path
) -> None:
    model.save_pretrained(tmp_path)
    (tmp_path / "bilstm.py").write_text("raise SystemExit('code of the folder was run')")
    assert (
        type(AutoModelForSequenceClassification.from_pretrained(tmp_path)) is BilstmForSequenceClassification
    )
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path, trust_remote_code=False)
    assert type(again) is BilstmForSequenceClassification
    assert AutoConfig.from_pretrained(tmp_path, trust_remote_code=False).id2label == dict(enumerate(LABELS))
    with torch.no_grad():
        torch.testing.assert_close(again(**batch()).logits, model(**batch()).logits, rtol=0, atol=0)


def test_loads_in_a_process_without_alembert(model: BilstmForSequenceClassification, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    inputs = {key: value.tolist() for key, value in batch().items()}
    script = f"""
import json, sys, torch
from transformers import AutoModelForSequenceClassification
sys.modules["alembert"] = None  # an import of it would fail
model = AutoModelForSequenceClassification.from_pretrained({str(tmp_path)!r}, trust_remote_code=True).eval()
inputs = {{key: torch.tensor(value) for key, value in json.loads({json.dumps(inputs)!r}).items()}}
with torch.no_grad():
    print(json.dumps(model(**inputs).logits.tolist()))
"""
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    with torch.no_grad():
        expected = model(**batch()).logits
    torch.testing.assert_close(torch.tensor(json.loads(result.stdout.splitlines()[-1])), expected)
