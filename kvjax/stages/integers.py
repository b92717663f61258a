"""Integer quantisers with or without a rotation before them, as `int4` and `int2` use them."""

from kvjax.errors import check_choice
from kvjax.stages.codebook import uniform_step
from kvjax.stages.levels import half_integer_levels
from kvjax.stages.linear import Rotation
from kvjax.stages.quantise import Quantiser, Uniform

ROTATIONS = ("hadamard", "dense", "none")
RANGES = ("auto", "normal", "minmax")


def integers(bits: int, *, rotation: str, range: str, name: str) -> tuple[Quantiser, Rotation | None]:
    """A quantiser of integers, a scale a token, and the rotation before it.

    rotated    levels (i + 1/2) step at the vector's length, the step best for the normal        bits + 16/D a number
    plain      min to max: s = (max - min)/(2**b - 1), code = round((x - min)/s)                 bits + 32/D

    Args:
      bits: of a code.
      rotation: one of `ROTATIONS`.
      range: "normal" or "minmax" as above; "auto" is normal after a rotation and minmax without.
      name: of the codec, for messages.

    Raises:
      UserError: an argument is not one of its choices.
    """
    check_choice(f"{name}(rotation)", rotation, ROTATIONS)
    check_choice(f"{name}(range)", range, RANGES)
    linear = None if rotation == "none" else Rotation(kind=rotation)
    normal = range == "normal" or (range == "auto" and linear is not None)
    return half_integer_levels(bits, uniform_step(bits)) if normal else Uniform(bits=bits), linear
