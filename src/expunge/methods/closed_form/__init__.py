"""Erasers that solve for the new weights."""
