"""Gives an encoder a head for masked language modelling and trains it on plain text.

Sentence encoders are often published without the head that they were pretrained with, but augmentation needs its
predictions. The head starts fresh with the encoder's own input embeddings as output weights, so little is left to
learn: training the last few layers on some megabytes of text of the right language is enough to get usable words.

    python scripts/train_masked_lm.py --model ENCODER --corpus texts.txt --output masked-lm \
        --trainable-layers 4 --steps 2000

The corpus is UTF-8 text, a paragraph per line; lines are joined and cut into blocks of --max-length tokens. The
same command goes on after an interruption. The output folder holds the model (safetensors), its tokenizer and
masked_lm.json with the configuration and the accuracy on held-out blocks before and after.
"""

from __future__ import annotations

import argparse
import itertools
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor
from transformers import (
    AutoModelForMaskedLM,
    DataCollatorForLanguageModeling,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from alembert.common.errors import InputError
from alembert.common.files import write_json
from alembert.data import iterate_texts
from alembert.data.augmentation.predictions import logits_at
from alembert.models.layered import LayeredEncoder
from alembert.models.loading import load_tokenizer
from alembert.training.checkpoints import last_complete_checkpoint, mark_complete
from alembert.training.settings import bf16_pays

HELD_OUT_BLOCKS = 128


class MaskedLanguageModelTrainer(Trainer):  # type: ignore[misc]
    """Scores the masked positions alone, a small share of all."""

    def compute_loss(self, model: Any, inputs: dict[str, Tensor], *_: Any, **__: Any) -> Tensor:
        labels = inputs.pop("labels")
        rows, columns = (labels != -100).nonzero(as_tuple=True)
        logits = logits_at(self.accelerator.unwrap_model(model), inputs, rows, columns)
        return torch.nn.functional.cross_entropy(logits.float(), labels[rows, columns])


class PrintLoss(TrainerCallback):  # type: ignore[misc]
    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **_: Any) -> None:
        if "loss" in logs:
            print(f"step {state.global_step} of {state.max_steps}: loss {logs['loss']:.3f}", flush=True)


class MarkCheckpoints(TrainerCallback):  # type: ignore[misc]
    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        mark_complete(Path(args.output_dir) / f"checkpoint-{state.global_step}")


def text_blocks(
    files: list[Path], tokenizer: PreTrainedTokenizerBase, length: int, wanted: int, seed: int
) -> Dataset:
    """Up to `wanted` blocks of exactly `length` tokens, in an order drawn by seed, the files alike."""
    body = length - 2

    def blocks(file: Path) -> Iterator[list[int]]:
        held: list[int] = []
        lines = (text for text in iterate_texts(file) if isinstance(text, str))
        while some := list(itertools.islice(lines, 256)):
            for ids in tokenizer(some, add_special_tokens=False, verbose=False)["input_ids"]:
                held += ids
            while len(held) >= body:
                yield [tokenizer.cls_token_id, *held[:body], tokenizer.sep_token_id]
                held = held[body:]

    share = -(-wanted // len(files))
    kept = [block for file in files for block in itertools.islice(blocks(file), share)]
    order = np.random.default_rng(seed).permutation(len(kept))
    return Dataset.from_dict({"input_ids": [kept[index] for index in order]})


def freeze_below(model: PreTrainedModel, trainable_layers: int | None) -> None:
    """Leaves the head and the last `trainable_layers` layers to train; None leaves everything."""
    if trainable_layers is None:
        return
    encoder = LayeredEncoder(model.base_model)
    if not 0 <= trainable_layers <= encoder.num_layers:
        raise InputError(f"--trainable-layers {trainable_layers}: choose 0 to {encoder.num_layers}")
    model.base_model.requires_grad_(False)
    for index in range(encoder.num_layers - trainable_layers, encoder.num_layers):
        encoder.layer(index + 1).requires_grad_(True)


@torch.inference_mode()
def accuracy(model: PreTrainedModel, blocks: Dataset, collator: Any, batch_size: int) -> float:
    """The share of masked tokens that are predicted exactly, under masks that are the same at every call."""
    set_seed(0)
    model.eval()
    right = total = 0
    for start in range(0, len(blocks), batch_size):
        batch = collator([{"input_ids": ids} for ids in blocks[start : start + batch_size]["input_ids"]])
        batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
        labels = batch.pop("labels")
        rows, columns = (labels != -100).nonzero(as_tuple=True)
        predicted = logits_at(model, batch, rows, columns).argmax(dim=-1)
        right += int((predicted == labels[rows, columns]).sum())
        total += len(rows)
    return right / total


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="folder or hub id of an encoder")
    parser.add_argument("--corpus", required=True, nargs="+", type=Path, help="UTF-8 text files (.txt)")
    parser.add_argument("--output", required=True, type=Path, help="folder to write; must not exist")
    parser.add_argument("--steps", type=int, default=2000, help="optimiser steps")
    parser.add_argument("--batch-size", type=int, default=16, help="blocks per step")
    parser.add_argument("--max-length", type=int, default=64, help="tokens per block")
    parser.add_argument("--learning-rate", type=float, default=3e-4, help="peak rate of AdamW")
    parser.add_argument("--mask-share", type=float, default=0.15, help="share of the tokens to predict")
    parser.add_argument(
        "--trainable-layers", type=int, help="train the head and this many last layers; all unless given"
    )
    parser.add_argument("--checkpoint-steps", type=int, default=200, help="steps between checkpoints")
    parser.add_argument("--seed", type=int, default=42)
    arguments = parser.parse_args()
    try:
        train(arguments)
    except InputError as error:
        parser.error(str(error))


def train(arguments: argparse.Namespace) -> None:
    output: Path = arguments.output
    if output.exists():
        raise InputError(f"{output} exists; remove it or name another folder")
    tokenizer = load_tokenizer(arguments.model)
    if tokenizer.mask_token_id is None:
        raise InputError(f"{arguments.model}: its tokenizer has no mask token")
    if arguments.max_length < 8:
        raise InputError(f"--max-length {arguments.max_length}: choose 8 or more")
    set_seed(arguments.seed)
    # Dropout holds back a model that sees each text once.
    model = AutoModelForMaskedLM.from_pretrained(
        arguments.model,
        use_safetensors=True,
        trust_remote_code=False,
        dtype=torch.float32,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    freeze_below(model, arguments.trainable_layers)
    wanted = arguments.steps * arguments.batch_size + HELD_OUT_BLOCKS
    blocks = text_blocks(arguments.corpus, tokenizer, arguments.max_length, wanted, arguments.seed)
    if len(blocks) <= HELD_OUT_BLOCKS + arguments.batch_size:
        raise InputError(f"the corpus gives only {len(blocks)} blocks of {arguments.max_length} tokens")
    held_out = blocks.select(range(HELD_OUT_BLOCKS))
    training = blocks.select(range(HELD_OUT_BLOCKS, len(blocks)))
    collator = DataCollatorForLanguageModeling(tokenizer, mlm_probability=arguments.mask_share)
    evaluation = DataCollatorForLanguageModeling(tokenizer, mlm_probability=0.15)
    before = accuracy(model, held_out, evaluation, arguments.batch_size)
    print(f"accuracy before: {before:.4f}; {len(training)} blocks", flush=True)

    checkpoints = output.with_name(f"{output.name}.checkpoints")
    trainer = MaskedLanguageModelTrainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(checkpoints),
            max_steps=arguments.steps,
            per_device_train_batch_size=arguments.batch_size,
            learning_rate=arguments.learning_rate,
            weight_decay=0.01,
            warmup_steps=0.05,
            bf16=bf16_pays(),
            use_cpu=not torch.cuda.is_available(),
            seed=arguments.seed,
            logging_steps=20,
            save_steps=arguments.checkpoint_steps,
            save_total_limit=2,
            disable_tqdm=True,
            report_to=[],
            dataloader_pin_memory=torch.cuda.is_available(),
        ),
        train_dataset=training,
        data_collator=collator,
        callbacks=[PrintLoss(), MarkCheckpoints()],
    )
    last = last_complete_checkpoint(checkpoints)
    set_seed(arguments.seed)
    trainer.train(resume_from_checkpoint=None if last is None else str(last))
    after = accuracy(model, held_out, evaluation, arguments.batch_size)
    print(f"accuracy after: {after:.4f}", flush=True)

    whole = checkpoints / "finished"
    model.save_pretrained(whole)
    tokenizer.save_pretrained(whole)
    configuration = {
        name: [file.name for file in value] if name == "corpus" else value
        for name, value in vars(arguments).items()
        if name != "output"
    } | {"model": Path(arguments.model).name}
    results = {"accuracy_before": before, "accuracy_after": after, "held_out_blocks": HELD_OUT_BLOCKS}
    write_json(whole / "masked_lm.json", {"configuration": configuration, **results})
    whole.replace(output)
    shutil.rmtree(checkpoints)


if __name__ == "__main__":
    main()
