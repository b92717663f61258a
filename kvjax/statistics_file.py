"""Statistics of a model as a file: safetensors arrays, and the facts of the model that they belong to."""

import dataclasses
import json
import os
import tempfile
from pathlib import Path

import jax
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from kvjax.errors import UserError
from kvjax.model_shape import ModelShape
from kvjax.statistics import Statistics, empty_statistics
from kvjax.triattention_file import load_triattention

_FORMATS = "kvjax statistics "
_FORMAT = f"{_FORMATS}2"
"""A new number for every change of what a file holds: 2 has the second moments of queries before RoPE, 1 had not."""


def save_statistics(path: str | Path, statistics: Statistics) -> None:
    """Writes statistics as safetensors, atomically."""
    arrays = {}
    for index, layer in enumerate(statistics.layers):
        for key_path, leaf in jax.tree_util.tree_leaves_with_path(layer):
            name = ".".join(str(getattr(key, "name", key)) for key in key_path)
            arrays[f"layers.{index}.{name}"] = np.require(leaf, np.float32, "C")
    facts = dataclasses.asdict(dataclasses.replace(statistics.shape, rope=None))
    metadata = {
        "format": _FORMAT,
        "shape": json.dumps(facts),
        "rope": repr(statistics.shape.rope),
        "about": json.dumps(statistics.about),
    }
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, scratch = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    os.close(handle)
    try:
        save_file(arrays, scratch, metadata=metadata)
        os.chmod(scratch, 0o644)
        os.replace(scratch, target)
    except BaseException:
        os.unlink(scratch)
        raise


def load_statistics(path: str | Path, shape: ModelShape) -> Statistics:
    """Reads statistics and checks that they belong to a model.

    Args:
      path: a file that `python -m kvjax.calibrate` wrote, or one that TriAttention's authors publish (`.pt`).
      shape: the model's `cache_shape`.

    Raises:
      UserError: the file is missing, no statistics file or of another format, or they belong to another model.
    """
    found = Path(path)
    if not found.is_file():
        raise UserError(
            f"There is no statistics file '{path}': write it with python -m kvjax.calibrate --output={path}."
        )
    if found.suffix == ".pt":
        return load_triattention(found, shape)
    try:
        with safe_open(found, framework="numpy") as file:
            metadata = file.metadata() or {}
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no mapping)
    except SafetensorError as error:
        raise UserError(
            f"{found} is not a safetensors file ({error}); python -m kvjax.calibrate writes statistics."
        ) from error
    written = metadata.get("format", "")
    if not written.startswith(_FORMATS):
        raise UserError(f"{found} holds no statistics of ours; python -m kvjax.calibrate writes them.")
    if written != _FORMAT:
        raise UserError(
            f"The format of {found} is '{written}'; this version reads '{_FORMAT}'. Write the statistics again with "
            f"python -m kvjax.calibrate --output={found}."
        )
    theirs = ModelShape(**{**json.loads(metadata["shape"]), "rope": shape.rope})
    Statistics((), theirs, source=str(found)).check(shape)
    if metadata["rope"] != repr(shape.rope):
        raise UserError(
            f"The statistics {found} belong to another model: their rope is {metadata['rope']}, the model's is "
            f"{shape.rope}. Write the model's own with python -m kvjax.calibrate."
        )
    heads = arrays["layers.0.keys.second"].shape[1] // shape.head_size
    with jax.ensure_compile_time_eval():
        templates = jax.eval_shape(lambda: empty_statistics(shape, heads=heads))
    layers = []
    for index, template in enumerate(templates):
        leaves = [
            arrays[f"layers.{index}." + ".".join(str(getattr(key, "name", key)) for key in key_path)]
            for key_path, _ in jax.tree_util.tree_leaves_with_path(template)
        ]
        layers.append(jax.tree.unflatten(jax.tree.structure(template), leaves))
    return Statistics(tuple(layers), theirs, source=str(found), about=json.loads(metadata["about"]))
