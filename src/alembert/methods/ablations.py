"""The papers' ablations as rows of option overrides, with the figures that the papers print beside them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from alembert.common.errors import InputError

FULL = "full"


@dataclass(frozen=True)
class PaperFigures:
    """A row as printed.

    Attributes:
        values: figures by column, in the paper's unit.
        table: where.
        verified: whether they were compared with the paper's full text; else they come from others' summaries.
    """

    values: Mapping[str, float]
    table: str
    verified: bool = True


@dataclass(frozen=True)
class Step:
    """A distillation. Several in turn: each takes the model of the one before as its student.

    Attributes:
        options: over those that all rows have in common.
        method: another one than the table's; of the common options it takes those that it knows.
        augmented: whether it trains on augmented rows where these are given.
    """

    options: Mapping[str, Any] = field(default_factory=dict)
    method: str | None = None
    augmented: bool = True


@dataclass(frozen=True)
class AblationRow:
    """One line of an ablation table.

    Attributes:
        name: of its folder, and for `--rows`.
        title: as shown, in the paper's words where it has the row.
        steps: what is run.
        figures: the paper's; None = the paper does not print this row, or its figures are not known.
        needs: what the command must be given for the row to differ from the full method: `augmented` rows, or a
            `checkpoint` as the student; without it the row is left out.
        from_scratch: whether a student given as a checkpoint gives its shape alone, and begins at random.
        top_k: share of the labels in the exits' top-K entropy; the model is the full method's.
    """

    name: str
    title: str
    steps: tuple[Step, ...] = (Step(),)
    figures: PaperFigures | None = None
    needs: Literal["augmented", "checkpoint"] | None = None
    from_scratch: bool = False
    top_k: float | None = None


@dataclass(frozen=True)
class AblationTable:
    """The ablations of a method.

    Attributes:
        method: its name.
        paper: the reference.
        columns: of the paper's figures.
        rows: the full method first.
        note: what to know about the figures.
    """

    method: str
    paper: str
    columns: tuple[str, ...]
    rows: tuple[AblationRow, ...]
    note: str

    def row(self, name: str) -> AblationRow:
        """The row of that name. Raises InputError naming those there are."""
        for row in self.rows:
            if row.name == name:
                return row
        names = ", ".join(row.name for row in self.rows)
        raise InputError(f"the ablations of {self.method} have no row {name!r}: choose from {names}")


def _simple(name: str, title: str, figures: PaperFigures | None = None, **options: Any) -> AblationRow:
    return AblationRow(name, title, (Step(options),), figures)


_GLUE = ("MNLI-m", "MNLI-mm", "MRPC", "CoLA", "Avg")


def _glue(table: str, *values: float) -> PaperFigures:
    return PaperFigures(dict(zip(_GLUE, values, strict=True)), table)


_TINYBERT_FULL = (82.8, 82.9, 85.8, 50.8, 75.6)

TINYBERT = AblationTable(
    "tinybert",
    "Jiao et al., TinyBERT: Distilling BERT for Natural Language Understanding, Findings of EMNLP 2020",
    _GLUE,
    (
        AblationRow(FULL, "TinyBERT4", figures=_glue("Table 3", *_TINYBERT_FULL)),
        _simple(
            "without-embedding", "w/o Embd", _glue("Table 3", 82.3, 82.3, 85.0, 46.7, 74.1), embedding=False
        ),
        AblationRow(
            "without-prediction",
            "w/o Pred",
            (Step({"stages": ("task-intermediate",)}), Step({"hard_weight": 1.0}, "kd", augmented=False)),
            _glue("Table 3", 80.5, 81.0, 84.3, 48.2, 73.5),
        ),
        _simple(
            "without-transformer",
            "w/o Trm",
            _glue("Table 3", 71.7, 72.3, 70.1, 11.2, 56.3),
            attention=False,
            hidden=False,
        ),
        _simple(
            "without-attention", "w/o Attn", _glue("Table 3", 79.9, 80.7, 82.3, 41.1, 71.0), attention=False
        ),
        _simple("without-hidden", "w/o Hidn", _glue("Table 3", 81.7, 82.1, 84.1, 43.7, 72.9), hidden=False),
        AblationRow(
            "without-general",
            "w/o GD",
            (Step({"initialise": "random"}),),
            _glue("Table 2", 82.5, 82.6, 84.1, 40.8, 72.5),
            needs="checkpoint",
            from_scratch=True,
        ),
        AblationRow(
            "without-task-distillation",
            "w/o TD",
            (Step({"hard_weight": 1.0}, "kd"),),
            _glue("Table 2", 80.6, 81.2, 83.8, 28.5, 68.5),
        ),
        AblationRow(
            "without-augmentation",
            "w/o DA",
            (Step(augmented=False),),
            _glue("Table 2", 80.5, 81.0, 82.4, 29.8, 68.4),
            needs="augmented",
        ),
        _simple("mapping-uniform", "Uniform", _glue("Table 4", *_TINYBERT_FULL), mapping="uniform"),
        _simple("mapping-top", "Top", _glue("Table 4", 81.7, 82.3, 83.6, 35.9, 70.9), mapping="top"),
        _simple("mapping-bottom", "Bottom", _glue("Table 4", 80.6, 81.3, 84.6, 38.5, 71.3), mapping="bottom"),
    ),
    "GLUE dev sets; student 4x312 from general distillation, with data augmentation.",
)

LRC_BERT = AblationTable(
    "lrc-bert",
    "Fu et al., LRC-BERT: Latent-representation Contrastive Knowledge Distillation, AAAI 2021",
    ("CoLA",),
    (
        AblationRow(FULL, "LRC-BERT", figures=PaperFigures({"CoLA": 50.0}, "Table 3", verified=False)),
        # The first stage trains on COS-NCE alone, so without it there is none.
        _simple(
            "without-contrastive",
            "w/o COS-NCE",
            PaperFigures({"CoLA": 37.0}, "Table 3", verified=False),
            contrastive_weight=0.0,
            two_stages=False,
        ),
        _simple("without-soft", "w/o soft loss", soft_weight=0.0),
        _simple("without-hard", "w/o hard loss", hard_weight=0.0),
        _simple("without-perturbation", "w/o gradient perturbation", perturbation=False),
        _simple("without-two-stages", "w/o two stages", two_stages=False),
        _simple("mse", "MSE instead of COS-NCE", layer_loss="mse"),
    ),
    "GLUE dev sets; student 4x312. The paper's figures of the other rows were not at hand and are left out.",
)

BERT_EMD = AblationTable(
    "bert-emd",
    "Li et al., BERT-EMD: Many-to-Many Layer Mapping for BERT Compression with EMD, EMNLP 2020",
    (),
    (
        AblationRow(FULL, "BERT-EMD"),
        _simple("without-attention", "w/o attention EMD", attention=False),
        _simple("without-hidden", "w/o hidden-state EMD", hidden=False),
        # Without transport there are no layer weights for cost attention to move.
        _simple("without-transport", "w/o EMD", attention=False, hidden=False, cost_attention=False),
        _simple("without-embedding", "w/o embedding loss", embedding=False),
        _simple("without-cost-attention", "w/o cost attention", cost_attention=False),
        _simple("separate-weights", "separate layer weights", separate=True),
    ),
    "The paper's own figures could not be compared with its text and are left out.",
)

MS_BERT = AblationTable(
    "ms-bert",
    "Huang et al., MS-BERT: a Multi-layer Self-distillation Approach for BERT Compression, CollaborateCom 2021",
    (),
    (
        AblationRow(FULL, "MS-BERT"),
        AblationRow("without-multi-layer", "w/o multi-layer term", (Step(method="fastbert"),)),
        # As good as even: the weights are a softmax of distances over this temperature.
        _simple("without-emd", "w/o EMD weights", weighting="normalised", weighting_temperature=1e6),
        _simple("every-2", "exits after every 2nd layer", placement="every_k", k=2, layers=None),
        _simple("last-half", "exits after the last layers", placement="last_k", k=None, layers=None),
        _simple("all-layers", "exits after all layers", placement="all", k=None, layers=None),
        AblationRow("top-k-half", "top-K uncertainty, K = half the labels", top_k=0.5),
    ),
    "The paper's own figures could not be compared with its text and are left out.",
)

ABLATIONS = {table.method: table for table in (TINYBERT, LRC_BERT, BERT_EMD, MS_BERT)}


def find_ablations(method: str) -> AblationTable:
    """The ablations of a method. Raises InputError naming the methods that have any."""
    if method not in ABLATIONS:
        raise InputError(
            f"there is no table of ablations for {method!r}: choose one of {', '.join(sorted(ABLATIONS))}"
        )
    return ABLATIONS[method]
