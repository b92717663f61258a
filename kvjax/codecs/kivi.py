"""kivi: keys by channel, values by token, as KIVI does (arXiv 2402.02750).

Keys have a few large channels that stay large from token to token, so 32 tokens of one channel share a scale; values
have none, so 32 channels of one token do.

    z = min,   s = (max - min) / (2**b - 1),   code = round((x - z) / s),   x^ = s code + z        b + 32/32 bits

As published: no sinks, no window, and the newest 1 to 128 tokens exact ("residual"), coded 128 at a time. The authors'
code moves values one at a time instead, which keeps 128 exact always; here they move with the keys.
"""

from kvjax.codec import CODECS, Codec, ExactSizes, pipeline
from kvjax.errors import check_choice
from kvjax.stages.quantise import Uniform

_EXACT = ExactSizes(sinks=0, window=0, round=128)


def kivi(role: str, *, bits: int = 2, group: int = 32, mean: str = "none", rope: str = "post") -> Codec:
    """Stores 2- or 4-bit integers: keys per channel of a token group, values per channel group of a token.

    Args:
      role: "keys" or "values".
      bits: 2 or 4 as published; 1 to 8 work.
      group: tokens of a key's channel, or channels of a value, that share a scale; a power of two from 4 to 128.
      mean: what is taken off first: none, calibrated or prompt.
      rope: post or pre.
    """
    check_choice("kivi(bits)", bits, (1, 2, 3, 4, 5, 6, 8))
    check_choice("kivi(group)", group, (4, 8, 16, 32, 64, 128))
    if role == "keys":
        return pipeline(role, Uniform(bits=bits, token_group=group), mean=mean, rope=rope, exact=_EXACT)
    return pipeline(role, Uniform(bits=bits, channel_group=group), mean=mean, exact=_EXACT)


CODECS.register("kivi", kivi)
