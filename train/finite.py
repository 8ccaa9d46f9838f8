"""Training ends where a number is not finite, before it reaches the weights."""

import math


class NonFiniteLossError(RuntimeError):
    """A loss or the gradient norm is not a number; raised before the step, so weights are still good."""


def check_finite(what: str, value: float) -> None:
    """Pass on finite values.

    Raises:
        NonFiniteLossError: naming `what`, its value and what usually helps.
    """
    if not math.isfinite(value):
        raise NonFiniteLossError(
            f"{what} is {value}: stopped before the weights are saved. Lower optim.lr, lengthen "
            "schedule.warmup_steps, or lower optim.grad_clip; checkpoints written before are intact"
        )
