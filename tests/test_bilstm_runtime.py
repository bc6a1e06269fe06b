"""BiLSTM students from the command line on: distilled, asked, measured, described, and distilled further."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoTokenizer, BertConfig, BertModel, PreTrainedModel

import alembert
from alembert import AdaptiveClassifier, BilstmForSequenceClassification
from alembert.benchmarks.flops import CostModel
from alembert.cli.app import run
from alembert.common.errors import InputError
from alembert.models.loading import load_any, load_classifier, load_encoder, load_tokenizer, max_tokens
from alembert.models.students import build_bilstm

EMBEDDING, HIDDEN, HEAD, LABELS = 32, 24, 400, 3
PER_TOKEN = 2 * 4 * HIDDEN * (EMBEDDING + HIDDEN)
DENSE, CLASSIFIER = 2 * HIDDEN * HEAD, HEAD * LABELS
TEXTS = [
    "we saw the soup",
    "rain",
    "a very very very much much coach was there today and it was a goal again",
]


def distil(teacher: Path, task_folder: Path, output: Path, *more: str) -> int:
    arguments = ["distill", "--method", "kd", "--teacher", str(teacher), "--data", str(task_folder)]
    return run([*arguments, "--output", str(output), "--batch-size", "8", "--max-length", "32", *more])


@pytest.fixture(scope="module")
def bilstm(tmp_path_factory: pytest.TempPathFactory, teacher: Path, task_folder: Path) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "bilstm"
    settings = ["--set", f"bilstm_hidden_size={HIDDEN}", "--epochs", "4", "--learning-rate", "5e-3"]
    assert distil(teacher, task_folder, folder, "--student", "bilstm", *settings) == 0
    return folder


@pytest.fixture(scope="module")
def classifier(bilstm: Path) -> AdaptiveClassifier:
    return AdaptiveClassifier.from_pretrained(bilstm)


def test_a_distilled_bilstm_predicts_what_its_own_forward_pass_says(
    bilstm: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["predict", str(bilstm), *TEXTS, "--json", "--speed", "0.9"]) == 0
    answers = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    model, tokenizer = load_classifier(str(bilstm)), AutoTokenizer.from_pretrained(bilstm)
    assert type(model) is BilstmForSequenceClassification
    for text, answer in zip(TEXTS, answers, strict=True):
        with torch.no_grad():
            expected = model(**tokenizer(text, return_tensors="pt")).logits[0].softmax(-1)
        assert answer["label"] == model.config.id2label[int(expected.argmax())]
        assert answer["score"] == pytest.approx(float(expected.max()), abs=1e-6)
        assert (answer["exit"], answer["uncertainty"]) == (1, None)


def test_it_has_learned_the_task(bilstm: Path) -> None:
    metrics = json.loads((bilstm / "metrics.json").read_text())
    assert metrics["test"]["full"]["accuracy"] > metrics["majority_baseline"] + 0.3


@pytest.mark.parametrize(("batch_tokens", "window"), [(1, 1), (40, 2), (4096, 4096)])
def test_predictions_depend_on_neither_batch_nor_padding(
    bilstm: Path, classifier: AdaptiveClassifier, batch_tokens: int, window: int
) -> None:
    other = AdaptiveClassifier.from_pretrained(bilstm, batch_tokens=batch_tokens, window=window)
    alone = np.concatenate([classifier.predict_proba([text]) for text in TEXTS])
    np.testing.assert_allclose(other.predict_proba(TEXTS), alone, atol=1e-6)
    np.testing.assert_allclose(other.predict_proba(TEXTS[::-1]), alone[::-1], atol=1e-6)


@pytest.mark.parametrize("speed", [0.0, 0.5, 1.0])
def test_the_full_model_answers_at_every_speed(classifier: AdaptiveClassifier, speed: float) -> None:
    assert classifier.exit_layers == (1,)
    assert classifier.predict(TEXTS, speed=speed) == classifier.predict(TEXTS)


def test_exits_that_it_cannot_have_are_refused(bilstm: Path) -> None:
    with pytest.raises(InputError, match=r"no exit after layer 1: the model's exits are \[\]"):
        AdaptiveClassifier.from_pretrained(bilstm, exits=[1])


def test_evaluation_measures_quality_cost_and_time(
    bilstm: Path, task_folder: Path, task: alembert.Task, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["evaluate", str(bilstm), "--data", str(task_folder), "--speed", "0,0.5", "--repeats", "1"]
    assert run([*command, "--output", str(tmp_path / "results"), "--json"]) == 0
    results = json.loads(capsys.readouterr().out)
    reported = json.loads((bilstm / "metrics.json").read_text())["test"]["full"]["accuracy"]
    lengths = [
        len(AutoTokenizer.from_pretrained(bilstm)(text)["input_ids"]) for text in task.dataset("test")["text"]
    ]
    assert results["full_model"]["metric"] == pytest.approx(reported)
    assert results["full_model"]["macs"] == pytest.approx(PER_TOKEN * np.mean(lengths) + DENSE)
    assert results["exit_layers"] == [1]
    for row in results["speeds"]:
        assert (row["metric"], row["speedup"], row["agreement"]) == (pytest.approx(reported), 1, 1)
        assert row["exits"] == {"1": 1.0}
        assert row["macs_full_convention"] - row["macs"] == pytest.approx(CLASSIFIER)
        assert row["same_exit_as_replayed"] == 1
        assert row["ratio_to_full"] > 0
    assert results["full_model"]["texts_per_second"] > 0
    assert {"results.csv", "results.json", "speed_curve.png", "exit_shares.png"} <= {
        file.name for file in (tmp_path / "results").iterdir()
    }


def test_info_describes_it(bilstm: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["info", str(bilstm), "--length", "20", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    model = load_classifier(str(bilstm))
    assert (facts["family"], facts["layers"], facts["hidden_size"]) == ("alembert-bilstm", 1, HIDDEN)
    assert facts["parameters"] == sum(parameter.numel() for parameter in model.parameters())
    assert (facts["problem_type"], facts["label_names"]) == (
        "single_label_classification",
        ["food", "sport", "weather"],
    )
    macs = 20 * PER_TOKEN + DENSE
    assert facts["exits"] == [{"layer": 1, "head": "stock", "macs": macs, "flops": 2 * macs, "speedup": 1.0}]
    assert run(["info", str(bilstm)]) == 0
    assert "alembert-bilstm, 1 layers × 24" in capsys.readouterr().out


@pytest.fixture(scope="module")
def encoder() -> PreTrainedModel:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8
    )
    return BertModel(config)


@pytest.mark.filterwarnings("ignore:TF32 acceleration")
@pytest.mark.parametrize(("layers", "length"), [(1, 7), (3, 12)])
def test_macs_are_those_of_every_matrix_product(encoder: PreTrainedModel, layers: int, length: int) -> None:
    model = build_bilstm(
        encoder, label_names=("no", "yes"), embedding_size=10, hidden_size=6, head_size=9, num_layers=layers
    ).eval()
    inputs = {"input_ids": torch.randint(3, 50, (4, length))}
    counter = FlopCounterMode(display=False)
    model.requires_grad_(False)
    # Without oneDNN's fused kernel torch runs the cells one by one, and its counter sees their products.
    with torch.no_grad(), torch.backends.mkldnn.flags(enabled=False), counter:
        model(**inputs)
    costs = CostModel.from_model(model)
    assert 4 * costs.full_model_macs(length, "full") == counter.get_total_flops() / 2
    assert costs.num_layers == layers
    first, later = 2 * 4 * 6 * (10 + 6), 2 * 4 * 6 * (12 + 6)
    assert costs.full_model_macs(length) == length * (first + (layers - 1) * later) + 12 * 9


def test_a_saved_bilstm_is_distilled_further_from_its_own_weights(
    bilstm: Path, teacher: Path, task_folder: Path, tmp_path: Path
) -> None:
    code = distil(
        teacher, task_folder, tmp_path / "more", "--student", str(bilstm), "--epochs", "1",
        "--learning-rate", "1e-12",
    )  # fmt: skip
    assert code == 0
    before, after = load_classifier(str(bilstm)).state_dict(), load_classifier(str(tmp_path / "more"))
    for name, weight in after.state_dict().items():
        torch.testing.assert_close(weight, before[name], atol=1e-6, rtol=0)


@pytest.mark.parametrize("method", ["tinybert", "ms-bert"])
def test_methods_that_need_layers_refuse_it(
    method: str, bilstm: Path, teacher: Path, task: alembert.Task, tmp_path: Path
) -> None:
    roles = (str(teacher), {"student": str(bilstm)}) if method == "tinybert" else (str(bilstm), {})
    with pytest.raises(InputError, match="type 'alembert-bilstm' are not supported"):
        alembert.distill(method, roles[0], task, tmp_path / "run", **roles[1])
    assert not (tmp_path / "run").exists()


def test_loading(bilstm: Path, tmp_path: Path) -> None:
    model, is_classifier = load_any(str(bilstm))
    assert is_classifier and not model.training and model.config.problem_type == "single_label_classification"
    again = load_encoder(str(bilstm), label_names=("one", "two"), problem_type="single_label_classification")
    assert again.classifier.out_features == 2
    torch.testing.assert_close(again.lstm.weight_hh_l0, model.lstm.weight_hh_l0)
    with pytest.raises(InputError, match="'alembert-bilstm' cannot be fine-tuned here"):
        load_encoder(
            str(bilstm), label_names=("a", "b"), problem_type="single_label_classification", head="linear"
        )


def test_the_tokenizer_alone_limits_its_texts(bilstm: Path) -> None:
    model, tokenizer = load_classifier(str(bilstm)), load_tokenizer(str(bilstm))
    assert max_tokens(model, tokenizer) == 64
    tokenizer.model_max_length = 2000
    assert max_tokens(model, tokenizer) == 2000
    tokenizer.model_max_length = int(1e30)
    assert max_tokens(model, tokenizer) == 512


def test_incomplete_weights_are_refused(encoder: PreTrainedModel, tmp_path: Path) -> None:
    model = build_bilstm(encoder, label_names=("no", "yes"), embedding_size=4, hidden_size=3, head_size=5)
    state = model.state_dict()
    model.save_pretrained(tmp_path / "cut", state_dict={k: v for k, v in state.items() if "reverse" not in k})
    with pytest.raises(InputError, match=r"4 missing \(lstm.bias_hh_l0_reverse"):
        load_classifier(str(tmp_path / "cut"))


def test_code_beside_a_model_is_never_run(bilstm: Path, tmp_path: Path) -> None:
    config = json.loads((bilstm / "config.json").read_text())
    assert config["auto_map"], "the run brings its own code for use without Alembert"
    for file in bilstm.iterdir():
        if file.is_file():
            (tmp_path / file.name).write_bytes(file.read_bytes())
    for code in tmp_path.glob("*.py"):
        code.write_text("raise SystemExit('this was run')")
    assert type(load_classifier(str(tmp_path))) is BilstmForSequenceClassification
    (tmp_path / "config.json").write_text(json.dumps(config | {"model_type": "of-their-own"}))
    with pytest.raises(InputError, match="no model could be read"):
        load_classifier(str(tmp_path))
