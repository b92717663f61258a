"""Reads RoPE from a `config.json`: `rope_parameters` of transformers 5, `rope_theta` and `rope_scaling` of 4."""

from collections.abc import Mapping
from typing import Any

from kvjax.errors import UserError, unknown
from kvjax.rope import Llama3Scaling, Rope, YarnScaling

_YARN_OPTIONS = {
    "beta_fast": "beta_fast",
    "beta_slow": "beta_slow",
    "attention_factor": "given_attention_factor",
    "mscale": "mscale",
    "mscale_all_dim": "mscale_all_dim",
}


def parse_rope(fields: Mapping[str, Any], *, head_size: int, max_positions: int, source: str) -> Rope:
    """The rotation of a model.

    Args:
      fields: of the `config.json`, the family's assumed values among them.
      head_size: D.
      max_positions: tokens of context, the original ones where the file does not say.
      source: the file, for messages.

    Raises:
      UserError: the type is unknown, or a parameter is missing, unknown, or no fitting number.
    """
    reader = _Reader(_parameters(fields, source), source)
    theta = reader.number("rope_theta", default=fields.get("rope_theta") or 10_000.0)
    kind = reader.kind()
    if reader.number("partial_rotary_factor", default=1.0) != 1.0:
        raise UserError(f"{source}: a partial_rotary_factor other than 1 is not supported.")
    original = reader.number("original_max_position_embeddings", default=max_positions)
    scaling = _READERS[kind](reader, int(original), max_positions)
    reader.finish()
    return Rope(head_size=head_size, theta=theta, scaling=scaling)


def _parameters(fields: Mapping[str, Any], source: str) -> dict[str, Any]:
    """The dict of parameters, under either name."""
    found = {name: fields[name] for name in ("rope_parameters", "rope_scaling") if fields.get(name)}
    for name, value in found.items():
        if not isinstance(value, Mapping):
            raise UserError(f"{source}: {name} is {value!r}; an object was expected.")
    if len(found) == 2 and dict(found["rope_parameters"]) != dict(found["rope_scaling"]):
        raise UserError(f"{source}: rope_parameters and rope_scaling differ; keep the one that is meant.")
    return dict(next(iter(found.values()), {}))


class _Reader:
    """Takes parameters out of a dict one by one, checks them, and refuses what is left."""

    def __init__(self, parameters: dict[str, Any], source: str):
        self._left, self._source = parameters, source
        self._kind = "default"

    def kind(self) -> str:
        """The RoPE type, which old files call "type"."""
        named = [self._left.pop(key) for key in ("rope_type", "type") if key in self._left]
        if any(isinstance(value, Mapping) for value in self._left.values()):
            raise UserError(f"{self._source}: RoPE parameters per layer type are not supported.")
        self._kind = named[0] if named else "default"
        if not isinstance(self._kind, str) or self._kind not in _READERS:
            raise UserError(f"{self._source}: {unknown('rope_type', self._kind, _READERS)}")
        return self._kind

    def number(self, name: str, *, default: Any = None) -> float:
        """A positive number; without a default it must be there."""
        value = self._left.pop(name, None)
        if value is None:
            value = default
        if value is None:
            raise UserError(f"{self._source}: RoPE of type '{self._kind}' lacks the parameter '{name}'.")
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < float("inf"):
            raise UserError(
                f"{self._source}: the RoPE parameter '{name}' is {value!r}; a positive number was expected."
            )
        return float(value)

    def optional(self, name: str) -> float | None:
        """A positive number, or None where it is not given."""
        if self._left.get(name) is None:
            self._left.pop(name, None)
            return None
        return self.number(name)

    def flag(self, name: str, *, default: bool) -> bool:
        """True or false."""
        value = self._left.pop(name, default)
        if not isinstance(value, bool):
            raise UserError(f"{self._source}: the RoPE parameter '{name}' is {value!r}; true or false was expected.")
        return value

    def refuse(self, reason: str) -> UserError:
        """An error about the whole set of parameters."""
        return UserError(f"{self._source}: RoPE of type '{self._kind}': {reason}.")

    def finish(self) -> None:
        """Refuses parameters that nobody took."""
        if self._left:
            raise self.refuse(f"unknown parameters: {', '.join(sorted(self._left))}")


def _read_plain(reader: _Reader, original: int, max_positions: int) -> None:
    """Takes nothing: plain RoPE has no parameters."""
    del reader, original, max_positions


def _read_llama3(reader: _Reader, original: int, max_positions: int) -> Llama3Scaling:
    """Takes the llama3 parameters."""
    del max_positions
    names = ("factor", "low_freq_factor", "high_freq_factor")
    scaling = Llama3Scaling(original_max_positions=original, **{name: reader.number(name) for name in names})
    if scaling.low_freq_factor >= scaling.high_freq_factor:
        raise reader.refuse("low_freq_factor must be below high_freq_factor")
    return scaling


def _read_yarn(reader: _Reader, original: int, max_positions: int) -> YarnScaling:
    """Takes the YaRN parameters; a factor that is not given follows from the two context lengths."""
    given = {ours: reader.optional(name) for name, ours in _YARN_OPTIONS.items()}
    implied = max_positions / original if max_positions > original else None
    return YarnScaling(
        factor=reader.number("factor", default=implied),
        original_max_positions=original,
        truncate=reader.flag("truncate", default=True),
        **{name: value for name, value in given.items() if value is not None},
    )


_READERS = {"default": _read_plain, "llama3": _read_llama3, "yarn": _read_yarn}
