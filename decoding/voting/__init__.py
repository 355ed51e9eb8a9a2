"""Voting among sampled answers: what each of them answers, who leads, when the rest can no longer matter."""
