"""Checkpoints that were quantized by others: their public formats, read tensor by tensor as numbers."""
