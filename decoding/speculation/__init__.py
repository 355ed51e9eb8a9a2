"""Speculative decoding: guess several tokens, let the model check them all in one step, keep what it would have said.

A guess is accepted if it equals the token that the model's own row draws with the noise of its own position, so the
answer is the same, token for token, as without. For a guess that is certain that is the rejection rule of Leviathan
et al. (2023) and Chen et al. (2023); a draft model draws with the same noise, which makes agreement likely.
"""
