"""The plan for the screen."""

from collections.abc import Iterable

from rich.box import SIMPLE_HEAD
from rich.table import Table

from sweeps.live import duration
from sweeps.trial import Plan, Trial

COLUMNS = (
    "kind",
    "rho",
    "rho\nactual",
    "experts",
    "slots",
    "params",
    "memory",
    "params\nresidual",
    "FLOPs/\ntoken",
    "FLOPs\nresidual",
    "tokens",
    "tokens/\nparam",
    "lr",
    "seeds",
    "time\neach",
    "disk",
)


def plan_table(plan: Plan) -> Table:
    """The plan for the screen: one line for each trial shape, its seeds together."""
    title = f"sweep {plan.name}: {len(plan.trials)} trials"
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for column in COLUMNS:
        table.add_column(column, justify="left" if column == "kind" else "right", no_wrap=True)
    for same in _by_shape(plan.trials):
        trial = same[0]
        table.add_row(
            trial.kind.value,
            f"{trial.rho:g}",
            f"{trial.rho_actual:.4f}",
            str(trial.num_experts),
            f"{trial.slots:,}",
            short(trial.total_params),
            short(trial.memory_params),
            f"{trial.params_residual:+.3%}",
            short(trial.flops_per_token),
            f"{trial.flops_residual:+.3%}",
            short(trial.tokens),
            f"{trial.tokens_per_param:.3g}",
            f"x{trial.lr_scale:g}",
            ",".join(str(t.seed) for t in same),
            duration(trial.estimated_seconds),
            f"{trial.estimated_disk_bytes / 1e6:.0f} MB",
        )
    return table


def _by_shape(trials: Iterable[Trial]) -> list[list[Trial]]:
    groups: dict[tuple[str, float, float], list[Trial]] = {}
    for trial in trials:
        groups.setdefault((trial.kind.value, trial.rho, trial.lr_scale), []).append(trial)
    return list(groups.values())


def short(number: float) -> str:
    """1234567 as `1.23M`."""
    for limit, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= limit:
            return f"{number / limit:.3g}{unit}"
    return f"{number:.3g}"
