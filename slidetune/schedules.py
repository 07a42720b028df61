"""Learning-rate schedules: the factor of the learning rate at a step. Steps count from 1, as `run` counts them.

Every schedule rises linearly over its warm-up, step / warm_up, and so stands at 1 in the warm-up's last step. A decay
then goes with its progress, the share of its steps already done: 0 in its first step, which still has the whole
learning rate, and below 1 in its last, which so is not wasted on a learning rate of 0. After the warm-up these are
transformers' factors (`transformers.optimization`).
"""

from __future__ import annotations

import math

KINDS = ("constant", "linear", "cosine", "wsd")


def factor(kind: str, step: int, total: int, *, warm_up: int = 0, decay_share: float = 0.2) -> float:
    """What the learning rate is multiplied by in step `step`, the first being 1, of `total`: from 0 to 1.

    constant: 1.
    linear:   1 - p, p being the progress of the decay (Devlin et al., https://arxiv.org/abs/1810.04805, A.2).
    cosine:   (1 + cos(pi p)) / 2 (Loshchilov and Hutter, https://arxiv.org/abs/1608.03983, equation 5, one period).
    wsd:      warm-up, stable, decay (Hu et al., https://arxiv.org/abs/2404.06395): 1, and 1 - sqrt(p) over the last
              `decay_steps` (Hägele et al., https://arxiv.org/abs/2405.18392).

    Raises ValueError for a step out of range, and for what `problems` finds.
    """
    found = problems(kind, total, warm_up=warm_up, decay_share=decay_share)
    if found or not 1 <= step <= total:
        raise ValueError(" ".join(found) or f"step must be from 1 to {total}, not {step}.")
    if step <= warm_up:
        return step / warm_up
    first = (total - decay_steps(total, decay_share) if kind == "wsd" else warm_up) + 1
    if kind == "constant" or step < first:
        return 1.0
    progress = (step - first) / (total - first + 1)
    if kind == "linear":
        return 1 - progress
    if kind == "cosine":
        return (1 + math.cos(math.pi * progress)) / 2
    return 1 - math.sqrt(progress)


def decay_steps(total: int, decay_share: float) -> int:
    """Steps of wsd's decay: this share of all steps, warm-up included, to the nearest whole one, and at least one."""
    return max(1, round(decay_share * total))


def problems(kind: str, total: int, *, warm_up: int, decay_share: float) -> list[str]:
    """Why there is no such schedule of `total` steps, one sentence a fault; empty where there is."""
    if kind not in KINDS:
        return [f"schedule is {kind!r}; allowed: {', '.join(KINDS)}."]
    found = []
    if total < 1:
        found.append(f"steps must be at least 1, not {total}.")
    if warm_up < 0:
        found.append(f"warm_up_steps must be at least 0, not {warm_up}.")
    if kind == "wsd" and not 0 < decay_share <= 1:
        found.append(f"decay_share must be above 0 and at most 1, not {decay_share}.")
    if found:
        return found
    if warm_up > total:
        found.append(f"warm_up_steps ({warm_up:,}) exceeds the {total:,} steps of training.")
    elif kind == "wsd" and warm_up + decay_steps(total, decay_share) > total:
        found.append(
            f"warm_up_steps ({warm_up:,}) and the decay's {decay_steps(total, decay_share):,} steps (decay_share "
            f"{decay_share:g}) exceed the {total:,} steps of training."
        )
    return found
