"""Exercise 10, worked."""

from torch import Tensor

from exercises.rank import demonstrate


def merged(weight: Tensor, a: Tensor, b: Tensor, alpha: float) -> Tensor:
    """The matrix W' with y = W' x: weight (out, in), a (r, in), b (out, r)."""
    # [L1] y = W x + (α / r) · B A x
    return weight + alpha / len(a) * b @ a


def trained_numbers(shapes: list[tuple[int, int]], rank: int) -> int:
    """How many numbers LoRA trains on projections of these (out, in) shapes."""
    return sum(rank * (out + width) for out, width in shapes)


if __name__ == "__main__":
    demonstrate(trained_numbers)
