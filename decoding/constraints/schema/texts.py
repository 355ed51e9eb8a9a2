"""The texts of an automaton, where they are few."""

from cadenza.decoding.constraints.automata.dfa import DFA


def few_texts(dfa: DFA, most: int) -> list[str] | None:
    """All texts, shortest first; None: there are more than `most`."""
    found: list[str] = []
    frontier: list[tuple[int, bytes]] = [] if dfa.is_empty else [(0, b"")]
    while frontier:
        found.extend(text.decode() for state, text in frontier if dfa.accepting[state])
        following = []
        for state, text in frontier:
            for byte in range(256):
                if (target := dfa.next(state, byte)) >= 0:
                    following.append((target, text + bytes([byte])))
            if len(following) > most:
                return None
        frontier = following
    return found if len(found) <= most else None
