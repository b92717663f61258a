"""turboquant: a random rotation, then the best scalar levels for what it leaves (arXiv 2504.19874).

    y = Q x,   code_i = the nearest level to y_i sqrt(D) / |x|,   x^ = scale Q^T level[code]         b + 16/D bits

After the rotation every coordinate has the density (1 - t**2)**((D - 3)/2), whose Lloyd-Max levels are used (or the
normal's). The paper's scale is |x|, "raw"; "norm", which keeps the length, and "unbiased" (EDEN) cost nothing more and
do better in a softmax. 2.5 and 3.5 bits are the paper's: a quarter of the channels, those with the largest squares
among the first tokens stored, get one bit more and are rotated apart, with a scale of their own, which makes 2.5 and
3.5 bits at D = 128 all counted. `prod` spends one bit on a sketch that makes products unbiased; for attention it is
worse than one more bit of levels (kvjax/stages/sketch.py), and is here for comparison.
"""

from kvjax.codec import CODECS, Codec, pipeline
from kvjax.errors import UserError, check_choice
from kvjax.stages.channels import Outliers
from kvjax.stages.levels import LloydMax
from kvjax.stages.linear import Linear, Rotation
from kvjax.stages.quantise import Quantiser, Split
from kvjax.stages.sketch import Sketch

BITS = (1, 2, 2.5, 3, 3.5, 4)
_OUTLIER_SHARE = 4  # one channel in four


def turboquant(
    role: str,
    *,
    bits: float = 4.0,
    rotation: str = "hadamard",
    table: str = "beta",
    scale: str = "norm",
    prod: str = "off",
    seed: int = 0,
    mean: str = "none",
    rope: str = "post",
) -> Codec:
    """Stores rotated vectors by Lloyd-Max levels.

    Args:
      role: "keys" or "values".
      bits: 1, 2, 2.5, 3, 3.5 or 4.
      rotation: hadamard (signed) or dense.
      table: levels of the exact density, beta, or of its limit, normal.
      scale: raw (the paper's), norm or unbiased.
      prod: off, or a sketch of the residual with one bit: gaussian (the paper's) or orthogonal.
      seed: of rotation and sketch.
      mean: what is taken off first: none, calibrated or prompt.
      rope: post or pre.
    """
    check_choice("turboquant(bits)", bits, BITS)
    check_choice("turboquant(rotation)", rotation, ("hadamard", "dense"))
    check_choice("turboquant(table)", table, ("beta", "normal"))
    check_choice("turboquant(scale)", scale, ("raw", "norm", "unbiased"))
    check_choice("turboquant(prod)", prod, ("off", "gaussian", "orthogonal"))
    whole = int(bits)
    linear: Linear = Rotation(kind=rotation, seed=seed)
    if bits != whole:
        if prod != "off":
            raise UserError(f"turboquant with prod={prod} takes whole bits, not {bits}. The nearest is {whole}.")
        linear = Outliers(share=_OUTLIER_SHARE, kind=rotation, seed=seed)
        one_more, plain = (LloydMax(bits=b, source=table, scale=scale) for b in (whole + 1, whole))
        return pipeline(role, Split(share=_OUTLIER_SHARE, first=one_more, second=plain), linear, mean=mean, rope=rope)
    if prod == "off":
        quantiser: Quantiser = LloydMax(bits=whole, source=table, scale=scale)
    else:
        if rope == "pre" and role == "keys":
            raise UserError("turboquant with prod keeps rope=post: the sketch is of the key as it meets the query.")
        levels = LloydMax(bits=whole - 1, source=table, scale="raw") if whole > 1 else None
        quantiser = Sketch(levels=levels, gaussian=prod == "gaussian", seed=seed)
    return pipeline(role, quantiser, linear, mean=mean, rope=rope)


CODECS.register("turboquant", turboquant)
