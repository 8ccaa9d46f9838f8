"""The answer in sentences, refusals included: the terminal's last lines and the top of the report."""

from __future__ import annotations

import math

from sweeps.findings import AllocationFit, Verdict
from sweeps.gains import CONTROLS, Gain
from sweeps.noise import NoiseSource


def conclude(fit: AllocationFit) -> tuple[str, ...]:
    """Where the minimum is, how sure, the gain over rho = 1, whether memory beats its controls, what remains unseen."""
    sentences = [_place(fit), _how_sure(fit), *_gain_sentences(fit), *_unseen(fit)]
    return tuple(sentence for sentence in sentences if sentence)


def _place(fit: AllocationFit) -> str:
    if fit.rho_star is not None:
        star = fit.rho_star
        edge = " The interval reaches the end of the grid, so it may go further." if fit.at_edge else ""
        return (
            f"The loss is lowest at rho = {star.estimate:.2f} (90 % interval {star.low:.2f} to {star.high:.2f}): "
            f"about {100 * star.estimate:.0f} % of the inactive parameters in experts and "
            f"{100 * (1 - star.estimate):.0f} % in Engram memory.{edge}"
        )
    low, high = fit.arms[0].rho, fit.arms[-1].rho
    lowest = min(fit.arms, key=lambda arm: arm.loss.estimate).rho
    between = f"from {low:.3g} to {high:.3g}"
    reasons = {
        Verdict.monotone_decreasing: f"the loss falls as rho grows {between} and no rise after the fall is shown, so "
        f"the best rho may be {high:.3g} itself (more experts, less memory). Lowest arm: rho = {lowest:.3g}.",
        Verdict.monotone_increasing: f"the loss rises as rho grows {between} and no fall before the rise is shown, so "
        f"the best rho may be {low:.3g} itself (more memory, fewer experts). Lowest arm: rho = {lowest:.3g}.",
        Verdict.minimum_at_edge: "the loss falls and rises, but every fitted minimum lies at an end of the grid "
        f"({between}).",
        Verdict.irregular: "the loss falls and rises by more than the noise, but not as one fall followed by one rise; "
        "a trial may have gone wrong (see the training curves).",
        Verdict.flat: f"over rho {between} the losses differ by no more than the noise explains.",
        Verdict.too_few_points: f"{len(fit.arms)} value{'s' if len(fit.arms) != 1 else ''} of rho finished; "
        "at least 5 are needed to tell an interior minimum from chance. This sweep claims nothing about rho.",
        Verdict.too_few_seeds: "there are too few paired seeds to know the noise: at least 2 seeds shared by at least "
        "5 values of rho are needed.",
    }
    return "No best rho is named: " + reasons[fit.verdict]


def _how_sure(fit: AllocationFit) -> str:
    if fit.shape is None or math.isnan(fit.noise.sigma):
        return ""
    noise = (
        f"noise of one trial within its seed {fit.noise.sigma:.4f} nats, {fit.noise.df} degrees of freedom"
        if fit.noise.source is NoiseSource.seeds
        else f"one loss per rho, so the noise, {fit.noise.sigma:.4f} nats, is read off the parabola's residuals "
        f"({fit.noise.df} degrees of freedom)"
    )
    p = fit.shape.p_interior
    if fit.verdict is not Verdict.interior_minimum:
        return f"The test for a fall followed by a rise gives p = {p:.3f} and would have to reach 0.025 ({noise})."
    forms = sorted((form for form in fit.forms if form.supported), key=lambda form: form.rho_star.estimate)
    spread = ""
    if len(forms) > 1:
        spread = (
            f" {len(forms)} of {len(fit.forms)} fitted forms are supported and put it between "
            f"{forms[0].rho_star.estimate:.2f} and {forms[-1].rho_star.estimate:.2f}; the interval covers their spread."
        )
    elif not forms:
        spread = " No fitted form passes through the points, so the interval rests on the arms' order."
    return f"A fall followed by a rise is supported, p = {p:.3g} ({noise}).{spread}"


def signed_nats(gain: Gain) -> str:
    """`0.118 nats (90 % interval 0.091 to 0.145)`."""
    interval = gain.interval
    digits = 4 if abs(interval.high - interval.low) < 0.02 else 3
    return (
        f"{interval.estimate:.{digits}f} nats (90 % interval {interval.low:.{digits}f} to {interval.high:.{digits}f})"
    )


def _gain_sentences(fit: AllocationFit) -> list[str]:
    sentences = []
    pure = next((gain for gain in fit.gains if gain.kind == "pure_moe"), None)
    if pure is not None:
        verb = "is better than" if pure.shown else "is not shown to be better than"
        if pure.interval.high < 0:
            verb = "is worse than"
        allowance = ", the choice of the best arm allowed for" if pure.simultaneous else ""
        sentences.append(
            f"The best arm, rho = {pure.arm_rho:.3g}, {verb} pure MoE (rho = 1): gain {signed_nats(pure)}, "
            f"{_pairing(fit)}{allowance}."
        )
    elif fit.arms[-1].rho != 1.0:
        sentences.append("rho = 1 has no finished trial, so there is no gain over pure MoE to report.")
    for gain in fit.gains:
        if gain.kind in CONTROLS:
            sentences.append(_control_sentence(gain))
    return sentences + _learning_rate_sentence(fit, pure)


def _pairing(fit: AllocationFit) -> str:
    return "paired by seed" if fit.noise.source is NoiseSource.seeds else "one loss per rho"


def _control_sentence(gain: Gain) -> str:
    what = CONTROLS[gain.kind]
    if gain.kind == "one_row_pure" and gain.arm_rho == gain.reference_rho:
        outcome = "helps" if gain.interval.high < 0 else "hurts" if gain.interval.low > 0 else "is not shown to matter"
        change = signed_nats(gain)
        return f"At rho = 1 the module's path alone, without memory, {outcome}: it changes the loss by {change}."
    if gain.shown:
        return f"Memory beats its control at rho = {gain.arm_rho:.3g}, {what}: gain {signed_nats(gain)}."
    outcome = "is worse than" if gain.interval.high < 0 else "is not shown to beat"
    return f"The arm at rho = {gain.arm_rho:.3g} {outcome} its control, {what}: gain {signed_nats(gain)}."


def _learning_rate_sentence(fit: AllocationFit, pure: Gain | None) -> list[str]:
    others = [gain for gain in fit.gains if gain.kind == "lr"]
    if not others or pure is None:
        return []
    flips = [gain for gain in others if gain.interval.estimate * pure.interval.estimate < 0]
    listed = "; ".join(f"x{gain.lr_scale:g}: {signed_nats(gain)} at rho = {gain.arm_rho:.3g}" for gain in others)
    if flips:
        at = ", ".join(f"x{gain.lr_scale:g}" for gain in flips)
        return [f"The sign of the gain over pure MoE FLIPS at learning rate {at}, so the gain may be tuning: {listed}."]
    return [f"The sign of the gain over pure MoE stays the same at the other learning rates ({listed})."]


def _unseen(fit: AllocationFit) -> list[str]:
    """What this sweep cannot show."""
    unseen = []
    if not any(gain.kind in CONTROLS for gain in fit.gains):
        unseen.append(
            "whether the memory itself helps: no control can be compared (it takes finished ones and two paired seeds)"
        )
    if not any(gain.kind == "lr" for gain in fit.gains):
        unseen.append("other learning rates, at which the gain may change its sign")
    if fit.noise.num_seeds < 4:
        unseen.append(f"more than {fit.noise.num_seeds} seed{'s' if fit.noise.num_seeds != 1 else ''}")
    if fit.noise.missing:
        unseen.append(f"{fit.noise.missing} missing cell{'s' if fit.noise.missing != 1 else ''} of the sweep")
    if fit.verdict is Verdict.interior_minimum and not all(form.supported for form in fit.forms):
        lost = ", ".join(form.name.value for form in fit.forms if not form.supported)
        unseen.append(f"a minimum by these forms, left out because they miss the points or leave the grid: {lost}")
    unseen.append("larger models and more tokens per parameter, where the minimum may lie elsewhere")
    unseen.append("other optimizers and learning rates of the memory rows, which move the minimum too")
    return ["Unseen: " + "; ".join(unseen) + "."]
