"""Statements about an edit that need no picture: one file each."""
