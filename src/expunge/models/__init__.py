"""Adapters: the only place that knows diffusers and transformers models."""
