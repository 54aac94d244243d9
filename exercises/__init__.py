"""Ten exercises: five of them are modules with a function to fill in."""
