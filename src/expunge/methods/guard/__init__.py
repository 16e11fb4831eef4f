"""Erasers that leave the weights alone and intervene while images are drawn."""
