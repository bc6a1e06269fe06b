"""Exported folders: what is in them, what they answer, what is refused."""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from transformers import AutoTokenizer

import alembert
from alembert import AdaptiveClassifier
from alembert.benchmarks.flops import CostModel
from alembert.benchmarks.pruning import PartTimes, prune_exits, segment_macs, time_parts
from alembert.cli.app import run
from alembert.common.errors import InputError
from alembert.models.loading import load_classifier, load_config, load_encoder
from alembert.runtime.export import export_classifier
from alembert.runtime.export_folder import check_output, written_whole
from alembert.runtime.graph_optimisation import drop_unused, fix_reshapes
from alembert.runtime.manifest import HoldOut, Manifest, is_exported
from alembert.runtime.merged_graph import write_merged_graph
from alembert.runtime.policies import ExitPolicy
from alembert.runtime.quantisation import quantise_tables

TEXTS = [
    "we saw the soup",
    "rain",
    "a very very very much much coach was there today and it was a goal again",
    "there was a storm and bread today",
    "the team saw the cheese",
]


@pytest.fixture(scope="module")
def exported(fast: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exports") / "fast"
    export_classifier(fast, folder, precision="fp32", merge_exits=[1, 3], count_macs=segment_macs)
    return folder


def open_graph(path: Path) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def run_segments(folder: Path, batch: dict[str, torch.Tensor]) -> list[np.ndarray]:
    """The logits of every exit, the full model's last."""
    manifest, feeds = Manifest.read(folder), {name: values.numpy() for name, values in batch.items()}
    logits = []
    for segment in manifest.segments:
        for graph in (segment, segment.head):
            if graph is None:
                continue
            session = open_graph(folder / graph.file)
            given = session.run(list(graph.outputs), {name: feeds[name] for name in graph.inputs})
            outputs = dict(zip(graph.outputs, given, strict=True))
            feeds["hidden_states"] = outputs.get("next_hidden_states", feeds.get("hidden_states"))
            logits += [outputs["logits"]] if "logits" in outputs else []
    return logits


class TestFolder:
    def test_it_is_told_from_a_folder_without_a_model(self, exported: Path, tmp_path: Path) -> None:
        with pytest.raises(
            InputError, match=r"is an exported model, or a part of one.*give the run that it came from"
        ):
            load_config(str(exported))
        with pytest.raises(InputError, match="no model in Hugging Face layout"):
            load_config(str(tmp_path))

    def test_the_manifest_describes_the_model(self, fast: Path, exported: Path) -> None:
        manifest = Manifest.read(exported)
        manifest.check(exported)
        assert is_exported(exported) and not is_exported(fast)
        assert manifest.exit_layers == (1, 2, 3)
        assert [(s.first_layer, s.last_layer) for s in manifest.segments] == [(1, 1), (2, 2), (3, 3), (4, 4)]
        assert (manifest.model_type, manifest.num_layers, manifest.hidden_size) == ("bert", 4, 32)
        assert manifest.label_names == ("food", "sport", "weather")
        assert (manifest.problem_type, manifest.precision) == ("single_label_classification", "fp32")
        assert (manifest.max_length, manifest.is_pair, manifest.pad_token_id) == (32, False, 0)
        assert manifest.learned_exit and manifest.heads[1].outputs == ("logits", "mistake_logits")
        assert [segment.outputs for segment in manifest.segments] == 3 * [("next_hidden_states",)] + [
            ("logits",)
        ]
        assert list(manifest.heads) == [1, 2, 3]
        assert set(manifest.source["weights"]) == {"config.json", "model.safetensors"}
        assert {path.name for path in exported.iterdir()} >= {
            "manifest.json", "README.md", "tokenizer.json", "merged.onnx", "segment-4.onnx", "exit-3.onnx"
        }  # fmt: skip

    def test_the_manifest_says_what_the_run_held_out(self, teacher: Path, tmp_path: Path) -> None:
        manifest = export_classifier(teacher, tmp_path / "out", precision="fp32")
        splits = json.loads((teacher / "alembert.json").read_text())["configuration"]["task"]["splits"]
        assert manifest.hold_out == HoldOut(
            42, {name: splits[name]["sha256"] for name in ("train", "dev")}
        ) == Manifest.read(tmp_path / "out").hold_out  # fmt: skip
        written = json.loads((tmp_path / "out" / "manifest.json").read_text())
        del written["hold_out"]
        (tmp_path / "out" / "manifest.json").write_text(json.dumps(written))
        assert Manifest.read(tmp_path / "out").hold_out is None
        Manifest.read(tmp_path / "out").check(tmp_path / "out")

    def test_macs_of_the_segments_add_up_to_those_of_a_text_that_stays(
        self, fast: Path, exported: Path
    ) -> None:
        macs, costs = Manifest.read(exported).macs, CostModel.from_model(load_classifier(str(fast)))
        assert sum(macs) == costs.macs(4, 128)
        assert macs[0] == costs.macs(1, 128)

    def test_every_exit_answers_as_the_torch_model(self, fast: Path, exported: Path) -> None:
        batch = AutoTokenizer.from_pretrained(fast)(TEXTS, padding=True, return_tensors="pt")
        with torch.no_grad():
            expected = load_classifier(str(fast))(**batch)
        logits = run_segments(exported, batch)
        for got, wanted in zip(logits, [*expected.exit_logits, expected.logits], strict=True):
            np.testing.assert_allclose(got, wanted, atol=1e-4)

    def test_a_choice_of_exits_leaves_the_others_out(self, fast: Path, tmp_path: Path) -> None:
        manifest = export_classifier(fast, tmp_path / "out", precision="int8", exits=[2])
        assert [(s.first_layer, s.last_layer) for s in manifest.segments] == [(1, 2), (3, 4)]
        assert {path.name for path in (tmp_path / "out").glob("*.onnx")} == {
            "segment-1.onnx", "exit-2.onnx", "segment-2.onnx"
        }  # fmt: skip
        batch = AutoTokenizer.from_pretrained(fast)(TEXTS, padding=True, return_tensors="pt")
        with torch.no_grad():
            expected = load_classifier(str(fast))(**batch)
        logits = run_segments(tmp_path / "out", batch)
        np.testing.assert_allclose(logits[0], expected.exit_logits[1], atol=0.5)
        assert (logits[1].argmax(-1) == expected.logits.argmax(-1).numpy()).all()
        operators = {node.op_type for node in onnx.load(tmp_path / "out" / "segment-2.onnx").graph.node}
        assert "MatMulIntegerToFloat" in operators and not any(
            name.startswith("Dynamic") for name in operators
        )
        assert "SkipLayerNormalization" not in operators

    def test_a_plain_teacher_is_one_segment(self, teacher: Path, tmp_path: Path) -> None:
        manifest = export_classifier(teacher, tmp_path / "out", precision="fp32")
        assert manifest.exit_layers == () and len(manifest.segments) == 1 and not manifest.learned_exit
        batch = AutoTokenizer.from_pretrained(teacher)(TEXTS, padding=True, return_tensors="pt")
        with torch.no_grad():
            expected = load_classifier(str(teacher))(**batch).logits
        np.testing.assert_allclose(run_segments(tmp_path / "out", batch)[0], expected, atol=1e-4)

    @pytest.mark.parametrize("problem_type", ["multi_label_classification", "regression"])
    def test_other_problem_types(self, tiny_encoder: Path, tmp_path: Path, problem_type: str) -> None:
        names = [] if problem_type == "regression" else ["a", "b"]
        model = load_encoder(str(tiny_encoder), label_names=names, problem_type=problem_type).eval()
        model.save_pretrained(tmp_path / "model")
        tokenizer = AutoTokenizer.from_pretrained(tiny_encoder)
        tokenizer.save_pretrained(tmp_path / "model")
        manifest = export_classifier(tmp_path / "model", tmp_path / "out", precision="fp32")
        assert (manifest.problem_type, manifest.label_names) == (problem_type, tuple(names))
        assert (manifest.is_pair, manifest.max_length) == (None, 64)
        shorter = export_classifier(tmp_path / "model", tmp_path / "short", precision="fp32", max_length=20)
        assert shorter.max_length == Manifest.read(tmp_path / "short").max_length == 20
        batch = tokenizer(TEXTS, padding=True, return_tensors="pt")
        with torch.no_grad():
            expected = model(**batch).logits
        np.testing.assert_allclose(run_segments(tmp_path / "out", batch)[0], expected, atol=1e-4)

    @pytest.mark.parametrize(("reduce_range", "largest"), [(False, 127), (True, 64)])
    def test_a_reduced_range_is_seven_bits(
        self, teacher: Path, tmp_path: Path, reduce_range: bool, largest: int
    ) -> None:
        export_classifier(teacher, tmp_path / "out", precision="int8", reduce_range=reduce_range)
        graph = onnx.load(tmp_path / "out" / "segment-1.onnx").graph
        weights = [numpy_helper.to_array(t) for t in graph.initializer if t.data_type == TensorProto.INT8]
        assert max(int(np.abs(values.astype(int)).max()) for values in weights if values.ndim == 2) == largest


class TestRefusals:
    @pytest.fixture()
    def copy(self, exported: Path, tmp_path: Path) -> Path:
        shutil.copytree(exported, tmp_path / "copy")
        return tmp_path / "copy"

    def edit(self, folder: Path, **changes: Any) -> None:
        path = folder / "manifest.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    def test_no_manifest(self, fast: Path) -> None:
        with pytest.raises(InputError, match="no exported model"):
            Manifest.read(fast)

    def test_a_missing_segment(self, copy: Path) -> None:
        (copy / "segment-2.onnx").unlink()
        with pytest.raises(InputError, match=r"segment-2\.onnx: is missing"):
            Manifest.read(copy)

    def test_a_segment_without_its_exits_head(self, copy: Path) -> None:
        segments = json.loads((copy / "manifest.json").read_text())["segments"]
        self.edit(copy, segments=[segments[0] | {"head": None}, *segments[1:]])
        with pytest.raises(InputError, match="every segment but the last must have an exit's head"):
            Manifest.read(copy)

    @pytest.mark.parametrize("name", ["exit-1.onnx", "exit-3.onnx"])
    def test_a_head_of_another_export(self, copy: Path, name: str) -> None:
        shutil.copyfile(copy / "exit-2.onnx", copy / name)
        with pytest.raises(InputError, match=rf"{name}: is not the file that was exported"):
            Manifest.read(copy).check(copy)

    def test_a_truncated_graph(self, copy: Path) -> None:
        graph = copy / "segment-3.onnx"
        graph.write_bytes(graph.read_bytes()[:-100])
        with pytest.raises(InputError, match=r"segment-3\.onnx: is not the file that was exported"):
            Manifest.read(copy).check(copy)

    def test_another_tokenizer(self, copy: Path) -> None:
        path = copy / "tokenizer.json"
        path.write_text(path.read_text().replace("soup", "soap"))
        with pytest.raises(InputError, match=r"tokenizer\.json: is another tokenizer"):
            Manifest.read(copy).check(copy)

    def test_a_wrong_checksum(self, copy: Path) -> None:
        manifest = Manifest.read(copy)
        first = replace(manifest.segments[0], sha256="0" * 64)
        with pytest.raises(InputError, match=r"segment-1\.onnx"):
            replace(manifest, segments=(first, *manifest.segments[1:])).check(copy)

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"format": 1}, "format 1"),
            ({"num_layers": "4"}, "num_layers"),
            ({"precision": "int4"}, "precision 'int4'"),
            ({"label_names": []}, "label_names"),
            ({"num_layers": 5}, "layers 1 to 5"),
            ({"policy": 3}, "policy"),
            ({"surprise": 1}, "'surprise' is unknown"),
            ({"segments": []}, "at least one segment"),
            ({"macs": [1]}, "macs"),
        ],
    )
    def test_a_manifest_that_does_not_hold_together(
        self, copy: Path, changes: dict[str, Any], message: str
    ) -> None:
        self.edit(copy, **changes)
        with pytest.raises(InputError, match=message):
            Manifest.read(copy)

    def test_a_file_outside_the_folder(self, copy: Path) -> None:
        segments = json.loads((copy / "manifest.json").read_text())["segments"]
        self.edit(copy, segments=[segments[0] | {"file": "../other.onnx"}, *segments[1:]])
        with pytest.raises(InputError, match="plain names"):
            Manifest.read(copy)

    def test_a_manifest_cut_short(self, copy: Path) -> None:
        (copy / "manifest.json").write_text('{"format": 2, ')
        with pytest.raises(InputError, match="no valid JSON"):
            Manifest.read(copy)

    def test_what_export_refuses(self, fast: Path, exported: Path, tmp_path: Path) -> None:
        with pytest.raises(InputError, match="no exit after layer 9"):
            export_classifier(fast, tmp_path / "out", exits=[1, 9])
        with pytest.raises(InputError, match="merge_exits: no exit after layer 2"):
            export_classifier(fast, tmp_path / "out", exits=[1], merge_exits=[2])
        with pytest.raises(InputError, match="unknown precision"):
            export_classifier(fast, tmp_path / "out", precision="int4")
        with pytest.raises(InputError, match="overwrite"):
            export_classifier(fast, exported)
        (tmp_path / "home").mkdir()
        (tmp_path / "home" / "thesis.txt").touch()
        with pytest.raises(InputError, match="no exported model"):
            export_classifier(fast, tmp_path / "home", overwrite=True)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["home"]


class TestMergedGraph:
    def uncertainties(self, manifest: Manifest, logits: list[np.ndarray]) -> dict[int, float]:
        """The policy's uncertainty at exits 1 and 3 of one text, from every exit's logits (1, labels)."""
        policy = ExitPolicy(manifest.policy or "", manifest.problem_type, 4, top_k=manifest.top_k).resolve(3)
        probabilities = {layer: torch.from_numpy(logits[layer - 1]).softmax(-1).numpy() for layer in (1, 3)}
        return {layer: float(policy.uncertainty(given)[0][0]) for layer, given in probabilities.items()}

    @pytest.mark.parametrize("policy", ["entropy", "top_k_entropy", "max_probability", "margin"])
    def test_it_takes_the_exits_of_the_segments(
        self, exported: Path, fast: Path, policy: str, tmp_path: Path
    ) -> None:
        top_k = 2 if policy == "top_k_entropy" else None
        manifest = replace(Manifest.read(exported), policy=policy, top_k=top_k)
        inputs, outputs = write_merged_graph(manifest, exported, (1, 3), tmp_path / "merged.onnx")
        assert inputs == ("input_ids", "attention_mask", "token_type_ids", "speed")
        assert outputs == ("probabilities", "exit_layer", "uncertainty")
        session, taken = open_graph(tmp_path / "merged.onnx"), set()
        tokenizer = AutoTokenizer.from_pretrained(fast)
        for text in TEXTS:
            batch = tokenizer(text, return_tensors="pt")
            logits = run_segments(exported, batch)
            values = self.uncertainties(manifest, logits)
            for speed in (0.0, 0.02, 1.0, sum(values.values()) / 2):
                feeds = {name: entry.numpy() for name, entry in batch.items()}
                feeds["speed"] = np.array(speed, np.float32)
                probabilities, layer, uncertainty = session.run(None, feeds)
                expected = next((exit_ for exit_, value in values.items() if value < speed), 4)
                assert int(layer) == expected
                np.testing.assert_allclose(uncertainty, values.get(expected, np.nan), atol=1e-5)
                answer = torch.from_numpy(logits[expected - 1]).softmax(-1)
                np.testing.assert_allclose(probabilities, answer, atol=1e-5)
                taken.add(expected)
        assert taken == {1, 3, 4}

    def test_learned_and_multi_label(self, exported: Path, fast: Path, tmp_path: Path) -> None:
        batch = AutoTokenizer.from_pretrained(fast)(TEXTS[0], return_tensors="pt")
        feeds = {name: values.numpy() for name, values in batch.items()} | {"speed": np.array(1, np.float32)}
        manifest = Manifest.read(exported)
        with torch.no_grad():
            output = load_classifier(str(fast))(**batch)
        write_merged_graph(replace(manifest, policy="learned"), exported, (1,), tmp_path / "l.onnx")
        _, layer, uncertainty = open_graph(tmp_path / "l.onnx").run(None, feeds)
        assert int(layer) == 1
        np.testing.assert_allclose(uncertainty, output.mistake_logits[0, 0].sigmoid(), atol=1e-5)
        several = replace(manifest, policy="entropy", problem_type="multi_label_classification")
        write_merged_graph(several, exported, (1,), tmp_path / "m.onnx")
        probabilities, layer, uncertainty = open_graph(tmp_path / "m.onnx").run(None, feeds)
        assert int(layer) == 1
        p = output.exit_logits[0, 0].sigmoid().double()
        entropies = -(p * p.log() + (1 - p) * (1 - p).log()) / np.log(2)
        np.testing.assert_allclose(probabilities[0], p, atol=1e-5)
        np.testing.assert_allclose(uncertainty, entropies.max(), atol=1e-5)

    def test_the_folders_own_works_without_the_heads_left_out(self, exported: Path) -> None:
        merged = Manifest.read(exported).merged
        assert merged is not None and merged.exit_layers == (1, 3)
        size = (exported / merged.file).stat().st_size
        assert size < sum(path.stat().st_size for path in exported.glob("*.onnx") if path.name != merged.file)

        def names(graph: onnx.GraphProto) -> set[str]:
            branches = [entry.g for node in graph.node for entry in node.attribute if entry.HasField("g")]
            return {node.name for node in graph.node}.union(*map(names, branches))

        graph = onnx.load(exported / merged.file).graph
        everywhere = names(graph)
        for segment, has_head in ((1, True), (2, False), (3, True)):
            assert any(name.startswith(f"s{segment}_") for name in everywhere)
            assert any(name.startswith(f"ask{segment}_") for name in everywhere) == has_head
        assert not any(node.name.startswith("ask") for node in graph.node), "a head runs where the speed is 0"

        def held(graph: onnx.GraphProto) -> list[str]:
            branches = [entry.g for node in graph.node for entry in node.attribute if entry.HasField("g")]
            return [tensor.name for branch in branches for tensor in branch.initializer] + [
                name for branch in branches for name in held(branch)
            ]

        assert any(name.startswith("s3_") for name in (tensor.name for tensor in graph.initializer))
        assert any(name.startswith("ask1_") for name in held(graph))
        assert not any(name.startswith("s") and name[1].isdigit() for name in held(graph)), (
            "layers' weights stand inside a branch, where every level of nesting keeps a copy"
        )

    def test_patience_is_refused(self, exported: Path, tmp_path: Path) -> None:
        with pytest.raises(InputError, match="patience"):
            write_merged_graph(
                replace(Manifest.read(exported), policy="patience"), exported, (1,), tmp_path / "x.onnx"
            )


class TestPruning:
    def test_times_add_up(self) -> None:
        times = PartTimes({1: 2.0, 3: 4.0, 4: 3.0}, {1: 0.5, 3: 0.25})
        taken = np.array([1, 3, 4, 4])
        each = [2.0 + 0.5, 6.0 + 0.75, 9.0 + 0.75, 9.0 + 0.75]
        assert times.per_text((1, 3), taken) == pytest.approx(np.mean(each))
        assert times.per_text((3,), np.array([3, 4])) == pytest.approx(np.mean([6.25, 9.25]))
        bordered = replace(times, border=0.1)
        assert bordered.per_text((1, 3), taken) == pytest.approx(np.mean(each) + (3 + 2) * 0.1 / 4)
        assert bordered.per_text((3,), taken) == pytest.approx(times.per_text((3,), taken) + 2 * 0.1 / 4)

    def test_exits_that_never_let_a_text_leave_are_left_out(
        self, fast: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        times = PartTimes({1: 1.0, 2: 1.0, 3: 1.0, 4: 1.0}, {1: 1e-6, 2: 5.0, 3: 1e-6})
        monkeypatch.setattr("alembert.benchmarks.pruning.time_parts", lambda *_: times)
        report = prune_exits(fast, TEXTS, speeds=[0.5, 0.9])
        assert 2 not in report["exits"] and report["exits"]
        assert report["ms_after"] < report["ms_before"]
        assert {row["exit"]: row["kept"] for row in report["exits_measured"]}[2] is False
        assert prune_exits(fast, TEXTS, speeds=[0.0])["exits"] == []

    def test_refusals(self, fast: Path, teacher: Path) -> None:
        with pytest.raises(InputError, match="no texts"):
            prune_exits(fast, [])
        with pytest.raises(InputError, match="no exits"):
            prune_exits(teacher, TEXTS)


class TestGraphs:
    def test_tables_are_stored_with_a_scale_per_row(self) -> None:
        table = np.random.default_rng(0).normal(size=(10, 4)).astype(np.float32)
        table[3] = 0
        table[4] *= 1000
        graph = helper.make_graph(
            [helper.make_node("Gather", ["table", "ids"], ["rows"], axis=0)],
            "lookup",
            [helper.make_tensor_value_info("ids", TensorProto.INT64, ["n"])],
            [helper.make_tensor_value_info("rows", TensorProto.FLOAT, ["n", 4])],
            [numpy_helper.from_array(table, "table")],
        )
        assert quantise_tables(graph, smallest=41) == 0
        assert quantise_tables(graph, smallest=40) == 1
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
        session = onnxruntime.InferenceSession(model.SerializeToString())
        (rows,) = session.run(None, {"ids": np.arange(10)})
        step = np.abs(table).max(axis=1, keepdims=True) / 127
        assert (np.abs(rows - table) <= step / 2 + 1e-7).all()
        assert "table" not in {tensor.name for tensor in graph.initializer}

    def test_reshapes_become_constant_where_they_can(self) -> None:
        nodes = [
            helper.make_node("Shape", ["x"], ["shape"]),
            helper.make_node("Gather", ["shape", "zero"], ["rows"], axis=0),
            helper.make_node("Unsqueeze", ["rows", "axis"], ["rows_1"]),
            helper.make_node("Concat", ["rows_1", "rest"], ["target"], axis=0),
            helper.make_node("Reshape", ["x", "target"], ["y"]),
        ]
        constants = {"zero": np.array(0), "axis": np.array([0]), "rest": np.array([-1, 2, 4])}
        graph = helper.make_graph(
            nodes,
            "g",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["rows", "tokens", 8])],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["rows", "tokens", 2, 4])],
            [numpy_helper.from_array(value.astype(np.int64), name) for name, value in constants.items()],
        )
        model = fix_reshapes(
            helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
        )
        assert [node.op_type for node in model.graph.node] == ["Reshape"]
        (y,) = onnxruntime.InferenceSession(model.SerializeToString()).run(
            None, {"x": np.arange(48, dtype=np.float32).reshape(2, 3, 8)}
        )
        assert (y == np.arange(48).reshape(2, 3, 2, 4)).all()

    def test_what_nothing_reads_is_dropped(self) -> None:
        graph = helper.make_graph(
            [helper.make_node("Neg", ["x"], ["y"]), helper.make_node("Mul", ["x", "w"], ["unread"])],
            "g",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1])],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1])],
            [numpy_helper.from_array(np.ones(1, np.float32), "w")],
        )
        drop_unused(graph)
        assert [node.op_type for node in graph.node] == ["Neg"] and not graph.initializer


def test_weights_that_no_onnx_file_holds_are_refused(
    fast: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load_classifier(str(fast)).full_model
    layers = [sum(weights.numel() for weights in layer.parameters()) for layer in model.bert.encoder.layer]
    first = 4 * (sum(weights.numel() for weights in model.parameters()) - sum(layers[1:]))
    monkeypatch.setattr("alembert.runtime.export.LARGEST_GRAPH", first)
    with pytest.raises(InputError, match=r"single texts would have .* --merge-exits"):
        export_classifier(fast, tmp_path / "out", precision="fp32", merge_exits="all")
    monkeypatch.setattr("alembert.runtime.export.LARGEST_GRAPH", first - 1)
    with pytest.raises(InputError, match=r"segment 1 has .* more exits"):
        export_classifier(fast, tmp_path / "out", precision="int8")
    assert not list(tmp_path.iterdir())


class TestCommand:
    def test_export_prunes_merges_and_says_what_it_wrote(
        self,
        fast: Path,
        task_folder: Path,
        tmp_path: Path,
        capsys: pytest.CaptureFixture[str],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        def timed(manifest: Manifest, *arguments: Any) -> PartTimes:
            # Which exits pay must not hang on what else this machine does.
            real = time_parts(manifest, *arguments)
            return PartTimes(dict.fromkeys(real.stretches, 1.0), dict.fromkeys(real.heads, 0.01), 0.01)

        monkeypatch.setattr("alembert.benchmarks.pruning.time_parts", timed)
        output = tmp_path / "out"
        arguments = ["export", str(fast), "--runtime", "onnx", "--output", str(output)]
        data = ["--prune-exits", str(task_folder / "dev.tsv"), "--prune-speed", "0.5"]
        chosen = ["--merge-exits", "all", "--precision", "int8", "--policy", "max_probability"]
        assert run([*arguments, *data, *chosen, "--json"]) == 0
        facts = json.loads(capsys.readouterr().out)
        manifest = Manifest.read(output)
        assert facts["exit_layers"] == facts["pruning"]["exits"] == list(manifest.exit_layers)
        assert facts["pruning"]["policy"] == manifest.policy == "max_probability"
        assert facts["files"]["merged.onnx"] == (output / "merged.onnx").stat().st_size
        assert facts["pruning"]["texts"] == 32 and len(facts["pruning"]["exits_measured"]) == 3
        assert len(manifest.macs) == len(manifest.segments)
        assert run(arguments) == 2
        assert "overwrite" in capsys.readouterr().err
        assert run([*arguments, "--overwrite", "--exits", "1,3", "--precision", "fp32"]) == 0
        shown = capsys.readouterr().out
        assert "segment-3.onnx" in shown and Manifest.read(output).exit_layers == (1, 3)
        assert not (output / "merged.onnx").exists()
        assert run([*arguments, "--overwrite", "--runtime", "tflite"]) == 2
        # No exit pays at speed 0, and a model without any needs no policy.
        none = ["--overwrite", "--prune-exits", str(task_folder / "dev.tsv"), "--prune-speed", "0", "--json"]
        assert run([*arguments, *none, "--policy", "margin"]) == 0
        assert json.loads(capsys.readouterr().out)["exit_layers"] == []

    def test_export_tells_what_it_costs(
        self,
        fast: Path,
        task: alembert.Task,
        task_folder: Path,
        tmp_path: Path,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        data = ["--data", str(task_folder), "--split", "train", "--max-rows", "40", "--json"]
        facts = {}
        for precision in ("fp32", "int8"):
            output = tmp_path / precision
            arguments = [
                "export",
                str(fast),
                "--output",
                str(output),
                "--exits",
                "1,3",
                "--precision",
                precision,
            ]
            assert run([*arguments, *data]) == 0
            facts[precision] = json.loads(capsys.readouterr().out)["quality"]
            assert json.loads((output / "quality.json").read_text()) == facts[precision]
            assert (facts[precision]["rows"], facts[precision]["split"]) == (40, "train")
        rows = task.dataset("train").shuffle(seed=0).select(range(40))
        truth = np.array(rows["labels"])
        opened = {
            name: AdaptiveClassifier.from_pretrained(source, speed=0.0)
            for name, source in (("run", fast), ("fp32", tmp_path / "fp32"), ("int8", tmp_path / "int8"))
        }
        answers = {name: one.predict_proba(rows["text"]).argmax(1) for name, one in opened.items()}
        for precision, quality in facts.items():
            assert [row["exit"] for row in quality["exits"]] == [1, 3, 4]
            full = quality["exits"][-1]
            assert full["run"] == (answers["run"] == truth).mean()
            assert full["exported"] == (answers[precision] == truth).mean()
            assert full["same_answer"] == (answers[precision] == answers["run"]).mean()
            for row in quality["exits"]:
                low, high = row["interval"]
                assert row["difference"] == row["exported"] - row["run"]
                assert low <= row["difference"] <= high
                if precision == "fp32":
                    assert (row["difference"], low, high, row["same_answer"]) == (0.0, 0.0, 0.0, 1.0)

    def test_wrong_labelled_texts_are_refused_before_anything_is_written(
        self, fast: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        (tmp_path / "other.tsv").write_text("label\ttext\nunheard\tof such a label\n")
        arguments = [
            "export",
            str(fast),
            "--output",
            str(tmp_path / "out"),
            "--data",
            str(tmp_path / "other.tsv"),
        ]
        assert run(arguments) == 2
        assert "unheard" in capsys.readouterr().err
        assert not (tmp_path / "out").exists()

    def test_the_output_is_checked_before_exits_are_timed(
        self,
        fast: Path,
        exported: Path,
        task_folder: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        monkeypatch.setattr("alembert.benchmarks.pruning.prune_exits", None)
        pruning = ["--prune-exits", str(task_folder / "dev.tsv"), "--data", str(task_folder)]
        assert run(["export", str(fast), "--output", str(exported), *pruning]) == 2
        assert "holds an exported model already" in capsys.readouterr().err

    @pytest.mark.parametrize(
        ("given", "words"),
        [
            (["--prune-speed", "0.5"], "--prune-speed is about exits to be left out"),
            (["--text-column", "body"], "--text-column body: no file of texts is read"),
            (["--text-pair-column", "other"], "--text-pair-column other: no file of texts is read"),
            (["--merge-exits", "1,x"], "--merge-exits '1,x': give layer numbers"),
            (["--exits", "1,x"], "--exits '1,x': give layer numbers"),
        ],
    )
    def test_options_that_nothing_would_read_are_refused(
        self, fast: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], given: list[str], words: str
    ) -> None:
        assert run(["export", str(fast), "--output", str(tmp_path / "out"), *given]) == 2
        assert words in capsys.readouterr().err
        assert not list(tmp_path.iterdir())

    def test_a_policy_that_no_exit_is_left_for_is_told(
        self, fast: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        monkeypatch.setattr("alembert.cli.export._prune", lambda *_: {"exits": []})
        monkeypatch.setattr("alembert.cli.export._print", lambda *_: None)
        kept: dict[str, Any] = {}
        monkeypatch.setattr(
            "alembert.runtime.export.export_classifier", lambda *_, **given: kept.update(given)
        )
        arguments = ["export", str(fast), "--output", str(tmp_path / "out"), "--prune-exits", "texts.tsv"]
        with caplog.at_level(logging.WARNING):
            assert run(arguments) == 0
            assert not caplog.messages
            assert run([*arguments, "--policy", "margin"]) == 0
        assert caplog.messages == ["texts.tsv: no exit is left, so the exported model has no policy"]
        assert (kept["exits"], kept["policy"]) == ([], None)


class TestOutput:
    def write(self, output: Path, content: str) -> None:
        with written_whole(check_output(output, overwrite=True)) as folder:
            for name in ("manifest.json", "README.md", f"{content}.onnx"):
                (folder / name).write_text(content, encoding="utf-8")

    def names(self, folder: Path) -> list[str]:
        return sorted(path.name for path in folder.iterdir())

    def failing_renames(
        self, patch: pytest.MonkeyPatch, fails: Callable[[int], bool], error: type[BaseException] = OSError
    ) -> list[Path]:
        """Makes the renames fail whose number, from 1, `fails` says; returns the list of all targets to come."""
        rename, done = Path.rename, []

        def renamed(path: Path, target: Path) -> Path:
            done.append(target)
            if fails(len(done)):
                raise error
            return rename(path, target)

        patch.setattr(Path, "rename", renamed)
        return done

    def test_a_folder_that_is_there_is_filled_and_not_replaced(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        output = tmp_path / "here"
        output.mkdir()
        number = output.stat().st_ino
        monkeypatch.chdir(output)
        for content in ("old", "new"):
            self.write(Path(), content)
            assert self.names(Path()) == sorted(["manifest.json", "README.md", f"{content}.onnx"])
            assert (output / "manifest.json").read_text(encoding="utf-8") == content
        assert output.stat().st_ino == number
        self.write(Path("deep/down"), "new")
        assert self.names(output / "deep") == ["down"]
        assert self.names(output / "deep" / "down") == ["README.md", "manifest.json", "new.onnx"]

    def test_what_is_no_part_of_an_export_stays(self, tmp_path: Path) -> None:
        output = tmp_path / "out"
        self.write(output, "old")
        theirs = {"notes.md": "mine", "service/app.py": "mine too"}
        stale = ("tokenizer.json", "vocab.txt", "calibration.json", "quality.json", "segment-9.onnx")
        (output / "service").mkdir()
        for name, text in theirs.items():
            (output / name).write_text(text, encoding="utf-8")
        for name in stale:
            (output / name).touch()
        self.write(output, "new")
        assert self.names(output) == sorted(["README.md", "manifest.json", "new.onnx", "notes.md", "service"])
        for name, text in theirs.items():
            assert (output / name).read_text(encoding="utf-8") == text

    @pytest.mark.parametrize("moves", range(6))
    @pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
    def test_the_old_export_comes_back_when_the_new_one_cannot_be_moved(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moves: int, error: type[BaseException]
    ) -> None:
        output = tmp_path / "out"
        self.write(output, "old")
        done = self.failing_renames(monkeypatch, lambda number: number == moves + 1, error)
        with pytest.raises(error):
            self.write(output, "new")
        assert self.names(output) == ["README.md", "manifest.json", "old.onnx"]
        assert {path.read_text(encoding="utf-8") for path in output.iterdir()} == {"old"}
        assert self.names(tmp_path) == ["out"]
        assert done[0].name == "manifest.json"
        assert moves != 5 or done[5].name == "manifest.json"

    @pytest.mark.parametrize("moves", range(6))
    def test_what_a_killed_export_had_set_aside_comes_back(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moves: int
    ) -> None:
        output = tmp_path / "out"
        self.write(output, "old")
        with monkeypatch.context() as patch:
            self.failing_renames(patch, lambda number: number > moves)
            patch.setattr(shutil, "rmtree", lambda *_, **__: None)
            with pytest.raises(OSError):
                self.write(output, "new")
        with pytest.raises(InputError, match="holds an exported model already"):
            check_output(output, overwrite=False)
        for name in ("manifest.json", "README.md", "old.onnx"):
            assert (output / name).read_text(encoding="utf-8") == "old"
        self.write(output, "newer")
        assert self.names(output) == ["README.md", "manifest.json", "newer.onnx"]

    def test_nothing_is_lost_where_the_old_export_cannot_be_put_back_at_once(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        output = tmp_path / "out"
        self.write(output, "old")
        with monkeypatch.context() as patch:
            # The first new file, and the second one of the way back.
            self.failing_renames(patch, lambda number: number in (4, 6))
            with pytest.raises(OSError):
                self.write(output, "new")
        assert not (output / "manifest.json").exists()
        check_output(output, overwrite=True)
        assert self.names(output) == ["README.md", "manifest.json", "old.onnx"]
        assert {path.read_text(encoding="utf-8") for path in output.iterdir()} == {"old"}

    def test_where_nothing_can_be_written_is_told_before_the_model_is_read(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "file").touch()
        with pytest.raises(InputError, match=r"file is a file: name a folder"):
            export_classifier("no-such-model", tmp_path / "file" / "out")
        access = os.access
        monkeypatch.setattr(
            os, "access", lambda path, mode: access(path, mode) and (path != tmp_path or mode == os.F_OK)
        )
        with pytest.raises(InputError, match=f"out: nothing can be written to {tmp_path}: choose"):
            export_classifier("no-such-model", tmp_path / "new" / "out")
        assert self.names(tmp_path) == ["file"]
