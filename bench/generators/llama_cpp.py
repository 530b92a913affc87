"""llama.cpp on a GGUF file, through the C functions that llama-cpp-python binds.

Flash attention is tried off and on, at load, for prompts and for decoding, and each is timed with the one that was faster.
Its cache holds keys and values in fp16, its default.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Sequence

import llama_cpp
import numpy as np

_CONTEXT = 2048
_FLASH = {"off": llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED, "on": llama_cpp.LLAMA_FLASH_ATTN_TYPE_ENABLED}
_TRIAL_STEPS, _TRIALS = 16, 2


@llama_cpp.llama_log_callback
def _quiet(level: int, text: bytes, data: object) -> None:
    """It would tell everything it loads."""


class Generator:
    cache_element_bytes = 2

    def __init__(self, gguf: str, threads: int, repack: bool = True) -> None:
        """``repack``: let it store weights in the order its kernels for this processor want, which its users get."""
        llama_cpp.llama_log_set(_quiet, ctypes.c_void_p())
        llama_cpp.llama_backend_init()
        settings = llama_cpp.llama_model_default_params()
        settings.use_extra_bufts = repack
        self.model = llama_cpp.llama_model_load_from_file(gguf.encode(), settings)
        if not self.model:
            raise ValueError(f"llama.cpp cannot read {gguf}")
        self.words = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))
        self.weight_bytes = _bytes_read(gguf)
        self.contexts = {name: self._context(kind, threads) for name, kind in _FLASH.items()}
        self.best = {"prompt": "off", "decode": "off"}
        self.note = "" if repack else "its repacked weights crash here; without them"

    def _context(self, flash: int, threads: int) -> object:
        settings = llama_cpp.llama_context_default_params()
        settings.n_ctx, settings.n_batch, settings.n_ubatch = _CONTEXT, 512, 512
        settings.n_threads = settings.n_threads_batch = threads
        settings.flash_attn_type = flash
        settings.no_perf = True
        context = llama_cpp.llama_init_from_model(self.model, settings)
        if not context:
            raise ValueError("llama.cpp could not make a context")
        return context

    def choose(self, prompt: list[int], start: list[int]) -> None:
        """Finds out which attention is the faster one, for each kind of work."""
        times: dict[tuple[str, str], float] = {}
        for trial in range(_TRIALS + 1):
            for name in self.contexts:
                self.best = {"prompt": name, "decode": name}
                begin = time.perf_counter()
                self.prompt(prompt)
                read = time.perf_counter() - begin
                for kind, seconds in (("prompt", read), ("decode", self.decode(start, _TRIAL_STEPS))):
                    if trial:  # the first only warms up
                        times[kind, name] = min(seconds, times.get((kind, name), seconds))
        self.best = {kind: min(self.contexts, key=lambda name: times[kind, name]) for kind in ("prompt", "decode")}
        self.note = ", ".join(filter(None, (self.note, *(f"flash attention {how} for {kind}s" for kind, how in self.best.items()))))

    def _read(self, context: object, ids: Sequence[int]) -> np.ndarray:
        """Adds ``ids`` to what the context holds; the logits after the last of them."""
        for begin in range(0, len(ids), 512):
            part = ids[begin : begin + 512]
            tokens = (llama_cpp.llama_token * len(part))(*part)
            if llama_cpp.llama_decode(context, llama_cpp.llama_batch_get_one(tokens, len(part))):
                raise RuntimeError("llama_decode failed")
        # WHY read: what comes back is a pointer into memory that the next call overwrites
        return np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(context, -1), shape=(self.words,))

    def _begin(self, kind: str) -> object:
        context = self.contexts[self.best[kind]]
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), True)
        return context

    def prompt(self, ids: list[int]) -> None:
        int(self._read(self._begin("prompt"), ids).argmax())

    def decode(self, ids: list[int], steps: int) -> float:
        context = self._begin("decode")
        token = int(self._read(context, ids).argmax())
        begin = time.perf_counter()
        for _ in range(steps):
            token = int(self._read(context, [token]).argmax())
        return time.perf_counter() - begin

    def logits(self, ids: list[int], forced: list[int]) -> np.ndarray:
        context = self._begin("decode")
        return np.stack([self._read(context, part).copy() for part in (ids, *([token] for token in forced))])


def _bytes_read(path: str) -> int:
    """Bytes of the tensors that a token reads: all but the embeddings, which count where they are the head, too."""
    import gguf

    sizes = {tensor.name: int(tensor.n_bytes) for tensor in gguf.GGUFReader(path).tensors}
    return sum(sizes.values()) - (sizes["token_embd.weight"] if "output.weight" in sizes else 0)
