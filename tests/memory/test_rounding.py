"""Stochastic rounding against SplitMix64 in Python's integers, and its mean."""

import struct

import torch

from models.initialize import seed_from_name
from train.memory.rounding import stochastic_round

MASK = 2**64 - 1


class SplitMix64:
    """Steele, Lea and Flood 2014, with the state that it adds to."""

    def __init__(self, state: int) -> None:
        self.state = state

    def next(self) -> int:
        self.state = (self.state + 0x9E3779B97F4A7C15) & MASK
        return self.mix(self.state)

    @staticmethod
    def mix(z: int) -> int:
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
        return z ^ (z >> 31)


def test_the_transcription_is_splitmix64() -> None:
    """The numbers that other implementations print for this seed."""
    generator = SplitMix64(1234567)
    assert [generator.next() for _ in range(3)] == [6457827717110365317, 3203168211198807973, 9817491932198370423]


def one(value: float, seed: int, layer: int, row: int, step: int, element: int) -> float:
    mix = SplitMix64.mix
    key = mix(mix(mix(seed_from_name(seed, f"memory.{layer}.rounding")) ^ row) ^ step)
    generator = SplitMix64(key)
    for _ in range(element // 4 + 1):
        word = generator.next()
    bits = struct.unpack("<I", struct.pack("<f", value))[0] + (word >> (16 * (element % 4)) & 0xFFFF)
    return struct.unpack("<f", struct.pack("<I", bits & 0xFFFF0000))[0]


def test_equals_integers_of_python() -> None:
    values, rows = torch.randn(6, 7), torch.tensor([0, 1, 5, 2**31 + 3, 2**40, 17])
    step = torch.tensor([1, 2, 1, 9, 2**20, 3], dtype=torch.int32)
    ours = stochastic_round(values, 3, 11, rows, step)
    assert ours.dtype == torch.bfloat16
    for u in range(6):
        expected = [one(float(values[u, j]), 3, 11, int(rows[u]), int(step[u]), j) for j in range(7)]
        assert ours[u].float().tolist() == expected


def test_bits_belong_to_seed_layer_row_and_step_alone() -> None:
    values, rows = torch.randn(50, 8), torch.arange(50)
    step = torch.ones(50, dtype=torch.int32)
    whole = stochastic_round(values, 0, 1, rows, step)
    order = torch.randperm(50)
    assert torch.equal(whole[order], stochastic_round(values[order], 0, 1, rows[order], step[order]))
    assert torch.equal(whole[:9], stochastic_round(values[:9], 0, 1, rows[:9], step[:9]))
    for other in (
        stochastic_round(values, 1, 1, rows, step),
        stochastic_round(values, 0, 2, rows, step),
        stochastic_round(values, 0, 1, rows + 50, step),
        stochastic_round(values, 0, 1, rows, step + 1),
    ):
        assert not torch.equal(whole, other)


def test_result_is_a_neighbour_and_exact_values_stay() -> None:
    values = torch.randn(200, 16) * torch.logspace(-20, 20, 200)[:, None]
    rows, step = torch.arange(200), torch.ones(200, dtype=torch.int32)
    ours = stochastic_round(values, 0, 0, rows, step)
    below = (values.view(torch.int32) & -0x10000).view(torch.float32)  # towards zero
    above = ((values.view(torch.int32) & -0x10000) + 0x10000).view(torch.float32)
    assert ((ours.float() == below) | (ours.float() == above)).all()
    exact = values.bfloat16()
    assert torch.equal(stochastic_round(exact.float(), 0, 0, rows, step), exact)


def test_the_mean_of_many_draws_is_the_value() -> None:
    """Each draw is one of two numbers a gap apart, so the mean of n has a deviation of at most gap / (2 sqrt(n)).

    400 means of 65536 draws: the largest of that many normal numbers stays below 4.5 deviations (probability 0.997).
    """
    count, values = 65536, torch.linspace(-1.99, 1.99, 400)
    rows, step = torch.arange(count), torch.ones(count, dtype=torch.int32)
    total = torch.zeros(400, dtype=torch.float64)
    for start in range(0, count, 4096):
        part = slice(start, start + 4096)
        drawn = stochastic_round(values.expand(4096, 400).contiguous(), 0, 0, rows[part], step[part])
        total += drawn.double().sum(0)
    gap = 2.0 ** (torch.floor(torch.log2(values.abs().double())) - 7)
    deviations = (total / count - values.double()).abs() / (gap / (2 * count**0.5))
    assert deviations.max() < 4.5
    nearest = (values.bfloat16().double() - values.double()).abs() / (gap / (2 * count**0.5))
    assert nearest.max() > 100  # what the bound would see of rounding to the nearest
