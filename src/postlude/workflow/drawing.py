"""The graph of stages, drawn with lines in front of the names."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence


def draw(graph: Mapping[str, Sequence[str]]) -> list[tuple[str, str, str]]:
    """Each stage with its line of the drawing and what else it needs, in the order of the lines.

    A stage hangs on the last of the stages that it needs; the others are named beside it: ``└─ rlhf``, ``judge``.
    """
    places = {name: place for place, name in enumerate(graph)}
    above = {name: max((need for need in needed if need in places), key=places.__getitem__, default=None)
             for name, needed in graph.items()}  # fmt: skip
    below: dict[str | None, list[str]] = {None: []}
    for name in graph:
        below.setdefault(above[name], []).append(name)

    def lines(name: str, front: str, rest: str) -> Iterator[tuple[str, str, str]]:
        others = [need for need in graph[name] if need != above[name]]
        yield name, f"{front}{name}", ", ".join(others)
        children = below.get(name, [])
        for child in children:
            is_last = child == children[-1]
            yield from lines(child, rest + ("└─ " if is_last else "├─ "), rest + ("   " if is_last else "│  "))

    return [line for root in below[None] for line in lines(root, "", "")]
