"""Select mutants: every position of every cosmic-ray operator in the targets, and a stratified sample of them.

A position is a syntax node that an operator can change. Positions in docstrings, comments, type annotations and
`if TYPE_CHECKING` blocks are left out because no test can observe them. A position whose mutant does not compile, or
compiles with a warning, is skipped and another one is drawn.

The identifier of a mutant is a hash of its operator, its file, the enclosing function and the changed lines. It
contains no line numbers, so it stays the same when code above it moves. Positions are drawn in the order of a similar
hash, so a change to one function leaves most of the sample as it is.
"""

from __future__ import annotations

import difflib
import hashlib
import random
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import parso
from cosmic_ray.plugins import get_operator, operator_names
from parso.tree import BaseNode, NodeOrLeaf
from tree import ROOT

SHARED = "services/shared/lorabbit"
SERVER = "services/server/lorabbit_server"
AREAS: Mapping[str, tuple[str, ...]] = {
    "engine": (f"{SERVER}/engine",),
    "unit of work": (f"{SERVER}/job/unit_of_work.py",),
    "transfer": (f"{SHARED}/transfer", f"{SERVER}/transfer"),
    "validation": (
        f"{SERVER}/aggregation/update_validation.py",
        f"{SHARED}/tensors/serialization.py",
        f"{SHARED}/compression/compressed_file.py",
        f"{SHARED}/job/validation.py",
    ),
    "aggregation": (
        f"{SHARED}/aggregation",
        f"{SERVER}/aggregation/aggregator.py",
        f"{SERVER}/aggregation/model_versions.py",
    ),
    "methods": (f"{SHARED}/methods",),
    "broker": (f"{SHARED}/broker",),
    "store": (f"{SHARED}/state",),
}
"""Files and folders by area."""
REPLACER, INSERTER = "core/VariableReplacer", "core/VariableInserter"
"""The operators with arguments, which are names of variables."""

Arguments = tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Position:
    """A place where an operator can change a file."""

    file: str
    node: int
    """Index of the syntax node, in the order of a walk from the top."""
    operator: str
    index: int
    """Which of the operator's changes of this node."""
    arguments: Arguments
    line: int
    text: str
    """The node's first line and its text."""
    seed: int
    """Of the sample."""

    @property
    def family(self) -> str:
        """The operator without the symbols that it exchanges."""
        return self.operator.split("_")[0]

    @cached_property
    def rank(self) -> str:
        """A number that orders positions at random, in the same order after a change to other code."""
        what = [str(self.seed), self.file, self.operator, str(self.index), str(self.arguments), self.text]
        return hashlib.sha256("\n".join(what).encode()).hexdigest()


@dataclass(frozen=True)
class Mutant:
    """One change of one file."""

    id: str
    area: str
    file: str
    line: int
    """The first changed line."""
    extent: tuple[int, int]
    """First and last line of the statement around the change, or of its header when it contains other statements."""
    operator: str
    diff: str
    source: str
    """The file's text with the change."""


def files_of(targets: Sequence[str], root: Path = ROOT) -> list[str]:
    """Return the Python files of an area, relative to the root."""
    found: list[Path] = []
    for target in targets:
        path = root / target
        found += sorted(path.rglob("*.py")) if path.is_dir() else [path]
    return [str(path.relative_to(root)) for path in found]


# ---- positions ----
@dataclass(frozen=True)
class Tree:
    """A parsed file: the root, and all nodes in the order of a walk, each with whether it has no effect at run time."""

    root: Any
    nodes: list[tuple[Any, bool]]


@cache
def parsed(source: str) -> Tree:
    """Parse a file."""
    root = parso.parse(source)
    return Tree(root, list(walk(root)))


def walk(root: NodeOrLeaf) -> Iterator[tuple[Any, bool]]:
    """Yield every node from the top, and whether it has no effect at run time."""
    waiting: list[tuple[Any, bool]] = [(root, False)]
    while waiting:
        node, hidden = waiting.pop()
        yield node, hidden
        if isinstance(node, BaseNode):
            without_effect = {id(child) for child in _without_effect(node)}
            waiting += [(child, hidden or id(child) in without_effect) for child in reversed(node.children)]


def _kind(node: Any) -> tuple[str, str]:
    """Return the type of a node, and the text of an operator or keyword."""
    return node.type, node.value.strip() if node.type in {"operator", "keyword"} else ""


@cache
def _operators_by_kind() -> dict[tuple[str, str], dict[str, Any]]:
    """Return the operators without arguments by the kind of node that they change, which their examples tell."""
    found: dict[tuple[str, str], dict[str, Any]] = defaultdict(dict)
    for name in sorted(operator_names()):
        kind = get_operator(name)
        if kind.arguments():
            continue
        operator = kind()
        for example in kind.examples():
            for node, _ in walk(parso.parse(example.pre_mutation_code)):
                if any(operator.mutation_positions(node)):
                    found[_kind(node)][name] = operator
    return found


def _without_effect(node: Any) -> list[NodeOrLeaf]:
    """Return the children of a node that are annotations, for type checkers only, or separators."""
    if node.type == "annassign":
        alias = node.children[1].get_code().strip() == "TypeAlias"
        return list(node.children) if alias else [node.children[1]]
    if node.type == "tfpdef":
        return list(node.children[2:])
    if node.type == "if_stmt" and node.children[1].get_code().strip() == "TYPE_CHECKING":
        return list(node.children)
    if node.type == "parameters":  # a bare `*` separates parameters, and is taken for a multiplication
        return [child for child in node.children if child.type == "operator"]
    if node.type == "funcdef" and node.annotation is not None:
        return [node.annotation]
    return []


def positions(file: str, source: str, seed: int = 0) -> list[Position]:
    """Return every position of every operator in a file."""
    found: list[Position] = []
    operators = _operators_by_kind()
    for number, (node, hidden) in enumerate(parsed(source).nodes):
        if hidden:
            continue
        changes: list[tuple[str, int, Arguments]] = [
            (name, index, ())
            for name, operator in operators.get(_kind(node), {}).items()
            for index, _ in enumerate(operator.mutation_positions(node))
        ]
        changes += [(name, 0, arguments) for name, arguments in _variables(node)]
        if changes:
            text = node.get_code(include_prefix=False)
            found += [Position(file, number, *change, node.start_pos[0], text, seed) for change in changes]
    return found


def _variables(node: Any) -> Iterator[tuple[str, Arguments]]:
    """Yield the operators on variables that can change a node, with their arguments.

    An assigned variable is the effect. Its causes are the names on the right side, which are replaced by a number, or
    the function's parameters, which are added to a sum or a product.
    """
    if node.type not in {"expr_stmt", "arith_expr", "term"}:
        return
    statement = node if node.type == "expr_stmt" else node.search_ancestor("expr_stmt")
    if statement is None:
        return
    causes: set[str] = set()
    if node.type == "expr_stmt":
        kind, right = REPLACER, node.get_rhs()
        if isinstance(right, BaseNode):  # the operator fails on a single name
            causes = {leaf.value for leaf, _ in walk(right) if leaf.type == "name"}
    else:
        kind, function = INSERTER, node.search_ancestor("funcdef")
        if function is not None:
            causes = {parameter.name.value for parameter in function.get_params()} - {"self", "cls"}
    for cause in sorted(causes):
        for effect in sorted({name.value for name in statement.get_defined_names()}):
            arguments = (("cause_variable", cause), ("effect_variable", effect))
            if any(get_operator(kind)(**dict(arguments)).mutation_positions(node)):
                yield kind, arguments


# ---- mutants ----
def mutant_at(position: Position, area: str, source: str) -> Mutant | None:
    """Apply an operator; None when it makes no different text that compiles without a warning."""
    node = parsed(source).nodes[position.node][0]
    extent, scope = _extent(node), _scope(node)
    text = _changed(position, source)
    if text is None or text == source or not compiles(text):
        return None
    lines = list(difflib.unified_diff(source.splitlines(), text.splitlines(), lineterm="", n=0))[2:]
    diff = "\n".join(line for line in lines if not line.startswith("@@"))
    line = int(lines[0].split()[1].lstrip("-").split(",")[0])
    # Equal lines of one function are told apart by how many equal ones are above.
    above = source.splitlines()[: line - 1].count(diff.splitlines()[0][1:])
    key = "\n".join([position.operator, position.file, scope, str(above), diff])
    name = hashlib.sha256(key.encode()).hexdigest()[:10]
    return Mutant(name, area, position.file, line, extent, position.operator, diff, text)


def _changed(position: Position, source: str) -> str | None:
    """Return the text after a change; the tree is put back as it was."""
    tree = parsed(source)
    node = tree.nodes[position.node][0]
    parent, siblings = node.parent, list(node.parent.children)
    before = [
        (each, each.parent, list(each.children) if isinstance(each, BaseNode) else each.value) for each, _ in walk(node)
    ]
    operator = get_operator(position.operator)(**dict(position.arguments))
    state = random.getstate()
    random.seed(position.rank)  # the operators on variables draw a number or a symbol
    try:
        changed = operator.mutate(node, position.index)
        parent.children = [changed if each is node else each for each in siblings if each is not node or changed]
        return str(tree.root.get_code())
    except (AssertionError, AttributeError, IndexError):
        return None
    finally:
        random.setstate(state)
        parent.children = siblings
        for each, above, content in before:
            each.parent = above
            setattr(each, "children" if isinstance(each, BaseNode) else "value", content)


def compiles(text: str) -> bool:
    """Tell whether a text compiles without a warning; a comparison such as `x is 1` warns, and tests raise warnings."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            compile(text, "mutant", "exec")
        except (SyntaxError, SyntaxWarning, ValueError):
            return False
    return True


def _extent(node: Any) -> tuple[int, int]:
    """Return the lines of the smallest statement around a node, or of its header when it contains other statements."""
    at = node
    while at.parent is not None and at.parent.type not in {
        *("file_input", "suite", "simple_stmt", "decorated", "decorators", "async_stmt"),
    }:
        at = at.parent
    bodies = [child for child in getattr(at, "children", []) if child.type in {"suite", "simple_stmt"}]
    if not bodies:
        return at.start_pos[0], at.end_pos[0] - (at.end_pos[1] == 0)
    if node.start_pos >= bodies[0].start_pos:  # the header of `elif` or `except`
        return node.start_pos[0], node.end_pos[0]
    return at.start_pos[0], bodies[0].start_pos[0]


def _scope(node: Any) -> str:
    """Return the dotted name of the functions and classes around a node."""
    names = []
    at = node.search_ancestor("funcdef", "classdef")
    while at is not None:
        names.append(at.name.value)
        at = at.search_ancestor("funcdef", "classdef")
    return ".".join(reversed(names))


# ---- the sample ----
def sample(
    size: int, seed: int, root: Path = ROOT, areas: Mapping[str, tuple[str, ...]] = AREAS
) -> tuple[list[Mutant], list[str]]:
    """Draw mutants; returns them and the operators that have a position.

    Each area gets the same number. First every operator with a position gets one mutant, operators with positions in
    few areas first. Then each area is filled from the family of operators that the sample has the fewest mutants of,
    because most positions are of comparisons and binary operators.
    """
    draw = _Draw(size, seed, root, areas)
    for operator in draw.operators_by_rarity():
        draw.place(operator)
    for area in areas:
        draw.fill(area)
    order = list(areas)
    return sorted(draw.mutants, key=lambda mutant: (order.index(mutant.area), mutant.file, mutant.line)), draw.operators


class _Draw:
    """A sample that is being drawn."""

    def __init__(self, size: int, seed: int, root: Path, areas: Mapping[str, tuple[str, ...]]) -> None:
        self._room = dict.fromkeys(areas, -(-size // len(areas)))
        self._sources: dict[str, str] = {}
        self._pool: dict[str, dict[str, list[Position]]] = {area: defaultdict(list) for area in areas}
        """Positions that are left, by area and operator."""
        self._lines: set[tuple[str, int]] = set()
        self.mutants: list[Mutant] = []
        for area, targets in areas.items():
            for file in files_of(targets, root):
                self._sources[file] = (root / file).read_text(encoding="utf-8")
                for position in positions(file, self._sources[file], seed):
                    self._pool[area][position.operator].append(position)
        self.operators = sorted({operator for pool in self._pool.values() for operator in pool})

    def operators_by_rarity(self) -> list[str]:
        """Return the operators, those with positions in the fewest areas first."""
        return sorted(self.operators, key=lambda each: (sum(each in pool for pool in self._pool.values()), each))

    def place(self, operator: str) -> None:
        """Draw one mutant of an operator; an operator without any mutant that compiles is forgotten.

        A line that has a mutant already gets another one only when no area has another position.
        """
        first = {area: min(left, key=_order) for area, pool in self._pool.items() if (left := pool.get(operator))}
        areas = sorted(first, key=lambda area: _order(first[area]))
        if any(
            self._room[area] and self._take(area, [operator], fresh=fresh) for fresh in (True, False) for area in areas
        ):
            return
        if not any(self._pool[area][operator] for area in areas):
            self.operators.remove(operator)

    def fill(self, area: str) -> None:
        """Draw mutants until an area is full or has no position left, from the family that the sample has least of."""
        families: dict[str, list[str]] = defaultdict(list)
        for operator, left in self._pool[area].items():
            if left:
                families[left[0].family].append(operator)
        for fresh in (True, False):
            open_families = set(families)
            while self._room[area] and open_families:
                drawn = Counter(mutant.operator.split("_")[0] for mutant in self.mutants)
                rarest = min(open_families, key=lambda family: (drawn[family], family))
                if not self._take(area, families[rarest], fresh=fresh):
                    open_families.remove(rarest)

    def _take(self, area: str, operators: Sequence[str], *, fresh: bool) -> bool:
        """Draw a mutant of one of several operators; a fresh one is on a line that has none."""
        left = [position for operator in operators for position in self._pool[area][operator]]
        for position in sorted(left, key=_order):
            if fresh and (position.file, position.line) in self._lines:
                continue
            self._pool[area][position.operator].remove(position)
            mutant = mutant_at(position, area, self._sources[position.file])
            if mutant is not None and all(mutant.id != other.id for other in self.mutants):
                self._lines.add((position.file, position.line))
                self._room[area] -= 1
                self.mutants.append(mutant)
                return True
        return False


def _order(position: Position) -> tuple[str, int]:
    return position.rank, position.node
