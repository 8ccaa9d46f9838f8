"""Rotary positions, and YaRN, which stretches them to sequences longer than those of the first training."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass
class YarnConfig:
    """Stretched positions (YaRN, Peng et al. 2023, arXiv 2309.00071), with the two factors of DeepSeek's code.

    Pairs that turn more than `beta` times in the original length keep their frequency, pairs that turn fewer than
    `alpha` times get 1 / `scale` of it, and the pairs between them a mixture. In Hugging Face's names: `scale` is
    factor, `alpha` beta_slow, `beta` beta_fast, `original_seq_len` original_max_position_embeddings.
    """

    scale: float  # s: by how much the longest sequence grows
    original_seq_len: int  # L: longest sequence of the training before, in positions
    alpha: float = 1.0  # turns in L; 1 and 32 are the paper's for Llama, and those of DeepSeek-V3 (2412.19437, 4.3)
    beta: float = 32.0  # turns in L
    # The attention's temperature, with m(a) = 0.1 a ln s + 1: the rotated coordinates of queries and keys are
    # multiplied by m(mscale) / m(mscale_all_dim), the scores of all coordinates by m(mscale_all_dim)^2.
    mscale: float = 1.0  # 1 and 0: the paper's sqrt(1/t) on rotated coordinates alone (3.4); 1 and 1: DeepSeek-V3
    mscale_all_dim: float = 0.0

    def __post_init__(self) -> None:
        if not 1 < self.scale < math.inf:
            raise ValueError(
                f"model.rotary.yarn.scale={self.scale} must be more than 1, or nothing is stretched, and finite; "
                "leave model.rotary.yarn null"
            )
        if not 0 < self.alpha < self.beta < math.inf:
            raise ValueError(
                f"model.rotary.yarn.alpha={self.alpha} must lie between 0 and model.rotary.yarn.beta={self.beta}; "
                "usual: 1 and 32"
            )
        shortest = math.floor(2 * math.pi * self.alpha) + 1  # the fastest pair turns once in 2 pi positions
        if self.original_seq_len < shortest:
            raise ValueError(
                f"model.rotary.yarn.original_seq_len={self.original_seq_len} is too short: in it even the fastest "
                "pair turns "
                f"fewer than model.rotary.yarn.alpha={self.alpha} times; nearest: {shortest}"
            )
        if not (0 < self.mscale < math.inf and 0 <= self.mscale_all_dim < math.inf):
            raise ValueError(
                f"model.rotary.yarn.mscale={self.mscale} must be positive and model.rotary.yarn.mscale_all_dim="
                f"{self.mscale_all_dim} not negative, both finite; usual: 1.0 and 0.0"
            )
        if self.mscale != 1 and self.mscale_all_dim == 0:
            raise ValueError(
                f"model.rotary.yarn.mscale={self.mscale} means nothing certain while "
                "model.rotary.yarn.mscale_all_dim=0.0: "
                f"DeepSeek's code takes it, transformers does not; set mscale_all_dim={self.mscale} too, or mscale=1.0"
            )

    def temperature(self, mscale: float) -> float:
        """m(a) = 0.1 a ln s + 1; with a = 1 the paper's sqrt(1/t) (3.4)."""
        return 0.1 * mscale * math.log(self.scale) + 1.0


@dataclass
class RotaryConfig:
    """How positions turn queries and keys, in every layer alike."""

    theta: float = 10_000.0  # base of the rotary wavelengths, in positions (Su et al. 2021, arXiv 2104.09864)
    yarn: YarnConfig | None = None

    def __post_init__(self) -> None:
        if not 0 < self.theta < math.inf:
            raise ValueError(f"model.rotary.theta={self.theta} must be positive and finite; usual: 10000.0")
        if self.yarn is not None and self.theta <= 1:
            raise ValueError(
                f"model.rotary.theta={self.theta} must be more than 1 with model.rotary.yarn, which takes its "
                "logarithm; "
                "usual: 10000.0"
            )


def inverse_frequencies(width: int, cfg: RotaryConfig, device: torch.device | None = None) -> Tensor:
    """Angle per position of every pair: f_i = theta^(-2i / C) (arXiv 2104.09864, eq 15), stretched where YaRN is on.

    YaRN's "NTK-by-parts" (arXiv 2309.00071, 3.2): f_i (1 - r_i + r_i / s), where r_i rises in i from 0 to 1. As in the
    released code of its authors and of DeepSeek the ramp is linear in i, and its ends are the whole numbers around the
    pairs that turn beta and alpha times in the original length.

    Args:
        width: C, coordinates that are turned; even.
        cfg: theta and YaRN.
        device: of the result.

    Returns:
        (C / 2,) fp32, radians per position.
    """
    frequencies = cfg.theta ** (-torch.arange(0, width, 2, dtype=torch.float32, device=device) / width)
    if cfg.yarn is None:
        return frequencies
    yarn = cfg.yarn

    def pair_that_turns(times: float) -> float:
        return width * math.log(yarn.original_seq_len / (2 * math.pi * times)) / (2 * math.log(cfg.theta))

    low, high = math.floor(pair_that_turns(yarn.beta)), math.ceil(pair_that_turns(yarn.alpha))
    low, high = min(max(low, 0), width - 1), min(max(high, 0), width - 1)
    steepness = 1 / (high - low) if high > low else 1e3  # a step from one pair to the next
    ramp = ((torch.arange(width // 2, dtype=torch.float32, device=device) - low) * steepness).clamp_(0, 1)
    return frequencies * (1 - ramp) + frequencies / yarn.scale * ramp


def rotary_tables(seq_len: int, width: int, cfg: RotaryConfig, device: torch.device | None = None) -> Tensor:
    """Cosines, and sines with the sign that `rotate` needs, of position * frequency; with YaRN times its factor.

    Returns:
        (2, S, C) fp32: [0] cos of the angles, twice; [1] minus sin of the angles, then sin of the angles.
    """
    frequencies = inverse_frequencies(width, cfg, device)
    angles = torch.outer(torch.arange(seq_len, dtype=torch.float32, device=device), frequencies)  # (S, C/2)
    cos, sin = angles.cos(), angles.sin()
    tables = torch.stack((torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)))
    if cfg.yarn is not None:
        tables *= cfg.yarn.temperature(cfg.yarn.mscale) / cfg.yarn.temperature(cfg.yarn.mscale_all_dim)
    return tables


def softmax_scale(width: int, cfg: RotaryConfig) -> float:
    """Factor on the scores: 1 / sqrt(C), with YaRN times m(mscale_all_dim)^2 as in DeepSeek-V3's released code.

    Args:
        width: C, all coordinates of a query or key, turned or not.
        cfg: theta and YaRN.
    """
    temperature = 1.0 if cfg.yarn is None else cfg.yarn.temperature(cfg.yarn.mscale_all_dim)
    return temperature**2 / math.sqrt(width)


class _Rotate(torch.autograd.Function):
    """x * cos + swap(x) * sin; the gradient is turned back by the same angles."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return (x * cos).addcmul_(x.roll(x.shape[-1] // 2, -1), sin)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        (grad,) = grads
        return (grad * cos).addcmul_(grad.roll(grad.shape[-1] // 2, -1), sin, value=-1), None, None


def rotate(x: Tensor, tables: Tensor) -> Tensor:
    """Turns the pair (x_i, x_{i + C/2}) of every head by its position's i-th angle.

    The halves are paired as in the released Llama checkpoints of Hugging Face, not neighbours as in the paper and in
    DeepSeek's checkpoints; the two differ by a fixed permutation of the head's coordinates: `pair_halves`.

    Args:
        x: (B, S, H, C).
        tables: (2, S, C) from `rotary_tables`.

    Returns:
        (B, S, H, C) in the type of `x`.
    """
    # Spread over the heads, the tables let each product run over whole rows of memory: on CPU 3 x faster.
    cos, sin = tables[:, :, None].to(x.dtype).expand(-1, -1, x.shape[2], -1).contiguous()  # each (S, H, C)
    return _Rotate.apply(x, cos, sin)


def pair_halves(rows: Tensor) -> Tensor:
    """Rows of a projection whose rotary pairs are neighbours, in the order that `rotate` expects.

    (x_0, x_1, x_2, x_3, ...) -> (x_0, x_2, ..., x_1, x_3, ...). Done to the rows of queries and keys alike, it changes
    no score. DeepSeek's checkpoints need it (`rope_interleave` in Hugging Face's configuration).

    Args:
        rows: (..., C, D), the C rows of one head's turned coordinates, C even.

    Returns:
        (..., C, D), a copy.
    """
    return torch.cat((rows[..., 0::2, :], rows[..., 1::2, :]), dim=-2)
