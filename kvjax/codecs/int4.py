"""int4: four-bit integers with a scale for each token and head, after a signed Hadamard rotation.

    rotated    levels (i + 1/2) step at the vector's length, the step best for the normal (0.3352)    4 + 16/D bits
    plain      min to max:  s = (max - min) / 15,  code = round((x - min) / s),  x^ = s code + min    4 + 32/D bits

SAW-INT4 (arXiv 2604.19157) rotates and then takes min to max: `range=minmax`. Half-integer levels are what an integer
matrix unit can use as they are, and one 16-bit scale is all that they need.
"""

from kvjax.codec import CODECS, Codec, pipeline
from kvjax.stages.integers import integers


def int4(
    role: str, *, rotation: str = "hadamard", range: str = "auto", mean: str = "none", rope: str = "post"
) -> Codec:
    """Stores 4-bit integers, a scale a token.

    Args:
      role: "keys" or "values".
      rotation: hadamard, dense or none.
      range: what the levels span: normal (the length), minmax, or auto: normal if rotated.
      mean: what is taken off first: none, calibrated or prompt.
      rope: post or pre.
    """
    quantiser, linear = integers(4, rotation=rotation, range=range, name="int4")
    return pipeline(role, quantiser, linear, mean=mean, rope=rope)


CODECS.register("int4", int4)
