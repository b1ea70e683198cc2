"""The goals of speed, and whether a figure meets them."""

IMAGES_H200 = 4000.0  # images/s of DMAE ViT-L -> ViT-B with the light decoder, compiled, on one H200
SHARE_OF_PEAK = 0.45  # of the measured bf16 product, compiled
TIMES_PLAIN = 3.0  # the plain fp16 loop's speed, compiled
OVERHEAD = 0.05  # of the engine, over a bare torch loop of the same modules
DATA_WAIT = 0.02  # share of the time that a run fed by the loader waits
PEAK_H200 = 750e12  # FLOP/s of a bf16 product that an H200 is taken to reach: other cards are expected in proportion


def images_goal(card: str, peak: float) -> float:
    """Return the images/s that are expected of a card whose measured bf16 peak is `peak`."""
    return IMAGES_H200 if card.startswith("NVIDIA H200") else IMAGES_H200 * peak / PEAK_H200


def at_least(goal: float, value: float, form: str) -> str:
    """Say a lower bound and whether it is met."""
    return f"goal: at least {goal:{form}}: {'met' if value >= goal else 'missed'}"


def below(goal: float, value: float, form: str) -> str:
    """Say an upper bound and whether it is met."""
    return f"goal: under {goal:{form}}: {'met' if value < goal else 'missed'}"
