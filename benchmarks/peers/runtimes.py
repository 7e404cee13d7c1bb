"""Every runtime behind two questions: how long a prefill takes after a depth, and how long a step of decoding.

A runtime reads random tokens after a cache of random content where it lets one be filled. Where it does not, it reads
so many tokens for real, once, and goes back to there each time. Every step chooses the likeliest token, as the
runtime does it itself or, where it leaves that to its user, by argmax.
"""

from __future__ import annotations

import ctypes
import json
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.peers.models import word_of
from expe_edge.runtime.session import PackageSession, Step
from expe_edge.speed.timed import filled

#: Tokens that are read at once where a runtime leaves that to its user, and where a depth is read for real.
PIECE = 512


#: What time is taken by. That of the processor, all threads together, leaves out what other programs take of a busy
#: machine; with several threads it counts what they wait for one another.
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


class Runtime(ABC):
    """A runtime with a model. vocab_size: of the model. threads: that it computes with. clock: one of `CLOCKS`."""

    #: The greatest depth it is taken to, and why to no greater one.
    deepest: tuple[int, str] | None = None

    def __init__(self, vocab_size: int, threads: int, clock: str) -> None:
        self.vocab_size, self.threads, self.clock = vocab_size, threads, CLOCKS[clock]
        self.depth: int | None = None

    def measure(self, depth: int, prefill: int, steps: int) -> tuple[float, float] | str:
        """Return the seconds of reading `prefill` tokens after `depth`, and the median of `steps` of decoding there.

        Where the runtime is not taken so deep: why.
        """
        if self.deepest is not None and max(depth, prefill) > self.deepest[0]:
            return self.deepest[1]
        if depth != self.depth:
            self.prepare(depth, depth + max(prefill, steps) + 2)
            self.depth = depth
        decode = float(np.median(self.decode(depth, int(self.tokens(1)[0]), steps)))
        return self.prefill(depth, self.tokens(prefill)), decode

    def tokens(self, count: int) -> np.ndarray:
        """Return random tokens, (count,) int64, none of which ends a text."""
        return np.random.default_rng(0).integers(2, self.vocab_size, size=count)

    def timed(self, work: Callable[[], object]) -> float:
        """Return the seconds of a piece of work."""
        began = self.clock()
        work()
        return self.clock() - began

    def timed_steps(self, step: Callable[[int], int], token: int, steps: int) -> list[float]:
        """Return the seconds of each of `steps`. step: from a token to the next."""
        seconds = []
        for _ in range(steps):
            began = self.clock()
            token = step(token)
            seconds.append(self.clock() - began)
        return seconds

    def prepare(self, depth: int, room: int) -> None:  # noqa: B027  # where nothing is kept from turn to turn
        """Get ready for `depth` tokens in a cache with room for `room`."""

    @abstractmethod
    def prefill(self, depth: int, tokens: np.ndarray) -> float:
        """Return the seconds of reading tokens (T,) after `depth`, with the choice of the next."""

    @abstractmethod
    def decode(self, depth: int, token: int, steps: int) -> list[float]:
        """Return the seconds of each of `steps` after `depth`, the first of which reads `token`."""


def pieces(tokens: np.ndarray) -> list[np.ndarray]:
    """Cut tokens (T,) into what is read at once."""
    return [tokens[begin : begin + PIECE] for begin in range(0, len(tokens), PIECE)]


class Ours(Runtime):
    """A package in our runtime. kernels: the directory of our own, or `off`."""

    def __init__(self, path: Path, kernels: str | Path, vocab_size: int, threads: int, clock: str) -> None:
        super().__init__(vocab_size, threads, clock)
        self.session = PackageSession.load(path, threads=threads, kernels=kernels)

    def prefill(self, depth: int, tokens: np.ndarray) -> float:
        cache = filled(self.session, depth, len(tokens))
        return self.timed(
            lambda: [logits[-1] for logits in self.session.prefill(cache, tokens, last=True)][-1].argmax()
        )

    def decode(self, depth: int, token: int, steps: int) -> list[float]:
        step = Step(self.session, filled(self.session, depth, steps), 1)
        return self.timed_steps(lambda token: int(step.run(np.array([[token]]))[0, -1].argmax()), token, steps)


class GenAI(Runtime):
    """A package in onnxruntime-genai: its generator's own loop, its cache one buffer, as the package says."""

    deepest = (16_384, "cannot be filled, and reads no farther in minutes")

    def __init__(self, path: Path, vocab_size: int, threads: int, clock: str) -> None:
        super().__init__(vocab_size, threads, clock)
        import onnxruntime_genai as og

        self.config = og.Config(str(path))
        session = {"intra_op_num_threads": threads}
        changes = {"model": {"context_length": 2**17, "decoder": {"session_options": session}}}
        self.config.overlay(json.dumps(changes))
        self.model = og.Model(self.config)

    def prepare(self, depth: int, room: int) -> None:
        import onnxruntime_genai as og

        parameters = og.GeneratorParams(self.model)
        parameters.set_search_options(do_sample=False, max_length=room, min_length=room)
        self.generator = og.Generator(self.model, parameters)
        self._read(self.tokens(depth))

    def _read(self, tokens: np.ndarray) -> None:
        for piece in pieces(tokens):
            self._append(piece)

    def _append(self, tokens: np.ndarray) -> None:
        self.generator.append_tokens(tokens[None].astype(np.int32))

    def prefill(self, depth: int, tokens: np.ndarray) -> float:
        def work() -> None:
            self._read(tokens)
            self.generator.generate_next_token()

        seconds = self.timed(work)
        self.generator.rewind_to(depth)
        return seconds

    def decode(self, depth: int, token: int, steps: int) -> list[float]:
        self._append(np.array([token]))
        self.generator.generate_next_token()  # chooses alone; every later one runs the model first
        seconds = [self.timed(self.generator.generate_next_token) for _ in range(steps)]
        self.generator.rewind_to(depth)
        return seconds


class Optimum(Runtime):
    """A package in Optimum's model for onnxruntime."""

    def __init__(self, path: Path, vocab_size: int, threads: int, clock: str) -> None:
        super().__init__(vocab_size, threads, clock)
        import onnxruntime as ort
        import torch
        from optimum.onnxruntime import ORTModelForCausalLM

        torch.set_num_threads(threads)
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        self.model = ORTModelForCausalLM.from_pretrained(path, session_options=options)

    def _past(self, depth: int) -> Any:
        import torch

        config = self.model.config
        shape = 1, config.num_key_value_heads, depth, config.head_dim
        return tuple((torch.randn(shape), torch.randn(shape)) for _ in range(config.num_hidden_layers))

    def _run(self, tokens: np.ndarray, past: Any) -> tuple[int, Any]:
        import torch

        length = past[0][0].shape[2] + len(tokens)
        mask = torch.ones(1, length, dtype=torch.long)
        output = self.model(torch.from_numpy(tokens)[None], attention_mask=mask, past_key_values=past, use_cache=True)
        return int(output.logits[0, -1].argmax()), output.past_key_values

    def prefill(self, depth: int, tokens: np.ndarray) -> float:
        past = self._past(depth)

        def work() -> None:
            nonlocal past
            for piece in pieces(tokens):
                _, past = self._run(piece, past)

        return self.timed(work)

    def decode(self, depth: int, token: int, steps: int) -> list[float]:
        past = self._past(depth)

        def step(token: int) -> int:
            nonlocal past
            chosen, past = self._run(np.array([token]), past)
            return chosen

        return self.timed_steps(step, token, steps)


class LlamaCpp(Runtime):
    """A llama in llama.cpp, flash attention on. cache: `f16` or `q8_0`, of keys and values."""

    def __init__(self, path: Path, cache: str, vocab_size: int, threads: int, clock: str) -> None:
        super().__init__(vocab_size, threads, clock)
        self.path, self.cache = path, cache

    def prepare(self, depth: int, room: int) -> None:
        import llama_cpp

        self.model = None  # its memory goes first
        kind = {"f16": llama_cpp.GGML_TYPE_F16, "q8_0": llama_cpp.GGML_TYPE_Q8_0}[self.cache]
        self.model = llama_cpp.Llama(
            str(self.path),
            n_ctx=room,
            n_threads=self.threads,
            n_threads_batch=self.threads,
            flash_attn=True,
            type_k=kind,
            type_v=kind,
            verbose=False,
        )
        self.context = self.model.ctx
        self.memory = llama_cpp.llama_get_memory(self.context)
        if depth:
            self._read(self.tokens(min(depth, PIECE)))
            self._fill(depth)

    def _read(self, tokens: np.ndarray) -> int:
        import llama_cpp

        ids = (llama_cpp.llama_token * len(tokens))(*tokens.tolist())
        if llama_cpp.llama_decode(self.context, llama_cpp.llama_batch_get_one(ids, len(tokens))):
            raise RuntimeError("llama_decode failed")
        return int(np.ctypeslib.as_array(llama_cpp.llama_get_logits(self.context), (self.vocab_size,)).argmax())

    def _fill(self, depth: int) -> None:
        """Replace what the cache holds by as many copies of it as `depth` tokens are, by way of the saved state."""
        import llama_cpp

        size = llama_cpp.llama_state_seq_get_size(self.context, 0)
        saved = (ctypes.c_uint8 * size)()
        llama_cpp.llama_state_seq_get_data(self.context, saved, size, 0)
        state = repeated_state(bytes(saved), depth)
        self._forget(0)
        given = (ctypes.c_uint8 * len(state)).from_buffer(state)
        if not llama_cpp.llama_state_seq_set_data(self.context, given, len(state), 0):
            raise RuntimeError("llama.cpp does not take the state")
        if llama_cpp.llama_memory_seq_pos_max(self.memory, 0) != depth - 1:
            raise RuntimeError("llama.cpp has read the state otherwise")

    def _forget(self, depth: int) -> None:
        import llama_cpp

        llama_cpp.llama_memory_seq_rm(self.memory, 0, depth, -1)

    def prefill(self, depth: int, tokens: np.ndarray) -> float:
        seconds = self.timed(lambda: [self._read(piece) for piece in pieces(tokens)])
        self._forget(depth)
        return seconds

    def decode(self, depth: int, token: int, steps: int) -> list[float]:
        seconds = self.timed_steps(lambda token: self._read(np.array([token])), token, steps)
        self._forget(depth)
        return seconds


def repeated_state(saved: bytes, depth: int) -> bytearray:
    """Return the saved state of a sequence of llama.cpp with what its cells hold repeated to `depth` cells.

    The state is, in little-endian numbers: three of 32 bits, the number of cells; of each cell its position, the number
    of sequences and their ids; whether values are transposed, the number of layers; of the keys of every layer, then
    of the values, the type, 64 bits for the bytes of a row, and the rows (`llama_kv_cache::state_write`).
    """
    before, at = 16, 16
    cells = int(np.frombuffer(saved, np.int32, 1, 12)[0])
    at += 12 * cells
    layers = int(np.frombuffer(saved, np.int32, 1, at + 4)[0])
    places = np.stack([np.arange(depth), np.ones(depth), np.zeros(depth)], axis=1).astype(np.int32)
    state = bytearray(saved[: before - 4])
    state += np.int32(depth).tobytes() + places.tobytes() + saved[at : at + 8]
    at += 8
    for _ in range(2 * layers):
        row = int(np.frombuffer(saved, np.uint64, 1, at + 4)[0])
        rows = saved[at + 12 : at + 12 + row * cells]
        state += saved[at : at + 12] + (rows * (depth // cells + 1))[: row * depth]
        at += 12 + row * cells
    if at != len(saved):
        raise RuntimeError("a saved state of llama.cpp of another layout")
    return state


class CTranslate2(Runtime):
    """A llama in CTranslate2, weights in int8; what is in the cache before is its static prompt."""

    deepest = (4096, "reads a depth in one piece, whose attention takes memory with its square")

    def __init__(self, path: Path, vocab_size: int, threads: int, clock: str) -> None:
        super().__init__(vocab_size, threads, clock)
        import ctranslate2

        self.generator = ctranslate2.Generator(
            str(path), device="cpu", compute_type="int8", inter_threads=1, intra_threads=threads
        )

    def prefill(self, depth: int, tokens: np.ndarray) -> float:
        return self.timed(lambda: self._generate(depth, tokens, 1))

    def decode(self, depth: int, token: int, steps: int) -> list[float]:
        return np.diff(self._generate(depth, np.array([token]), steps + 1)).tolist()

    def _generate(self, depth: int, tokens: np.ndarray, steps: int) -> list[float]:
        """Return when each of `steps` tokens was there."""
        times: list[float] = []
        self.generator.generate_batch(
            [[word_of(token) for token in tokens.tolist()]],
            static_prompt=[word_of(token) for token in self.tokens(depth).tolist()] or None,
            cache_static_prompt=True,
            max_length=steps,
            min_length=steps,
            include_prompt_in_result=False,
            callback=lambda _: times.append(self.clock()),  # None: go on
        )
        return times


class Torch(Runtime):
    """A llama in PyTorch and transformers, in bfloat16: eager with a cache that grows, compiled with a static one."""

    deepest = (16_384, "takes minutes a turn beyond")

    def __init__(self, path: Path, compiled: bool, vocab_size: int, threads: int, clock: str) -> None:
        super().__init__(vocab_size, threads, clock)
        import torch
        from transformers import LlamaForCausalLM

        torch.set_num_threads(threads)
        torch.set_grad_enabled(False)
        self.model = LlamaForCausalLM.from_pretrained(path, dtype=torch.bfloat16).eval()
        self.compiled = compiled

    def prepare(self, depth: int, room: int) -> None:
        import torch

        self.room = room
        self.run = self.model
        if self.compiled:
            torch.compiler.reset()
            self.run = torch.compile(self.model)

    def _cache(self, depth: int) -> Any:
        import torch
        from transformers import DynamicCache, StaticCache

        config = self.model.config
        heads, size = config.num_key_value_heads, config.hidden_size // config.num_attention_heads
        if self.compiled:
            cache = StaticCache(config=config, max_cache_len=self.room)
            cache.early_initialization(1, heads, size, torch.bfloat16, "cpu")
            for layer in cache.layers:
                layer.keys[:, :, :depth].normal_()
                layer.values[:, :, :depth].normal_()
            return cache
        cache = DynamicCache(config=config)
        for layer in range(config.num_hidden_layers if depth else 0):
            cache.update(*torch.randn(2, 1, heads, depth, size, dtype=torch.bfloat16).unbind(0), layer)
        return cache

    def _read(self, tokens: np.ndarray, cache: Any, depth: int) -> int:
        import torch

        positions = torch.arange(depth, depth + len(tokens))
        output = self.run(
            torch.from_numpy(tokens)[None],
            past_key_values=cache,
            cache_position=positions,
            position_ids=positions[None],
            use_cache=True,
            logits_to_keep=1,
        )
        return int(output.logits[0, -1].argmax())

    def prefill(self, depth: int, tokens: np.ndarray) -> float:
        cache = self._cache(depth)

        def work() -> None:
            begin = depth
            for piece in pieces(tokens):
                self._read(piece, cache, begin)
                begin += len(piece)

        return self.timed(work)

    def decode(self, depth: int, token: int, steps: int) -> list[float]:
        cache, places = self._cache(depth), iter(range(depth, depth + steps))
        return self.timed_steps(lambda token: self._read(np.array([token]), cache, next(places)), token, steps)
