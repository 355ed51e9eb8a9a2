"""Weights in 8 bits and fewer: how they are made from any checkpoint, kept on disk, and computed with."""
