"""StreamingLLM (arXiv 2309.17453): sinks and the newest tokens.

    s_j = position of j

The authors roll keys to slot positions at every step; here keys keep the rotation of their own position, as in all
selections.
"""

import dataclasses

import jax.numpy as jnp

from kvjax.selection import SELECTIONS, Scores, Selection, View


@dataclasses.dataclass(frozen=True, kw_only=True)
class Streaming(Selection):
    """Keeps the newest tokens; sinks are the policy's (`exact(sinks=4)`)."""

    def score(self, view: View) -> Scores:
        """Newer is higher."""
        return view.positions.astype(jnp.float32)


SELECTIONS.register("streaming", Streaming)
