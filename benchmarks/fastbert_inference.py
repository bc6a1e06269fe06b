"""How much faster a classifier is than FastBERT's published way of inference, with the same exits and decisions.

    python benchmarks/fastbert_inference.py RUN --exported FOLDER --data FOLDER --speed 0.5 --output fastbert.json

The stand-in does what FastBERT's released program does with a text: tokenise it, pad it to 128 tokens, run layer after
layer in torch fp32 on a batch of this one text, ask the exit's head after each layer that has one, and stop as soon as
the uncertainty is below the speed. It is written on this repository's modules, so that weights, exits and decisions are
the same; padding stays in until the end. Ours is `AdaptiveClassifier.predict`, from strings to labels, on the run
directory (torch) and on its exports (ONNX Runtime). All take turns.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from alembert.benchmarks.evaluation import task_texts
from alembert.benchmarks.timing import interleave, machine_description, ratio
from alembert.cli.options import limit_rows, load_evaluation_task, quiet_libraries
from alembert.common.files import write_json
from alembert.models.multi_exit import MultiExitModel
from alembert.runtime.adaptive import AdaptiveClassifier
from alembert.runtime.policies import ExitPolicy
from alembert.runtime.torch_backend import to_probabilities

PADDED_LENGTH = 128


class PublishedInference:
    """One text at a time, padded to a fixed length, layer by layer."""

    def __init__(
        self,
        model: MultiExitModel,
        tokenizer: Any,
        policy: ExitPolicy,
        max_length: int,
        padded_length: int = PADDED_LENGTH,
    ) -> None:
        self.model, self.tokenizer, self.policy = model, tokenizer, policy
        self.max_length, self.padded_length = max_length, padded_length

    @torch.inference_mode()
    def predict(self, text: Any, speed: float) -> tuple[int, int]:
        """The label's number and the layer after which the text left."""
        fields = text if isinstance(text, tuple) else (text,)
        length = min(self.max_length, self.padded_length)
        encoded = self.tokenizer(*([field] for field in fields), truncation=True, max_length=length)
        batch = self.tokenizer.pad(
            encoded, padding="max_length", max_length=self.padded_length, return_tensors="pt"
        )
        model, layered = self.model, self.model.layered
        state = layered.embed(batch["input_ids"], batch["attention_mask"], batch.get("token_type_ids"))
        history = None
        for layer in range(1, model.num_layers + 1):
            state = layered.run_layer(layer, state)
            if layer == model.num_layers:
                logits = model.final_logits(layered.output(state), state.attention_mask)
                return int(logits.argmax()), layer
            if layer in model.exit_layers and speed > 0:
                hidden_states = layered.output(state)
                logits = model.exit_heads[str(layer)](hidden_states, state.attention_mask)
                learned = None
                if self.policy.name == "learned":
                    learned = model.mistake_logits(hidden_states).sigmoid()
                probabilities = to_probabilities(logits, self.policy.problem_type)
                uncertainty, history = self.policy.uncertainty(probabilities, history, learned)
                if bool(uncertainty[0] < speed):
                    return int(logits.argmax()), layer
        raise AssertionError("the last layer answers")


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Measures, prints and returns the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("run", help="a run directory with exits, for one label per text")
    parser.add_argument("--exported", action="append", default=[], help="a folder of `alembert export`")
    parser.add_argument("--data", required=True)
    parser.add_argument("--speed", type=float, default=0.5)
    parser.add_argument("--policy", help="the run's own unless given")
    parser.add_argument("--padded-length", type=int, default=PADDED_LENGTH)
    parser.add_argument("--rows", type=int, default=64, help="texts of a round")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--output")
    given = parser.parse_args(arguments)
    quiet_libraries()
    if given.threads:
        torch.set_num_threads(given.threads)
    threads = torch.get_num_threads()
    classifier = AdaptiveClassifier.from_pretrained(
        given.run, device="cpu", threads=threads, speed=given.speed, policy=given.policy
    )
    model, policy = classifier.backend.model, classifier.policy()
    task, split, _ = load_evaluation_task(given.data, given.run, classifier, None)
    task = limit_rows(task, {split: given.rows}, 0)
    texts, labels = task_texts(task, split), np.array(task.dataset(split)["labels"])
    published = PublishedInference(
        model, classifier.tokenizer, policy, classifier.max_length, given.padded_length
    )
    # Speed and policy are given, so that a calibration beside an export does not choose others for it.
    ours = {"torch": classifier} | {
        str(folder): AdaptiveClassifier.from_pretrained(
            folder, threads=threads, speed=given.speed, policy=policy.name, top_k=policy.top_k
        )
        for folder in given.exported
    }
    expected, expected_exits = np.array([published.predict(text, given.speed) for text in texts]).T
    candidates: dict[str, Any] = {
        "published": lambda: [published.predict(text, given.speed) for text in texts]
    }
    for name, other in ours.items():
        candidates[f"{name}, one text at a time"] = lambda c=other: [
            c.predict(text, speed=given.speed) for text in texts
        ]
        candidates[f"{name}, all texts"] = lambda c=other: c.predict(texts, speed=given.speed)
    timings = interleave(candidates, repeats=given.repeats)
    names = list(classifier.label_names)
    results: dict[str, Any] = {
        "machine": machine_description(),
        "model": given.run,
        "data": given.data,
        "speed": given.speed,
        "policy": policy.name,
        "rows": len(texts),
        "padded_length": given.padded_length,
        "exits": {str(layer): float((expected_exits == layer).mean()) for layer in classifier.exit_layers},
        "results": {},
    }  # fmt: skip
    for name, timing in timings.items():
        against = ratio(timings["published"], timing)
        found, left = expected, expected_exits
        if name != "published":
            predictions = ours[name.rpartition(", ")[0]].predict(texts, speed=given.speed)
            found = np.array([names.index(str(prediction.label)) for prediction in predictions])
            left = np.array([prediction.exit for prediction in predictions])
        entry = {
            "texts_per_second": timing.per_second(len(texts)).median,
            "ratio_to_published": against.median,
            "ratio_quartiles": [against.lower, against.upper],
            "accuracy": float((found == labels).mean()),
            "same_label": float((found == expected).mean()),
            "same_exit": float((left == expected_exits).mean()),
        }
        results["results"][name] = entry
        print(f"{name:50} {entry['texts_per_second']:9.1f} texts/s  {against.median:6.2f}×")
    if given.output:
        write_json(given.output, results | {"threads": threads})
    return results


if __name__ == "__main__":
    main()
