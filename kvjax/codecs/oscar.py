"""oscar: a rotation fitted to what the queries see, then 2-bit integers (arXiv 2605.17757).

    keys     R = U H P,  U the eigenvectors of E[q q^T] over the queries of a key/value head
    values   the same for E[w v v^T], w = k^T E[q q^T] k at mean 1
    code     min to max of the rotated vector, of which the middle 96 % (keys) or 92 % (values) of the range is kept

H is Hadamard's matrix and P a bit reversal, so that every stretch of numbers has an even share of what matters. As
published: 64 sinks and a window of 256 exact tokens. 2 + 32/D bits a number. One difference: the weights w use the
queries' moment as it stands when a token is read in calibration, so that one pass over the text is enough.
"""

from kvjax.codec import CODECS, Codec, ExactSizes, pipeline
from kvjax.errors import check_between, check_choice
from kvjax.stages.calibrated import QueryCovariance
from kvjax.stages.quantise import Uniform

_EXACT = ExactSizes(sinks=64, window=256, round=128)

_CLIP = {"keys": 0.96, "values": 0.92}


def oscar(role: str, *, bits: int = 2, clip: float = 0.0, mean: str = "none") -> Codec:
    """Stores vectors rotated by statistics as integers, a scale and an offset a token.

    Args:
      role: "keys" or "values".
      bits: 2 as published; 1 to 4 work.
      clip: share of the range that is kept, in (0, 1]; 0 takes the published 0.96 for keys and 0.92 for values.
      mean: what is taken off first: none, calibrated or prompt.
    """
    check_choice("oscar(bits)", bits, (1, 2, 3, 4))
    check_between("oscar(clip)", clip, 0.0, 1.0)
    return pipeline(role, Uniform(bits=bits, clip=clip or _CLIP[role]), QueryCovariance(), mean=mean, exact=_EXACT)


CODECS.register("oscar", oscar)
