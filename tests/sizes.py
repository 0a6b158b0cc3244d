"""Counts the source, layer by layer, and holds its limits.

    python tests/sizes.py [PACKAGE]

A line of code has something of the program in it: blanks, comments and docstrings (texts that stand alone, those under
a field too) are none. Files and functions are measured with everything, functions with their decorators. Exits 1 past
a limit, naming what is.
"""

from __future__ import annotations

import ast
import io
import sys
import tokenize
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "src" / "postlude"

CODE_LINES = 23_500 + 15_000
"""Of the whole package: what it had when it was put in order, and what was added since, for models, adapters, records
and templates that others made, for comparing what is written with what it was made of, for keeping secrets, for locks
that are looked at again, for digests of all that is read again, to keep programs that others made within bounds, for
a Ray that is started anew, for lines with a schema that are followed as they come, for alarms,
for the page, for what may change while a stage runs, for trackers in a process of their own, for workers that are
forked, for object stores, for encryption, and for roles."""

FILE_LINES = 450

FUNCTION_LINES = 60

NOT_CODE = {
    tokenize.COMMENT,
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENCODING,
    tokenize.ENDMARKER,
}


def code_lines(text: str) -> int:
    """The lines of a file that hold something other than blanks, comments and docstrings."""
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in NOT_CODE:
            lines.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            lines.difference_update(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    return len(lines)


def functions(node: ast.AST, above: str = "") -> Iterator[tuple[int, str]]:
    """Every function and method below a node, with the number of its lines and its name."""
    for child in ast.iter_child_nodes(node):
        name = above
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            name = f"{above}.{child.name}" if above else child.name
            if not isinstance(child, ast.ClassDef):
                first = min([child.lineno, *(decorator.lineno for decorator in child.decorator_list)])
                yield (child.end_lineno or first) - first + 1, name
        yield from functions(child, name)


def main(package: Path = PACKAGE) -> int:
    files, code, lines = Counter[str](), Counter[str](), Counter[str]()
    file_sizes: list[tuple[int, str]] = []
    function_sizes: list[tuple[int, str]] = []
    for path in sorted(package.rglob("*.py")):
        text, place = path.read_text(), path.relative_to(package).as_posix()
        layer = place.partition("/")[0].removesuffix(".py")
        files[layer] += 1
        code[layer] += code_lines(text)
        lines[layer] += text.count("\n")
        file_sizes.append((text.count("\n"), place))
        function_sizes += ((size, f"{place}: {name}") for size, name in functions(ast.parse(text)))
    print(f"{'layer':20}{'files':>8}{'code':>10}{'all':>10}")
    for layer, count in code.most_common():
        print(f"{layer:20}{files[layer]:8}{count:10,}{lines[layer]:10,}")
    print(f"{'all':20}{files.total():8}{code.total():10,}{lines.total():10,}\n")
    is_held = [
        report("lines of code", [(code.total(), "the package")], CODE_LINES),
        report("lines in a file", file_sizes, FILE_LINES),
        report("lines in a function", function_sizes, FUNCTION_LINES),
    ]
    return 0 if all(is_held) else 1


def report(what: str, sizes: list[tuple[int, str]], limit: int) -> bool:
    """Print what is past a limit, else what is nearest to it; whether the limit holds."""
    ordered = sorted(sizes, reverse=True)
    past = [entry for entry in ordered if entry[0] > limit]
    print(f"{what}, at most {limit:,}:")
    for size, name in past or ordered[:1]:
        print(f"{size:10,}  {name}")
    return not past


if __name__ == "__main__":
    sys.exit(main(*map(Path, sys.argv[1:])))
