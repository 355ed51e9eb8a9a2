"""Strongly connected components of a graph."""

from collections.abc import Callable, Iterable, Iterator


def components(roots: Iterable[int], targets: Callable[[int], Iterable[int]]) -> Iterator[list[int]]:
    """All that the roots lead to, in groups that lead to each other; a group after the groups it leads to.

    Tarjan's algorithm (1972), without recursion.
    """
    index: dict[int, int] = {}
    low: dict[int, int] = {}
    open_nodes: list[int] = []
    is_open: set[int] = set()
    for root in roots:
        if root in index:
            continue
        path: list[tuple[int, Iterator[int]]] = []
        entered: int | None = root
        while entered is not None or path:
            if entered is not None:
                index[entered] = low[entered] = len(index)
                open_nodes.append(entered)
                is_open.add(entered)
                path.append((entered, iter(targets(entered))))
                entered = None
            node, rest = path[-1]
            for target in rest:
                if target not in index:
                    entered = target
                    break
                if target in is_open:
                    low[node] = min(low[node], index[target])
            if entered is not None:
                continue
            path.pop()
            if path:
                parent = path[-1][0]
                low[parent] = min(low[parent], low[node])
            if low[node] == index[node]:
                group = [open_nodes.pop()]
                while group[-1] != node:
                    group.append(open_nodes.pop())
                is_open.difference_update(group)
                yield group
