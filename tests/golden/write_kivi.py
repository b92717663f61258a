"""Writes what the code of the authors of KIVI (arXiv 2402.02750) makes of one set of keys and values, on a CPU.

The code is `quant/new_pack.py` of github.com/jy-yuan/KIVI at commit 876b4d2d08e3b1d5f70d0969c299d8c7c42ddfb6, run
with Python 3.11, torch 2.13.0 and numpy 2.4.6. It is no package, so its folder is an argument:

    git clone https://github.com/jy-yuan/KIVI && git -C KIVI checkout 876b4d2d08e3b1d5f70d0969c299d8c7c42ddfb6
    python -m venv golden && golden/bin/pip install torch==2.13.0 numpy==2.4.6
    golden/bin/python tests/golden/write_kivi.py KIVI

B = 2 sequences, H = 2 heads, T = 128 tokens, D = 64 channels, groups of 32. `kivi.npz` holds, in float32 unless said,

    keys, values                    [B, H, T, D]       the inputs; their lowest 10 bits are zero
    keysN_codes, valuesN_codes      [B, H, T, D]       uint8, one code an element
    keysN_scale, keysN_min          [B, H, T/32, 1, D] per channel over 32 tokens
    valuesN_scale, valuesN_min      [B, H, T, D/32, 1] per token over 32 channels
    keysN_words                     [B, H, T*N/32, D]  int32, packed along tokens, first token in the lowest bits
    valuesN_words                   [B, H, T, D*N/32]  int32, packed along channels, first channel in the lowest bits
    keysN_restored, valuesN_restored [B, H, T, D]      code * scale + min

for N = 2 and 4 bits. No element is nearer than `MARGIN` of a step to the middle between two codes. A later torch may
read the indexing of `pack_tensor` and `unpack_tensor` otherwise: 2.13.0 warns of that, and still reads it as meant.
"""

import argparse
import importlib
import sys
import types
from pathlib import Path

import numpy as np
import torch

SHAPE, GROUP, MARGIN = (2, 2, 128, 64), 32, 1e-5
CUT, SEED = (1 << 10) - 1, 33
LARGE_CHANNELS = [3, 17, 40]
TARGET = Path(__file__).parent / "kivi.npz"


def authors_code(folder: Path) -> types.ModuleType:
    """`quant.new_pack` with a Triton that decorates and does nothing: the functions used here are all torch."""
    triton, language = types.ModuleType("triton"), types.ModuleType("triton.language")
    triton.jit, triton.language, language.constexpr = lambda function: function, language, int
    sys.modules.update({"triton": triton, "triton.language": language})
    sys.path.insert(0, str(folder.resolve()))
    return importlib.import_module("quant.new_pack")


def inputs(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Normal keys, a few channels ten times larger, and normal values; their low bits are cut, which compresses."""
    generator = torch.Generator().manual_seed(seed)
    keys = torch.randn(SHAPE, generator=generator)
    keys[..., LARGE_CHANNELS] *= 10
    values = torch.randn(SHAPE, generator=generator)
    return tuple((data.view(torch.int32) & ~CUT).view(torch.float32) for data in (keys, values))


def margin(grouped: torch.Tensor, scale: torch.Tensor, minimum: torch.Tensor) -> float:
    """How near, in steps, an element comes to the middle between two codes."""
    steps = (grouped.double() - minimum.double()) / scale.double()
    return float((steps - steps.floor() - 0.5).abs().min())


def quantised(code: types.ModuleType, name: str, data: torch.Tensor, bits: int) -> dict[str, np.ndarray]:
    """Every array of one input at one width."""
    if name == "keys":
        quantise, restore, axis = code.quant_and_pack_kcache, code.unpack_and_dequant_kcache, 2
    else:
        quantise, restore, axis = code.quant_and_pack_vcache, code.unpack_and_dequant_vcache, 3
    words, scale, minimum = quantise(data, GROUP, bits)
    nearest = margin(data.unflatten(axis, (-1, GROUP)), scale, minimum)
    if nearest < MARGIN:
        raise ValueError(f"{name} at {bits} bits: an element {nearest} of a step from a tie; take another SEED")
    arrays = dict(
        codes=code.unpack_tensor(words, bits, pack_dim=axis).to(torch.uint8),
        scale=scale,
        min=minimum,
        words=words,
        restored=restore(words, scale, minimum, GROUP, bits),
    )
    return {f"{name}{bits}_{key}": array.numpy() for key, array in arrays.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description="Writes kivi.npz.")
    parser.add_argument("folder", type=Path, help="a checkout of github.com/jy-yuan/KIVI")
    options = parser.parse_args()
    code = authors_code(options.folder)
    keys, values = inputs(SEED)
    arrays = dict(keys=keys.numpy(), values=values.numpy())
    for bits in (2, 4):
        arrays |= quantised(code, "keys", keys, bits)
        arrays |= quantised(code, "values", values, bits)
    np.savez_compressed(TARGET, **arrays)
    for name, array in arrays.items():
        print(name, array.shape, array.dtype)


if __name__ == "__main__":
    main()
