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
        if self.statistics is None:
            raise UserError(
                f"This policy needs statistics of the model's {self.role}: write them once with `python -m "
                "kvjax.calibrate --config=... --text=FILE --output=STATS.safetensors`, and give them as statistics."
            )
        if self.role == "values":
            return self.statistics.values
        return self.statistics.keys_before_rope if self.before_rope else self.statistics.keys
