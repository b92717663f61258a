"""nf: the nearest of a table's levels at a scale a token, by default NormalFloat (QLoRA, arXiv 2305.14314).

    s = max|x| / max|level|,   code = the level nearest to x / s,   x^ = s level[code]               b + 16/D bits

A table of your own (KVQuant's nuq and the like) comes from a file with its levels: JSON, a list of 2, 4, ... 256
numbers.
"""

import functools
import json
import math

from kvjax.codec import CODECS, Codec, pipeline
from kvjax.errors import UserError, check_choice
from kvjax.folder import find_file
from kvjax.stages.codebook import normal_float
from kvjax.stages.levels import Levels
from kvjax.stages.linear import Rotation


def nf(
    role: str, *, bits: int = 4, table: str = "", rotation: str = "none", mean: str = "none", rope: str = "post"
) -> Codec:
    """Stores the nearest levels of a table.

    Args:
      role: "keys" or "values".
      bits: of a NormalFloat code, 2 to 8; a table from a file has bits of its own.
      table: a file with levels; none for NormalFloat.
      rotation: hadamard, dense or none.
      mean: what is taken off first: none, calibrated or prompt.
      rope: post or pre.
    """
    check_choice("nf(bits)", bits, (2, 3, 4, 5, 6, 7, 8))
    check_choice("nf(rotation)", rotation, ("none", "hadamard", "dense"))
    levels = read_table(table) if table else normal_float(bits)
    linear = None if rotation == "none" else Rotation(kind=rotation)
    return pipeline(role, Levels(levels=levels, scale="largest"), linear, mean=mean, rope=rope)


@functools.lru_cache(maxsize=8)
def read_table(path: str) -> tuple[float, ...]:
    """The levels in a file, ascending.

    Raises:
      UserError: there is no such file, or it is no list of 2, 4, ... 256 different numbers.
    """
    found = find_file(path, "table of levels")
    try:
        levels = json.loads(found.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"{found} is not JSON: {error}.") from error
    if not isinstance(levels, list) or not all(
        type(level) in (int, float) and math.isfinite(level) for level in levels
    ):
        raise UserError(f"{found} must hold a JSON list of numbers, the levels.")
    count = len(set(levels))
    if count != len(levels) or count < 2 or count > 256 or count & (count - 1) or max(map(abs, levels)) == 0:
        raise UserError(f"{found} holds {len(levels)} levels; expected 2, 4, 8, ... 256 different numbers.")
    return tuple(sorted(map(float, levels)))


CODECS.register("nf", nf)
