"""One file a method: see README.md in this folder."""
