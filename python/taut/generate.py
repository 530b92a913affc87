"""Writing text with a model: streamed to standard output, and timed."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TextStreamer


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen. ``greedy`` None: the likeliest one unless a temperature is given.

    Raises ``ValueError`` for a temperature that is not positive, or one together with greedy.
    """

    greedy: bool | None = None
    temperature: float | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        if self.temperature is not None and not 0 < self.temperature < float("inf"):
            raise ValueError(f"temperature must be a positive number, got {self.temperature}; use --greedy for the likeliest token")
        if self.greedy and self.temperature is not None:
            raise ValueError("--greedy takes no temperature")

    def arguments(self) -> dict[str, Any]:
        greedy = self.temperature is None if self.greedy is None else self.greedy
        if greedy:
            return {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        return {"do_sample": True, "temperature": self.temperature or 1.0}


@dataclass(frozen=True)
class Timing:
    """Prompt and decode of one text: tokens, and seconds. The first new token comes with the prompt."""

    prompt_tokens: int
    prompt_s: float
    new_tokens: int
    decode_s: float

    def __str__(self) -> str:
        words = f"prompt: {self.prompt_tokens} tokens, {self.prompt_tokens / self.prompt_s:.1f} tokens/s"
        if self.new_tokens < 2:
            return f"{words}; wrote {self.new_tokens} token{'' if self.new_tokens == 1 else 's'}"
        return f"{words}; wrote {self.new_tokens} tokens, {(self.new_tokens - 1) / self.decode_s:.1f} tokens/s"


class TimedStreamer(TextStreamer):
    """Prints text as it is written, and notes when the first and the last token came."""

    def __init__(self, tokenizer: Any) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.times: list[float] = []

    def put(self, value: Tensor) -> None:
        self.times.append(time.perf_counter())  # the first call hands over the prompt, before it is read
        super().put(value)


@torch.inference_mode()
def generate_text(model: nn.Module, tokenizer: Any, ids: Tensor, max_new_tokens: int, sampling: Sampling) -> Timing:
    """Goes on from ``ids [1, T]`` for at most ``max_new_tokens``, printing the text. Raises ``ValueError`` if it does not fit the model."""
    limit = getattr(model.config, "max_position_embeddings", None)
    if limit is not None and ids.shape[1] + max_new_tokens > limit:
        raise ValueError(f"a prompt of {ids.shape[1]} tokens and {max_new_tokens} new ones do not fit the {limit} this model takes")
    if sampling.seed is not None:
        torch.manual_seed(sampling.seed)
    streamer = TimedStreamer(tokenizer)
    mask = torch.ones_like(ids)
    model.generate(ids, attention_mask=mask, max_new_tokens=max_new_tokens, streamer=streamer, **_padding(model), **sampling.arguments())
    start, *tokens = streamer.times
    return Timing(ids.shape[1], tokens[0] - start, len(tokens), tokens[-1] - tokens[0])


def _padding(model: nn.Module) -> dict[str, int]:
    """A padding id, which one text never uses, so that transformers does not warn about a model that names none."""
    config = model.generation_config
    if config.pad_token_id is not None or config.eos_token_id is None:
        return {}
    end = config.eos_token_id
    return {"pad_token_id": end if isinstance(end, int) else end[0]}
