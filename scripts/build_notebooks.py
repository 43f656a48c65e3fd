"""Builds the course: each notebooks/src/NAME.py becomes notebooks/NAME.ipynb, run without the repository.

A source is a notebook in jupytext's percent format. Cells with one of these titles are directives:

    # %% magic                                          the cell that defines %%twin (notebooks/src/_magic.py)
    # %% twin: layers.visible, layers.attend            these definitions from jax_models/ and torch_models/
    # %% both: errors.UsageError                        these definitions from twinformers/
    # %% torch: layers.Linear                           what only PyTorch needs
    # %% both: configs.llama.LlamaConfig[validate]      a class with its fields and of its methods only these
    # %% both: configs.llama.PRESETS[llama2-7b]         a dictionary with only these keys
    # %% twin: training.SIDE_trainer.smoothed_loss      from twinformers/, with the side's name put in

Comment lines below a directive go on with its names. Text is taken as it stands in the packages. What it
needs from its own file comes along, and so do the imports that it needs from elsewhere; imports of this
repository are left out, and what no cell has defined by then is an error.
"""

from __future__ import annotations

import argparse
import ast
import base64
import builtins
import difflib
import hashlib
import json
import os
import re
import symtable
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import jupytext
import nbformat
from jupyter_client.kernelspec import KernelSpecManager
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell, new_notebook

from twinformers.errors import FormatError, TwinformersError

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = ROOT / "notebooks"
PACKAGES = ("jax_models", "torch_models", "twinformers")
#: Where a directive's definitions come from: (the argument of %%twin, the package).
SIDES = {
    "twin": (("jax", "jax_models"), ("torch", "torch_models")),
    "torch": (("torch", "torch_models"),),
    "both": (("both", "twinformers"),),
}
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}
MAX_PNG = 60_000
#: A kernel in which nothing of the repository can be imported, wherever an editable install has put it.
KERNEL = f"""
import sys
from importlib.abc import MetaPathFinder
class Absent(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {PACKAGES!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}: a notebook stands alone", name=name)
sys.meta_path.insert(0, Absent())
sys.path[:] = [p for p in sys.path if p != {str(ROOT)!r}]
from ipykernel.kernelapp import launch_new_instance
launch_new_instance()
"""


@dataclass
class Definitions:
    """What the cells so far have defined, by the argument of %%twin, and how to get more."""

    where: str  # the source that asks
    names: dict[str, set[str]] = field(default_factory=lambda: {"jax": set(), "torch": set(), "both": set()})

    def cell(self, side: str, package: str, wanted: list[str]) -> str:
        """One %%twin cell: first the imports that its definitions need, then the definitions."""
        imports: set[str] = set()
        texts = [text for item in wanted for text in self._texts(side, package, item, imports)]
        ordered = sorted(imports, key=lambda s: (s.split()[1], s))
        cell = "".join(f"{s}\n" for s in [f"%%twin {side}", *ordered])
        cell += "\n\n" if imports else ""
        for before, text in zip(["", *texts], texts, strict=False):
            one_liners = "\n" not in before + text and not text.startswith(("def", "class"))
            cell += text if not before else f"\n{text}" if one_liners else f"\n\n\n{text}"
        return cell

    def _texts(self, side: str, package: str, item: str, imports: set[str]) -> Iterator[str]:
        """The text of one definition, after the text of what it needs from its own file."""
        match = re.fullmatch(r"([\w.]+)\.(\w+)(?:\[(.+)\])?", item)
        if match is None:
            raise FormatError(
                "not a name", where=self.where, expected="file.NAME or file.NAME[part, part]", found=item
            )
        module, name, parts = match.groups()
        file_name = f"{module.replace('.', '/').replace('SIDE', side)}.py"
        places = (package, "twinformers") if "SIDE" in module else (package,)
        paths = [path for place in places if (path := ROOT / place / file_name).is_file()]
        where = f"{self.where}: {package}/{file_name}: {name}"
        if not paths:
            raise FormatError("no such file", where=where)
        tree = ast.parse(file := paths[0].read_text())
        known = self.names["both"] | self.names[side] | set(vars(builtins))
        text = definition(file, tree, name, re.split(r",\s*", parts) if parts else None, known)
        if text is None:
            raise FormatError("no such definition", where=where, found=item)
        self.names[side] |= {n for node in tree.body if name in bound_names(node) for n in bound_names(node)}
        foreign = dict(foreign_imports(tree))
        for needed in sorted(free_names(text) - known - {name}, key=lambda n: (file.find(f"\n{n} ="), n)):
            if needed in self.names[side]:
                continue  # brought along by the one before
            if needed in foreign:
                imports.add(foreign[needed])
                self.names[side].add(needed)
            elif definition(file, tree, needed, None, known) is not None:
                yield from self._texts(side, package, f"{module}.{needed}", imports)
            else:
                raise FormatError(
                    "a definition uses what no earlier cell defines",
                    where=where,
                    found=needed,
                    hint="name it in this directive before, or in an earlier one",
                )
        yield text


def definition(
    file: str, tree: ast.Module, name: str, parts: list[str] | None, known: set[str]
) -> str | None:
    """The text of a class, function or constant with the comment above it; None if absent."""
    for node in tree.body:
        if name not in bound_names(node):
            continue
        lines = file.splitlines()
        if parts is None:
            return "\n".join(lines[first_line(node, lines) - 1 : node.end_lineno])
        if isinstance(node, ast.ClassDef):
            return selected_class(node, lines, parts, known)
        if isinstance(value := getattr(node, "value", None), ast.Dict):
            return selected_items(node, value, lines, parts)
    return None


def bound_names(node: ast.stmt) -> set[str]:
    """What a class, function or assignment defines."""
    if isinstance(node, ast.ClassDef | ast.FunctionDef):
        return {node.name}
    targets = [node.target] if isinstance(node, ast.AnnAssign) else getattr(node, "targets", [])
    return {n.id for target in targets for n in ast.walk(target) if isinstance(n, ast.Name)}


def first_line(node: ast.stmt, lines: list[str]) -> int:
    """Where a definition begins, its decorators and the comment above it included."""
    first = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))])
    while first > 1 and lines[first - 2].lstrip().startswith("#"):
        first -= 1
    return first


def selected_class(node: ast.ClassDef, lines: list[str], parts: list[str], known: set[str]) -> str | None:
    """A class with docstring, fields and the named members, without bases that the notebook lacks."""
    kept, found = [], set()
    for child in node.body:
        target = child.target if isinstance(child, ast.AnnAssign) else None
        name = getattr(child, "name", getattr(target, "id", None))
        found.add(name)
        is_field = isinstance(child, ast.AnnAssign) and "ClassVar" not in ast.unparse(child.annotation)
        if isinstance(child, ast.Expr) or is_field or name in parts:
            kept.append(child)
    if not found.issuperset(parts):
        return None
    text = [f"@{ast.unparse(d)}" for d in node.decorator_list]
    bases = ", ".join(b for b in map(ast.unparse, node.bases) if b in known)
    text.append(f"class {node.name}({bases}):" if bases else f"class {node.name}:")
    previous: ast.stmt | None = None
    for child in kept:
        both_fields = isinstance(child, ast.AnnAssign) and isinstance(previous, ast.AnnAssign)
        text += [""] if previous is not None and not both_fields else []
        text += lines[first_line(child, lines) - 1 : child.end_lineno]
        previous = child
    return "\n".join(text)


def selected_items(node: ast.stmt, value: ast.Dict, lines: list[str], parts: list[str]) -> str | None:
    """A dictionary whose items begin on lines of their own, with the named keys only."""
    items = {
        ast.literal_eval(key): (key.lineno, item.end_lineno or key.lineno)
        for key, item in zip(value.keys, value.values, strict=True)
        if key is not None
    }
    if not items.keys() >= set(parts):
        return None
    body = [line for key in parts for line in lines[items[key][0] - 1 : items[key][1]]]
    return "\n".join([*lines[first_line(node, lines) - 1 : node.lineno], *body, "}"])


class WithoutAnnotations(ast.NodeTransformer):
    """`from __future__ import annotations` is in force: nothing evaluates them."""

    def visit_arg(self, node: ast.arg) -> ast.arg:
        return ast.arg(arg=node.arg)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        node.returns = None
        return self.generic_visit(node)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.AST:
        # dataclasses read the annotations of fields as text; what those name need not exist, except ClassVar
        note = "ClassVar" if "ClassVar" in ast.unparse(node.annotation) else "None"
        self.generic_visit(node)
        node.annotation = ast.Name(id=note, ctx=ast.Load())
        return node


def free_names(text: str) -> set[str]:
    """The global names that running the definition, or what it defines, looks up."""

    def scopes(table: symtable.SymbolTable) -> Iterator[symtable.SymbolTable]:
        yield table
        for child in table.get_children():
            yield from scopes(child)

    bare = ast.unparse(ast.fix_missing_locations(WithoutAnnotations().visit(ast.parse(text))))
    top = symtable.symtable(bare, "<definition>", "exec")
    here = {s.get_name() for s in top.get_symbols() if s.is_assigned() or s.is_imported()}
    used = {
        s.get_name()
        for scope in scopes(top)
        for s in scope.get_symbols()
        if s.is_referenced() and (s.is_global() or scope is top)
    }
    return used - here - {"__class__"}


def foreign_imports(tree: ast.Module) -> Iterator[tuple[str, str]]:
    """Each name that a file imports from elsewhere, with the statement for this name alone."""
    for node in tree.body:
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.asname or alias.name.partition(".")[0], ast.unparse(ast.Import([alias]))
        elif isinstance(node, ast.ImportFrom) and str(node.module).partition(".")[0] not in PACKAGES:
            for alias in node.names:
                statement = ast.ImportFrom(node.module, [alias], node.level)
                yield alias.asname or alias.name, ast.unparse(statement)


def build(source: Path) -> NotebookNode:
    """The notebook of a source, not yet run. Raises FormatError for a directive that cannot be followed."""
    definitions = Definitions(str(source.relative_to(ROOT)) if source.is_relative_to(ROOT) else str(source))
    cells = []
    for cell in jupytext.reads(source.read_text(), fmt="py:percent").cells:
        title = cell.metadata.pop("title", "")
        cell.metadata.pop("lines_to_next_cell", None)
        kind, _, names = title.partition(":")
        if kind == "magic":
            cells.append(new_code_cell((NOTEBOOKS / "src" / "_magic.py").read_text().rstrip()))
        elif kind in SIDES:
            more = [line.removeprefix("#").strip(" ,") for line in cell.source.splitlines()]
            wanted = re.findall(r"[^,\[\]\s]+(?:\[[^\]]*\])?", ", ".join([names, *more]))
            cells += [new_code_cell(definitions.cell(*side, wanted)) for side in SIDES[kind]]
        elif title:
            raise FormatError(
                "unknown directive",
                where=definitions.where,
                expected="magic, twin: NAMES, torch: NAMES or both: NAMES",
                found=title,
            )
        else:
            cells.append(cell)
    for number, cell in enumerate(cells):
        # An id that follows from the text alone: the same source builds the same file.
        same = [c.source for c in cells[:number]].count(cell.source)
        cell.id = hashlib.sha256(f"{same}{cell.source}".encode()).hexdigest()[:12]
    return new_notebook(cells=cells, metadata=METADATA)


def execute(notebook: NotebookNode, name: str, timeout: int = 600) -> None:
    """Run all cells in a fresh kernel that cannot import the repository, and keep the outputs.

    Raises FormatError for an error in a cell, for what a cell writes to stderr, for a path of this machine in
    an output, and for a picture that is too large.
    """
    with tempfile.TemporaryDirectory() as folder:
        spec = Path(folder) / "kernels" / "standalone"
        spec.mkdir(parents=True)
        kernel = {
            "argv": [sys.executable, "-I", "-c", KERNEL, "--log-level=40", "-f", "{connection_file}"],
            "display_name": "standalone",
            "language": "python",
        }
        (spec / "kernel.json").write_text(json.dumps(kernel))
        manager = AsyncKernelManager(
            kernel_name="standalone",
            kernel_spec_manager=KernelSpecManager(kernel_dirs=[str(spec.parent)]),
        )
        empty = Path(folder) / "empty"
        empty.mkdir()
        environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
        environment["IPYTHONDIR"] = folder
        client = NotebookClient(
            notebook, km=manager, timeout=timeout, record_timing=False, coalesce_streams=True
        )
        client.owns_km = True  # it ends the kernel as well
        try:
            client.execute(cwd=str(empty), env=environment)
        except (CellExecutionError, CellTimeoutError, DeadKernelError) as error:
            shown = re.sub(r"\x1b\[[0-9;]*m", "", str(error))  # without colours
            raise FormatError("a cell failed", where=name, found=shown) from None
        places = (str(ROOT), folder, str(Path.home()) + os.sep, sys.prefix)
    notebook.metadata = nbformat.from_dict(METADATA)
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            text, size = (
                json.dumps(output),
                len(base64.b64decode(output.get("data", {}).get("image/png", ""))),
            )
            for problem, found in (
                ("a cell writes to stderr", output.get("name") == "stderr" and output.text),
                ("an output names a place on this machine", any(p in text for p in places) and text[:500]),
                (f"a picture has more than {MAX_PNG} bytes", size > MAX_PNG and str(size)),
            ):
                if found:
                    raise FormatError(problem, where=f"{name}, the cell\n{cell.source[:200]}", found=found)


def differences(built: NotebookNode, stored: NotebookNode) -> list[str]:
    """Where a stored notebook is not what its source builds, or was not run from end to end."""

    def face(notebook: NotebookNode) -> list[str]:
        lines = [json.dumps([notebook.nbformat, notebook.nbformat_minor, notebook.metadata], sort_keys=True)]
        for cell in notebook.cells:
            lines += [f"cell {cell.id} {cell.cell_type} {dict(cell.metadata)}", *cell.source.splitlines()]
        return lines

    found = list(difflib.unified_diff(face(stored), face(built), "stored", "built", lineterm=""))
    counts = [cell.execution_count for cell in stored.cells if cell.cell_type == "code"]
    if counts != list(range(1, len(counts) + 1)):
        found.append(f"not run once from top to bottom: {counts}")
    kinds = {output.output_type for cell in stored.cells for output in cell.get("outputs", [])}
    return found + (["a cell failed when it was run"] if "error" in kinds else [])


def sources() -> dict[str, Path]:
    return {p.stem: p for p in sorted((NOTEBOOKS / "src").glob("*.py")) if not p.stem.startswith("_")}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="scripts/build-notebooks", description="Build the course.")
    parser.add_argument("names", nargs="*", metavar="NAME", help="01_Attention-Mechanisms ... (default: all)")
    parser.add_argument(
        "--check", action="store_true", help="only compare the stored notebooks' code with the sources"
    )
    options = parser.parse_args(arguments)
    available = sources()
    if unknown := set(options.names) - available.keys():
        parser.error(f"no source for {', '.join(sorted(unknown))}; there are {', '.join(available)}")
    status = 0
    for name in options.names or available:
        try:
            notebook, path = build(available[name]), NOTEBOOKS / f"{name}.ipynb"
            if options.check:
                stored = nbformat.read(path, as_version=4) if path.is_file() else new_notebook()
                found = differences(notebook, stored)
                print(f"{path.name}: {'differs from its source' if found else 'as its source says'}")
                print("".join(f"  {line}\n" for line in found), end="")
                status |= bool(found)
            else:
                print(f"{path.name}: running {len(notebook.cells)} cells", flush=True)
                execute(notebook, path.name)
                nbformat.validate(notebook)
                new = path.with_suffix(".new")
                new.write_text(nbformat.writes(notebook) + "\n")
                new.replace(path)
        except TwinformersError as error:
            print(error, file=sys.stderr)
            status = 2
    return status


if __name__ == "__main__":
    sys.exit(main())
