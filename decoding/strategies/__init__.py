"""Decoding strategies: what becomes of a request's branches after each step."""
