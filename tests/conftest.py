"""Tiny models and tasks that tests share, and caches of their own."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

# Libraries read these when they are imported, so they are set before any import of theirs.
_CACHE = tempfile.mkdtemp(prefix="alembert-tests-")
os.environ |= {
    "HF_HOME": _CACHE,
    "HF_DATASETS_CACHE": f"{_CACHE}/datasets",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
}

import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors  # noqa: E402
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast, set_seed  # noqa: E402

import alembert  # noqa: E402

KEYWORDS = {
    "food": ("soup", "bread", "cheese", "salad", "pepper"),
    "sport": ("goal", "match", "race", "team", "coach"),
    "weather": ("rain", "cloud", "storm", "frost", "wind"),
}
FILLERS = ("the", "a", "was", "today", "and", "very", "we", "saw", "it", "there", "again", "much")
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
ROWS = {"train": 64, "dev": 32, "test": 32}


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> Iterator[None]:
    torch.set_num_threads(1)
    yield
    shutil.rmtree(_CACHE, ignore_errors=True)


def sentence(label: str, generator: np.random.Generator) -> str:
    """Three to twelve words, one or two of which give the label away."""
    words = list(generator.choice(FILLERS, size=generator.integers(2, 11)))
    for word in generator.choice(KEYWORDS[label], size=generator.integers(1, 3)):
        words.insert(int(generator.integers(0, len(words) + 1)), str(word))
    return " ".join(words)


@pytest.fixture(scope="session")
def write_task() -> Callable[..., Path]:
    """Writes train, dev and test TSV files of a made-up task: `single`, `pair`, `multi` or `regression`."""

    def write(folder: Path, kind: str = "single", seed: int = 0) -> Path:
        generator = np.random.default_rng(seed)
        names = sorted(KEYWORDS)
        folder.mkdir(parents=True, exist_ok=True)
        for split, count in ROWS.items():
            lines = ["label\ttext" + ("\ttext_pair" if kind == "pair" else "")]
            for row in range(count):
                first, second = names[row % 3], names[int(generator.integers(3))]
                text = sentence(first, generator)
                if kind == "single":
                    lines.append(f"{first}\t{text}")
                elif kind == "pair":
                    opening = " ".join(generator.choice(FILLERS, size=4))
                    lines.append(f"{first}\t{opening}\t{text}")
                elif kind == "multi":
                    lines.append(f"{'|'.join(sorted({first, second}))}\t{text} {sentence(second, generator)}")
                else:
                    lines.append(f"{names.index(first) / 2 + 0.25:.2f}\t{text}")
            (folder / f"{split}.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
        return folder

    return write


@pytest.fixture(scope="session")
def tiny_encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random BERT of 4 layers with a WordPiece tokenizer, never fine-tuned, in Hugging Face layout."""
    folder = tmp_path_factory.mktemp("encoder")
    words = [*SPECIAL, *FILLERS, *(word for group in KEYWORDS.values() for word in group)]
    vocabulary = {word: index for index, word in enumerate([*words, *"abcdefghijklmnopqrstuvwxyz", "##s"])}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", vocabulary["[CLS]"]), ("[SEP]", vocabulary["[SEP]"])],
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="[UNK]",
        pad_token="[PAD]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
        model_max_length=64,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    ).save_pretrained(folder)
    set_seed(1)
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        num_hidden_layers=4,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=64,
        initializer_range=0.2,
    )
    BertModel(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def task_folder(tmp_path_factory: pytest.TempPathFactory, write_task: Callable[..., Path]) -> Path:
    return write_task(tmp_path_factory.mktemp("task") / "topics")


@pytest.fixture(scope="session")
def task(task_folder: Path) -> alembert.Task:
    return alembert.load_task(task_folder)


@pytest.fixture(scope="session")
def teacher(tmp_path_factory: pytest.TempPathFactory, tiny_encoder: Path, task: alembert.Task) -> Path:
    """The tiny encoder fine-tuned on the tiny task."""
    folder = tmp_path_factory.mktemp("runs") / "teacher"
    settings = alembert.TrainingSettings(
        epochs=8, batch_size=8, learning_rate=2e-3, max_length=32, evaluate_every_epoch=True
    )
    alembert.finetune(str(tiny_encoder), task, folder, settings=settings)
    return folder


@pytest.fixture(scope="session")
def fast(tmp_path_factory: pytest.TempPathFactory, teacher: Path, task: alembert.Task) -> Path:
    """The teacher with exits after layers 1, 2 and 3 and a learned exit, distilled by MS-BERT."""
    folder = tmp_path_factory.mktemp("runs") / "fast"
    options = {"placement": "all", "exit_head_size": 32, "learned_exit": True}
    settings = {"epochs": 10, "batch_size": 8, "learning_rate": 1e-2, "max_length": 32}
    alembert.distill("ms-bert", str(teacher), task, folder, options=options, settings=settings)
    return folder


@pytest.fixture
def held_elsewhere() -> Callable[[Path], AbstractContextManager[None]]:
    """Within the block another process works on the folder."""
    program = (
        "import sys\nfrom pathlib import Path\nfrom alembert.common.locks import FolderLock\n"
        "lock = FolderLock(Path(sys.argv[1]))\nlock.acquire()\nprint(flush=True)\nsys.stdin.read()\n"
    )

    @contextmanager
    def held(folder: Path) -> Iterator[None]:
        command = [sys.executable, "-c", program, str(folder)]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
            assert other.stdout is not None
            other.stdout.readline()
            yield
            other.kill()

    return held
