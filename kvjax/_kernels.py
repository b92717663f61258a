"""The one door to `kernels_pallas`: arrays in, arrays out."""

from jax.sharding import Mesh

from kernels_pallas._dispatch import device_of
from kernels_pallas._tpu import LIBTPU
from kernels_pallas.coded import (
    Coded,
    Parts,
    Rotated,
    alignment,
    look_up,
    pack,
    plane_bits,
    read_parts,
    slice_parts,
    unpack,
)
from kernels_pallas.decode_attention import Attended, Segment, decode_attention
from kernels_pallas.decode_attention.api import choose as choose_attention
from kernels_pallas.encode import Integers, Table
from kernels_pallas.encode import api as _encode
from kernels_pallas.encode.api import encode
from kernels_pallas.encode.reference import divide, to_scale, transform
from kernels_pallas.score import StoredKeys, score, window_mass
from kernels_pallas.score import api as _score
from kernels_pallas.select import api as _select
from kernels_pallas.select.api import select
from kernels_pallas.slots import api as _slots
from kernels_pallas.slots.api import merge_heads, put_slots, take_slots

__all__ = [
    "LIBTPU",
    "Attended",
    "Coded",
    "Integers",
    "Parts",
    "Rotated",
    "Segment",
    "StoredKeys",
    "Table",
    "alignment",
    "choose_attention",
    "decode_attention",
    "device_of",
    "divide",
    "encode",
    "implementations",
    "look_up",
    "merge_heads",
    "pack",
    "plane_bits",
    "put_slots",
    "read_parts",
    "score",
    "select",
    "slice_parts",
    "take_slots",
    "to_scale",
    "transform",
    "unpack",
    "window_mass",
]


def implementations(mesh: Mesh | None = None) -> dict[str, str]:
    """Which implementation of each operation a run uses on a mesh, attention apart, where it depends on the cache."""
    operations = {"encode": _encode, "score": _score, "select": _select, "slots": _slots}
    return {name: operation.chosen_implementation(mesh) for name, operation in operations.items()}
