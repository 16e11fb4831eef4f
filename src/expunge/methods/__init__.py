"""Erasers: one file, one method, one paper."""
