"""The three kinds of change: full weights, low-rank factors, guards."""
