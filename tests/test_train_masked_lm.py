"""The script that gives an encoder a masked-language-model head."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForMaskedLM

SCRIPT = Path(__file__).parents[1] / "scripts" / "train_masked_lm.py"
STEPS = 6


def run_script(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> dict[str, Any]:
    monkeypatch.setattr(sys, "argv", [SCRIPT.name, *(str(argument) for argument in arguments)])
    return runpy.run_path(str(SCRIPT), run_name="__main__")


def test_a_run_cut_off_while_saving_goes_on_from_the_checkpoint_before(
    tiny_encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus = tmp_path / "corpus.txt"
    sentences = ("we saw the soup and bread again", "there was a storm today", "the rain and the wind came")
    corpus.write_text("\n".join(sentences * 2000), encoding="utf-8")
    settings = [
        "--model", tiny_encoder, "--corpus", corpus, "--steps", STEPS, "--batch-size", 2, "--max-length", 16,
        "--checkpoint-steps", 2, "--seed", 3,
    ]  # fmt: skip
    run_script(monkeypatch, *settings, "--output", tmp_path / "whole")

    class KilledError(Exception):
        pass

    def stop_after_the_second(checkpoint: Path) -> None:
        (checkpoint / "complete").touch()
        if checkpoint.name == "checkpoint-4":
            # A folder as a kill in the middle of saving leaves it.
            (checkpoint / "complete").unlink()
            (checkpoint / "model.safetensors").write_bytes(b"half")
            raise KilledError

    with monkeypatch.context() as cut, pytest.raises(KilledError):
        cut.setattr("alembert.training.checkpoints.mark_complete", stop_after_the_second)
        run_script(cut, *settings, "--output", tmp_path / "cut")
    run_script(monkeypatch, *settings, "--output", tmp_path / "cut")

    models = [AutoModelForMaskedLM.from_pretrained(tmp_path / name) for name in ("whole", "cut")]
    for name, weight in models[0].state_dict().items():
        # The words masked after a resumption are drawn anew.
        torch.testing.assert_close(weight, models[1].state_dict()[name], rtol=0, atol=1e-2)
    results = json.loads((tmp_path / "cut" / "masked_lm.json").read_text())
    assert 0 <= results["accuracy_before"] <= 1
    assert 0 <= results["accuracy_after"] <= 1
    assert str(tmp_path) not in json.dumps(results)
