"""Read off the cells of a notebook which checks they call, and which other cells these need."""

import ast
import re
import symtable
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field

from IPython.core.inputtransformer2 import TransformerManager
from nbformat import NotebookNode

CALL = re.compile(r"^[ \t]*checks\.(\w+)\(", re.MULTILINE)
# A cell with one of these uses names that cannot be read off it.
OPAQUE = re.compile(r"run_cell_magic|run_line_magic\('run'|import \*|\bexec\(|\bglobals\(\)\[|\bsys\.path\b")
TIMING = re.compile(r"\A\s*%%(?:time|capture)\b.*\n|%time (?=\w)", re.MULTILINE)
MAGIC = re.compile(r"^[ \t]*[%!?]|= *[%!]|\?[ \t]*$", re.MULTILINE)  # how Jupyter's own syntax begins or ends
MOST_MAGICS = 500_000  # such lines times letters of a cell: IPython translates them in seconds


@dataclass
class Names:
    """The checks that a cell calls, with their arguments as text, and the global names in it."""

    calls: dict[str, str] = field(default_factory=dict)
    bound: set[str] = field(default_factory=set)  # with the imported
    imported: set[str] = field(default_factory=set)
    changed: set[str] = field(default_factory=set)
    used: set[str] = field(default_factory=set)
    always: bool = False  # run the cell in any case


def names_of(cell: NotebookNode) -> Names:
    """Read off a cell's names; a cell of text has none.

    A cell always runs if it sets parameters, if its names cannot be read off, if it has a syntax error (it stops at
    once), or if it holds only imports: these take no time, and one that fails explains the errors after it.
    """
    if cell.cell_type != "code":
        return Names()
    try:
        source = _python(TIMING.sub("", cell.source))
        tree, tables = ast.parse(source), [symtable.symtable(source, "cell", "exec")]
    except Exception:  # SyntaxError, but also RecursionError and MemoryError
        return Names(calls=dict.fromkeys(CALL.findall(cell.source), ""), always=True)
    has_imports_only = all(isinstance(statement, ast.Import | ast.ImportFrom) for statement in tree.body)
    is_of_parameters = "parameters" in cell.metadata.get("tags", ())
    found = Names(always=has_imports_only or is_of_parameters or bool(OPAQUE.search(source)))
    own = {symbol.get_name() for symbol in tables[0].get_symbols() if symbol.is_namespace()}
    for statement in tree.body:
        if not isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):  # their names are local
            found.changed |= set().union(*map(_changed, ast.walk(statement)))
    for node in ast.walk(tree):
        match node:
            case ast.Call(func=ast.Attribute(value=ast.Name("checks"), attr=name)):
                found.calls[name] = ""
                with suppress(Exception):  # RecursionError of a long sum, ValueError of a long number
                    found.calls[name] = ", ".join(map(ast.unparse, [*node.args, *node.keywords]))
    for table in tables:  # functions inside are appended on the way
        for symbol in table.get_symbols():
            if table is tables[0] or symbol.is_global():
                name = {symbol.get_name()}
                found.bound |= name if symbol.is_assigned() or symbol.is_imported() else set()
                found.imported |= name if symbol.is_imported() else set()
                found.used |= name - own if symbol.is_referenced() else set()
        tables += table.get_children()
    return found


def _python(source: str) -> str:
    """Return a cell without Jupyter's own syntax, unless IPython would take too long for that."""
    try:
        ast.parse(source)
    except SyntaxError:
        if len(MAGIC.findall(source)) * len(source) <= MOST_MAGICS:
            return TransformerManager().transform_cell(source)
    return source


def _changed(node: ast.AST) -> set[str]:
    """Return the name that is changed by ``x[0] = 1``, ``x.a = 1`` or ``x.append(1)``."""
    match node:
        case ast.Attribute(ctx=ast.Store() | ast.Del()) | ast.Subscript(ctx=ast.Store() | ast.Del()):
            part = node
        case ast.Expr(value=ast.Call(func=ast.Attribute() as part)):
            pass
        case _:
            return set()
    while isinstance(part, ast.Attribute | ast.Subscript):
        part = part.value
    return {part.id} if isinstance(part, ast.Name) else set()


def needed_cells(names: Sequence[Names], checks: set[int]) -> set[int]:
    """Return the numbers of the cells with checks, of those that always run, and of those that make what these use.

    A cell that changes a value only inside a function or through a module, as ``nn.init`` does, is not found.
    """
    modules = set().union(*(cell.imported for cell in names))  # plt.show() makes no plt
    needed, todo = {number for number, cell in enumerate(names) if cell.always}, set(checks)
    while todo:
        needed |= todo
        used = set().union(*(names[number].used for number in needed))
        makers = {number for number, cell in enumerate(names) if used & (cell.bound | (cell.changed - modules))}
        todo = {number for number in makers - needed if number < max(checks)}
    return needed
