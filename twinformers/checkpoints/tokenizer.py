"""Text to token ids and back, and chats to text, from the files that travel with the weights.

Chat templates are programs by whoever made the checkpoint. jinja2's sandbox keeps them out of Python's
insides, but not from eating all time and memory; here every value that a template makes is weighed, and a
trace function watches the clock.
"""

from __future__ import annotations

import functools
import json
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import datetime
from typing import Any

import jinja2
import jinja2.ext
import jinja2.filters
from jinja2 import nodes
from jinja2.compiler import CodeGenerator
from jinja2.sandbox import ImmutableSandboxedEnvironment, SecurityError
from tokenizers import Tokenizer as _Backend

from twinformers.errors import FormatError, SourceError, UsageError

#: Characters of a template, characters of its output and of any value in between, characters of all these
#: values together, bits of an integer, and seconds of a rendering.
MAX_TEMPLATE = 1 << 18
MAX_VALUE = 1 << 20
MAX_WORK = 1 << 27
MAX_BITS = 4096
MAX_SECONDS = 1.0

_NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class Tokenizer:
    """A tokenizer.json with the ids and the chat template of the files beside it.

    `bos_id` and `pad_id` are None, `eos_ids` empty, where no file names them. `named` holds the special
    tokens by what the files call them ("bos_token"), `template` the chat template.
    """

    def __init__(
        self,
        backend: _Backend,
        config: Mapping[str, Any],
        generation: Mapping[str, Any],
        template: str | None,
        where: str,
    ):
        self._backend, self.template, self._where = backend, template, where
        backend.no_truncation()
        backend.no_padding()
        self.vocab_size: int = backend.get_vocab_size(with_added_tokens=True)
        self.named = {name: _content(config[name]) for name in _NAMED if config.get(name)}
        self._special = {i for i, token in backend.get_added_tokens_decoder().items() if token.special}

        def ids(name: str) -> tuple[int, ...]:
            found = generation.get(f"{name}_token_id")
            if found is None and f"{name}_token" in self.named:
                found = backend.token_to_id(self.named[f"{name}_token"])
            values = found if isinstance(found, list) else [] if found is None else [found]
            if not all(isinstance(i, int) and i >= 0 for i in values):
                raise FormatError("not a token id", where=f"{where}: {name}_token_id", found=repr(found))
            return tuple(values)

        self.bos_id: int | None = next(iter(ids("bos")), None)
        self.eos_ids: tuple[int, ...] = ids("eos")
        self.pad_id: int | None = next(iter(ids("pad")), None)

    @classmethod
    def from_assets(cls, assets: Mapping[str, bytes], where: str) -> Tokenizer:
        """The tokenizer in a checkpoint's assets; `where` names the checkpoint in errors.

        Raises SourceError where there is no tokenizer.json, FormatError where a file is malformed.
        """
        if "tokenizer.json" not in assets:
            raise SourceError(
                "there is no tokenizer",
                where=where,
                expected="tokenizer.json",
                found=", ".join(sorted(assets)) or "no such files",
                hint="put the model's tokenizer.json and tokenizer_config.json beside the weights",
            )
        try:
            backend = _Backend.from_buffer(assets["tokenizer.json"])
        except Exception as error:  # tokenizers raises nothing more specific
            raise FormatError(f"malformed tokenizer: {error}", where=f"{where}: tokenizer.json") from error
        config = _object(assets, "special_tokens_map.json", where) | _object(
            assets, "tokenizer_config.json", where
        )
        template = _chat_template(config, assets, where)
        return cls(backend, config, _object(assets, "generation_config.json", where), template, where)

    @property
    def has_chat_template(self) -> bool:
        return self.template is not None

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """The ids of a text; `special` adds what the model expects around it (often a BOS token)."""
        return self._backend.encode(text, add_special_tokens=special).ids

    def decode(self, ids: Iterable[int], *, skip_special: bool = True) -> str:
        """The text of some ids; one beyond the vocabulary has none. Raises UsageError for a negative id."""
        ids = [int(i) for i in ids]
        if ids and min(ids) < 0:
            raise UsageError("not a token id", where="ids", expected="at least 0", found=str(min(ids)))
        return self._backend.decode(ids, skip_special_tokens=skip_special)

    def stream(self, ids: Iterable[int], *, skip_special: bool = True) -> Iterator[str]:
        """Text as soon as it is complete, while the ids still come; joined, it is what `decode` gives.

        A character of which bytes are missing decodes to U+FFFD, so text is held back while it ends in one.
        """
        context: list[
            int
        ] = []  # what the last piece came from: decoders treat the start of a text differently
        held: list[int] = []
        for i in ids:
            if skip_special and i in self._special:
                continue
            held.append(i)
            piece = self._continued(context, held, skip_special)
            if piece and not piece.endswith("\ufffd"):
                yield piece
                context, held = held, []
        if held and (piece := self._continued(context, held, skip_special)):
            yield piece

    def _continued(self, context: list[int], held: list[int], skip_special: bool) -> str:
        before = self.decode(context, skip_special=skip_special)
        return self.decode(context + held, skip_special=skip_special)[len(before) :]

    def apply_chat_template(
        self, messages: list[dict[str, str]], *, add_generation_prompt: bool = True
    ) -> str:
        """The chat as one text, special tokens included: encode it with `special=False`.

        Raises SourceError where there is no template, FormatError where it fails, refuses the messages, or
        takes too much time or memory.
        """
        if self.template is None:
            raise SourceError(
                "there is no chat template",
                where=self._where,
                expected="chat_template in tokenizer_config.json, or chat_template.jinja",
                hint="use an instruction-tuned model, or give plain text",
            )
        variables = {
            **self.named,
            "messages": [dict(message) for message in messages],
            "tools": None,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
        }
        return _render(self.template, variables, f"{self._where}: chat_template")


def _object(assets: Mapping[str, bytes], name: str, where: str) -> dict[str, Any]:
    try:
        value = json.loads(assets.get(name, b"{}"))
    except (ValueError, RecursionError) as error:
        raise FormatError(f"malformed JSON: {error}", where=f"{where}: {name}") from error
    if not isinstance(value, dict):
        raise FormatError(
            "malformed file", where=f"{where}: {name}", expected="an object", found=type(value).__name__
        )
    return value


def _content(token: Any) -> str:
    """A token as these files spell it: its text, or an object around it."""
    return str(token.get("content", "")) if isinstance(token, dict) else str(token)


def _chat_template(config: Mapping[str, Any], assets: Mapping[str, bytes], where: str) -> str | None:
    if "chat_template.jinja" in assets:  # the newer place, which wins in transformers as well
        try:
            return assets["chat_template.jinja"].decode("utf-8")
        except UnicodeDecodeError as error:
            raise FormatError(f"not UTF-8: {error}", where=f"{where}: chat_template.jinja") from error
    template = config.get("chat_template")
    if isinstance(template, list):
        named = {t.get("name"): t.get("template") for t in template if isinstance(t, dict)}
        template = named.get("default")
    if template is not None and not isinstance(template, str):
        found = type(template).__name__
        raise FormatError("malformed chat template", where=where, expected="a text", found=found)
    return template


class _TimeUp(BaseException):
    """Not an Exception: jinja2 swallows some, and a trace function that raised is not called again."""


@functools.lru_cache(maxsize=4)  # compiling takes most of the time, and a conversation renders at every turn
def _compiled(source: str) -> tuple[_Sandbox, jinja2.Template]:
    sandbox = _Sandbox()
    return sandbox, sandbox.from_string(source)


def _render(source: str, variables: Mapping[str, Any], where: str) -> str:
    """The template's output. Raises FormatError for whatever goes wrong in it."""
    end = time.monotonic() + MAX_SECONDS

    # A loop that emits nothing offers no other place to look at the clock than its own lines.
    def watch(frame: object, event: str, argument: object) -> Callable[..., Any]:
        if time.monotonic() > end:
            raise _TimeUp
        return watch

    tracing = sys.gettrace()
    sys.settrace(watch)
    try:
        if len(source) > MAX_TEMPLATE:
            raise SecurityError(f"it is longer than {MAX_TEMPLATE} characters")
        sandbox, template = _compiled(source)
        sandbox.work = 0
        return sandbox.concat(template.generate(variables))
    except _TimeUp:
        problem = f"it took longer than {MAX_SECONDS} seconds"
    except Exception as error:  # a template can raise anything
        # What a template says is not to be trusted with the terminal.
        text = "".join(c if c.isprintable() else " " for c in str(error)[:400])
        problem = text if isinstance(error, jinja2.TemplateError) else f"{type(error).__name__}: {text}"
    finally:
        sys.settrace(tracing)
    raise FormatError(
        f"the chat template failed: {problem}", where=where, hint="give plain text, or another template"
    )


class _Code(CodeGenerator):
    """jinja2's compiler, which builds containers and joins text (`~`) outside the environment's hands."""

    def visit_Concat(self, node: nodes.Concat, frame: Any) -> None:
        self.write("environment.concat(map(str, (")
        for part in node.nodes:
            self.visit(part, frame)
            self.write(", ")
        self.write(")))")

    def visit_List(self, node: nodes.List, frame: Any) -> None:
        self.write("environment.spend(")
        super().visit_List(node, frame)
        self.write(")")

    def visit_Dict(self, node: nodes.Dict, frame: Any) -> None:
        self.write("environment.spend(")
        super().visit_Dict(node, frame)
        self.write(")")

    def visit_Tuple(self, node: nodes.Tuple, frame: Any) -> None:
        if node.ctx != "load":  # a target of an assignment
            return super().visit_Tuple(node, frame)
        self.write("environment.spend(")
        super().visit_Tuple(node, frame)
        self.write(")")


class _Generation(jinja2.ext.Extension):
    """The tag `generation`, by which transformers finds the assistant's part; the text stays as it is."""

    tags = {"generation"}  # noqa: RUF012 (as jinja2 declares it)

    def parse(self, parser: Any) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_same"), [], [], body).set_lineno(line)

    def _same(self, caller: Callable[[], str]) -> str:
        return caller()


def _weight(value: object) -> int:
    """The characters and elements in a value, counted as often as they would be printed. Raises SecurityError
    beyond the limit, and so bounds what a printing, comparing or hashing of the value can take."""
    total, stack = 0, [value]
    while stack:
        item = stack.pop()
        total += 1
        if isinstance(item, (str, bytes)):
            total += len(item)
        elif isinstance(item, int) and item.bit_length() > MAX_BITS:
            raise SecurityError("it makes a number that is too large")
        elif isinstance(item, Mapping):
            stack += item.keys()
            stack += item.values()
        elif isinstance(item, (list, tuple, set, frozenset)):
            stack += item
        _bounded(total + len(stack))
    return total


def _bounded(size: int) -> None:
    if size > MAX_VALUE:
        raise SecurityError(f"it makes a value of more than {MAX_VALUE} characters")


def _check_width(*widths: object) -> None:
    """Bound what is repeated once for each element or line: an indentation or a separator."""
    if any((len(w) if isinstance(w, str) else w if isinstance(w, int) else 0) > 64 for w in widths):
        raise SecurityError("an indentation or separator is longer than 64 characters")


def _replace(text: object, old: object, new: object, count: int | None = None) -> str:
    text, old, new = str(text), str(old), str(new)
    _bounded(len(text) + text.count(old) * len(new))
    return text.replace(old, new, -1 if count is None else count)


def _check_format(text: str, mark: str, arguments: object) -> None:
    # Widths are bounded by refusing those of four digits, and those that come from an argument.
    wild = r"%(\(|[^a-zA-Z%]*(\*|\d{4}))" if mark == "%" else r"\{[^{}]*\d{4}|\{[^{}]+\{"
    if re.search(wild, text):
        raise SecurityError("this form of a format is not available")
    _bounded(len(text) + text.count(mark) * (999 + _weight(arguments)))


def _format(text: object, *arguments: object) -> str:
    _check_format(str(text), "%", arguments)
    return str(text) % arguments


def _trim(text: object, characters: str | None = None) -> str:
    _check_search(str(text), characters)
    return str(text).strip(characters)


def _check_search(text: str, *arguments: object) -> None:
    """Searches from the right and stripping take the product of both lengths in the worst case."""
    if any(isinstance(a, str) and len(text) * len(a) > 1 << 28 for a in arguments):
        raise SecurityError("a search takes too long")


def _indent(text: str, width: int | str = 4, first: bool = False, blank: bool = False) -> str:
    _check_width(width)
    return jinja2.filters.do_indent(text, width, first, blank)


def _tojson(
    value: object,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    _weight(value)
    _check_width(indent, *(separators or ()))
    encoder = json.JSONEncoder(
        ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )
    return _concat(encoder.iterencode(value))


@jinja2.pass_environment
def _join(
    environment: jinja2.Environment, values: Iterable[Any], separator: str = "", attribute: str | None = None
) -> str:
    if attribute is not None:
        values = map(jinja2.filters.make_attrgetter(environment, attribute), values)
    return _concat(_between(str(separator), map(str, values)))


def _between(separator: str, parts: Iterator[str]) -> Iterator[str]:
    yield next(parts, "")
    for part in parts:
        yield separator
        yield part


def _concat(parts: Iterable[str]) -> str:
    kept, size = [], 0
    for part in parts:
        size += len(part)
        _bounded(size)
        kept.append(part)
    return "".join(kept)


def _raise_exception(message: object) -> None:
    raise jinja2.TemplateError(str(message))


def _strftime_now(form: str) -> str:
    _check_width(form)
    return datetime.now().strftime(form)


#: jinja2's own filters whose result is no larger than a small multiple of what goes in.
# fmt: off
_FILTERS = (
    "abs", "attr", "capitalize", "count", "d", "default", "dictsort", "e", "escape", "first", "float",
    "groupby", "int", "items", "last", "length", "list", "lower", "map", "max", "min", "reject", "rejectattr",
    "reverse", "safe", "select", "selectattr", "sort", "string", "title", "unique", "upper", "wordcount",
)
# fmt: on
_OWN_FILTERS: dict[str, Callable[..., Any]] = {
    "format": _format,
    "indent": _indent,
    "join": _join,
    "replace": _replace,
    "tojson": _tojson,
    "trim": _trim,
}
#: Methods of texts that make as much text as a number asks for, or leave for types that are not watched.
_REFUSED_METHODS = {"center", "encode", "expandtabs", "format_map", "ljust", "rjust", "translate", "zfill"}


class _Sandbox(ImmutableSandboxedEnvironment):
    """jinja2's sandbox with transformers' settings, and a limit to what any single step may make."""

    code_generator_class = _Code
    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols, _Generation]
        )
        self.work = 0
        filters = {name: self.filters[name] for name in _FILTERS} | _OWN_FILTERS
        self.filters = {name: self._watched(function) for name, function in filters.items()}
        del self.globals["lipsum"]
        self.globals |= {"raise_exception": _raise_exception, "strftime_now": _strftime_now}

    def spend(self, value: Any) -> Any:
        """The value itself, where its weight is within the limits of one value and of the rendering."""
        self.work += _weight(value)
        if self.work > MAX_WORK:
            raise SecurityError("it makes too much text in all")
        return value

    def concat(self, parts: Iterable[str]) -> str:  # type: ignore[override]
        return self.spend(_concat(parts))

    def _watched(self, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)  # takes jinja2's marks along, which say what the filter wants to be passed
        def watched(*args: Any, **kwargs: Any) -> Any:
            return self.spend(function(*args, **kwargs))

        return watched

    def call(self, context: Any, function: Any, /, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        # A macro sees its arguments as a tuple and a dict, which are values too.
        _weight(args)
        _weight({k: v for k, v in kwargs.items() if k not in ("_loop_vars", "_block_vars")})
        method = getattr(function, "__wrapped__", function)  # the sandbox wraps str.format
        subject, name = getattr(method, "__self__", None), getattr(method, "__name__", "")
        if isinstance(subject, (int, float, bytes)):
            raise SecurityError(f"the method {name} is not available")
        if isinstance(subject, str):
            args = self._check_method(subject, name, args, kwargs)
        return self.spend(super().call(context, function, *args, **kwargs))

    def _check_method(
        self, text: str, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Any, ...]:
        if name in _REFUSED_METHODS:
            raise SecurityError(f"the method {name} is not available")
        if name == "replace" and len(args) >= 2:
            _bounded(len(text) + text.count(args[0]) * len(args[1]))
        elif name == "join" and args:
            parts = list(args[0])
            _bounded(_weight(parts) + len(parts) * len(text))
            return (parts,)
        elif name == "format":
            _check_format(text, "{", [args, {k: v for k, v in kwargs.items() if k[:1] != "_"}])
        else:
            _check_search(text, *args)
        return args

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "*":
            for value, times in ((left, right), (right, left)):
                if isinstance(times, int) and isinstance(value, (str, list, tuple)):
                    _bounded(_weight(value) * times)
        if operator == "%" and isinstance(left, str):
            _check_format(left, "%", right)
        if isinstance(left, int) and isinstance(right, int):
            bits = (
                left.bit_length() * abs(right) if operator == "**" else left.bit_length() + right.bit_length()
            )
            if bits > MAX_BITS:
                raise SecurityError("it makes a number that is too large")
        return self.spend(super().call_binop(context, operator, left, right))
