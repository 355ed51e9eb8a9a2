"""The texts of an automaton, where they are few."""

from cadenza.decoding.constraints.automata.dfa import DFA


def few_texts(dfa: DFA, most: int) -> list[str] | None:
    """All texts, shortest first; None: there are more than `most`.

    Every state of the automaton leads to acceptance, so that more than `most` ways at one length are too many texts,
    and a way longer than there are states has gone in a circle.
    """
    found: list[str] = []
    frontier: list[tuple[int, bytes]] = [] if dfa.is_empty else [(0, b"")]
    for _ in range(dfa.num_states):
        found.extend(text.decode() for state, text in frontier if dfa.accepting[state])
        following: list[tuple[int, bytes]] = []
        for state, text in frontier:
            for byte in range(256):
                if (target := dfa.next(state, byte)) >= 0:
                    following.append((target, text + bytes([byte])))
        if len(following) > most or len(found) > most:
            return None
        frontier = following
    return None if frontier else found
