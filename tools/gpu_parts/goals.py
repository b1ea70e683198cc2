"""The speed goals, and functions that say whether a figure meets them."""

IMAGES_H200 = 4000.0  # images/s of DMAE ViT-L -> ViT-B with the light decoder, compiled, on one H200
SHARE_OF_PEAK = 0.45  # share of the measured peak of a bf16 product, compiled
TIMES_PLAIN = 3.0  # speed relative to the plain fp16 loop, compiled
OVERHEAD = 0.05  # extra time of the engine over a bare torch loop of the same modules
DATA_WAIT = 0.02  # share of the time that a run fed by the loader waits for data
PEAK_H200 = 750e12  # assumed FLOP/s of a bf16 product on an H200; the goals of other cards are scaled by their peak


def images_goal(card: str, peak: float) -> float:
    """Return the images/s expected of a card whose measured bf16 peak is `peak` FLOP/s."""
    return IMAGES_H200 if card.startswith("NVIDIA H200") else IMAGES_H200 * peak / PEAK_H200


def at_least(goal: float, value: float, form: str) -> str:
    """Return text that states a lower bound and whether it is met."""
    return f"goal: at least {goal:{form}}: {'met' if value >= goal else 'missed'}"


def below(goal: float, value: float, form: str) -> str:
    """Return text that states an upper bound and whether it is met."""
    return f"goal: under {goal:{form}}: {'met' if value < goal else 'missed'}"
