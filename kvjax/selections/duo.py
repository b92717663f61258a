"""DuoAttention (arXiv 2410.10819): some heads look back far, the others at sinks and window alone.

    s_j = position of j      for heads whose importance in the file is at least the quantile `sparsity`
    s_j = -inf               for all others: nothing beyond sinks and window

The file has a number for each key/value head, a line a layer: the authors' patterns (tab-separated text), or KVzip's
head scores (`.pt`, read without executing anything). The heads that look back share a pool of slots that is as large as
they need (`kvjax/compaction.py`), so the others really take no memory.
"""

import dataclasses
import functools
from typing import ClassVar

import jax.numpy as jnp
import numpy as np

from kvjax.errors import UserError, check_between
from kvjax.folder import find_file
from kvjax.selection import SELECTIONS, Scores, Selection, View
from kvjax.stages.facts import Arrays, LayerFacts
from kvjax.torch_file import read_torch


@functools.lru_cache(maxsize=8)
def read_pattern(path: str) -> np.ndarray:
    """Importances of heads, `L K` float32.

    Raises:
      UserError: there is no such file, or it holds no table of numbers.
    """
    found = find_file(path, "head-pattern file", advice="It has a number for each key/value head, a line a layer.")
    if found.suffix == ".pt":
        table = read_torch(found)
    else:
        try:
            table = np.loadtxt(found, ndmin=2) if found.read_text().strip() else None
        except (ValueError, OSError) as error:
            raise UserError(f"{found} is no head-pattern file ({error}): a line a layer, a number a head.") from error
    if not isinstance(table, np.ndarray) or table.ndim not in (2, 3) or not np.isfinite(table).all():
        raise UserError(f"{found} is no head-pattern file: it must hold one table of finite numbers, layers by heads.")
    return np.asarray(table, np.float32).reshape(table.shape[0], -1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Duo(Selection):
    """Whole heads keep their tokens, others only sinks and window.

    Attributes:
      budget: tokens that a head which looks back keeps at most, the newest ones; 1.0 keeps all.
      pattern: the file.
      sparsity: share of the model's heads that do not look back.
    """

    heads: ClassVar[str] = "adaptive"
    needs_pool: ClassVar[bool] = True

    budget: int | float = 1.0
    pattern: str = ""
    sparsity: float = 0.5

    def __post_init__(self):
        check_between("duo(sparsity)", self.sparsity, 0.0, 1.0)
        if not self.pattern:
            raise UserError("duo needs the file with the importance of each head: duo(pattern=FILE).")
        read_pattern(self.pattern)

    def looks_back(self, layer: int) -> np.ndarray:
        """Which heads of a layer keep their tokens, `K` bool: those at or above the quantile of the whole table."""
        table = read_pattern(self.pattern)
        if layer >= table.shape[0]:
            raise UserError(f"{self.pattern} has {table.shape[0]} layers; the model has more.")
        return table[layer] >= np.quantile(table, self.sparsity) if self.sparsity < 1.0 else table[layer] > np.inf

    def head_share(self, layer: int) -> float:
        """Share of the layer's heads that look back."""
        return float(np.mean(self.looks_back(layer)))

    def fit(self, facts: LayerFacts) -> tuple[Selection, Arrays]:
        """Checks that the file suits the model."""
        table, shape = read_pattern(self.pattern), facts.shape
        if table.shape != (shape.num_layers, shape.num_kv_heads):
            raise UserError(
                f"{self.pattern} is for {table.shape[0]} layers of {table.shape[1]} key/value heads; the model has "
                f"{shape.num_layers} of {shape.num_kv_heads}. Give the pattern of this model."
            )
        fitted, _ = super().fit(facts)
        return fitted, {"looks_back": self.looks_back(facts.layer)}

    def score(self, view: View) -> Scores:
        """Newer is higher in the heads that look back."""
        return jnp.where(view.arrays["looks_back"][None, :, None], view.positions.astype(jnp.float32), -jnp.inf)


SELECTIONS.register("duo", Duo)
