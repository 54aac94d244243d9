"""The exercises, worked."""
