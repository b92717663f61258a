"""int2: two-bit integers with a scale for each token and head, after a signed Hadamard rotation.

    rotated    levels (i + 1/2) step at the vector's length, the step best for the normal (0.9957)    2 + 16/D bits
    plain      min to max:  s = (max - min) / 3,  code = round((x - min) / s),  x^ = s code + min     2 + 32/D bits

At 2 bits the best half-integer levels have within 1.2 % of Lloyd-Max's error, and min to max twice as much.
"""

from kvjax.codec import CODECS, Codec, pipeline
from kvjax.stages.integers import integers


def int2(
    role: str, *, rotation: str = "hadamard", range: str = "auto", mean: str = "none", rope: str = "post"
) -> Codec:
    """Stores 2-bit integers, a scale a token.

    Args:
      role: "keys" or "values".
      rotation: hadamard, dense or none.
      range: what the levels span: normal (the length), minmax, or auto: normal if rotated.
      mean: what is taken off first: none, calibrated or prompt.
      rope: post or pre.
    """
    quantiser, linear = integers(2, rotation=rotation, range=range, name="int2")
    return pipeline(role, quantiser, linear, mean=mean, rope=rope)


CODECS.register("int2", int2)
