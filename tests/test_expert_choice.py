"""The choice of the expert kernel: who takes part, what is measured, and that nothing else is touched."""

from dataclasses import replace

import pytest
import torch

from models import expert_choice
from models.expert_choice import candidates, expert_kernel_seconds, fastest_expert_kernel
from models.kernels import launch
from models.moe import ExpertKernel
from tests.tiny import tiny_config

CPU, GPU = torch.device("cpu"), torch.device("cuda")


def test_candidates(monkeypatch):
    cfg = tiny_config("moe")  # widths 16 and 8
    assert set(candidates(cfg, CPU)) == {ExpertKernel.loop, ExpertKernel.padded, ExpertKernel.grouped_mm}
    monkeypatch.setattr(launch, "INTERPRETED", False)
    assert set(candidates(cfg, GPU)) == {ExpertKernel.loop, ExpertKernel.grouped_mm}
    wide = replace(cfg, moe=replace(cfg.moe, d_expert=32))
    assert set(candidates(wide, GPU)) == {ExpertKernel.loop, ExpertKernel.grouped_mm, ExpertKernel.triton}
    odd = replace(cfg, moe=replace(cfg.moe, d_expert=12))
    assert set(candidates(odd, CPU)) == {ExpertKernel.loop, ExpertKernel.padded}
    monkeypatch.setattr(launch, "INSTALLED", False)
    assert set(candidates(wide, GPU)) == {ExpertKernel.loop, ExpertKernel.grouped_mm}
    with pytest.raises(ValueError, match=r"model\.moe=null"):
        candidates(tiny_config("dense"), CPU)


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_every_candidate_is_timed_and_the_random_state_stays(precision):
    cfg = tiny_config("moe")
    before = torch.get_rng_state()
    seconds, failures = expert_kernel_seconds(cfg, CPU, 40, precision)
    assert torch.equal(torch.get_rng_state(), before)
    assert not failures and set(seconds) == set(candidates(cfg, CPU))
    assert all(0 < value < 10 for value in seconds.values())


def test_the_slow_ones_are_not_chosen(monkeypatch):
    """On a clock of our own, on which a pass of the others takes 1.5 seconds."""
    cfg, clock = tiny_config("moe"), [0.0]
    monkeypatch.setattr(expert_choice.time, "perf_counter", lambda: clock[0])
    forward = expert_choice.MoE.forward
    for fastest in candidates(cfg, CPU):

        def timed(self, x, fastest=fastest):
            clock[0] += 1.0 if self.experts.kernel is fastest else 1.5
            return forward(self, x)

        monkeypatch.setattr(expert_choice.MoE, "forward", timed)
        seconds, _ = expert_kernel_seconds(cfg, CPU, 8, torch.float32)
        assert fastest_expert_kernel(seconds) is fastest and seconds[fastest] == pytest.approx(1.0)


def test_one_slow_pass_does_not_decide(monkeypatch):
    cfg, clock, passes = tiny_config("moe"), [0.0], [0]
    monkeypatch.setattr(expert_choice.time, "perf_counter", lambda: clock[0])
    forward = expert_choice.MoE.forward

    def timed(self, x):
        passes[0] += 1
        clock[0] += 100.0 if passes[0] % (1 + expert_choice.REPEATS) in (1, 3) else 1.0  # the first and one more
        return forward(self, x)

    monkeypatch.setattr(expert_choice.MoE, "forward", timed)
    assert set(expert_kernel_seconds(cfg, CPU, 8, torch.float32).seconds.values()) == {1.0}


def test_a_candidate_that_fails_is_left_out(monkeypatch):
    """As one that runs out of memory or finds no compiler; only when none is left, choosing fails."""
    cfg, broken = tiny_config("moe"), {ExpertKernel.loop}
    forward = expert_choice.MoE.forward

    def fails(self, x):
        if self.experts.kernel in broken:
            raise torch.OutOfMemoryError("\nCUDA out of memory. Tried to allocate 2 GiB.\nMore about it")
        return forward(self, x)

    monkeypatch.setattr(expert_choice.MoE, "forward", fails)
    seconds, failures = expert_kernel_seconds(cfg, CPU, 8, torch.float32)
    assert failures == {ExpertKernel.loop: "OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB."}
    assert set(seconds) == set(candidates(cfg, CPU)) - broken
    broken.update(candidates(cfg, CPU))
    with pytest.raises(
        ValueError, match=r"expert_kernel=auto found no kernel .* 8 tokens .*loop: OutOfMemoryError.*padded"
    ):
        expert_kernel_seconds(cfg, CPU, 8, torch.float32)
