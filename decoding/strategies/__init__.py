"""Decoding strategies: what becomes of a request's branches after each step."""

from cadenza.decoding.strategies.base import Append, Strategy
from cadenza.decoding.strategies.independent import IndependentBranches

__all__ = ["Append", "IndependentBranches", "Strategy"]
