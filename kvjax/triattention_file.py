"""Statistics that TriAttention's authors publish (`.pt`), as ours: centre and mean lengths of each head's queries.

{"metadata": {"head_dim", "rope_style", ...},
"stats": {"layer00_head00": {"q_mean_real": [D/2], "q_mean_imag": [D/2], "q_abs_mean": [D/2]}, ...}}
"""

import re
from pathlib import Path
from typing import Any

import numpy as np

from kvjax.errors import UserError
from kvjax.model_shape import ModelShape
from kvjax.statistics import LayerStatistics, Moments, Statistics
from kvjax.torch_file import read_torch

_NAME = re.compile(r"layer(\d+)_head(\d+)$")
_PARTS = ("q_mean_real", "q_mean_imag", "q_abs_mean")


def load_triattention(path: str | Path, shape: ModelShape) -> Statistics:
    """Reads published statistics and checks that they suit a model.

    Args:
      path: the authors' file.
      shape: the model's `cache_shape`.

    Raises:
      UserError: the file cannot be read, holds something else, or belongs to a model of another shape.
    """
    content = read_torch(path)
    if not isinstance(content, dict) or not isinstance(content.get("stats"), dict) or not content["stats"]:
        raise UserError(
            f"{path} holds no TriAttention statistics: expected is a 'stats' entry for each layer and head."
        )
    metadata = content.get("metadata", {})
    if not isinstance(metadata, dict):
        raise UserError(f"{path} holds no TriAttention statistics: its 'metadata' is no table.")
    if metadata.get("rope_style", "half") != "half":
        raise UserError(f"{path} has rope_style '{metadata['rope_style']}'; only 'half' is supported.")
    table = _table(path, content["stats"], shape)
    mean = np.concatenate([table[..., 0, :], table[..., 1, :]], axis=-1)  # L N D
    return Statistics(
        tuple(_layer(mean[index], table[index, :, 2], shape) for index in range(shape.num_layers)),
        shape,
        source=str(path),
        about={"model": str(metadata.get("model_name") or metadata.get("model_path") or "")},
    )


def _table(path: str | Path, stats: dict[str, Any], shape: ModelShape) -> np.ndarray:
    """All numbers, `L N 3 D/2`."""
    found: dict[tuple[int, int], np.ndarray] = {}
    size = None
    for name, parts in stats.items():
        match = _NAME.match(str(name))
        if not match or not isinstance(parts, dict) or not set(_PARTS) <= set(parts):
            raise UserError(f"{path} has an entry '{name}' that is no layer and head with {', '.join(_PARTS)}.")
        vectors = [parts[part] for part in _PARTS]
        if not all(isinstance(vector, np.ndarray) and vector.ndim == 1 for vector in vectors):
            raise UserError(f"{path} has an entry '{name}' whose {', '.join(_PARTS)} are no vectors.")
        size = size or 2 * vectors[0].size
        if any(2 * vector.size != size for vector in vectors):
            raise UserError(f"{path} has an entry '{name}' whose vectors have not {size // 2} numbers, as the first's.")
        found[int(match.group(1)), int(match.group(2))] = np.stack(
            [np.asarray(vector, np.float32) for vector in vectors]
        )
    layers, heads = (1 + max(index[axis] for index in found) for axis in (0, 1))
    theirs, ours = (layers, heads, size), (shape.num_layers, shape.num_query_heads, shape.head_size)
    if theirs != ours or len(found) != layers * heads:
        raise UserError(
            f"The statistics {path} belong to another model: {layers} layers of {heads} query heads of size {size}; "
            f"this model has {ours[0]} of {ours[1]} of size {ours[2]}. Write its own with python -m kvjax.calibrate."
        )
    table = np.stack([np.stack([found[layer, head] for head in range(heads)]) for layer in range(layers)])
    if not np.isfinite(table).all():
        raise UserError(f"The statistics {path} hold numbers that are not finite.")
    return table


def _layer(mean: np.ndarray, norm: np.ndarray, shape: ModelShape) -> LayerStatistics:
    """One layer: what the file has, and None for the rest."""
    return LayerStatistics(
        num_tokens=None,
        keys=None,
        keys_before_rope=None,
        values=None,
        queries_second=None,
        queries=Moments(mean=mean, second=None),
        queries_norm=norm,
        values_weighted=None,
        value_weight=None,
        rope=shape.rope,
    )
