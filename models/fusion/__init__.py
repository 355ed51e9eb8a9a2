"""Kernels of one launch in place of several small ones of transformers' layers, wherever trials show them equal."""
