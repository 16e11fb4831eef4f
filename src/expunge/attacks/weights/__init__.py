"""Attacks on the weights."""
