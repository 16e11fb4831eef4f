"""Erasers that train part of the network."""
