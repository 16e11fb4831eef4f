"""Per-image concept detectors: one file, one detector."""
