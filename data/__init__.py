"""The tiny world, the data made from it, and how each was made."""
