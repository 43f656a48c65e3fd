# One module for each framework: both sides can then define an `Attention`, and neither finds the other's.
import __future__

import linecache
import sys
import types

from IPython.core.magic import register_cell_magic

MODULES = {"jax": "jx", "torch": "pt", "both": "shared"}
for name in MODULES.values():
    module = sys.modules.setdefault(name, types.ModuleType(name))
    module.__file__ = f"<{name}>"


@register_cell_magic
def twin(line, cell):
    """Run the cell in the module `jx` (%%twin jax) or `pt` (%%twin torch), or for both (%%twin both)."""
    module = sys.modules[MODULES[line.strip()]]
    # The module's text grows cell by cell, so that tracebacks show it and `inspect.getsource` finds it.
    text = "".join(linecache.cache[module.__file__][2]) if module.__file__ in linecache.cache else ""
    text += "" if cell in text else cell
    linecache.cache[module.__file__] = (len(text), None, text.splitlines(keepends=True), module.__file__)
    blank = "\n" * text[: text.index(cell)].count("\n")  # keeps line numbers true
    flags = __future__.annotations.compiler_flag  # as each source file has it: annotations are not evaluated
    exec(compile(blank + cell, module.__file__, "exec", flags), vars(module))
    if module.__name__ == "shared":
        for name in ("jx", "pt"):
            vars(sys.modules[name]).update((k, v) for k, v in vars(module).items() if k[:2] != "__")
