import math

import pytest

from train.schedule import ScheduleConfig, ScheduleKind, lr_scale


def curve(steps: int = 100, **settings: object) -> list[float]:
    cfg = ScheduleConfig(**settings)  # type: ignore[arg-type]
    return [lr_scale(cfg, step, steps) for step in range(steps)]


def test_warm_up_is_linear_and_reaches_one() -> None:
    assert curve(warmup_steps=4, kind=ScheduleKind.constant)[:6] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]


def test_cosine_closed_form() -> None:
    values = curve(kind=ScheduleKind.cosine, warmup_steps=10, min_lr_ratio=0.1)
    assert values[10] == 1.0
    assert values[55] == pytest.approx(0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * 45 / 90)))
    assert values[99] == pytest.approx(0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * 89 / 90)))


def test_wsd_is_flat_then_linear() -> None:
    values = curve(kind=ScheduleKind.wsd, warmup_steps=0, decay_fraction=0.2)
    assert values[:81] == [1.0] * 81
    assert values[90] == pytest.approx(0.5)
    assert values[99] == pytest.approx(0.05)


def test_step_decay_is_the_papers() -> None:
    values = curve(kind=ScheduleKind.step_decay, warmup_steps=0)
    assert (values[79], values[80], values[90]) == pytest.approx((1.0, 0.316, 0.316**2))


@pytest.mark.parametrize(
    ("setting", "value"),
    [("warmup_steps", -1), ("min_lr_ratio", 1.5), ("decay_fraction", -0.1), ("milestones", [0.9, 0.8])],
)
def test_bad_values_are_named(setting: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"schedule.{setting}"):
        ScheduleConfig(**{setting: value})  # type: ignore[arg-type]
