"""Teacher layers for student layers: the papers' examples, and what holds for any depth."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from alembert.common.errors import InputError
from alembert.models.layer_mapping import LAYER_MAPPINGS, layer_mapping, pkd_layers
from alembert.models.projections import HiddenProjection

DEPTHS = st.integers(1, 40).flatmap(lambda n: st.tuples(st.integers(1, n), st.just(n)))


@pytest.mark.parametrize(
    ("kind", "student", "teacher", "expected"),
    [
        ("uniform", 4, 12, (3, 6, 9, 12)),
        ("uniform", 6, 12, (2, 4, 6, 8, 10, 12)),
        ("uniform", 5, 12, (2, 5, 7, 10, 12)),
        ("uniform", 8, 12, (2, 3, 5, 6, 8, 9, 11, 12)),
        ("uniform", 1, 12, (12,)),
        ("top", 4, 12, (9, 10, 11, 12)),
        ("bottom", 4, 12, (1, 2, 3, 4)),
        ("spread", 6, 12, (1, 3, 5, 8, 10, 12)),
        ("spread", 1, 12, (1,)),
        ("spread", 3, 3, (1, 2, 3)),
    ],
)
def test_mapping(kind: str, student: int, teacher: int, expected: tuple[int, ...]) -> None:
    assert layer_mapping(kind, student, teacher) == expected


@given(DEPTHS, st.sampled_from(sorted(LAYER_MAPPINGS)))
@settings(deadline=None, max_examples=50)
def test_mappings_rise_within_the_teacher(depths: tuple[int, int], kind: str) -> None:
    student, teacher = depths
    mapped = layer_mapping(kind, student, teacher)
    assert len(mapped) == student
    assert sorted(set(mapped)) == list(mapped)
    assert mapped[0] >= 1 and mapped[-1] <= teacher


@given(DEPTHS)
@settings(deadline=None, max_examples=50)
def test_uniform_is_the_nearest_layer_and_ends_at_the_last(depths: tuple[int, int]) -> None:
    student, teacher = depths
    mapped = layer_mapping("uniform", student, teacher)
    assert mapped[-1] == teacher
    for layer, target in enumerate(mapped, start=1):
        assert -Fraction(1, 2) < target - Fraction(layer * teacher, student) <= Fraction(1, 2)


@pytest.mark.parametrize(
    ("kind", "student", "expected"),
    [
        ("skip", 6, ((1, 2), (2, 4), (3, 6), (4, 8), (5, 10))),
        ("skip", 3, ((1, 4), (2, 8))),
        ("last", 6, ((1, 7), (2, 8), (3, 9), (4, 10), (5, 11))),
        ("last", 3, ((1, 10), (2, 11))),
    ],
)
def test_patient_layers_as_published(kind: str, student: int, expected: tuple[tuple[int, int], ...]) -> None:
    assert pkd_layers(kind, student, 12) == expected


def test_explicit_layers() -> None:
    assert layer_mapping("uniform", 3, 12, [1, 1, 12]) == (1, 1, 12)
    assert layer_mapping("uniform", 4, 3, [1, 2, 3, 3]) == (1, 2, 3, 3)


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (("uniform", 12, 6), ("12", "6", "choose 1 to 6", "list a teacher layer")),
        (("top", 0, 6), ("0 layers",)),
        (("middle", 2, 6), ("middle", "uniform, top, bottom, spread")),
        (("uniform", 3, 6, [1, 2]), ("2 teacher layers", "3 student layers")),
        (("uniform", 2, 6, [1, 7]), ("1, 7", "1 to 6")),
        (("uniform", 2, 6, [0, 6]), ("0, 6", "1 to 6")),
        (("uniform", 2, 6, [5, 4]), ("5, 4", "ascending")),
    ],
)
def test_refused_mappings(arguments: tuple[object, ...], parts: tuple[str, ...]) -> None:
    with pytest.raises(InputError) as caught:
        layer_mapping(*arguments)
    assert all(part in str(caught.value) for part in parts)


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (("skip", 7, 6), ("7", "6")),
        (("last", 1, 6), ("1 layer", "2 to 6")),
        (("first", 3, 6), ("skip or last",)),
    ],
)
def test_refused_patient_layers(arguments: tuple[str, int, int], parts: tuple[str, ...]) -> None:
    with pytest.raises(InputError) as caught:
        pkd_layers(*arguments)
    assert all(part in str(caught.value) for part in parts)


def test_shared_projection_is_one_affine_map_of_every_layer() -> None:
    torch.manual_seed(0)
    projection = HiddenProjection(3, 5)
    hidden = torch.randn(2, 4, 3)
    linear = projection.linears["shared"]
    torch.nn.init.normal_(linear.bias)
    for layer in (0, 1, 4):
        torch.testing.assert_close(projection(hidden, layer), hidden @ linear.weight.T + linear.bias)
    assert sum(parameter.numel() for parameter in projection.parameters()) == 3 * 5 + 5


def test_projections_per_layer_differ() -> None:
    torch.manual_seed(0)
    projection = HiddenProjection(3, 5, num_layers=2, sharing="per_layer")
    hidden = torch.randn(2, 4, 3)
    for layer in range(3):
        torch.testing.assert_close(
            projection(hidden, layer), hidden @ projection.linears[str(layer)].weight.T
        )
    assert not torch.equal(projection(hidden, 0), projection(hidden, 1))
    assert sum(parameter.numel() for parameter in projection.parameters()) == 3 * (3 * 5 + 5)
    few = HiddenProjection(3, 5, layers=(2, 4), sharing="per_layer")
    torch.testing.assert_close(few(hidden, 4), hidden @ few.linears["4"].weight.T)
    assert sum(parameter.numel() for parameter in few.parameters()) == 2 * (3 * 5 + 5)


def test_projection_of_equal_widths() -> None:
    hidden = torch.randn(2, 4, 3)
    assert not torch.equal(HiddenProjection(3, 3)(hidden, 1), hidden)
    identity = HiddenProjection(3, 3, when_equal=False)
    assert identity(hidden, 1) is hidden
    assert not list(identity.parameters())
    assert HiddenProjection(3, 4, when_equal=False)(hidden, 1).shape == (2, 4, 4)


def test_refused_projections() -> None:
    with pytest.raises(InputError, match="shared or per_layer"):
        HiddenProjection(3, 5, sharing="twice")
    with pytest.raises(InputError, match="number of student layers"):
        HiddenProjection(3, 5, sharing="per_layer")
