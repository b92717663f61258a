"""lowrank: principal components of keys and values, exact or quantised.

    y = (x - mean) A,   x^ = A y + mean,   A the R leading eigenvectors of the vectors' covariance, from statistics

Keys have a far lower rank before RoPE than after it; `rope=pre` stores those and turns them when they are read. Values
are nearly of full rank. With `heads=2` or more, neighbouring heads share one set of R numbers (Palu's group-wise form,
arXiv 2407.21118; its whitening and its Fisher-weighted ranks are not done here). Before they are quantised, the
components are rotated among themselves, as Palu does, since their sizes differ by far.
"""

from kvjax.codec import CODECS, Codec, pipeline
from kvjax.errors import UserError, check_between, check_choice
from kvjax.stages.calibrated import Principal
from kvjax.stages.levels import LloydMax
from kvjax.stages.quantise import Quantiser, Uniform


def lowrank(
    role: str,
    *,
    rank: int = 0,
    energy: float = 0.0,
    bits: int = 16,
    heads: int = 1,
    mean: str = "calibrated",
    rope: str = "post",
) -> Codec:
    """Stores R principal components.

    Args:
      role: "keys" or "values".
      rank: R, of heads x D numbers.
      energy: instead of a rank: the share of the variance that every head keeps, in (0, 1]; R is then each layer's own,
        a multiple of 8.
      bits: of a component: 16 for the model's dtype, 8 for integers, 1 to 4 for Lloyd-Max levels.
      heads: neighbouring key/value heads that share one set of R numbers.
      mean: what is taken off first: none, calibrated or prompt.
      rope: post or pre.
    """
    if bool(rank) == bool(energy):
        raise UserError("lowrank takes either rank=R or energy=SHARE, e.g. lowrank(energy=0.95).")
    if rank:
        check_between("lowrank(rank)", rank, 1, 65536)
    else:
        check_between("lowrank(energy)", energy, 0.01, 1.0)
    check_choice("lowrank(bits)", bits, (1, 2, 3, 4, 8, 16))
    check_between("lowrank(heads)", heads, 1, 64)
    quantiser: Quantiser | None = None
    if bits < 16:
        quantiser = Uniform(bits=8, symmetric=True) if bits == 8 else LloydMax(bits=bits, source="normal")
    basis = Principal(rank=rank or None, energy=energy or None, heads=heads, spread=bits < 16)
    return pipeline(role, quantiser, basis, mean=mean, rope=rope)


CODECS.register("lowrank", lowrank)
