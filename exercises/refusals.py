"""Exercise 2: at which weight of safety does a refusal stop paying?"""


def tie_weight(comply: dict[str, float], refuse: dict[str, float],
               weights: dict[str, float]) -> float:
    """The weight of safety at which both answers have the same R [E2].

    Args:
        comply, refuse: marks by axis, "safety" among them; refuse is the safer one.
        weights: of all other axes.

    Returns:
        the weight; negative where compliance never pays as much.
    """
    # R = Σ w s / Σ w for either answer. Set them equal, and solve for safety's weight.
    raise NotImplementedError("write me")
