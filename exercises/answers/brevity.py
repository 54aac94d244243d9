"""Exercise 9, worked."""

from exercises.brevity import main


def brevity(response: str) -> float:
    """1 for at most 12 words, 0 from 40 words on, falling evenly in between."""
    return min(1.0, max(0.0, (40 - len(response.split())) / (40 - 12)))


if __name__ == "__main__":
    main(brevity)
