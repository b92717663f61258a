"""What one decode step moves in a chip's memory, beside what it cannot do without; the chips need not be there.

The step is compiled ahead of time for a slice of TPU chips, heads over all of them, with two and with four layers, and
what these differ by is taken for every further layer: compiling 36 of them takes minutes, and layers are alike. A
policy that treats layers differently is refused. `--layers=all` compiles all; for Qwen3-8B with `full` that moves 0.8 %
more, since masks of several layers are made at once.

All bytes are a chip's. `bytes` is what the step's instructions read and write in HBM (`kvjax/hlo.py`), without the
branch in which a round runs, which has a column of its own: rows that come in step have one in U steps. `ideal` is each
weight once, rows of an untied embedding apart, and each slot of a full cache once, with scales and positions.
`compiler` is XLA's own "bytes accessed" with the operands and results of kernels added, which it counts as nothing: it
has weights twice that go to VMEM ahead of their product, and a round in each step.

Statistics that a policy needs are made up: they change numbers, not bytes.
"""

import dataclasses
import importlib.util
import math
import os
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh

from kvjax._kernels import LIBTPU
from kvjax._program import Settings
from kvjax.accounting import expected_bytes
from kvjax.attention import attention_implementations
from kvjax.cache import KVCache
from kvjax.decoding import compressed_decode
from kvjax.empty import abstract_cache
from kvjax.errors import UserError, unknown
from kvjax.grammar import parse_policy, split_policies
from kvjax.hlo import Movement, movements
from kvjax.model_shape import ModelShape
from kvjax.peers import Case, parse_case
from kvjax.policy import Policy
from kvjax.progress import Progress
from kvjax.report import check_target, new_report, write_json
from kvjax.sharding import MESH_AXES
from kvjax.statistics import Statistics, empty_statistics
from models import ModelConfig, Transformer, abstract_model, published_config

MODELS = "qwen3-8b,llama-3.1-8b"
TOPOLOGIES = "v5e:2x4,v6e:2x4"
POLICIES = (
    "full;int8;int4;turboquant(bits=4);kivi(bits=2);triattention(budget=2048);snapkv(budget=2048);"
    "triattention(budget=2048)+int4"
)
CASES = "16x32768"

COLUMNS: dict[str, Callable[[dict[str, Any]], str]] = {
    "GB/step": lambda row: f"{row['bytes'] / 1e9:.2f}",
    "ideal": lambda row: f"{row['ideal'] / 1e9:.2f}",
    "ratio": lambda row: f"{row['ratio']:.3f}",
    "round": lambda row: f"{row['round'] / 1e9:.2f}",
    "compiler": lambda row: f"{row['compiler'] / 1e9:.2f}",
    "temporary": lambda row: f"{row['temporary'] / 1e9:.2f}",
    "less": lambda row: f"{row['times_less_than_first']:.2f}x",
}
"""What is shown of a row: GB, their ratio to the ideal, and how much less a step moves than the first policy's."""

_KINDS = ("v4", "v5e", "v5p", "v6e", "tpu7x")
_SHOWN = 12  # instructions that a row of the report names


@dataclasses.dataclass(frozen=True)
class Setting:
    """What all policies of a table are compiled for.

    Attributes:
      config: of the model.
      topology: name of the slice.
      mesh: of its chips.
      case: rows, and tokens that each may see.
      layers: how many are compiled, two numbers, or one, which is all.
    """

    config: ModelConfig
    topology: str
    mesh: Mesh
    case: Case
    layers: tuple[int, ...]


def bench_step(settings: Settings) -> dict[str, Any]:
    """Compiles a step of each policy for each model and topology; returns the report."""
    values = settings.flags
    configs = {name: published_config(name) for name in values["models"].value}
    policies = [parse_policy(one) for one in split_policies(_given(values, "policies", POLICIES))]
    cases = [parse_case(text) for text in _given(values, "cases", CASES.split(","))]
    layers = {name: parse_layers(values["layers"].value, config.num_layers) for name, config in configs.items()}
    names = values["topologies"].value
    for policy in policies:
        for config in configs.values():
            for case in cases:
                check_alike(policy, config.cache_shape(config.dtype), max_tokens=case.context)
    meshes = {name: slice_of(name) for name in names}
    target = values["report"].value
    if target:
        check_target(target)
    report = new_report("kvjax.bench step", config={name: values[name].value for name in values}, policy="")
    wanted = [
        (name, Setting(config=config, topology=topology, mesh=mesh, case=case, layers=layers[name]))
        for topology, mesh in meshes.items()
        for name, config in configs.items()
        for case in cases
    ]
    rows: list[dict[str, Any]] = []
    total = len(wanted) * len(policies)
    with Progress("compiling", unit="steps", total=total, quiet=values["quiet"].value) as progress:
        for name, setting in wanted:
            first = len(rows)
            for policy in policies:
                row = {"name": str(policy), "model": name, **measure_step(policy, setting)}
                row["case"] = f"{name}, {setting.topology}, {setting.case}"
                row["times_less_than_first"] = (rows[first] if len(rows) > first else row)["bytes"] / row["bytes"]
                rows.append(row)
                if target:
                    write_json(target, {**report, "rows": rows})
                progress.advance(1)
    return {**report, "rows": rows}


def _given(values: Any, name: str, default: Any) -> Any:
    """A flag that other benchmarks have another default for."""
    return values[name].value if values[name].present else default


def parse_layers(given: Sequence[str], most: int) -> tuple[int, ...]:
    """Reads "2,4" or "all", which is one number, of a model with `most` layers.

    Raises:
      UserError: they are not two numbers that ascend, or more than the model has.
    """
    if list(given) == ["all"]:
        return (most,)
    if len(given) != 2 or not all(one.isdigit() for one in given) or not 0 < int(given[0]) < int(given[1]) <= most:
        raise UserError(
            f"--layers={','.join(given)} must be 'all' or two numbers of layers, the smaller one first, such as 2,4; "
            f"the model has {most}."
        )
    return int(given[0]), int(given[1])


def slice_of(name: str) -> Mesh:
    """A mesh of a slice's chips, all of them along "model".

    Raises:
      UserError: there is no such slice, or no libtpu to compile for it.
    """
    kind, _, sizes = name.partition(":")
    if kind not in _KINDS:
        raise unknown("kind of TPU", kind, _KINDS, advice="A topology is a kind and its chips, such as v5e:2x4.")
    if not re.fullmatch(r"\d+(x\d+){1,2}", sizes):
        raise UserError(f"The topology '{name}' is not KIND:AxB or KIND:AxBxC, such as v5e:2x4.")
    if importlib.util.find_spec("libtpu") is None:
        raise UserError("libtpu, which compiles for TPUs that are not there, is missing: pip install 'kvjax[aot]'.")
    os.environ.update({key: os.environ.get(key, value) for key, value in LIBTPU.items()})
    jax.config.update("jax_platforms", "cpu")  # no chip of this machine's is touched
    try:
        chips = topologies.get_topology_desc(platform="tpu", topology_name=name).devices
    except Exception as error:  # whatever libtpu raises
        raise UserError(f"libtpu knows no topology '{name}': {str(error).strip().splitlines()[0]}") from error
    return Mesh(np.array(chips).reshape(1, -1), MESH_AXES, axis_types=(AxisType.Auto,) * 2)


def check_alike(policy: Policy, shape: ModelShape, *, max_tokens: int) -> None:
    """Raises `UserError` if a policy treats a model's layers differently: a few do not stand for all then."""
    count = shape.num_layers
    plans = {
        (policy.codecs(index, count), policy.selection_of(index, count))
        + dataclasses.astuple(policy.plan(index, shape=shape, max_tokens=max_tokens))
        for index in range(count)
    }
    if len(plans) > 1:
        raise UserError(f"The policy '{policy}' treats layers differently; kvjax.bench step takes them to be alike.")


def measure_step(policy: Policy, setting: Setting) -> dict[str, Any]:
    """A row: bytes a chip of a step of the whole model, from compilations with the setting's numbers of layers."""
    found = [_compile(policy, setting, layers) for layers in setting.layers]
    counts, told = found[-1]
    if len(found) == 2:
        counts = extrapolate(found[0][0], counts, layers=setting.layers, num_layers=setting.config.num_layers)
    return {
        "topology": setting.topology,
        "batch": setting.case.batch,
        "context": setting.case.context,
        "layers": setting.layers,
        **counts,
        "ratio": counts["bytes"] / counts["ideal"],
        "compiled": [counted for counted, _ in found],
        **told,
    }


def extrapolate(
    first: dict[str, int], second: dict[str, int], *, layers: tuple[int, ...], num_layers: int
) -> dict[str, int]:
    """Counts of a model of `num_layers` layers from those of models of two numbers of them, along a line."""
    share = (num_layers - layers[0]) / (layers[1] - layers[0])
    return {name: round(count + share * (second[name] - count)) for name, count in first.items()}


def _compile(policy: Policy, setting: Setting, layers: int) -> tuple[dict[str, int], dict[str, Any]]:
    """Counts, all in bytes a chip, and what is told beside them."""
    config = dataclasses.replace(setting.config, num_layers=layers)
    model = abstract_model(config, mesh=setting.mesh)
    placement, batch = model.placement, setting.case.batch
    sizes = {"batch": batch, "max_tokens": setting.case.context, "placement": placement}
    cache = abstract_cache(model.cache_shape, policy=policy, statistics=_made_up(model.cache_shape), **sizes)
    tokens = jax.ShapeDtypeStruct((batch, 1), jnp.int32, sharding=placement.sharding("B T", (batch, 1)))
    compiled = compressed_decode.lower(model, cache, tokens).compile()
    moved, memory = movements(compiled.as_text()), compiled.memory_analysis()
    counts = {
        **sum_up(moved),
        "ideal": ideal_bytes(model, cache),
        "compiler": round(compiled.cost_analysis().get("bytes accessed", 0)) + _moved(moved, "kernel"),
        "arguments": memory.argument_size_in_bytes,
        "temporary": memory.temp_size_in_bytes,
    }
    largest = sorted(moved, key=lambda one: -one.moved)[:_SHOWN]
    written = sorted((one for one in moved if not one.branch), key=lambda one: -one.written)[:_SHOWN]
    told = {
        "implementations": attention_implementations(cache),
        "largest": [dataclasses.asdict(one) for one in largest],
        "most_written": [dataclasses.asdict(one) for one in written if one.written],
    }
    return counts, told


def sum_up(moved: Sequence[Movement]) -> dict[str, int]:
    """What a step without a round moves (`bytes`, of them `written`, and by `kernels`), and what a round does."""
    step = [one for one in moved if not one.branch]
    return {
        "bytes": _moved(step),
        "written": sum(one.written for one in step),
        "kernels": _moved(step, "kernel"),
        "round": _moved([one for one in moved if one.branch]),
    }


def _moved(moved: Sequence[Movement], opcode: str | None = None) -> int:
    return sum(one.moved for one in moved if opcode in (None, one.opcode))


def ideal_bytes(model: Transformer, cache: KVCache) -> int:
    """Bytes a chip of the weights that a step multiplies by, and of the slots that it looks at, each once."""
    chips = model.placement.mesh.size
    rows = cache.num_seen.shape[0]
    weights = jax.tree.leaves(model)
    held = sum(map(_on_a_chip, weights))
    if model.head is not None:  # of the embedding, the rows of the tokens
        table = model.embedding.get_value()
        held -= _on_a_chip(table) - math.ceil(rows * table.shape[1] * table.dtype.itemsize / chips)
    slots = [
        (layer.exact, layer.body and (layer.body.keys, layer.body.values, layer.body.positions))
        for layer in cache.layers
    ]
    return held + expected_bytes(slots) // chips


def _on_a_chip(leaf: jax.ShapeDtypeStruct) -> int:
    return math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize


def _made_up(shape: ModelShape) -> Statistics:
    """Statistics of no model."""
    layers = jax.tree.map(
        lambda array: (
            np.ones(array.shape, np.float32) * (np.eye(array.shape[2], dtype=np.float32) if array.ndim == 3 else 1)
        ),
        empty_statistics(shape),
    )
    return Statistics(layers=layers, shape=shape, source="made up")
