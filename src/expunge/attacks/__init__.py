"""Ways of bringing erased concepts back: one file, one attack."""
