"""Adapters in the engine: which there are, where they lie, and how one batch computes with many of them."""
