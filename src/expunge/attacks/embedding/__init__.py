"""Attacks on the embedding."""
