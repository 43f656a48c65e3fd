"""What a check feeds a model and how it calls it: one class for each calling contract.

`Config.kind` names the contract, and `kind(config)` finds the class. A check knows arrays and results; which
of them are tokens and which a source sentence stays here. Inputs come in pairs of tokens and positions; what
does not come in a pair, such as segments, is last.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from twinformers.configs import Config

Inputs = tuple[np.ndarray, ...]
#: Calls a method of a model by name, on numpy arrays and on what earlier calls returned.
Call = Callable[..., Any]


def chunks(length: int) -> list[slice]:
    """A prefill in uneven pieces, then single tokens."""
    edges = sorted({0, 1, length // 2 - 7, length // 2 - 2, *range(length - 6, length + 1)})
    return [slice(a, b) for a, b in itertools.pairwise(edges)]


def real(x: np.ndarray, inputs: Inputs) -> np.ndarray:
    """[B, T] which rows of x [B, T, ...] belong to real tokens, told by the length of the inputs."""
    for positions in inputs[1::2]:
        if x.shape[:2] == positions.shape:
            return positions >= 0
    return np.ones(x.shape[:2], bool)


def _upwards(length: int) -> np.ndarray:
    return np.arange(length, dtype=np.int32)[None]


def _successors(tokens: np.ndarray, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Each token's successor in its row, and where that is a real one."""
    following, places = np.roll(tokens, -1, axis=1), np.roll(positions, -1, axis=1)
    return following, ((positions >= 0) & (places == positions + 1)).astype(np.int32)


def _greedily(step: Call, logits: Any, cache: Any, length: int, count: int) -> Iterator[int]:
    """The likeliest token after `length` others, and `count` more from `step(token, position, cache)`."""
    for place in itertools.count(length):
        token = int(logits[0, -1].argmax())
        yield token
        if place == length + count:
            return
        logits, cache = step(np.array([[token]], np.int32), np.array([[place]], np.int32), cache)


class Causal:
    """`model(tokens, positions, cache)`: decoder-only language models."""

    generates = True

    def positions(self, inputs: Inputs) -> np.ndarray:
        """Those of the tokens that the logits are for. [B, T]"""
        return inputs[1]

    def inputs(self, config: Any, length: int = 128, seed: int = 0) -> Inputs:
        """Two rows of random tokens; the second is left-padded and begins at position 200."""
        tokens = np.random.default_rng(seed).integers(0, config.vocab_size, (2, length)).astype(np.int32)
        positions = np.tile(np.arange(length, dtype=np.int32), (2, 1))
        padding = length // 5
        positions[1] = np.r_[-np.ones(padding), 200 + np.arange(length - padding)]
        return tokens, positions

    def batch(self, config: Any, number: int) -> Inputs:
        """What one update of a training run learns from."""
        return self.inputs(config, length=32, seed=number)

    def targets(self, inputs: Inputs) -> tuple[np.ndarray, np.ndarray]:
        """The token that each logit should predict, and 1 where there is one, 0 where not. 2 x [B, T]"""
        return _successors(*inputs)

    def cached(self, call: Call, empty_cache: Call, inputs: Inputs) -> list[Any]:
        """The logits of the same tokens given piece by piece."""
        tokens, positions = inputs
        cache, parts = empty_cache(len(tokens), 512), []
        for part in chunks(tokens.shape[1]):
            logits, cache = call("__call__", tokens[:, part], positions[:, part], cache)
            parts.append(logits)
        return parts

    def generate(self, engines: str, model: Any, inputs: Inputs) -> list[list[int | None]]:
        """Sixteen tokens after the first 24, greedily."""
        import importlib

        engine = importlib.import_module(f"{engines}.generate").Generator(model)
        return list(engine.stream(inputs[0][:1, :24].tolist(), max_new_tokens=16))

    def prompted(self, config: Any, prompt: Sequence[int]) -> Inputs:
        """One row: a text to continue."""
        return np.array([prompt], np.int32), _upwards(len(prompt))

    def steps(self, config: Any, call: Call, empty_cache: Call, inputs: Inputs, count: int) -> Iterator[int]:
        """The likeliest token after one row of inputs, then after each of `count` steps with a cache."""
        length = inputs[0].shape[1]
        cache = empty_cache(1, length + count)
        most = config.longest_call(cache.positions.shape[1] - 1) or length
        for start in range(0, length, most):
            logits, cache = call("__call__", *(x[:, start : start + most] for x in inputs), cache)
        yield from _greedily(lambda *args: call("__call__", *args), logits, cache, length, count)

    def continued(self, config: Any, inputs: Inputs, generated: list[list[int | None]]) -> Inputs:
        """The inputs whose last logits decide on the token that follows `generated`."""
        tokens = [*inputs[0][0, :24].tolist(), *(row[0] for row in generated)]
        return np.array([tokens], np.int32), _upwards(len(tokens))

    def reference(self, model: Any, inputs: Inputs, kind: Any) -> Any:
        """The logits of transformers' model, which takes a mask where the twins take positions."""
        import torch

        tokens, positions = map(torch.from_numpy, inputs)
        place = positions.long()
        seen = (place[:, None, :] >= 0) & (place[:, None, :] <= place[:, :, None])  # [B, T, S]
        if (window := getattr(model.config, "sliding_window", None)) is not None:
            seen &= place[:, None, :] > place[:, :, None] - window
        # A mask of four dimensions is used as it is; transformers' own would not know these positions.
        mask = torch.zeros(seen.shape, dtype=kind).masked_fill(~seen, torch.finfo(kind).min)[:, None]
        return model(
            input_ids=tokens.long(),
            position_ids=place.clamp(min=0),
            attention_mask=mask,
            use_cache=False,
        ).logits


class EncoderDecoder:
    """`model(source, source_positions, tokens, positions)`, or step by step `encode` and `decode`."""

    generates = True

    def positions(self, inputs: Inputs) -> np.ndarray:
        """Those of the tokens that the logits are for. [B, T]"""
        return inputs[3]

    def batch(self, config: Any, number: int) -> Inputs:
        """What one update of a training run learns from."""
        return self.inputs(config, source=29, target=23, seed=number)

    def inputs(self, config: Any, source: int = 71, target: int = 59, seed: int = 0) -> Inputs:
        """Two rows of random tokens, the second right-padded: Marian and FSMT count from the left."""
        rng = np.random.default_rng(seed)
        sizes = {"source": config.source_vocab_size, "target": config.target_vocab_size}
        lengths = {"source": source, "target": target}
        inputs = []
        for side, vocabulary in sizes.items():
            length = min(lengths[side], config.max_position_embeddings - (side == "target"))
            tokens = rng.integers(0, vocabulary, (2, length)).astype(np.int32)
            tokens[tokens == config.pad_token_id] = (config.pad_token_id + 1) % vocabulary
            positions = np.tile(np.arange(length, dtype=np.int32), (2, 1))
            tokens[1, -9:], positions[1, -9:] = config.pad_token_id, -1
            inputs += [tokens, positions]
        return tuple(inputs)

    def targets(self, inputs: Inputs) -> tuple[np.ndarray, np.ndarray]:
        """The token that each logit should predict, and 1 where there is one, 0 where not. 2 x [B, T]"""
        return _successors(*inputs[2:])

    def cached(self, call: Call, empty_cache: Call, inputs: Inputs) -> list[Any]:
        """The logits of the same tokens given piece by piece, the source once."""
        source, source_positions, tokens, positions = inputs
        cross = call("cross_cache", call("encode", source, source_positions), source_positions)
        cache, parts = empty_cache(len(tokens), 128), []
        for part in chunks(tokens.shape[1]):
            logits, cache = call("decode", tokens[:, part], positions[:, part], cross, cache)
            parts.append(logits)
        return parts

    def generate(self, engines: str, model: Any, inputs: Inputs) -> list[list[int | None]]:
        """A greedy translation of the first source, a token per step."""
        import importlib

        from twinformers.configs._beams import Beams

        engine = importlib.import_module(f"{engines}.beam").Translator(model)
        beams = Beams(num_beams=1, max_new_tokens=16)
        return [[token] for token in engine.translate([inputs[0][0].tolist()], beams)[0].tokens]

    def prompted(self, config: Any, prompt: Sequence[int]) -> Inputs:
        """One row: a text to translate, and the token that every translation starts with."""
        start = np.array([[config.decoder_start_token_id]], np.int32)
        return np.array([prompt], np.int32), _upwards(len(prompt)), start, _upwards(1)

    def steps(self, config: Any, call: Call, empty_cache: Call, inputs: Inputs, count: int) -> Iterator[int]:
        """The likeliest token after one row of inputs, then after each of `count` steps with a cache."""
        source, source_positions, tokens, positions = inputs
        cross = call("cross_cache", call("encode", source, source_positions), source_positions)
        length = tokens.shape[1]
        logits, cache = call("decode", tokens, positions, cross, empty_cache(1, length + count))
        yield from _greedily(
            lambda token, place, cache: call("decode", token, place, cross, cache),
            logits,
            cache,
            length,
            count,
        )

    def continued(self, config: Any, inputs: Inputs, generated: list[list[int | None]]) -> Inputs:
        """The inputs whose last logits decide on the token that follows `generated`."""
        tokens = [config.decoder_start_token_id, *(row[0] for row in generated)]
        return inputs[0][:1], inputs[1][:1], np.array([tokens], np.int32), _upwards(len(tokens))

    def reference(self, model: Any, inputs: Inputs, kind: Any) -> Any:
        """The logits of transformers' model, whose positions follow from its masks."""
        import torch

        source, source_positions, tokens, positions = map(torch.from_numpy, inputs)
        return model(
            input_ids=source.long(),
            attention_mask=(source_positions >= 0).long(),
            decoder_input_ids=tokens.long(),
            decoder_attention_mask=(positions >= 0).long(),
            use_cache=False,
        ).logits


class Encoder:
    """`model(tokens, positions, segments)`: every token sees all others, and nothing is generated."""

    generates = False

    def positions(self, inputs: Inputs) -> np.ndarray:
        """Those of the tokens that the logits are for. [B, T]"""
        return inputs[1]

    def inputs(self, config: Any, length: int = 125, seed: int = 0) -> Inputs:
        """Two rows of random tokens and segments; the second is right-padded and begins late.

        Right, because transformers makes what stands for the whole of the first column. Token 0 does not
        occur: as padding, transformers learns nothing from it.
        """
        rng, most = np.random.default_rng(seed), config.max_position_embeddings
        length = min(length, most)
        tokens = rng.integers(1, config.vocab_size, (2, length)).astype(np.int32)
        segments = rng.integers(0, config.type_vocab_size, (2, length)).astype(np.int32)
        positions = np.tile(np.arange(length, dtype=np.int32), (2, 1))
        positions[1] += min(200, most - length)
        positions[1, length - length // 5 :] = -1
        return tokens, positions, segments

    def batch(self, config: Any, number: int) -> Inputs:
        """What one update of a training run learns from."""
        return self.inputs(config, length=32, seed=number)

    def targets(self, inputs: Inputs) -> tuple[np.ndarray, np.ndarray]:
        """What each output should predict, and 1 where it should. 2 x [B, T]

        One of sixteen classes of tokens: that can be asked of logits, and of hidden states too.
        """
        return inputs[0] % 16, (inputs[1] >= 0).astype(np.int32)

    def reference(self, model: Any, inputs: Inputs, kind: Any) -> Any:
        """The logits, or the hidden states, of transformers' model."""
        import torch

        tokens, positions, segments = map(torch.from_numpy, inputs)
        return model(
            input_ids=tokens.long(),
            attention_mask=(positions >= 0).long(),
            token_type_ids=segments.long(),
            position_ids=positions.long().clamp(min=0),
        )[0]


KINDS: dict[str, Any] = {"causal": Causal(), "encoder": Encoder(), "encoder-decoder": EncoderDecoder()}


def kind(config: Config) -> Any:
    """The calling contract of a configuration's architecture."""
    return KINDS[config.kind]
