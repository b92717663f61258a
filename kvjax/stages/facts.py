"""What stages may be fitted to."""

import dataclasses
from typing import Any

from kvjax.errors import UserError
from kvjax.model_shape import ModelShape

Arrays = dict[str, Any]
"""What a codec knows of one layer beyond its own numbers: fitted before, or chosen from the first tokens stored."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerFacts:
    """What a stage may be fitted to.

    Attributes:
      shape: of the model.
      layer: index of the layer.
      role: "keys" or "values".
      statistics: of this layer (`kvjax.statistics.LayerStatistics`), or None.
      before_rope: whether the vectors are keys from before RoPE.
      centred: whether the mean is taken off before.
    """

    shape: ModelShape
    layer: int
    role: str
    statistics: Any = None
    before_rope: bool = False
    centred: bool = False

    @property
    def moments(self) -> Any:
        """Mean and second moments of the vectors that come in."""
        name = "values" if self.role == "values" else "keys_before_rope" if self.before_rope else "keys"
        return self._found(name, self.role)

    def query_moments(self) -> tuple[Any, Any]:
        """Mean `N D` and second moments `N D D` of queries before RoPE."""
        moments = self._found("queries", "queries")
        if moments.second is None:
            raise UserError(_MISSING.format(what="second moments of queries"))
        return moments.mean, moments.second

    def query_centre(self) -> tuple[Any, Any]:
        """Mean `N D` of queries before RoPE, and the mean length of each band's pair, `N D/2`."""
        return self._found("queries", "queries").mean, self._found("queries_norm", "queries")

    def _found(self, name: str, what: str) -> Any:
        found = None if self.statistics is None else getattr(self.statistics, name)
        if found is None:
            raise UserError(_MISSING.format(what=what))
        return found


_MISSING = (
    "This policy needs statistics of the model's {what}: write them once with `python -m kvjax.calibrate --config=... "
    "--text=FILE --output=STATS.safetensors`, and give them as statistics."
)
