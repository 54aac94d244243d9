"""Exercise 2, worked."""


def tie_weight(comply: dict[str, float], refuse: dict[str, float],
               weights: dict[str, float]) -> float:
    """The weight of safety at which both answers have the same R [E2]."""
    # Σ_k w_k c_k + w c_safety = Σ_k w_k r_k + w r_safety, over the same Σ w
    gained = sum(w * (comply[axis] - refuse[axis]) for axis, w in weights.items())
    return gained / (refuse["safety"] - comply["safety"])
