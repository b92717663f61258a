"""The body of `mosaic_codes`: one block of slots of some heads.

Queries Q and weights enter the integer matrix unit as two planes of bytes, 16 and 15 bits; products are exact integers.

    scores   x[q, s] = (Q[q] . code[s] + before[q]) a[s] + lift[s]     a: scale of the key; lift: log2 of the value's
    weights  w[q, s] = 2^(x - largest x of the block)                  so w holds the value's scale already
    output   sum_s w[q, s] code[s]          sum of weights   sum_s w[q, s] / scale[s]

Codes are never widened one by one. A byte of n codes holds tokens n i, n i + 1, ...: masks cut out one field of every
byte, so the tokens of a block come in n classes, each of as many lanes as there are rows of bytes. What belongs to
tokens (scales, which of them count) is brought into this order once for all heads, a head on each sublane. A slot that
no query sees has a = 0 and lift = -1e30, so neither NaN in its scale nor its codes matter.

    byte         d c b a                     fields of 2 bits, a is token 4 i
    keys         c b a, b a, a               cut off at the top: differences of scores take the rest apart
    values       a000, b000, c000, d000      moved to the top, where a byte's sign is the code's
    tables       000a, 000b, 000c, 000d      places in a tile of 32 levels, which one instruction looks up

Weights are rounded to 1/32512 of the block's largest after a dither was added: a thousand weights of a thousandth of a
step each would otherwise be none at all beside a large one. A rounded weight, as it stands in the low bits of a float,
is its own bytes: the matrix unit takes the words of [Q, 128] as [4 Q, 128] bytes, and rows 4 q and 4 q + 1 of the
product are the weight's two planes. Row 4 q + 2 is made 1 everywhere, and gives what a signed low byte lacks.

Heads go through three stages in a pipeline: while one's scores are made, the weights of the one before it are, and what
the one before that gave is merged. Stages are handed over in scratch memory, so a turn of the loop over heads has three
independent strands to fill its units with, and no more of them than its registers hold.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from kernels_pallas._tpu import LANES, MASKED, beside, in_each_byte, of_half, picked
from kernels_pallas.decode_attention.mosaic_plan import Plan, classes

_STEPS = 127 * 256  # of the largest weight
_TO_INTEGER = 1.5 * 2**23  # added to a float, it leaves the rounded number in its low bits
_FLIP = 0x00410080  # of a rounded weight's word: low byte minus 128, third byte 1
_TINIEST = 1  # the least scale of a value that counts, as bits of a float16


@dataclasses.dataclass
class _Refs:
    """What a step reads and writes; leading axes of length 1 are kept."""

    unit: Any  # 1 heads 128
    queries: Any  # 1 heads/beside rows D
    sums: Any  # 1 heads Q 128
    bias: Any  # 1 heads Q 128
    query_positions: Any  # 1 Q 128
    positions: Any  # 1 #heads S
    keys: Any  # 1 heads bytes D
    key_scale: Any  # 1 heads S
    values: Any  # 1 heads bytes V
    value_scale: Any  # 1 heads S
    key_table: Any  # 32 128
    value_table: Any  # 32 128
    dither: Any  # tiles 8 128
    output: Any  # 1 heads Q V
    maximum: Any  # 1 heads Q 128
    total: Any  # 1 heads Q 128
    a: Any  # tiles heads 128, and so on: by class, then by tile
    lift: Any
    inverse: Any
    slot_positions: Any
    scores: Any  # heads tiles Q 128, and so on: from stage to stage
    largest: Any  # heads Q 128
    weights: Any  # heads Q 128
    totals: Any  # heads Q 128
    products: Any  # heads V/128, 4 Q 128


def kernel(live: jax.Ref, newest: jax.Ref, *given: jax.Ref, plan: Plan, groups: int) -> None:
    """One step.

    Args:
      live: blocks of each sequence that hold a slot which a query sees.
      newest: position of each sequence's newest query.
      given: what `_Refs` names.
      plan: what it is written for.
      groups: steps of a sequence.
    """
    names = [field.name for field in dataclasses.fields(_Refs)]
    missing = ["bias"] * (not plan.biased) + ["query_positions", "slot_positions"] * plan.one_position
    missing += ["key_table"] * (plan.key_levels is None) + ["value_table"] * (plan.value_levels is None)
    there = [name for name in names if name not in missing]
    refs = _Refs(**dict.fromkeys(missing), **dict(zip(there, given, strict=True)))
    block, sequence = pl.program_id(1), jax.lax.div(pl.program_id(0), groups)

    @pl.when(block == 0)
    def _() -> None:
        refs.output[...] = jnp.zeros_like(refs.output)
        refs.maximum[...] = jnp.full_like(refs.maximum, MASKED / 10)
        refs.total[...] = jnp.zeros_like(refs.total)

    @pl.when(block < live[sequence])
    def _() -> None:
        _bring_tokens(block, newest[sequence], refs, plan)
        _add_block(newest[sequence], refs, plan)


def _bring_tokens(block: jax.Array, newest: jax.Array, refs: _Refs, plan: Plan) -> None:
    """Puts what belongs to tokens into the orders of scores and weights, heads on sublanes."""
    shape = (plan.heads, LANES)
    of_keys, of_values = classes(plan.key_bits), classes(plan.value_bits)
    for first in range(0, plan.tiles, of_values):
        tiles = range(first, first + of_values)
        visible = [_visible(tile, block, newest, refs, plan) for tile in tiles]
        words = [jnp.where(seen, _scales(tile, refs), 0) for seen, tile in zip(visible, tiles, strict=True)]
        places = []
        if not plan.one_position:
            places = [
                jnp.where(seen, jnp.broadcast_to(refs.positions[0, :, _slots(tile)], shape), -1)
                for seen, tile in zip(visible, tiles, strict=True)
            ]
        for part in range(0, of_values, of_keys):
            own = _by_class(words[part : part + of_keys])
            own_places = [] if plan.one_position else _by_class(places[part : part + of_keys])
            for index, word in enumerate(own):
                at = (index * plan.tiles + first + part) // of_keys
                step = 2.0 ** (-plan.key_bits * index) if plan.key_levels is None else plan.key_step
                refs.a[at] = of_half((word >> 3) & (0x7FFF << 13)) * (refs.unit[0] * step)
                refs.lift[at] = _lift(word)
                if not plan.one_position:
                    refs.slot_positions[at] = own_places[index]
                if of_keys == of_values:
                    refs.inverse[at] = _inverse(refs.lift[at])
        for index, word in enumerate(_by_class(words) if of_keys != of_values else []):
            refs.inverse[(index * plan.tiles + first) // of_values] = _inverse(_lift(word))


def _slots(tile: int) -> Any:
    return pl.ds(tile * LANES, LANES)


def _visible(tile: int, block: jax.Array, newest: jax.Array, refs: _Refs, plan: Plan) -> jax.Array:
    """Which slots some query sees, `heads 128`."""
    positions = refs.positions[0, :, _slots(tile)]
    # As unsigned numbers empty slots (-1) are behind every query.
    visible = jax.lax.bitcast_convert_type(positions, jnp.uint32) <= newest.astype(jnp.uint32)
    if plan.num_slots % plan.slots:
        left = plan.num_slots - block * plan.slots - tile * LANES
        visible &= jax.lax.broadcasted_iota(jnp.int32, positions.shape, 1) < left
    return jnp.broadcast_to(visible, (plan.heads, LANES))


def _scales(tile: int, refs: _Refs) -> Int[Array, "heads 128"]:
    """The bits of two float16 that are not negative in a word: the key's above the value's, which is not 0."""
    key, value = (ref[0, :, _slots(tile)].astype(jnp.int32) for ref in (refs.key_scale, refs.value_scale))
    return (key << 16) | jnp.maximum(value, _TINIEST)


def _lift(word: Int[Array, "heads 128"]) -> Float[Array, "heads 128"]:
    """The logarithm of the value's scale; far below all where the slot does not count."""
    value = word & 0xFFFF
    return jnp.where(value > 0, jnp.log2(of_half(value << 13)), MASKED)


def _inverse(lift: Float[Array, "heads 128"]) -> Float[Array, "heads 128"]:
    """1 / the value's scale, as exactly as `lift` has it; finite where a slot does not count, and its weight 0."""
    return jnp.minimum(jnp.exp2(-lift), 2.0**24)  # of the least float16


def _by_class(pieces: list[jax.Array]) -> list[jax.Array]:
    """Of n tiles of tokens a tile for each class: lanes i, i + n, i + 2 n, ... of the tiles beside each other.

    Each tile is gathered from once. Its classes come to lie in a row that starts at a place of the tile's own, so what
    a class has in different tiles lies apart: it is picked from them as it lies, and then moved together.
    """
    count = len(pieces)
    if count == 1:
        return pieces
    if pieces[0].shape[0] == 1:  # one row is not gathered from
        return [found[:1] for found in _by_class([jnp.broadcast_to(piece, (8, LANES)) for piece in pieces])]
    width = LANES // count
    lane = jax.lax.broadcasted_iota(jnp.int32, pieces[0].shape, 1)
    place, within = lane >> (width.bit_length() - 1), lane & (width - 1)
    gathered = []
    for number, piece in enumerate(pieces):
        index = within * count + ((place - number) & (count - 1))
        gathered.append(picked(piece, index, 1))
    classes_of = []
    for index in range(count):
        found = gathered[0]
        for number in range(1, count):
            found = jnp.where(place == (number + index) % count, gathered[number], found)
        classes_of.append(pltpu.roll(found, LANES - index * width, 1) if index else found)
    return classes_of


def _every(pieces: list[jax.Array], first: int, lane: jax.Array) -> jax.Array:
    """Lanes `first`, `first` + n, first + 2 n, ... of n pieces beside each other."""
    count = len(pieces)
    if count == 1:
        return pieces[0]
    index = (lane * count + first) & (LANES - 1)
    found = None
    for number, piece in enumerate(pieces):
        taken = picked(piece, index, 1)
        found = taken if found is None else jnp.where(lane >= number * (LANES // count), taken, found)
    return found


def _add_block(newest: jax.Array, refs: _Refs, plan: Plan) -> None:
    """Adds the block to the rows of all heads, those that share passes through the matrix unit together."""
    count = plan.heads // plan.beside
    # What comes first in the program comes first in the schedule where all else is equal.
    stages = [(2, _merge_heads), (1, _weigh_heads), (0, _score_heads)]
    if plan.beside == 1:
        stages = stages[::-1]

    def turn(number: int | jax.Array) -> None:
        for behind, stage in stages:
            if not isinstance(number, int) or 0 <= number - behind < count:
                stage(number - behind, refs, plan)

    def apart(number: int) -> None:
        """A turn in a branch that is always taken: the schedule does not mix it with what is before."""
        pl.when(newest >= -1)(lambda: turn(number))

    turn(0)
    if count > 1:
        (apart if plan.value_bits == 2 else turn)(1)  # where the schedule would run out of registers
    # Of three heads the first has the loop's own number: addresses behind it would not be told apart from it.
    jax.lax.fori_loop(0, plan.trips, lambda number, _: turn(number + 2), None)
    turn(count)
    apart(count + 1)


def _heads(at: int | jax.Array, plan: Plan) -> list[Any]:
    """Those that share a pass through the matrix unit."""
    return [at * plan.beside + one for one in range(plan.beside)]


def _score_heads(at: int | jax.Array, refs: _Refs, plan: Plan) -> None:
    """First stage: scores of a block, and the largest of each row."""
    heads = _heads(at, plan)
    largest: list[Any] = [None] * len(heads)
    for start in range(0, plan.slots // classes(plan.key_bits), plan.chunk):
        _score(at, start, largest, refs, plan)
    for head, one in zip(heads, largest, strict=True):
        most = jnp.maximum(jnp.max(one, axis=1, keepdims=True), MASKED / 10)
        refs.largest[head] = jnp.broadcast_to(most, (plan.rows, LANES))


def _weigh_heads(at: int | jax.Array, refs: _Refs, plan: Plan) -> None:
    """Second stage: weights, and what they and their products with values add up to."""
    heads = _heads(at, plan)
    maxima, sums = [refs.largest[head] for head in heads], _Sums.of(len(heads))
    for start in range(0, plan.slots // classes(plan.value_bits), plan.chunk):
        _weigh(heads, start, maxima, sums, refs, plan)
    for one, head in enumerate(heads):
        refs.totals[head] = sums.total[one]
        if plan.value_shift:
            refs.weights[head] = sums.weights[one]
        for part, start in enumerate(range(0, plan.value_width, LANES)):
            lanes = min(LANES, plan.value_width - start)
            refs.products[head, part, :, :lanes] = sums.products[one][:, start : start + lanes]


def _merge_heads(at: int | jax.Array, refs: _Refs, plan: Plan) -> None:
    """Third stage."""
    for head in _heads(at, plan):
        _merge(head, refs, plan)


@dataclasses.dataclass
class _Sums:
    """Of the weights of a block, each a list of heads: lanes are added up at the end."""

    weights: list[Any]  # with the scales of values
    total: list[Any]  # without
    products: list[Any]

    @classmethod
    def of(cls, heads: int) -> "_Sums":
        """Nothing yet."""
        return cls([None] * heads, [None] * heads, [None] * heads)


def _add(sums: list[Any], index: int, new: jax.Array) -> None:
    sums[index] = new if sums[index] is None else sums[index] + new


def _tiles(start: int, index: int, bits: int, plan: Plan) -> list[int]:
    """Tiles of one class that a chunk of byte rows holds."""
    first = index * plan.tiles // classes(bits) + start // LANES
    return list(range(first, first + plan.chunk // LANES))


def _words(codes: jax.Ref, head: Any, start: int, plan: Plan) -> jax.Array:
    """Rows of bytes of a head, four to a word."""
    return pltpu.bitcast(codes[0, head, pl.ds(start, plan.chunk)], jnp.int32)


def _signs(bits: int, count: int) -> int:
    """The sign bits of the first fields of each byte, as a word."""
    return in_each_byte(sum(1 << (bits * index + bits - 1) for index in range(count)))


def _score(at: int | jax.Array, start: int, largest: list[Any], refs: _Refs, plan: Plan) -> None:
    """Scores of a chunk into `refs.scores`; the largest of each row and lane into `largest`."""
    bits, count, rows = plan.key_bits, classes(plan.key_bits), plan.rows
    heads, queries = _heads(at, plan), refs.queries[0, at]
    table, below = plan.key_levels is not None, None
    for index in range(count):
        last = index == count - 1
        codes = [_key_codes(head, start, index, refs, plan) for head in heads]
        across = (((1,), (1,)), ((), ()))
        planes = jax.lax.dot_general(queries, beside(codes, 1), across, preferred_element_type=jnp.int32)
        cut = [planes[2 * rows * one : 2 * rows * (one + 1)] for one in range(len(heads))]
        upto = [(one[:rows] << 8) + one[rows:] for one in cut]
        field = upto if below is None or table else [one - other for one, other in zip(upto, below, strict=True)]
        below = upto
        shift = 0.0 if table else (plan.key_shift - (0 if last else 1 << (bits - 1))) * 2.0 ** (bits * index)
        for one, head in enumerate(heads):
            before = refs.sums[0, head] * shift if shift else None
            products = field[one].astype(jnp.float32)
            for number, tile in enumerate(_tiles(start, index, bits, plan)):
                found = products[:, number * LANES : (number + 1) * LANES]
                found = _finish_scores(found if before is None else found + before, head, tile, refs, plan)
                refs.scores[head, tile] = found
                largest[one] = found if largest[one] is None else jnp.maximum(largest[one], found)


def _key_codes(head: Any, start: int, index: int, refs: _Refs, plan: Plan) -> Int[Array, "_ D"]:
    """One class of a chunk's codes: levels of the table, or all fields up to it, each but the top one 0 at least."""
    bits, count = plan.key_bits, classes(plan.key_bits)
    if count == 1:
        return refs.keys[0, head, pl.ds(start, plan.chunk)]
    words = _words(refs.keys, head, start, plan)
    if plan.key_levels is not None:
        return _look_up(words, index, bits, refs.key_table)
    # Two's complement as it is at the top of a byte; below, 2**(bits-1) more, so that no field borrows.
    words = words ^ _signs(bits, count - 1)
    return pltpu.bitcast(words if index == count - 1 else words & in_each_byte((1 << bits * (index + 1)) - 1), jnp.int8)


def _value_codes(head: Any, start: int, index: int, refs: _Refs, plan: Plan) -> Int[Array, "_ V"]:
    """One class of a chunk's codes: levels of the table, or the field at the top of its byte."""
    bits, count = plan.value_bits, classes(plan.value_bits)
    if count == 1:
        return refs.values[0, head, pl.ds(start, plan.chunk)]
    words = _words(refs.values, head, start, plan)
    if plan.value_levels is not None:
        return _look_up(words, index, bits, refs.value_table)
    words = words if index == count - 1 else words << (8 - bits * (index + 1))
    return pltpu.bitcast(words & in_each_byte(((1 << bits) - 1) << (8 - bits)), jnp.int8)


def _look_up(words: Int[Array, "_ D"], index: int, bits: int, table: jax.Ref) -> Int[Array, "_ D"]:
    """Levels of the fields of one class: a tile of bytes is permuted by a tile of bytes."""
    flipped = words ^ _signs(bits, classes(bits))
    places = pltpu.bitcast((flipped >> (bits * index)) & in_each_byte((1 << bits) - 1), jnp.int8)
    levels = table[...]

    def tile(row: int, lane: int) -> jax.Array:
        found = places[row : row + 32, lane : lane + LANES]
        return picked(levels, found, 0)

    lanes = range(0, places.shape[1], LANES)
    return beside([beside([tile(row, lane) for lane in lanes], 1) for row in range(0, places.shape[0], 32)], 0)


def _finish_scores(products: jax.Array, head: Any, tile: int, refs: _Refs, plan: Plan) -> jax.Array:
    """Scores in units of ln 2, the value's scale in them, from integers."""
    scores = products * _row(refs.a, tile, head, plan) + _row(refs.lift, tile, head, plan)
    if plan.biased:
        scores = scores + refs.bias[0, head]
    if not plan.one_position:
        # As unsigned numbers empty slots (-1) are behind every query, and nothing is before padding (-1 + 1).
        ahead = jax.lax.bitcast_convert_type(refs.query_positions[0] + 1, jnp.uint32)
        positions = jax.lax.bitcast_convert_type(_row(refs.slot_positions, tile, head, plan), jnp.uint32)
        scores = jnp.where(positions < ahead, scores, MASKED)
    return scores


def _row(ref: jax.Ref, tile: int, head: Any, plan: Plan) -> jax.Array:
    """What belongs to the tokens of a head, for each row."""
    return jnp.broadcast_to(ref[tile, pl.ds(head, 1)], (plan.rows, LANES))


def _weigh(heads: list[Any], start: int, maxima: list[jax.Array], sums: _Sums, refs: _Refs, plan: Plan) -> None:
    """Weights of a chunk times its values, added to `sums`."""
    for index in range(classes(plan.value_bits)):
        planes, codes = [], []
        for one, head in enumerate(heads):
            tiles = _tiles(start, index, plan.value_bits, plan)
            planes.append(beside([_weights(head, tile, one, maxima[one], sums, refs, plan) for tile in tiles], 1))
            codes.append(_value_codes(head, start, index, refs, plan))
        products = jnp.dot(beside(planes, 0), beside(codes, 1), preferred_element_type=jnp.int32)
        rows, width = 4 * plan.rows, plan.value_width
        for one in range(len(heads)):
            own = products[rows * one : rows * (one + 1), width * one : width * (one + 1)]
            _add(sums.products, one, own)


def _weights(
    head: Any, tile: int, one: int, maximum: jax.Array, sums: _Sums, refs: _Refs, plan: Plan
) -> Int[Array, "_ 128"]:
    """A tile of a head's weights as bytes, four rows for one."""
    scores = _scores_of(head, tile, refs, plan)
    weights = jnp.exp2(scores - (maximum - math.log2(_STEPS)))
    _add(sums.total, one, weights * _row(refs.inverse, tile, head, plan))
    if plan.value_shift:
        _add(sums.weights, one, weights)
    dither = beside([refs.dither[tile % refs.dither.shape[0]]] * (plan.rows // 8), 0)
    words = jax.lax.bitcast_convert_type(weights + dither + _TO_INTEGER, jnp.int32) ^ _FLIP
    return pltpu.bitcast(words, jnp.int8)


def _scores_of(head: Any, tile: int, refs: _Refs, plan: Plan) -> jax.Array:
    """A tile of scores in the order of values, whose bytes may hold more codes than those of keys."""
    scores, count = refs.scores, classes(plan.key_bits)
    ratio = classes(plan.value_bits) // count
    if ratio == 1:
        return scores[head, tile]
    of_class = plan.tiles // classes(plan.value_bits)
    index, number = divmod(tile, of_class)  # tokens n i + index; of keys, class index % n and every ratio-th of it
    first = index % count * (plan.tiles // count) + number * ratio
    lane = jax.lax.broadcasted_iota(jnp.int32, (plan.rows, LANES), 1)
    return _every([scores[head, first + piece] for piece in range(ratio)], index // count, lane)


def _merge(head: Any, refs: _Refs, plan: Plan) -> None:
    """Adds what a block gave to what the blocks before it gave."""
    old, maximum = refs.maximum[0, head], refs.largest[head]
    new = jnp.maximum(old, maximum)
    decay, share = jnp.exp2(old - new), jnp.exp2(maximum - new) * (1.0 / _STEPS)
    refs.maximum[0, head] = new
    refs.total[0, head] = refs.total[0, head] * decay + jnp.sum(refs.totals[head], axis=1, keepdims=True) * share
    shift = 0.0
    if plan.value_shift:
        shift = jnp.sum(refs.weights[head], axis=1, keepdims=True) * plan.value_shift
    width = plan.value_width
    for part, start in enumerate(range(0, width, LANES)):
        lanes = min(LANES, width - start)
        low, high, signs = (_every_fourth(refs.products, head, part, row, plan) for row in range(3))
        step = 2.0 ** (plan.value_bits - 8) if plan.value_levels is None else plan.value_step
        added = (high * 256.0 + low + signs * 128.0) * step + shift
        before = refs.output[0, head, :, start : start + lanes]
        refs.output[0, head, :, start : start + lanes] = before * decay[:, :lanes] + (added * share)[:, :lanes]


def _every_fourth(ref: jax.Ref, head: Any, part: int, first: int, plan: Plan) -> Float[Array, "Q 128"]:
    """Rows `first`, `first` + 4, ... of products."""
    rows = ref[pl.ds(head, 1), pl.ds(part, 1), pl.ds(first, plan.rows, stride=4), :]
    return rows.reshape(plan.rows, LANES).astype(jnp.float32)
