"""From YAML text to values that know their line and column.

The text is composed by ruamel.yaml (YAML 1.2: ``1e-5`` is a number, ``yes`` is text) and turned into values
here, so that every key and value keeps its place, duplicate keys are found, and only what JSON knows comes out.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.constructor import SafeConstructor
from ruamel.yaml.error import MarkedYAMLError
from ruamel.yaml.nodes import MappingNode, Node, ScalarNode
from ruamel.yaml.reader import ReaderError

from postlude.manifest.problem import Problem, refusal
from postlude.manifest.value import KeyPath, Layer, Origin, Value, dotted

MOST_REPEATED = 10_000
"""Values that aliases may stand for in all: a few of them, one within the other, could stand for more than any memory
holds."""
MOST_LEVELS = 100
"""Collections within each other."""

_LAYERS: dict[str, Layer] = {"defaults": "defaults", "stages": "stage"}


def parse(text: str | bytes, name: str) -> Value:
    """Read a manifest's text; ``name`` is what to call it in messages. ManifestError lists what is wrong."""
    if isinstance(text, bytes):
        text = _decode(text, name)
    top = Origin("manifest", name, 1, 1)
    root = _compose(text, top)
    if root is None or root.value == "":
        raise refusal(name, [Problem(top, "", "the manifest is empty. 'postlude init' writes one to start from.")])
    reading = _Reading(name)
    value = reading.value(root, ())
    if not isinstance(root, MappingNode) and not reading.problems:
        what = "a manifest is a mapping of keys, such as 'name: my-run'"
        reading.problems.append(Problem(reading.origin(root, ()), "", what))
    if reading.problems:
        raise refusal(name, reading.problems)
    return value


def parse_inline(text: str, origin: Origin) -> Value:
    """Read the VALUE of a KEY=VALUE: one YAML value, all of whose parts have the same origin. ManifestError."""
    root = _compose(text, origin)
    if root is None:
        return Value(None, origin)
    reading = _Reading("", origin)
    value = reading.value(root, ())
    if reading.problems:
        raise refusal("", reading.problems)
    return value


def _decode(text: bytes, name: str) -> str:
    try:
        return text.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        before = text[: error.start]
        line = before.count(b"\n") + 1
        column = error.start - before.rfind(b"\n")
        what = f"not UTF-8 (byte 0x{text[error.start]:02x}). Save the file as UTF-8."
        raise refusal(name, [Problem(Origin("manifest", name, line, column), "", what)]) from error


def _compose(text: str, origin: Origin) -> Node | None:
    """The document's root node. ``origin`` says where the text begins."""
    try:
        yaml = YAML(typ="safe", pure=True)
        yaml.max_depth = MOST_LEVELS
        return yaml.compose(text)
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        what = f"not YAML: {error.problem or error.context}"
        if error.context and error.problem:
            what += f" ({error.context})"
        if mark is not None and _is_tab(text, mark):
            what = "a tab where YAML takes only spaces. Indent with spaces."
        if origin.assignment:
            where = origin
            what += ". Put the value in quotes that reach it: KEY='\"...\"'"
        else:
            where = Origin("manifest", origin.file, mark.line + 1, mark.column + 1) if mark else origin
        raise refusal(origin.file, [Problem(where, "", what)]) from error
    except ReaderError as error:
        before = text[: error.position]
        where = replace(origin, line=before.count("\n") + 1, column=error.position - before.rfind("\n"))
        what = f"a character that YAML does not allow (U+{ord(text[error.position]):04X})"
        raise refusal(origin.file, [Problem(where, "", what)]) from error


def _is_tab(text: str, mark: Any) -> bool:
    lines = text.splitlines()
    return mark.line < len(lines) and lines[mark.line][mark.column : mark.column + 1] == "\t"


@dataclass
class _Reading:
    """One pass over the nodes of a document, gathering what is wrong on the way."""

    name: str
    everywhere: Origin | None = None
    """The origin of everything, for a value of the command line."""
    problems: list[Problem] = field(default_factory=list)
    above: list[int] = field(default_factory=list)
    """Ids of the collections around the node being read: an alias to one of them has no end."""
    read: set[int] = field(default_factory=set)
    """Ids of the nodes that were read: what is read again an alias stands for."""
    repeated: int = 0
    """How many values aliases stand for so far."""

    def origin(self, node: Node, path: KeyPath) -> Origin:
        if self.everywhere is not None:
            return self.everywhere
        layer = _LAYERS.get(str(path[0]), "manifest") if path else "manifest"
        return Origin(layer, self.name, node.start_mark.line + 1, node.start_mark.column + 1)

    def problem(self, node: Node, path: KeyPath, what: str) -> None:
        self.problems.append(Problem(self.origin(node, path), dotted(path), what))

    def value(self, node: Node, path: KeyPath) -> Value:
        origin = self.origin(node, path)
        self.repeated += id(node) in self.read
        self.read.add(id(node))
        if self.repeated >= MOST_REPEATED:
            if self.repeated == MOST_REPEATED:
                self.problem(node, path, f"aliases stand for more than {MOST_REPEATED:,} values. Write them out.")
            return Value(None, origin)
        if isinstance(node, ScalarNode):
            return Value(self._scalar(node, path), origin)
        if id(node) in self.above:
            self.problem(node, path, f"the alias '*{node.anchor}' refers to what it is a part of")
            return Value(None, origin)
        if node.tag not in ("tag:yaml.org,2002:map", "tag:yaml.org,2002:seq"):
            self.problem(node, path, f"the tag '{node.tag}' is not known")
        self.above.append(id(node))
        content: Any
        if isinstance(node, MappingNode):
            content = self._mapping(node, path)
        else:
            content = [self.value(item, (*path, i)) for i, item in enumerate(node.value)]
        self.above.pop()
        return Value(content, origin)

    def _mapping(self, node: MappingNode, path: KeyPath) -> dict[str, Value]:
        content: dict[str, Value] = {}
        for key_node, value_node in node.value:
            if not isinstance(key_node, ScalarNode):
                self.problem(key_node, path, "a key must be text")
                continue
            key = self._text(key_node, path)
            here = (*path, key)
            if key_node.tag == "tag:yaml.org,2002:merge":
                self.problem(key_node, here, "merge keys are not supported: what stages share stands in 'defaults'")
            elif key in content:
                first = content[key].key_origin
                self.problem(key_node, here, f"this key is there twice, first at {first.place if first else ''}")
            else:
                read = self.value(value_node, here)
                content[key] = Value(read.content, read.origin, self.origin(key_node, here))
        return content

    def _scalar(self, node: ScalarNode, path: KeyPath) -> Any:
        """A scalar as JSON knows it. What YAML would make a date stays text."""
        kind = str(node.tag).removeprefix("tag:yaml.org,2002:")
        if kind in ("null", "bool", "int", "float"):
            try:
                return getattr(self._constructor, f"construct_yaml_{kind}")(node)
            except (ValueError, KeyError):
                self.problem(node, path, f"'{node.value}' is not what its tag says, {kind}")
        elif kind not in ("str", "timestamp", "value", "merge"):
            self.problem(node, path, f"the tag '{node.tag}' is not known")
        return self._text(node, path)

    def _text(self, node: ScalarNode, path: KeyPath) -> str:
        r"""A scalar's text, in which JSON's escapes of one character as two (``\ud83d\ude00``) are that character."""
        try:
            return node.value.encode("utf-16", "surrogatepass").decode("utf-16")
        except UnicodeDecodeError:
            self.problem(node, path, "half of a character, written as an escape")
            return ""

    @cached_property
    def _constructor(self) -> SafeConstructor:
        return SafeConstructor(loader=YAML(typ="safe", pure=True))
