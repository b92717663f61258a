"""none: vectors as they are, in the model's dtype."""

from kvjax.codec import CODECS, Codec, pipeline


def none(role: str, *, mean: str = "none", rope: str = "post") -> Codec:
    """Stores vectors in the model's dtype; with `mean` or `rope`, those stages alone.

    Args:
      role: "keys" or "values".
      mean: what is taken off first: none, calibrated or prompt.
      rope: post or pre.
    """
    return pipeline(role, None, mean=mean, rope=rope)


CODECS.register("none", none)
