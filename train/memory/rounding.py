"""fp32 -> bf16 by stochastic rounding, with random bits that are a function of what they round.

The generator is SplitMix64 (Steele, Lea and Flood 2014, "Fast splittable pseudorandom number generators"): output n of
the seed s is mix(s + n * gamma) modulo 2^64. Nothing is carried from one number to the next, so threads, order and a
resumed run cannot change a bit.
"""

import torch
from torch import Tensor

from models.initialize import seed_from_name

_MASK = 2**64 - 1
_GAMMA = 0x9E3779B97F4A7C15
_FACTORS = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)


def stochastic_round(values: Tensor, seed: int, layer: int, rows: Tensor, step: Tensor) -> Tensor:
    """Rounds to one of the two neighbours in bf16, the nearer one more often: the mean of many draws is the value.

    A bf16 number is the upper half of an fp32 number: 16 random bits are added to the lower half, which is then cut.
    Keys are nested, mix(mix(mix(seed of the layer) xor row) xor step), and element j of a row takes bits
    16 (j mod 4) and up of output j // 4 of that key.

    Args:
        values: (u, M) fp32, finite.
        seed: of the run.
        layer: the table's.
        rows: (u,) int64, ids in the whole table, wherever this part of it lies.
        step: (u,) updates that each row has had, this one included.

    Returns:
        (u, M) bf16.
    """
    key = _mix(torch.full_like(rows, _signed(seed_from_name(seed, f"memory.{layer}.rounding"))))
    key = _mix(_mix(key ^ rows) ^ step)  # (u,)
    width = values.shape[1]
    counters = torch.arange(1, -(-width // 4) + 1, device=values.device) * _signed(_GAMMA)
    words = _mix(key[:, None] + counters)  # (u, ceil(M / 4)) of 64 bits
    bits = words.view(torch.int16)[:, :width].to(torch.int32) & 0xFFFF  # (u, M)
    rounded = (values.contiguous().view(torch.int32) + bits) & -0x10000
    return rounded.view(torch.float32).bfloat16()


def _mix(z: Tensor) -> Tensor:
    """SplitMix64's output function on int64, whose products wrap modulo 2^64."""
    z = (z ^ _shift(z, 30)) * _signed(_FACTORS[0])
    z = (z ^ _shift(z, 27)) * _signed(_FACTORS[1])
    return z ^ _shift(z, 31)


def _shift(z: Tensor, bits: int) -> Tensor:
    """Logical shift to the right: torch's keeps the sign."""
    return (z >> bits) & (_MASK >> bits)


def _signed(value: int) -> int:
    """The same 64 bits as a signed number."""
    return value - 2**64 if value >= 2**63 else value
