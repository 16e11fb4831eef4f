"""Suites: prompts, seeds, sampler and detectors, as data."""
