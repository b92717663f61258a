"""fp8: eight-bit floats, e4m3 (largest 448) or e5m2 (largest 57,344).

At a scale of 1 a number costs 8 bits and nothing more; numbers beyond the format's largest are held there. Its relative
error, 0.0007 for e4m3 and 0.0028 for e5m2, does not depend on the scale within the format's range.
"""

from kvjax.codec import CODECS, Codec, pipeline
from kvjax.errors import check_choice
from kvjax.stages.quantise import Float8

_FORMATS = {"auto": "", "e4m3": "float8_e4m3fn", "e5m2": "float8_e5m2"}


def fp8(role: str, *, format: str = "auto", scale: str = "none", mean: str = "none", rope: str = "post") -> Codec:
    """Stores 8-bit floats.

    Args:
      role: "keys" or "values".
      format: e4m3, e5m2, or auto: e5m2 on NVIDIA chips older than compute capability 8.9, e4m3 elsewhere.
      scale: none, or token for a 16-bit scale a token.
      mean: what is taken off first: none, calibrated or prompt.
      rope: post or pre.
    """
    check_choice("fp8(format)", format, _FORMATS)
    check_choice("fp8(scale)", scale, ("none", "token"))
    return pipeline(role, Float8(dtype=_FORMATS[format], scaled=scale == "token"), mean=mean, rope=rope)


CODECS.register("fp8", fp8)
