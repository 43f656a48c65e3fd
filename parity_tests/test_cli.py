"""The command: every verb's example and keys, its exit codes, and no traceback whatever it is given.

Verbs run in this process where they can; a few go through the installed command itself.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from typer.main import get_command

import jax_models.llama
from twinformers import port
from twinformers.cli.app import app, run
from twinformers.configs import preset, presets

SCRIPT = str(Path(sys.executable).with_name("twinformers"))
TINY = "preset:llama-tiny"
VERBS = sorted(get_command(app).commands)


pytestmark = pytest.mark.usefixtures("own_logging")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A folder with a tokenizer whose every word is one id, and no chat template."""
    folder = tmp_path_factory.mktemp("cli") / "model"
    port(TINY, folder, to="hf")
    words = Tokenizer(models.WordLevel({f"w{n}": n for n in range(preset("llama-tiny").vocab_size)}, "w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture
def call(capsys):
    """Run the command; its exit code, stdout and stderr."""

    def call(*arguments):
        code = run([str(a) for a in arguments])
        return (code, *capsys.readouterr())

    return call


def as_json(result):
    code, out, _ = result
    return code, json.loads(out)


# Help


@pytest.mark.parametrize("verb", VERBS)
def test_help_has_an_example_that_parses(verb, call):
    code, out, err = call(verb, "--help")
    assert (code, err) == (0, "") and "--json" in out
    example = re.search(r"Example:\s+twinformers (.*)", " ".join(out.split()))[1]
    name, *arguments = shlex.split(example)
    assert name == verb
    get_command(app).commands[verb].make_context(verb, arguments)


def test_an_example_that_does_not_parse_is_caught():
    with pytest.raises(Exception, match=r"(?i)no such option"):
        get_command(app).commands["port"].make_context("port", ["demo", "out", "--too", "jax"])


def test_the_verbs_are_those_that_are_documented(call):
    code, out, _ = call("--help")
    assert code == 0
    assert {"bench", "generate", "inspect", "list", "port", "verify"} <= set(VERBS)
    assert all(re.search(rf"^  {verb} +[A-Z]", out, re.MULTILINE) for verb in VERBS)


# What each verb says


def test_list(call):
    code, found = as_json(call("list", "--json"))
    assert code == 0 and found.keys() == {"architectures", "presets"}
    assert {p["preset"]: p["architecture"] for p in found["presets"]} == {
        name: config.architecture for name, config in presets().items()
    }
    assert all(p.keys() == {"preset", "architecture", "parameters"} for p in found["presets"])
    sizes = {p["preset"]: p["parameters"] for p in found["presets"]}
    assert sizes["llama2-7b"] == 6_738_415_616
    code, out, _ = call("list")
    assert code == 0 and re.search(r"preset:llama2-7b.*llama.*6,738,415,616", out)


def test_inspect(model, call):
    code, found = as_json(call("inspect", model, "--json"))
    assert code == 0 and found.keys() == {
        "source",
        "format",
        "architecture",
        "parameters",
        "dtypes",
        "config",
        "assets",
        "tensors",
    }
    assert (found["source"], found["format"], found["architecture"]) == (str(model), "hf", "llama")
    assert found["config"]["rope_theta"] == preset("llama-tiny").rope_theta
    assert found["dtypes"] == {"float32": len(found["tensors"])}
    assert {"name": "model.norm.weight", "shape": [48], "dtype": "float32"} in found["tensors"]
    assert found["assets"] == ["generation_config.json", "tokenizer.json"]
    code, out, _ = call("inspect", model)
    assert code == 0 and f"{found['parameters']:,}" in out and "[48]" in out


def test_port(model, call, tmp_path):
    to = tmp_path / "out"
    code, found = as_json(call("port", model, to, "--to", "torch", "--dtype", "bfloat16", "--json"))
    assert code == 0 and found.keys() == {
        "source",
        "source_format",
        "destination",
        "format",
        "architecture",
        "parameters",
        "tensors",
        "bytes",
        "dtypes",
        "losses",
        "files",
        "seconds",
    }
    assert found["format"] == "torch" and found["source_format"] == "hf"
    assert found["dtypes"] == {"bfloat16": found["tensors"]}
    assert found["bytes"] == 2 * found["parameters"]
    assert (to / "tokenizer.json").read_bytes() == (model / "tokenizer.json").read_bytes()
    code, out, err = call("port", model, to, "--to", "hf", "--overwrite")
    assert code == 0 and out.startswith("hf -> hf: 30 tensors (30 x float32)") and err == ""


def test_generate(model, call):
    arguments = ["generate", model, "--framework", "torch", "--prompt", "w3 w5 w7", "--max-new-tokens", 5]
    code, found = as_json(call(*arguments, "--json"))
    assert code == 0 and found.keys() == {"outputs"}
    (output,) = found["outputs"]
    assert output.keys() >= {"framework", "text", "tokens", "prefill_seconds", "decode_tokens_per_second"}
    assert output["framework"] == "torch" and len(output["tokens"]) == 5
    assert output["text"].split() == [f"w{token}" for token in output["tokens"]]
    code, out, err = call(*arguments)
    assert code == 0 and out.strip() == output["text"].strip() and err.startswith("torch: 5 tokens")


def test_generate_in_int8_with_a_penalty(model, call):
    arguments = ["generate", model, "--framework", "torch", "--prompt", "w3 w5 w7", "--max-new-tokens", 40]
    tokens = [
        as_json(call(*arguments, *more, "--json"))[1]["outputs"][0]["tokens"]
        for more in ([], ["--quantize", "int8"], ["--repetition-penalty", "1e6"])
    ]
    assert tokens[0] != tokens[1] and len(set(tokens[0])) < 40
    assert len({3, 5, 7, *tokens[2]}) == 43  # none comes again, as long as others have a chance


@pytest.mark.slow
def test_generate_with_both(model, call):
    code, out, err = call(
        "generate", model, "--framework", "both", "--prompt", "w3 w5 w7", "--max-new-tokens", 5
    )
    first, second = (line.split("] ") for line in out.strip().splitlines())
    assert code == 0 and (first[0], second[0]) == ("[jax", "[torch") and first[1] == second[1]
    assert "jax: 5 tokens" in err and "torch: 5 tokens" in err


def test_verify(call):
    code, found = as_json(call("verify", TINY, "--dtype", "float64", "--check", "activations", "--json"))
    assert code == 0 and found.keys() >= {"ok", "source", "architecture", "checks"}
    assert (found["ok"], found["source"], found["architecture"]) == (True, TINY, "llama")
    documented = {"check", "dtype", "left", "right", "path", "max_abs", "max_rel", "limit", "ok"}
    assert all(c.keys() >= documented for c in found["checks"])
    assert {c["limit"] for c in found["checks"]} == {1e-12}


def test_verify_that_fails_has_its_own_exit_code(call, monkeypatch):
    monkeypatch.setattr(jax_models.llama, "constrain", lambda x, name: x * 1.001)
    code, found = as_json(call("verify", TINY, "--dtype", "float64", "--check", "logits", "--json"))
    assert code == 1 and not found["ok"]


# Bad input


GENERATE = ["generate", "{model}", "--prompt", "w3"]
PORT = ["port", TINY, "{tmp}/out", "--to"]
VERIFY = ["verify", TINY]
BENCH = ["bench", TINY, "--task", "prefill"]

#: The arguments, and what the one message must say.
BAD = {
    "no verb": (["frobnicate"], "No such command 'frobnicate'"),
    "no source": (["inspect"], "(?i)missing argument 'source'"),
    "unknown option": (["list", "--yaml"], "No such option"),
    "no format": (["port", TINY, "{tmp}/out"], "Missing option '--to'"),
    "unknown preset": (["inspect", "preset:llama2-7c"], "preset:llama2-7c: no such preset.*llama2-7b"),
    "bad seed": (["inspect", f"{TINY}@x"], "preset:llama-tiny@x.*found: +'x'"),
    "enormous seed": (["inspect", f"{TINY}@" + "9" * 5000], "the seed is no number"),
    "unknown source": (["inspect", "{tmp}/nothing"], "{tmp}/nothing: no such source.*expected: a path"),
    "unknown word": (["inspect", "smollm3"], "smollm3: no such source"),
    "endless source": (["inspect", "x" * 5000], "no such source"),
    "somebody's home": (["inspect", "~nobody-here/x"], "no such"),
    "hub out of reach": (["inspect", "no-such-org/no-such-model"], "no-such-org/no-such-model"),
    "file that is no checkpoint": (["inspect", __file__], "test_cli.py: not a checkpoint"),
    "folder that is no checkpoint": (["inspect", "{tmp}"], "{tmp}: the folder is no checkpoint"),
    "unknown format": (
        [*PORT, "onnx"],
        "to: unknown format.*one of hf, torch, jax.*found: +'onnx'",
    ),
    "bad dtype": (
        [*PORT, "hf", "--dtype", "int8"],
        "dtype: unknown dtype.*one of keep.*found: +'int8'",
    ),
    "destination exists": (
        ["port", TINY, "{model}", "--to", "hf"],
        "{model}: the destination exists.*--over",
    ),
    "destination is precious": (
        ["port", TINY, "{model}/..", "--to", "hf", "--overwrite"],
        "{model}/..: the destination is not a checkpoint",
    ),
    "destination unwritable": (
        ["port", TINY, "/proc/self/x", "--to", "hf"],
        "/proc/self/x: .* be written",
    ),
    "destination below a file": (["port", TINY, __file__ + "/x", "--to", "hf"], "cannot be written"),
    "somebody's home to write": (["port", "{tmp}", "~nobody-here/x", "--to", "hf"], "no checkpoint"),
    "unknown framework": (
        [*GENERATE, "--framework", "tensorflow"],
        "framework: unknown framework.*expected: jax, torch or both.*found: +'tensorflow'",
    ),
    "negative temperature": ([*GENERATE, "--temperature", "-1"], "temperature: bad value.*found: +-1.0"),
    "temperature not a number": ([*GENERATE, "--temperature", "nan"], "temperature: bad value.*found: +nan"),
    "temperature a word": ([*GENERATE, "--temperature", "hot"], "'--temperature'"),
    "negative top k": ([*GENERATE, "--top-k", "-1"], "top_k: bad value"),
    "top p of nothing": ([*GENERATE, "--top-p", "0"], "top_p: bad value.*found: +0.0"),
    "negative seed": ([*GENERATE, "--seed", "-1"], "seed: bad value"),
    "no tokens": (
        [*GENERATE, "--max-new-tokens", "0"],
        "max_new_tokens: bad value.*>= 1.*found: +0",
    ),
    "too many tokens": (
        [*GENERATE, "--framework", "torch", "--max-new-tokens", "5000"],
        "max_new_tokens: more positions.*at most 1024.*found: +1 . 5000",
    ),
    "empty prompt": (["generate", "{model}", "--prompt", "", "--framework", "torch"], "a prompt is empty"),
    "generate in a bad dtype": ([*GENERATE, "--dtype", "keep"], "dtype: unknown dtype.*found: +'keep'"),
    "float64 without x64": ([*GENERATE, "--dtype", "float64"], "dtype: JAX would.*JAX_ENABLE_X64"),
    "unknown quantisation": (
        [*GENERATE, "--quantize", "int3"],
        "quantize: unknown quan.*int8.*found: +'int3'",
    ),
    "no penalty": ([*GENERATE, "--repetition-penalty", "0"], "repetition_penalty: bad value.*found: +0"),
    "no tokenizer": (["generate", TINY, "--prompt", "hello"], f"{TINY}: .*no tokenizer.*tokenizer.json"),
    "no chat template": ([*GENERATE, "--chat"], "{model}: there is no chat template"),
    "unknown task": (["bench", TINY, "--task", "sleep"], "task: unknown task.*decode.*found: +'sleep'"),
    "bench of nothing": ([*BENCH, "--batch", "0"], "batch: bad value.*found: +0"),
    "bench with an unknown framework": ([*BENCH, "--framework", "caffe"], "framework: .*found: +'caffe'"),
    "bench in a bad dtype": ([*BENCH, "--dtype", "keep"], "dtype: unknown dtype.*found: +'keep'"),
    "bench without repeats": ([*BENCH, "--repeats", "0"], "repeats: bad value"),
    "unknown sweep": ([*BENCH, "--sweep", "width"], "sweep: unknown sweep.*found: +'width'"),
    "sweep of a start": (["bench", TINY, "--task", "start", "--sweep", "batch"], "no size to sweep"),
    "unknown kind of report": ([*BENCH, "--report", "{tmp}/speed.txt"], "report: unknown kind.*speed.txt"),
    "plots below a file": ([*BENCH, "--plots", __file__ + "/x"], "plots cannot be made"),
    "bench of too many tokens": ([*BENCH, "--prompt-tokens", "5000"], "more positions.*at most 1024"),
    "bench of no language model": (["bench", "preset:transformer-tiny", "--task", "load"], "only causal"),
    "unknown check": ([*VERIFY, "--check", "taste"], "check: unknown check.*logits.*found: +'taste'"),
    "verify in a bad dtype": (
        [*VERIFY, "--dtype", "float8"],
        "dtype: unknown dtype.*found: +'float8'",
    ),
    "unknown JAX device": ([*VERIFY, "--jax-device", "abacus"], "jax device.*found: +'abacus'"),
    "JAX device out of range": ([*VERIFY, "--jax-device", "cpu:99"], "jax device.*found: +'cpu:99'"),
    "negative JAX device": ([*VERIFY, "--jax-device", "cpu:-1"], "jax device.*found: +'cpu:-1'"),
    "unknown PyTorch device": (
        [*VERIFY, "--torch-device", "abacus"],
        "torch device.*found: +'abacus'",
    ),
    "PyTorch device that is not there": (
        [*VERIFY, "--torch-device", "cuda:99"],
        "'cuda:99'",
    ),
    "PyTorch device without values": (
        [*VERIFY, "--torch-device", "meta"],
        "torch device.*found: +'meta'",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_message(name, model, call, tmp_path):
    arguments, message = BAD[name]
    fill = {"{model}": str(model), "{tmp}": str(tmp_path)}

    def filled(text):
        for mark, value in fill.items():
            text = text.replace(mark, value)
        return text

    code, out, err = call(*map(filled, arguments))
    assert code == 2 and out == ""
    assert re.search(filled(message), err, re.DOTALL), err
    assert "Traceback" not in err and len(err) < 7000
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("verb", ["inspect", "generate"])
def test_json_stays_away_from_errors(verb, call, tmp_path):
    code, out, err = call(verb, tmp_path, "--json", *(["--prompt", "x"] if verb == "generate" else []))
    assert code == 2 and out == "" and "no checkpoint" in err


def test_names_do_not_reach_the_terminal_raw(model, call, tmp_path):
    index = {"weight_map": {"\x1b[2J\x1b]0;evil\x07": "a.safetensors", "b": "../c"}}
    (tmp_path / "config.json").write_bytes((model / "config.json").read_bytes())
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    port(TINY, tmp_path / "a", to="hf")
    (tmp_path / "a" / "model.safetensors").rename(tmp_path / "a.safetensors")
    index["weight_map"].pop("b")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    code, _, err = call("inspect", tmp_path)
    assert code == 2 and "evil" in err and "\x1b" not in err and "\x07" not in err


def test_names_that_look_like_markup_are_shown_as_they_are(call, tmp_path):
    place = tmp_path / "[" / "x]" / ":smile:"
    code, out, _ = call("port", TINY, place, "--to", "hf")
    assert code == 0 and str(place) in out
    code, out, _ = call("inspect", place)
    assert code == 0 and str(place) in "".join(out.split())  # long cells are folded, never cut


def test_what_is_no_bad_input_is_not_hidden(monkeypatch):
    """A mistake of the program keeps its traceback: exit code 2 is for the user's."""
    from twinformers.cli import list as verb

    monkeypatch.setattr(verb, "presets", lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(["list"])


def test_interrupt_has_its_own_exit_code(call, monkeypatch):
    from twinformers.cli import list as verb

    def interrupt():
        raise KeyboardInterrupt

    monkeypatch.setattr(verb, "presets", interrupt)
    assert call("list")[0] == 130


# The command itself


def test_command_prints_json_alone():
    done = subprocess.run([SCRIPT, "list", "--json"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and done.stderr == "" and json.loads(done.stdout)["presets"]


def test_command_reports_bad_input(tmp_path):
    done = subprocess.run([SCRIPT, "inspect", str(tmp_path)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and done.stdout == "" and done.stderr.startswith("error: ")
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("arguments", [["list", "--json"], ["inspect", TINY], ["--help"]])
@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("read", [0, 1])
def test_command_ends_quietly_when_nobody_reads_on(arguments, unbuffered, read):
    """As in `twinformers list | head -1`: the reader takes a line, or none, and goes away."""
    environment = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
    child = subprocess.Popen(
        [SCRIPT, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )
    for _ in range(read):
        assert child.stdout.readline()
    child.stdout.close()
    with child.stderr:
        assert child.stderr.read() == ""
    # A small output may have been written whole before the reader went away.
    assert child.wait(timeout=60) == 141 or (read and child.returncode == 0)


def test_generate_keeps_its_compilations(model, tmp_path):
    """A second process finds on disk what the first one compiled, and compiles nothing."""
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path), "JAX_LOG_COMPILES": "0"}
    environment |= {"JAX_ENABLE_COMPILATION_CACHE": "true", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    command = [SCRIPT, "generate", str(model), "--prompt", "w3 w5", "--max-new-tokens", "4", "--json"]
    folder, kept = tmp_path / "twinformers" / "jax", []
    for _ in range(2):
        subprocess.run(command, env=environment, check=True, capture_output=True, timeout=300)
        kept.append({p.name for p in folder.iterdir() if "atime" not in p.name})
    assert kept[0] and kept[0] == kept[1]
