"""think: drops the key channels that the prompt's last queries care least about (ThinK, arXiv 2407.21018).

    score_d = mean of q_d^2 over the last 32 queries and the heads that share the key  x  mean of k_d^2

The channels are chosen for each row and head when its first tokens are stored, and stay. A row that had no prompt (its
first tokens came by `compressed_decode`) goes by the keys alone. Dropped channels are not stored; the exact segment
keeps all.
"""

from kvjax.codec import CODECS, Codec, pipeline
from kvjax.errors import check_between
from kvjax.stages.channels import Prune


def think(role: str, *, ratio: float = 0.5) -> Codec:
    """Stores keys without a share of their channels; values are stored as they are.

    Args:
      role: "keys" or "values".
      ratio: share of the channels that is dropped, in [0, 1); the paper drops 0.4 to 0.5.
    """
    check_between("think(ratio)", ratio, 0.0, 1.0, open_above=True)
    return pipeline(role, None, Prune(ratio=ratio) if role == "keys" else None)


CODECS.register("think", think)
