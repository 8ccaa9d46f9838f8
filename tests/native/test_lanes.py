"""Numbers by lanes in C (models/native/lanes.h) against torch in fp64, in the form of this processor and in plain C."""

import ctypes
import math
import subprocess

import pytest
import torch

from models import native
from tests.tiny import relative_error

LANES = """#include "lanes.h"
void run(long n, const float *x, const bf16 *narrow_x, float *e, float *inverse, float *logs, bf16 *narrowed,
         float *copy, float *sums, float *powers, uint32_t *pairs, float *pair_sums, float *chosen) {
    for (long i = 0; i < n; i += LANES) {
        const Lanes values = load(x + i, n - i, 0.0f);
        store(e + i, n - i, exponential_of(values));
        store(inverse + i, n - i, reciprocal(values));
        store(logs + i, n - i, logarithm_of(values));
        store_bf16(narrowed + i, n - i, values);
        store(copy + i, n - i, load_bf16(narrow_x + i, n - i, 0.0f));
        if (n - i >= LANES) {
            const Lanes second = 3.0f * values;
            store(powers + i, LANES, power_of_two(values));
            store(pair_sums + i, LANES, store_pairs(pairs + i, values, second));
            store(chosen + i, LANES, where_above(values, all(1.0f), where(0x5555, values, all(-1.0f)), all(-2.0f)));
        }
        sums[0] += sum_of(values);
        sums[1] = greatest_of(greater(load(x + i, n - i, -INFINITY), all(sums[1])));
    }
}
"""


@pytest.fixture(params=[[], ["-mno-avx512bf16"]], ids=["as here", "plain C"])
def lanes(request, tmp_path):
    """What models/native/lanes.h makes of numbers, in the form of this processor and in plain C."""
    source, built = tmp_path / "lanes.c", tmp_path / "lanes.so"
    source.write_text(LANES)
    command = ["cc", *native.FLAGS, *request.param, f"-I{native.FOLDER}", str(source), "-o", str(built), "-lm"]
    subprocess.run(command, check=True)
    library = ctypes.CDLL(str(built))

    def run(x):
        """Exponentials, reciprocals, logarithms, bf16 of x, fp32 of bf16(x), [sum, greatest], and of whole vectors
        2^x, pairs (x, 3 x) in bf16, their sums, and a choice of lanes."""
        guard = torch.full((len(x) + 16,), 7.0)  # behind the last number nothing may be written
        outputs = [guard.clone(), guard.clone(), guard.clone(), guard.bfloat16(), guard.clone()]
        outputs.append(torch.tensor([0.0, -50.0]))
        outputs += [
            torch.zeros(len(x)),
            torch.zeros(len(x), dtype=torch.int32),
            torch.zeros(len(x)),
            torch.zeros(len(x)),
        ]
        arguments = [x, x.bfloat16(), *outputs]
        library.run(ctypes.c_long(len(x)), *(ctypes.c_void_p(tensor.data_ptr()) for tensor in arguments))
        assert all((output[len(x) :] == 7.0).all() for output in outputs[:5])
        return [output[: len(x)] for output in outputs[:5]] + outputs[5:]

    return run


def test_exponential_is_exact_to_fp32(lanes):
    x = torch.linspace(-86.0, 87.0, 100_001)
    assert float((lanes(x)[0].double() / x.double().exp() - 1).abs().max()) < 1.5e-7  # 2^-23 and a little


def test_exponential_of_large_and_broken_numbers(lanes):
    inf, nan = float("inf"), float("nan")
    e = lanes(torch.tensor([-inf, -200.0, -87.5, 0.0, 89.5, 1e9, inf, nan]))[0].tolist()
    assert e[:7] == [0.0, 0.0, 0.0, 1.0, inf, inf, inf] and e[7] != e[7]


def test_logarithm_is_exact_to_fp32(lanes):
    x = torch.cat((torch.logspace(-37, 37, 10_001), torch.linspace(0.5, 2.0, 10_001), torch.tensor([1.0])))
    logs, exact = lanes(x)[2].double(), x.double().log()
    assert float(((logs - exact).abs() / exact.abs().clamp_min(0.1)).max()) < 2.5e-7


@pytest.mark.parametrize("count", [1, 15, 16, 17, 100])
def test_lanes_of_any_number(lanes, count):
    x = 1.0 + 1e4 * torch.rand(count) ** 8
    _, _, _, narrowed, widened, (total, greatest), *_ = lanes(-x)
    assert greatest == -x.min().clamp(max=50.0) and relative_error(total, -x.sum()) < 1e-6
    assert torch.equal(narrowed, -x.bfloat16()) and torch.equal(widened, -x.bfloat16().float())
    inverse = lanes(x)[1]
    assert float((inverse.double() * x.double() - 1).abs().max()) < 1.5e-7


def test_power_of_two_is_exact_enough_for_bf16(lanes):
    powers = lanes(torch.linspace(-126.0, 126.0, 160_000))[6].double()
    assert float((powers / torch.linspace(-126.0, 126.0, 160_000).double().exp2() - 1).abs().max()) < 3e-7
    special = lanes(torch.tensor([-1e9, -math.inf, -126.0, 0.0, 1.0, math.nan] + [200.0] * 10))[6]
    assert special[:5].tolist() == [2.0**-126] * 3 + [1.0, 2.0] and special[5].isnan() and special[6:].isinf().all()


def test_pairs_of_rows_and_their_sums(lanes):
    x = 100 * torch.randn(64)
    pairs, sums = lanes(x)[7:9]
    halves = pairs.view(torch.bfloat16).view(-1, 2)
    assert torch.equal(halves[:, 0], x.bfloat16()) and torch.equal(halves[:, 1], (3 * x).bfloat16())
    assert relative_error(sums, halves.float().sum(1)) < 1e-6


def test_choice_of_lanes(lanes):
    x = torch.linspace(-1.0, 3.0, 32)
    x[7] = math.nan
    above, chosen = ~(x <= 1.0), lanes(x)[9]
    assert bool((chosen[~above] == -2.0).all())
    even = torch.arange(32) % 2 == 0  # of sixteen lanes; where there is one, it is the first of its own
    for i in range(32):
        expected = {float(x[i])} if even[i] else {float(x[i]), -1.0}
        assert not above[i] or float(chosen[i]) in expected or chosen[i].isnan()
