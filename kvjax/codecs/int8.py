"""int8: eight-bit integers with a scale for each token and head, without a rotation.

s = max|x| / 127,   code = round(x / s),   x^ = s code            8 + 16/D bits a number
"""

from kvjax.codec import CODECS, Codec, pipeline
from kvjax.stages.quantise import Uniform


def int8(role: str, *, mean: str = "none", rope: str = "post") -> Codec:
    """Stores symmetric 8-bit integers, a scale a token.

    Args:
      role: "keys" or "values".
      mean: what is taken off first: none, calibrated or prompt.
      rope: post or pre.
    """
    return pipeline(role, Uniform(bits=8, symmetric=True), mean=mean, rope=rope)


CODECS.register("int8", int8)
