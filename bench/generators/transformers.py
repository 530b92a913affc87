"""Models in transformers, through ``model.generate``: as they are, and swapped by taut."""

from __future__ import annotations

import time

import numpy as np
import torch
from transformers import GenerationConfig
from transformers.generation.streamers import BaseStreamer

import taut
from taut import models
from taut.fuse import cache_name
from taut.models import Source
from taut.swap import held_bytes

_HEAD = {"weights": "int8", "group_size": 32}  # nearly as good as floats, and a quarter of their bytes


class _Clock(BaseStreamer):
    """Notes when ``generate`` hands over the prompt, and then each token."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: object) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


class Generator:
    cache_element_bytes: int

    def __init__(self, directory: str, threads: int, dtype: str, weights: str | None = None) -> None:
        torch.set_num_threads(threads)
        self.model, _ = models.load_model(Source("directory", directory), dtype)
        self.note = "eager"
        if weights is not None:
            self.note = taut.swap(self.model, weights, rules={"lm_head": _HEAD}).summary
        self.model.generation_config = GenerationConfig(do_sample=False, eos_token_id=None, pad_token_id=0)
        self.cache_element_bytes = torch.finfo(models.DTYPES[dtype]).bits // 8
        self.weight_bytes = self._weight_bytes()

    def _weight_bytes(self) -> int:
        """All but the embeddings, of which a token reads a row; they count where they are the head, too."""
        sizes = held_bytes(self.model)
        table = self.model.get_input_embeddings()
        head = self.model.get_output_embeddings()
        shared = getattr(head, "weight", None) is table.weight
        own = next(name for name, module in self.model.named_modules() if module is table)
        return sum(sizes.values()) - (0 if shared else sizes[own])

    def _generate(self, ids: list[int], tokens: int) -> list[float]:
        clock, tensor = _Clock(), torch.tensor([ids])
        self.model.generate(tensor, attention_mask=torch.ones_like(tensor), max_new_tokens=tokens, streamer=clock)
        return clock.times

    def prompt(self, ids: list[int]) -> None:
        self._generate(ids, 1)

    def decode(self, ids: list[int], steps: int) -> float:
        _, first, *_, last = self._generate(ids, steps + 1)
        return last - first

    @torch.inference_mode()
    def logits(self, ids: list[int], forced: list[int]) -> np.ndarray:
        cache, rows, name = None, [], cache_name(type(self.model))
        for part in (ids, *([token] for token in forced)):
            out = self.model(input_ids=torch.tensor([part]), use_cache=True, logits_to_keep=1, **{name: cache})
            cache = out[name]
            rows.append(out.logits[0, -1].float().numpy())
        return np.stack(rows)
