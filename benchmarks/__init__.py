"""Ours against what people use: `python -m benchmarks MODEL_FOLDER`."""
