"""The multi-exit model as a transformers model: the same answers, whole checkpoints, a frozen backbone."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForSequenceClassification, PreTrainedModel

from alembert import InputError, MultiExitConfig, MultiExitModel
from alembert.models.exit_heads import EXIT_HEADS
from alembert.models.loading import classifier_facts, load_any, load_classifier, load_encoder, load_tokenizer

FINAL_HEADS = ("stock", *EXIT_HEADS)


@pytest.fixture
def batch() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    lengths = torch.tensor([9, 4, 6])
    mask = (torch.arange(9) < lengths[:, None]).long()
    return {
        "input_ids": torch.randint(5, 30, (3, 9), generator=generator) * mask,
        "attention_mask": mask,
        "token_type_ids": (torch.arange(9) > 3).long() * mask,
    }


def stock_model(folder: Path) -> PreTrainedModel:
    return AutoModelForSequenceClassification.from_pretrained(folder).eval()


def with_exits(encoder: Path, final_head: str, **exits: object) -> MultiExitModel:
    """Fresh exits after layers 1 and 3 of 4, behind any kind of final head."""
    if final_head == "stock":
        model = AutoModelForSequenceClassification.from_pretrained(encoder, num_labels=3)
    else:
        model = AutoModel.from_pretrained(encoder)
        model.config.num_labels = 3
    return MultiExitModel.from_full_model(
        model, exit_layers=(1, 3), exit_head_size=8, final_head=final_head, **exits
    ).eval()


def test_full_model_answers_as_the_stock_model(teacher: Path, batch: dict[str, Tensor]) -> None:
    stock = stock_model(teacher)
    model = MultiExitModel.from_full_model(stock_model(teacher), exit_layers=(2,)).eval()
    with torch.no_grad():
        assert torch.equal(model(**batch).logits, stock(**batch).logits)
        assert torch.equal(
            model(input_ids=batch["input_ids"]).logits, stock(input_ids=batch["input_ids"]).logits
        )
    assert model.num_layers == 4
    assert model.exit_layers == (2,)


@pytest.mark.parametrize("final_head", FINAL_HEADS)
@pytest.mark.parametrize("exit_head", EXIT_HEADS)
def test_round_trip_is_bit_exact(
    tiny_encoder: Path, tmp_path: Path, batch: dict[str, Tensor], final_head: str, exit_head: str
) -> None:
    model = with_exits(tiny_encoder, final_head, exit_head=exit_head, learned_exit=True)
    model.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").exists()
    with torch.no_grad():
        before = model(**batch, output_layer_logits=True)
    loaders: tuple[Callable[[Path], PreTrainedModel], ...] = (
        MultiExitModel.from_pretrained,
        AutoModelForSequenceClassification.from_pretrained,
        lambda folder: load_classifier(str(folder)),
    )
    for load in loaders:
        loaded = load(tmp_path)
        assert isinstance(loaded, MultiExitModel)
        assert not loaded.training
        with torch.no_grad():
            after = loaded(**batch, output_layer_logits=True)
        assert before.exit_logits.shape == (2, 3, 3)
        assert before.layer_logits.shape == (4, 3, 3)
        assert before.mistake_logits.shape == (2, 3)
        # Sums may be taken in another order where the weights lie elsewhere in memory.
        for name in ("logits", "exit_logits", "layer_logits", "mistake_logits"):
            torch.testing.assert_close(before[name], after[name], rtol=0, atol=1e-6)
        weights, loaded_weights = model.state_dict(), loaded.state_dict()
        assert weights.keys() == loaded_weights.keys()
        assert all(torch.equal(weights[name], loaded_weights[name]) for name in weights)


@pytest.mark.parametrize("final_head", FINAL_HEADS)
def test_last_layer_logits_are_the_logits(
    tiny_encoder: Path, batch: dict[str, Tensor], final_head: str
) -> None:
    model = with_exits(tiny_encoder, final_head)
    with torch.no_grad():
        output = model(**batch, output_layer_logits=True)
        assert torch.equal(output.layer_logits[-1], output.logits)
        assert model(**batch).layer_logits is None


def test_layer_heads_answer_in_place_of_the_final_head(tiny_encoder: Path, batch: dict[str, Tensor]) -> None:
    model = with_exits(tiny_encoder, "stock")
    model.add_layer_heads()
    with torch.no_grad():
        output = model(**batch, output_layer_logits=True)
        hidden_states = model.full_model.bert(**batch, output_hidden_states=True).hidden_states
    for layer in (1, 2, 3):
        head = model.layer_heads[str(layer)].classifier
        expected = hidden_states[layer][:, 0] @ head.weight.T + head.bias
        torch.testing.assert_close(output.layer_logits[layer - 1], expected, rtol=0, atol=1e-5)
    assert torch.equal(output.layer_logits[-1], output.logits)
    model.remove_layer_heads()
    assert not [name for name in model.state_dict() if name.startswith("layer_heads")]


@pytest.mark.parametrize("final_head", ["stock", "fastbert"])
def test_exits_on_a_teacher_keep_its_answers(
    tiny_encoder: Path, batch: dict[str, Tensor], final_head: str
) -> None:
    first = with_exits(tiny_encoder, final_head)
    second = MultiExitModel.from_teacher(
        first, exit_layers=(2,), exit_head="linear", exit_head_size=32
    ).eval()
    with torch.no_grad():
        assert torch.equal(first(**batch).logits, second(**batch).logits)
    assert second.exit_layers == (2,)
    assert second.config.final_head == final_head


@pytest.mark.parametrize("final_head", ["stock", "fastbert"])
def test_frozen_backbone(tiny_encoder: Path, batch: dict[str, Tensor], final_head: str) -> None:
    model = with_exits(tiny_encoder, final_head)
    assert not model.backbone_is_frozen
    model.freeze_backbone()
    assert model.backbone_is_frozen
    model.train()
    assert not any(module.training for module in model.full_model.modules())
    assert model.exit_heads.training
    if model.final_head is not None:
        assert not model.final_head.training

    seen: list[bool] = []

    def watch(module: nn.Module, inputs: object, output: Tensor | tuple[Tensor, ...]) -> None:
        seen.append((output[0] if isinstance(output, tuple) else output).requires_grad)

    for layer in range(1, 5):
        model.layered.layer(layer).register_forward_hook(watch)
    output = model(**batch)
    assert seen == [False] * 4
    assert not output.logits.requires_grad
    output.exit_logits.sum().backward()
    with_gradient = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert with_gradient
    assert all(name.startswith("exit_heads.") for name in with_gradient)


def test_a_backbone_that_trains_drops_out_and_learns(tiny_encoder: Path, batch: dict[str, Tensor]) -> None:
    model = with_exits(tiny_encoder, "stock").train()
    assert all(module.training for module in model.full_model.modules())
    model.config.problem_type = "single_label_classification"
    assert not torch.equal(model(**batch).logits, model(**batch).logits)
    model(**batch, labels=torch.tensor([0, 1, 2])).loss.backward()
    gradients = [parameter.grad for parameter in model.layered.layer(1).parameters()]
    assert all(gradient is not None and gradient.abs().sum() > 0 for gradient in gradients)


def test_loss_of_each_problem_type(tiny_encoder: Path, batch: dict[str, Tensor]) -> None:
    model = with_exits(tiny_encoder, "stock")
    with torch.no_grad():
        logits = model(**batch).logits
        model.config.problem_type = "single_label_classification"
        labels = torch.tensor([0, 2, 1])
        expected = -torch.stack([logits[i].softmax(0)[labels[i]].log() for i in range(3)]).mean()
        torch.testing.assert_close(model(**batch, labels=labels).loss, expected)

        model.config.problem_type = "multi_label_classification"
        flags = torch.tensor([[1.0, 0, 1], [0, 0, 0], [0, 1, 1]])
        chances = logits.sigmoid()
        expected = -(flags * chances.log() + (1 - flags) * (1 - chances).log()).mean()
        torch.testing.assert_close(model(**batch, labels=flags).loss, expected)

        value_model = MultiExitModel.from_full_model(
            AutoModelForSequenceClassification.from_pretrained(tiny_encoder, num_labels=1), exit_layers=(1,)
        ).eval()
        value_model.config.problem_type = "regression"
        values = torch.tensor([0.5, -1.0, 2.0])
        expected = (value_model(**batch).logits[:, 0] - values).square().mean()
        torch.testing.assert_close(value_model(**batch, labels=values).loss, expected)


def edited(folder: Path, destination: Path, edit: Callable[[dict[str, Tensor]], object]) -> str:
    shutil.copytree(folder, destination)
    weights = load_file(destination / "model.safetensors")
    edit(weights)
    save_file(weights, destination / "model.safetensors", metadata={"format": "pt"})
    return str(destination)


LOADERS: dict[str, Callable[[str], PreTrainedModel]] = {
    "load_classifier": load_classifier,
    "MultiExitModel": MultiExitModel.from_pretrained,
    "AutoModelForSequenceClassification": AutoModelForSequenceClassification.from_pretrained,
}


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize(
    ("fault", "key"),
    [
        ("missing", "exit_heads.1.classifier.weight"),
        ("missing", "full_model.bert.encoder.layer.2.output.dense.weight"),
        ("unexpected", "exit_heads.9.classifier.weight"),
        ("misshapen", "exit_heads.1.classifier.weight"),
    ],
)
def test_weights_that_do_not_fit_are_refused(
    fast: Path, tmp_path: Path, loader: str, fault: str, key: str
) -> None:
    def edit(weights: dict[str, Tensor]) -> None:
        if fault == "missing":
            del weights[key]
        else:
            weights[key] = torch.zeros(7, 5)

    with pytest.raises(InputError) as caught:
        LOADERS[loader](edited(fast, tmp_path / "broken", edit))
    # load_classifier calls a model without its heads untrained.
    if (fault, "classifier" in key, loader) != ("missing", True, "load_classifier"):
        assert key in str(caught.value)


@pytest.mark.parametrize("fault", ["missing", "unexpected", "misshapen"])
def test_stock_weights_that_do_not_fit_are_refused(teacher: Path, tmp_path: Path, fault: str) -> None:
    key = "bert.encoder.layer.1.attention.self.query.weight"

    def edit(weights: dict[str, Tensor]) -> None:
        if fault == "missing":
            del weights[key]
        else:
            weights[key if fault == "misshapen" else "bert.encoder.layer.9.x.weight"] = torch.zeros(7, 5)

    source = edited(teacher, tmp_path / "broken", edit)
    for load in (
        lambda: load_classifier(source),
        lambda: load_encoder(source, label_names=("a", "b", "c"), problem_type="single_label_classification"),
    ):
        with pytest.raises(InputError, match="layer"):
            load()


@pytest.mark.parametrize("fixture", ["teacher", "fast"])
def test_only_safetensors_are_read(fixture: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    source = tmp_path / "pickled"
    shutil.copytree(request.getfixturevalue(fixture), source)
    torch.save(load_file(source / "model.safetensors"), source / "pytorch_model.bin")
    (source / "model.safetensors").unlink()
    with pytest.raises(InputError, match="safetensors"):
        load_classifier(str(source))
    with pytest.raises(InputError, match="safetensors"):
        load_encoder(str(source), label_names=("a", "b"), problem_type="single_label_classification")
    with pytest.raises(OSError, match="safetensors"):
        MultiExitModel.from_pretrained(source)


def test_an_encoder_that_was_never_fine_tuned_is_no_classifier(tiny_encoder: Path) -> None:
    with pytest.raises(InputError, match="fine-tune it first"):
        load_classifier(str(tiny_encoder))
    model, is_classifier = load_any(str(tiny_encoder))
    assert not is_classifier
    assert type(model).__name__ == "BertModel"


def test_sources_that_are_no_models(tmp_path: Path, tiny_encoder: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(InputError, match=r"no config\.json"):
        load_classifier(str(empty))
    with pytest.raises(InputError, match="no tokenizer"):
        load_tokenizer(str(empty))
    with pytest.raises(InputError, match="no model could be read"):
        load_classifier(str(tmp_path / "nowhere"))
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.json").write_text('{"model_type": "gpt2"}', encoding="utf-8")
    with pytest.raises(InputError, match="'gpt2'"):
        load_classifier(str(other))
    with pytest.raises(InputError, match="'gpt2'"):
        load_encoder(str(other), label_names=("a", "b"), problem_type="single_label_classification")


def test_wrong_configurations_are_refused() -> None:
    with pytest.raises(InputError, match="full_model"):
        MultiExitModel(MultiExitConfig())
    with pytest.raises(InputError, match="unknown final head 'mlp'"):
        MultiExitModel(MultiExitConfig(final_head="mlp"))


def test_labels_reach_both_configurations(fast: Path, task: object) -> None:
    model = load_classifier(str(fast))
    names = ("food", "sport", "weather")
    assert classifier_facts(str(fast)).label_names == classifier_facts(model).label_names == names
    assert classifier_facts(model).problem_type == "single_label_classification"
    assert tuple(model.full_model.config.id2label.values()) == names


def test_it_is_a_transformers_model_in_full(fast: Path) -> None:
    assert issubclass(MultiExitModel, PreTrainedModel)
    assert issubclass(MultiExitModel, nn.Module)
    assert MultiExitModel.push_to_hub is PreTrainedModel.push_to_hub
    model = MultiExitModel.from_pretrained(fast)
    weight = model.output_weight()
    assert weight is model.full_model.classifier.weight
    with pytest.raises(InputError, match="no learned exit"):
        with_no_learned_exit = MultiExitModel.from_teacher(model, exit_layers=(1,))
        with_no_learned_exit.mistake_logits(torch.zeros(1, 1, 32))
