"""How many texts a second an epoch of self-distillation handles, against the backbone's plain forward pass.

    python benchmarks/self_distillation_speed.py --model ENCODER --data FOLDER --output speed.json

The plain pass is transformers' own forward under inference mode over the same batches. The epoch is everything the
Trainer does: loading, padding, the frozen backbone, all exits forward and backward, the loss, AdamW, logging.
"""

from __future__ import annotations

import argparse
import tempfile

import torch

from alembert.benchmarks.timing import interleave, machine_description, ratio
from alembert.cli.options import limit_rows, quiet_libraries
from alembert.common.files import write_json
from alembert.data import load_task
from alembert.methods.base import resolve
from alembert.methods.registry import find_method
from alembert.models.loading import load_encoder, load_tokenizer
from alembert.training.runner import tokenised
from alembert.training.trainer import DistillationTrainer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--output")
    parser.add_argument("--rows", type=int, default=512)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--max-length", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    quiet_libraries()
    task = limit_rows(load_task(arguments.data), {"train": arguments.rows}, 0)
    encoder = load_encoder(arguments.model, label_names=task.label_names, problem_type=task.problem_type)
    tokenizer = load_tokenizer(arguments.model)
    dataset = tokenised(task, "train", tokenizer, arguments.max_length)
    settings = {"epochs": 1, "batch_size": arguments.batch_size, "max_length": arguments.max_length}

    def trainer(method: str, folder: str) -> DistillationTrainer:
        method_class = find_method(method)
        options, training = resolve(method_class, "default", {}, settings)
        instance = method_class(options)
        model = instance.build_model(encoder, task)
        (stage,) = instance.stages(model, task, training)
        return DistillationTrainer(model, stage, dataset, None, tokenizer, folder)

    with tempfile.TemporaryDirectory() as folder:
        batches = [
            {name: values for name, values in batch.items() if name != "labels"}
            for batch in trainer("fastbert", folder).get_train_dataloader()
        ]

        @torch.inference_mode()
        def plain_forward() -> None:
            encoder.eval()
            for batch in batches:
                encoder(**batch)

        def epoch(method: str) -> None:
            prepared = trainer(method, folder)
            prepared.args.set_save("no")
            prepared.train()

        timings = interleave(
            {
                "plain forward": plain_forward,
                "fastbert": lambda: epoch("fastbert"),
                "ms-bert": lambda: epoch("ms-bert"),
            },
            repeats=arguments.repeats,
        )
    results = {"machine": machine_description(), "rows": len(dataset), "settings": settings, "methods": {}}
    for name, timing in timings.items():
        share = ratio(timings["plain forward"], timing)
        results["methods"][name] = {
            "texts_per_second": timing.per_second(len(dataset)).median,
            "share_of_plain_forward": share.median,
            "share_quartiles": [share.lower, share.upper],
        }
        print(
            f"{name:14} {len(dataset) / timing.median:8.1f} texts/s  {share.median:6.1%} of the plain forward pass"
        )
    if arguments.output:
        write_json(arguments.output, results)


if __name__ == "__main__":
    main()
