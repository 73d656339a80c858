"""Read off the cells of a notebook which checks they call, and which other cells these need."""

import ast
import re
import symtable
from collections.abc import Mapping
from dataclasses import dataclass, field

from IPython.core.inputtransformer2 import TransformerManager
from nbformat import NotebookNode

CALL = re.compile(r"^[ \t]*checks\.(\w+)\(", re.MULTILINE)
# In cells whose names cannot be read off.
OPAQUE = re.compile(r"run_cell_magic|run_line_magic\('run'|import \*|\bexec\(|\bglobals\(\)\[|\bsys\.path\b")
DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)


def calls_of(cell: NotebookNode) -> dict[str, str]:
    """Return the checks that a cell calls, with their arguments as text; "" in a cell with a syntax error."""
    if cell.cell_type != "code":
        return {}
    found = {}
    try:
        for node in ast.walk(ast.parse(_python(cell.source))):
            match node:
                case ast.Call(func=ast.Attribute(value=ast.Name("checks"), attr=name)):
                    found[name] = ", ".join(map(ast.unparse, [*node.args, *node.keywords]))
    except (SyntaxError, ValueError, RecursionError):
        return dict.fromkeys(CALL.findall(cell.source), "")
    return found


def _python(source: str) -> str:
    """Return a cell's source without Jupyter's own syntax."""
    timed = re.compile(r"\A\s*%%(?:time|capture)\b.*\n|%time (?=\w)", re.MULTILINE)
    return TransformerManager().transform_cell(timed.sub("", source))


@dataclass
class Names:
    """The global names of a cell: those it binds, imports, changes and uses; ``always`` if it is run in any case."""

    bound: set[str] = field(default_factory=set)
    imported: set[str] = field(default_factory=set)
    changed: set[str] = field(default_factory=set)
    used: set[str] = field(default_factory=set)
    always: bool = True


def names_of(cell: NotebookNode) -> Names:
    """Read off a cell's names.

    A cell always runs if its names cannot be read off, if it has a syntax error (it stops at once), or if it holds only
    imports and constants: these take no time, and an import that fails explains the errors after it.
    """
    try:
        source = _python(cell.source)
        tree, tables = ast.parse(source), [symtable.symtable(source, "cell", "exec")]
    except (SyntaxError, ValueError, RecursionError):
        return Names()
    found = Names(always=bool(OPAQUE.search(source)) or all(map(_takes_no_time, tree.body)))
    defined = {symbol.get_name() for symbol in tables[0].get_symbols() if symbol.is_namespace()}
    for table in tables:  # functions inside are appended on the way
        for symbol in table.get_symbols():
            if table is tables[0] or symbol.is_global():
                name = {symbol.get_name()}
                found.bound |= name if symbol.is_assigned() or symbol.is_imported() else set()
                found.imported |= name if symbol.is_imported() else set()
                found.used |= name - defined if symbol.is_referenced() else set()
        tables += table.get_children()
    for statement in (statement for statement in tree.body if not isinstance(statement, DEFINITIONS)):
        found.changed |= set(filter(None, map(_changed, ast.walk(statement))))
    return found


def _changed(node: ast.AST) -> str | None:
    """Return the name that is changed by ``x[0] = 1``, ``x.a = 1`` or ``x.append(1)``."""
    is_stored = isinstance(getattr(node, "ctx", None), ast.Store | ast.Del)
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
        node, is_stored = node.value.func, True
    is_part = isinstance(node, ast.Attribute | ast.Subscript)
    while isinstance(node, ast.Attribute | ast.Subscript):
        node = node.value
    return node.id if is_stored and is_part and isinstance(node, ast.Name) else None


def _takes_no_time(statement: ast.stmt) -> bool:
    is_constant = isinstance(getattr(statement, "value", None), ast.Constant)
    return isinstance(statement, ast.Import | ast.ImportFrom) or is_constant


def needed_cells(code: Mapping[int, NotebookNode], names: Mapping[int, Names], checks: set[int]) -> set[int]:
    """Return the cells with checks, parameters and imports, and those that make what these use."""
    modules = set().union(*(cell.imported for cell in names.values()))  # plt.show() makes no plt
    needed = {index for index, cell in code.items() if names[index].always or "parameters" in cell.metadata.tags}
    todo = set(checks)
    while todo:
        needed |= todo
        used = set().union(*(names[index].used for index in needed))
        makers = {i for i, cell in names.items() if used & (cell.bound | (cell.changed - modules))}
        todo = {index for index in makers - needed if index < max(checks)}
    return needed
