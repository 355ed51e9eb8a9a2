"""Regular expressions and the automata over bytes that they become."""
