"""Turns a run, a teacher or a student into a folder of ONNX graphs that is run without torch."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from alembert.common.errors import InputError, install_extra
from alembert.common.files import file_sha256, write_text
from alembert.models.bilstm import BilstmForSequenceClassification
from alembert.models.loading import (
    check_max_length,
    classifier_facts,
    load_classifier,
    load_tokenizer,
    max_tokens,
    run_configuration,
    weights_fingerprint,
)
from alembert.models.multi_exit import MultiExitModel
from alembert.runtime.export_folder import check_output, written_whole
from alembert.runtime.hold_out import read_hold_out
from alembert.runtime.manifest import (
    HIDDEN_STATES,
    NEXT_HIDDEN_STATES,
    PRECISIONS,
    TOKENIZER_FILE,
    Head,
    Manifest,
    MergedGraph,
    Segment,
)
from alembert.runtime.policies import ExitPolicy, default_policy

Progress = Callable[[str, int, int], None]
MERGED_FILE = "merged.onnx"
LARGEST_GRAPH = 2_000_000_000
"""Bytes of weights in a file: ONNX stands on protocol buffers, which end at 2 GiB."""
_LIBRARIES = ("alembert", "torch", "transformers", "onnx", "onnxruntime")


def export_classifier(
    source: str | Path,
    output: str | Path,
    *,
    precision: str = "int8",
    exits: Sequence[int] | None = None,
    merge_exits: Sequence[int] | Literal["all"] | None = None,
    policy: str | None = None,
    top_k: int | None = None,
    reduce_range: bool = False,
    max_length: int | None = None,
    count_macs: Callable[[PreTrainedModel, tuple[int, ...]], Sequence[int]] | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Manifest:
    """Writes a classifier as ONNX graphs: one per stretch of layers between two exits, and one per exit.

    The folder is whole or absent: it is made apart and moved to `output` at the end. A folder that is there already is
    kept, for it may be a mount or somebody's working directory, and its content replaced, manifest.json last.

    Args:
        source: a run directory, a folder in Hugging Face layout or a hub id.
        output: the folder to be made.
        precision: "fp32" or "int8".
        exits: layers of the student exits to keep; None = all that the model has, () = none.
        merge_exits: also write one graph for single texts with exits after these layers, or "all" that are kept;
            None = no such graph.
        policy, top_k: the exit policy that the exported model has as its own; None = the model's. The graph for
            single texts decides by it.
        reduce_range: as in `quantise`; for int8 alone.
        max_length: in tokens, to which the exported model cuts texts; None = what the run was trained with, else the
            most that the model takes.
        count_macs: gives the MACs of every segment for a model and its exits, to be kept in the manifest.
        overwrite: replace an exported model that lies in `output`.
        progress: called with a description, steps done and steps in all.

    Raises:
        InputError: no `onnx` extra; the model cannot be read; an exit that it does not have; `output` is taken or
            cannot be written to; a policy that does not fit the model, or of a model without exits;
            a merged graph is asked for and the policy is patience; a graph would be larger than `LARGEST_GRAPH`.
    """
    _check_installed()
    if precision not in PRECISIONS:
        raise InputError(f"unknown precision {precision!r}: choose one of {', '.join(PRECISIONS)}")
    if reduce_range and precision != "int8":
        raise InputError("reduce_range is about int8 weights: leave it out or export with precision int8")
    output = check_output(output, overwrite)
    model, tokenizer = load_classifier(str(source)), load_tokenizer(str(source))
    known = model.exit_layers if isinstance(model, MultiExitModel) else ()
    chosen = known if exits is None else _chosen(exits, known, "exits")
    wanted = chosen if merge_exits == "all" else merge_exits
    merged = None if wanted is None else _chosen(wanted, chosen, "merge_exits")
    if max_length is not None:
        check_max_length(max_length, model, tokenizer)
    facts = classifier_facts(model)
    size = (facts.problem_type, len(facts.label_names) or 1, len(chosen) + 1)
    if policy is not None or top_k is not None:
        _set_policy(model.config, policy, top_k, size)
    if merged is not None:
        from alembert.runtime.merged_graph import merged_policy

        merged_policy(getattr(model.config, "policy", None), getattr(model.config, "top_k", None), *size)
    with written_whole(output) as folder:
        pairs = bool(run_configuration(source).get("task", {}).get("is_pair"))
        segments = _write_segments(model, tokenizer, folder, chosen, precision, reduce_range, pairs, progress)
        _write_tokenizer(tokenizer, folder, source)
        manifest = _manifest(model, tokenizer, source, folder, segments, precision)
        additions: dict[str, Any] = {"reduce_range": reduce_range}
        if max_length is not None:
            additions["max_length"] = max_length
        if count_macs is not None:
            additions["macs"] = tuple(int(count) for count in count_macs(model, chosen))
        if merged is not None:
            additions["merged"] = _write_merged(manifest, folder, merged)
        manifest = Manifest(**(vars(manifest) | additions))
        write_text(folder / "README.md", _card(manifest, output.name))
        manifest.write(folder)
    return manifest


def _set_policy(config: Any, policy: str | None, top_k: int | None, size: tuple[str, int, int]) -> None:
    """Gives a model's configuration another policy; `size` is problem type, labels and exits, the full model's too."""
    problem_type, num_labels, num_exits = size
    if num_exits == 1:
        raise InputError("policy: the model has no exits, or none is kept; leave it out")
    name = policy or getattr(config, "policy", None) or default_policy(problem_type, num_labels)
    resolved = ExitPolicy(name, problem_type, num_exits, top_k=top_k).resolve(num_labels)
    if name == "learned" and not config.learned_exit:
        raise InputError(
            "policy learned: the model has no learned exit: distil with the option learned_exit=true, or choose "
            "another policy"
        )
    config.policy, config.top_k = resolved.name, resolved.top_k
    # A speed means something under one policy alone.
    config.speed = None


def _write_segments(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    exits: tuple[int, ...],
    precision: str,
    reduce_range: bool,
    is_pair: bool,
    progress: Progress | None,
) -> tuple[Segment, ...]:
    from alembert.runtime.quantisation import random_inputs
    from alembert.runtime.segment_graph import head_modules, reads_token_types, segment_modules

    token_types = reads_token_types(model, tokenizer.model_input_names)
    modules, heads = segment_modules(model, exits, token_types), head_modules(model, exits)
    for number, module in enumerate(modules, 1):
        _check_size(module.weight_bytes, f"segment {number}")
    total, done = len(modules) + len(heads), 0
    notify = progress or (lambda *_: None)

    def write(module: Any, name: str) -> tuple[tuple[str, str], list[dict[str, Any]]]:
        nonlocal done
        notify("exporting", done, total)
        width = _encoder_config(model).hidden_size
        outputs = write_module(module, folder / name, width, precision, samples, reduce_range=reduce_range)
        done += 1
        return (name, file_sha256(folder / name)), outputs

    samples: list[Mapping[str, Any]] = (
        random_inputs(tokenizer, max_tokens(model, tokenizer), is_pair=is_pair) if precision == "int8" else []
    )
    ends, first, segments = [*exits, _num_layers(model)], 1, []
    for number, (module, last) in enumerate(zip(modules, ends, strict=True), 1):
        named, outputs = write(module, f"segment-{number}.onnx")
        head = None
        if last in heads:
            samples = [
                {HIDDEN_STATES: given[NEXT_HIDDEN_STATES], "attention_mask": sample["attention_mask"]}
                for sample, given in zip(samples, outputs, strict=True)
            ]
            written, _ = write(heads[last], f"exit-{last}.onnx")
            head = Head(*written, heads[last].input_names, heads[last].output_names)
        segments.append(Segment(*named, first, last, last, module.input_names, module.output_names, head))
        first = last + 1
    notify("exporting", total, total)
    return tuple(segments)


def write_module(
    module: Any,
    path: Path,
    hidden_size: int,
    precision: str,
    samples: Sequence[Mapping[str, Any]] = (),
    *,
    reduce_range: bool = False,
) -> list[dict[str, Any]]:
    """Traces a module of `segment_graph`, quantises it where asked for, and writes the optimised graph to `path`.

    For int8 it needs `samples` of what it reads, by name, and returns what the float32 graph gives for them.
    """
    from alembert.runtime.graph_optimisation import fold_constants, optimise
    from alembert.runtime.quantisation import quantise
    from alembert.runtime.segment_graph import write_graph

    outputs: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".graph-") as scratch:
        traced, folded, quantised = (
            Path(scratch) / f"{name}.onnx" for name in ("traced", "folded", "quantised")
        )
        write_graph(module, traced, hidden_size)
        fold_constants(traced, folded)
        if precision == "int8":
            outputs = quantise(folded, quantised, samples, reduce_range=reduce_range)
        optimise(quantised if precision == "int8" else folded, path)
    return outputs


def _check_size(size: int, name: str) -> None:
    """Weights are traced in float32 before they become int8, so that size counts for both."""
    if size > LARGEST_GRAPH:
        raise InputError(
            f"{name} has {size / 1e9:.1f} GB of weights, and an ONNX file holds {LARGEST_GRAPH / 1e9:.1f}: a model "
            "with more exits has smaller segments; as it is, run it on torch"
        )


def _write_merged(manifest: Manifest, folder: Path, exits: tuple[int, ...]) -> MergedGraph:
    from alembert.runtime.merged_graph import write_merged_graph

    size = sum((folder / segment.file).stat().st_size for segment in manifest.segments)
    if size > LARGEST_GRAPH:
        raise InputError(
            f"the graph for single texts would have {size / 1e9:.1f} GB, and an ONNX file holds "
            f"{LARGEST_GRAPH / 1e9:.1f}: leave --merge-exits out"
        )
    inputs, outputs = write_merged_graph(manifest, folder, exits, folder / MERGED_FILE)
    return MergedGraph(MERGED_FILE, file_sha256(folder / MERGED_FILE), exits, inputs, outputs)


def _manifest(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    source: str | Path,
    folder: Path,
    segments: tuple[Segment, ...],
    precision: str,
) -> Manifest:
    from alembert.runtime.segment_graph import OPSET

    facts, config, trained = classifier_facts(model), model.config, run_configuration(source)
    encoder = _encoder_config(model)
    max_length = trained.get("settings", {}).get("max_length")
    return Manifest(
        precision=precision,
        model_type=encoder.model_type,
        num_layers=_num_layers(model),
        hidden_size=encoder.hidden_size,
        problem_type=facts.problem_type,
        label_names=facts.label_names,
        policy=getattr(config, "policy", None),
        top_k=getattr(config, "top_k", None),
        speed=getattr(config, "speed", None),
        max_length=max_tokens(model, tokenizer) if max_length is None else int(max_length),
        is_pair=trained.get("task", {}).get("is_pair"),
        pad_token_id=int(tokenizer.pad_token_id),
        pad_token_type_id=int(tokenizer.pad_token_type_id),
        tokenizer_sha256=file_sha256(folder / TOKENIZER_FILE),
        segments=segments,
        macs=(),
        opset=OPSET,
        truncation_side=str(tokenizer.truncation_side),
        versions={name: version(name) for name in _LIBRARIES},
        source={
            "name": Path(source).name if Path(source).is_dir() else str(source),
            "method": trained.get("method"),
            "weights": weights_fingerprint(str(source)),
        },
        hold_out=read_hold_out(source),
    )


def _encoder_config(model: PreTrainedModel) -> Any:
    return model.config.full_model_config() if isinstance(model, MultiExitModel) else model.config


def _num_layers(model: PreTrainedModel) -> int:
    if isinstance(model, BilstmForSequenceClassification):
        return int(model.config.num_hidden_layers)
    plain = model if isinstance(model, MultiExitModel) else MultiExitModel.from_full_model(model)
    return plain.num_layers


def _write_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path, source: str | Path) -> None:
    tokenizer.save_pretrained(folder)
    if not (folder / TOKENIZER_FILE).is_file():
        raise InputError(
            f"{source}: its tokenizer cannot be written as {TOKENIZER_FILE}, which inference without transformers "
            "needs: convert it to a fast tokenizer first (AutoTokenizer.from_pretrained(…, use_fast=True))"
        )


def _chosen(layers: Sequence[int], known: Sequence[int], name: str) -> tuple[int, ...]:
    unknown = sorted(set(layers) - set(known))
    if unknown:
        raise InputError(
            f"{name}: no exit after layer {unknown[0]}: the exits to choose from are {list(known) or 'none'}"
        )
    return tuple(sorted(set(layers)))


def _check_installed() -> None:
    try:
        import onnx
        import onnxruntime  # noqa: F401
    except ImportError as error:
        raise InputError(f"exporting needs {error.name}: {install_extra('onnx')}") from error
    del onnx


def _card(manifest: Manifest, name: str) -> str:
    exits = ", ".join(str(layer) for layer in manifest.exit_layers) or "none"
    labels = ", ".join(manifest.label_names[:20]) + (", …" if len(manifest.label_names) > 20 else "")
    merged = (
        f"\n`{manifest.merged.file}` holds all segments as one graph for single texts: inputs "
        f"{_code(manifest.merged.inputs)}, outputs {_code(manifest.merged.outputs)}.\n"
        if manifest.merged
        else ""
    )
    return f"""# {name}

A text classifier as ONNX graphs, exported by Alembert {manifest.versions["alembert"]}.

| | |
|---|---|
| exported from | {manifest.source["name"]} |
| encoder | {manifest.model_type}, {manifest.num_layers} layers × {manifest.hidden_size} |
| early exits after layers | {exits} |
| precision | {manifest.precision} |
| task | {manifest.problem_type} |
| labels | {labels or "one value"} |
| longest text | {manifest.max_length} tokens |

```python
from alembert import AdaptiveClassifier

classifier = AdaptiveClassifier.from_pretrained("{name}")
```

`manifest.json` names the graphs in the order in which they run, the exits' own, and their checksums.
{merged}"""


def _code(names: Sequence[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)
