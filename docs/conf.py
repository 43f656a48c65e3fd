"""How the documentation is built: `scripts/build-docs`. Needs no network, and its pages need none either."""

from __future__ import annotations

import inspect
import os
import re
import shutil
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

DOCS = Path(__file__).resolve().parent
ROOT = DOCS.parent
sys.path.insert(0, str(ROOT))

project = "twinformers"
author = "the twinformers authors"
project_copyright = "the twinformers authors, Apache-2.0"
html_title = "twinformers"
html_theme = "furo"
html_show_sourcelink = False
html_copy_source = False
html_static_path = ["static"]
html_css_files = ["site.css"]
html_theme_options = {"navigation_with_keys": True}

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.viewcode"]
exclude_patterns = ["gallery/*"]  # parts of the gallery, which a script puts together
nb_execution_mode = "off"  # the course is executed by scripts/build-notebooks, and a test runs it
nb_merge_streams = True
myst_enable_extensions = ["dollarmath", "amsmath"]
myst_heading_anchors = 4
myst_update_mathjax = False
html_math_renderer = "mathml"

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_inherit_docstrings = False  # else a property without one gets that of the value it overrides
python_use_unqualified_type_names = True
# Types in signatures belong to other projects' documentation, which is not at hand without a network.
nitpick_ignore_regex = [("py:.*", ".*")]
pygments_style = "friendly"
pygments_dark_style = "github-dark"

#: Made at each build and ignored by git: copies of the notebooks, and a page for each file that is linked.
COURSE, FILES = DOCS / "course", DOCS / "files"
#: A link of Markdown to what is neither on the web nor in this page.
LINK = re.compile(r"\]\((?![a-z]+:|#)([^)\s#]+)(#[^)\s]*)?\)")
LANGUAGES = {
    ".py": "python",
    ".sh": "bash",
    ".sbatch": "bash",
    ".json": "json",
    ".toml": "toml",
    ".md": "markdown",
}


def _write(path: Path, text: str) -> None:
    """Only what has changed, so that the next build reads only what has changed."""
    if not path.exists() or path.read_text() != text:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def _language(path: Path) -> str:
    if path.suffix in LANGUAGES:
        return LANGUAGES[path.suffix]
    first = path.read_text().partition("\n")[0]
    return "python" if "python" in first else "bash" if "bash" in first else "text"


def _inside(target: str, page: Path) -> Path | None:
    """The page that stands for a linked file outside of docs/, relative to docs/; None for other links."""
    path = (page.parent / target).resolve()
    if path.is_relative_to(DOCS) or not path.is_relative_to(ROOT) or not path.is_file():
        return None
    where = path.relative_to(ROOT)
    if where.parts[0] == "notebooks" and path.suffix == ".ipynb":
        return Path("course", path.name)
    return Path("files", f"{where}.md")


def _pages() -> list[Path]:
    made = {COURSE, FILES, DOCS / "gallery"}
    return [p for p in sorted(DOCS.rglob("*.md")) if not made & set(p.parents)]


def prepare(app: Any, config: Any) -> None:
    """Copy the notebooks, and make a page of every file of the repository that some page links to."""
    wanted = set()
    for notebook in sorted((ROOT / "notebooks").glob("[0-9]*.ipynb")):
        copy = COURSE / notebook.name
        wanted.add(copy)
        _write(copy, notebook.read_text())
    for page in _pages():
        for match in LINK.finditer(page.read_text()):
            target = _inside(match[1], page)
            if target is None or target.parts[0] != "files":
                continue
            path = (page.parent / match[1]).resolve()
            up = "/".join([".."] * len(target.parts))
            include = f"{up}/{path.relative_to(ROOT)}"
            text = (
                f"---\norphan: true\n---\n\n# `{path.relative_to(ROOT)}`\n\n"
                f"```{{literalinclude}} {include}\n:language: {_language(path)}\n:linenos:\n```\n"
            )
            wanted.add(DOCS / target)
            _write(DOCS / target, text)
    for folder in (COURSE, FILES):
        for path in list(folder.rglob("*")) if folder.exists() else []:
            if path.is_file() and path not in wanted:
                path.unlink()
        if folder.exists() and not any(p.is_file() for p in folder.rglob("*")):
            shutil.rmtree(folder)


def relink(app: Any, docname: str, source: list[str]) -> None:
    """Links to files outside of docs/ lead to the pages that were made for them."""
    page = DOCS / f"{docname}.md"
    if not page.exists() or page.is_relative_to(FILES):
        return

    def inside(match: re.Match[str]) -> str:
        target = _inside(match[1], page)
        if target is None:
            return match[0]
        return f"]({os.path.relpath(DOCS / target, page.parent)})"

    source[0] = LINK.sub(inside, source[0])


# --- docstrings: plain text with code in backticks, which reStructuredText would misread


def _escaped(text: str) -> str:
    """A paragraph for reStructuredText: code as literals, all else as it stands."""
    parts = re.split(r"(`[^`]+`)", text)
    for n, part in enumerate(parts):
        if n % 2:
            inner = part[1:-1].strip()
            # A literal must be bounded by what is no letter; an escaped blank is one that is not shown.
            parts[n] = rf"\ ``{inner}``\ "
        else:
            parts[n] = re.sub(r"([\\*_|`\[\]])", r"\\\1", part)
    return "".join(parts)


def rewrite(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Paragraphs are paragraphs, "- " is a list, and what is indented is code."""
    blocks: list[list[str]] = [[]]
    for line in lines:
        if line.strip():
            blocks[-1].append(line)
        elif blocks[-1]:
            blocks.append([])
    written: list[str] = []
    for block in filter(None, blocks):
        if all(line.startswith("    ") for line in block):
            written += ["::", "", *block, ""]
        elif any(line.startswith("- ") for line in block):
            for line in block:
                bullet = line.startswith("- ")
                written.append(("- " if bullet else "") + _escaped(line[2:] if bullet else line))
            written.append("")
        else:
            written += [*_escaped("\n".join(block)).split("\n"), ""]
    # What begins with an escaped blank would be taken for an indented line.
    lines[:] = [line.lstrip() if line.startswith(r"\ ``") else line for line in written]


def signature(
    app: Any, what: str, name: str, obj: Any, options: Any, given: str | None, returns: str | None
) -> tuple[str, str | None] | None:
    """Defaults that cannot be read back as dots. Of a Flax module, what its own constructor takes: its
    metaclass says (*args, **kwargs)."""
    if what != "class" or type(obj) is type:
        return (re.sub(r"<\w+( <\w+>|[^<>]*)>", "...", given), returns) if given else None
    try:
        found = inspect.signature(obj.__init__)
    except (TypeError, ValueError):
        return None
    parameters = [p for p in found.parameters.values() if p.name != "self"]
    text = str(found.replace(parameters=parameters, return_annotation=inspect.Signature.empty))
    return re.sub(r"<class 'jax\.numpy\.(\w+)'>", r"jnp.\1", text).replace("'", ""), None


# --- formulas as MathML, which browsers draw themselves: no script, no fonts from elsewhere


def _mathml(latex: str, display: str) -> str:
    from latex2mathml.converter import convert

    return convert(latex, display=display)


def visit_math(self: Any, node: Any) -> None:
    from docutils import nodes

    self.body.append(_mathml(node.astext(), "inline"))
    raise nodes.SkipNode


def visit_displaymath(self: Any, node: Any) -> None:
    from docutils import nodes

    self.body.append(f'<div class="math">{_mathml(node.astext(), "block")}</div>\n')
    raise nodes.SkipNode


def setup(app: Any) -> dict[str, bool]:
    app.connect("config-inited", prepare)
    app.connect("source-read", relink)
    app.connect("autodoc-process-docstring", rewrite)
    app.connect("autodoc-process-signature", signature)
    app.add_html_math_renderer("mathml", (visit_math, None), (visit_displaymath, None))
    return {"parallel_read_safe": True, "parallel_write_safe": True}
