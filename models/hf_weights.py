"""Names and orientations of weights: ours beside those of a Hugging Face checkpoint.

Hugging Face stores a linear map as (outputs, inputs), heads and head size in one axis; here it is inputs first, and
heads have an axis of their own. The table below is the only place that knows.
"""

import dataclasses
import math
import re

import numpy as np

_LAYER_NAMES = {
    "attention_norm.scale": "input_layernorm.weight",
    "attention.query.kernel": "self_attn.q_proj.weight",
    "attention.query.bias": "self_attn.q_proj.bias",
    "attention.key.kernel": "self_attn.k_proj.weight",
    "attention.key.bias": "self_attn.k_proj.bias",
    "attention.value.kernel": "self_attn.v_proj.weight",
    "attention.value.bias": "self_attn.v_proj.bias",
    "attention.output.kernel": "self_attn.o_proj.weight",
    "attention.output.bias": "self_attn.o_proj.bias",
    "attention.query_norm.scale": "self_attn.q_norm.weight",
    "attention.key_norm.scale": "self_attn.k_norm.weight",
    "feed_forward_norm.scale": "post_attention_layernorm.weight",
    "feed_forward.gate.kernel": "mlp.gate_proj.weight",
    "feed_forward.gate.bias": "mlp.gate_proj.bias",
    "feed_forward.up.kernel": "mlp.up_proj.weight",
    "feed_forward.up.bias": "mlp.up_proj.bias",
    "feed_forward.down.kernel": "mlp.down_proj.weight",
    "feed_forward.down.bias": "mlp.down_proj.bias",
}
_OTHER_NAMES = {"embedding": "model.embed_tokens.weight", "norm.scale": "model.norm.weight", "head": "lm_head.weight"}


@dataclasses.dataclass(frozen=True)
class Weight:
    """One parameter of ours and the tensor that holds it.

    Attributes:
      name: ours, e.g. "layers.0.attention.query.kernel".
      axes: letters of its axes, e.g. "M N D".
      shape: its shape.
    """

    name: str
    axes: str
    shape: tuple[int, ...]

    @property
    def tensor_name(self) -> str:
        """The Hugging Face name."""
        layer = re.fullmatch(r"layers\.(\d+)\.(.+)", self.name)
        if layer is None:
            return _OTHER_NAMES[self.name]
        return f"model.layers.{layer.group(1)}.{_LAYER_NAMES[layer.group(2)]}"

    @property
    def _num_inputs(self) -> int:
        """How many leading axes are inputs; 0 for what is stored as it is (embedding, norms, biases)."""
        if self.name == "head":
            return 1
        if not self.name.endswith("kernel"):
            return 0
        return 2 if self.axes == "N D M" else 1

    @property
    def tensor_shape(self) -> tuple[int, ...]:
        """The shape of the stored tensor: (outputs, inputs), heads flattened."""
        split = self._num_inputs
        if split == 0 and self.name != "embedding":
            return (math.prod(self.shape),)
        if split == 0:
            return self.shape
        return (math.prod(self.shape[split:]), math.prod(self.shape[:split]))

    def tensor_slices(self, index: tuple[slice, ...]) -> tuple[slice, ...]:
        """Which part of the stored tensor holds a part of ours.

        Args:
          index: a slice for each of our axes; the head size is never cut.
        """
        bounds = [part.indices(size)[:2] for part, size in zip(index, self.shape, strict=True)]
        split = self._num_inputs
        if split == 0 and self.name == "embedding":
            return tuple(slice(*bound) for bound in bounds)
        groups = [slice(0, None)] if split == 0 else [slice(split, None), slice(0, split)]
        return tuple(_flat_slice(bounds[group], self.shape[group]) for group in groups)

    def from_tensor(self, tensor: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        """Turns (a part of) the stored tensor into (a part of) ours of the given shape."""
        split = self._num_inputs
        if split == 0:
            return tensor.reshape(shape)
        return tensor.T.reshape(shape)

    def to_tensor(self, value: np.ndarray) -> np.ndarray:
        """Turns our parameter into the tensor that is stored, contiguous."""
        if self._num_inputs == 0:
            return np.ascontiguousarray(value.reshape(self.tensor_shape))
        return np.ascontiguousarray(value.reshape(self.tensor_shape[::-1]).T)


def _flat_slice(bounds: list[tuple[int, int]], sizes: tuple[int, ...]) -> slice:
    """The slice of flattened (heads, head size) axes, of which only the first is cut."""
    inner = math.prod(sizes[1:])
    whole = all(bound == (0, size) for bound, size in zip(bounds[1:], sizes[1:], strict=True))
    assert whole, "only the first of flattened axes can be cut"
    return slice(bounds[0][0] * inner, bounds[0][1] * inner)
