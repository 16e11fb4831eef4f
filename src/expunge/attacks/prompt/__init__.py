"""Attacks on the prompt."""
