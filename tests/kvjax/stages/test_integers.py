"""Integers with or without a rotation: which levels each choice gives."""

import pytest

from kvjax.errors import UserError
from kvjax.stages.codebook import uniform_step
from kvjax.stages.integers import RANGES, ROTATIONS, integers
from kvjax.stages.levels import half_integer_levels
from kvjax.stages.linear import Rotation
from kvjax.stages.quantise import Uniform


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("rotation", ROTATIONS)
@pytest.mark.parametrize("range", RANGES)
def test_choices(bits, rotation, range):
    """Levels best for the normal after a rotation, the range from least to largest without, unless it is said."""
    quantiser, linear = integers(bits, rotation=rotation, range=range, name="int")
    assert linear == (None if rotation == "none" else Rotation(kind=rotation))
    normal = {"normal": True, "minmax": False, "auto": rotation != "none"}[range]
    assert quantiser == (half_integer_levels(bits, uniform_step(bits)) if normal else Uniform(bits=bits))


def test_levels_of_the_normal_are_half_integers_times_the_best_step():
    quantiser, _ = integers(2, rotation="hadamard", range="auto", name="int2")
    step = 0.99569
    assert quantiser.levels == pytest.approx((-1.5 * step, -0.5 * step, 0.5 * step, 1.5 * step), rel=1e-4)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"rotation": "hadamar"}, r"int4\(rotation\) is hadamar; .* The nearest is hadamard\."),
        ({"range": "min-max"}, r"int4\(range\) is min-max; .* The nearest is minmax\."),
    ],
)
def test_others_are_refused(wrong, message):
    with pytest.raises(UserError, match=message):
        integers(4, **{"rotation": "none", "range": "auto", "name": "int4", **wrong})
