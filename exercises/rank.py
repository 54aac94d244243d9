"""Exercise 10: what LoRA adds to a projection, and how many numbers that takes."""

from collections.abc import Callable

from torch import Tensor

from loading import TINY, load
from lora import PROJECTIONS


def merged(weight: Tensor, a: Tensor, b: Tensor, alpha: float) -> Tensor:
    """The matrix W' with y = W' x: weight (out, in), a (r, in), b (out, r)."""
    # [L1] y = W x + (α / r) · B A x
    raise NotImplementedError("write me")


def trained_numbers(shapes: list[tuple[int, int]], rank: int) -> int:
    """How many numbers LoRA trains on projections of these (out, in) shapes."""
    raise NotImplementedError("write me")


def demonstrate(trained_numbers: Callable) -> None:
    """The tiny model's share of trained numbers, by rank."""
    model, _ = load(TINY)
    shapes = [tuple(weight.shape) for name, weight in model.named_parameters()
              if weight.ndim == 2 and name.split(".")[-2] in PROJECTIONS]
    for rank in (1, 8, 64):
        count = trained_numbers(shapes, rank)
        share = count / model.config.num_parameters
        print(f"rank {rank}: {count:,} numbers, {share:.1%} of the base")


if __name__ == "__main__":
    demonstrate(trained_numbers)
