"""One variant of a model, in the process that measures it."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..fuse import cache_name
from ..models import Settings, Source, end_tokens, find_source, load_model
from .energy import EnergyCounter
from .fidelity import TokenStats, compare_logits
from .memory import PeakSampler, anonymous_bytes, file_mappings
from .resources import cache_bytes_per_token, decode_flops, parameter_count, ship_bytes, swapped_bytes, weight_bytes


@dataclass(frozen=True)
class Variant:
    """A model as it is to be measured: where it comes from, in which dtype, and how it is swapped (``settings=None``: not)."""

    name: str
    source: str
    dtype: str = "auto"
    settings: Settings | None = None

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Variant:
        settings = values["settings"]
        return cls(**{**values, "settings": None if settings is None else Settings(**settings)})


class Runner:
    """Loads a ``Variant``, times it, and gives its logits. Its methods take and give plain numbers and lists, for a pipe."""

    def __init__(self, variant: Variant, threads: int | None = None) -> None:
        if threads is not None:
            torch.set_num_threads(threads)
        self.variant = variant
        self.energy = EnergyCounter()

    @torch.inference_mode()
    def load(self, prompt: list[int], steps: int, layers: Settings | None = None) -> dict[str, Any]:
        """Loads the model, reads ``prompt`` and writes ``steps`` tokens once (which warms it up), and says what it takes.

        ``peak_bytes``: the most anonymous memory the process held from before the load to the last token. Weights that the
        loader left mapped from a file are copied out first, so that they count as what they are: memory the model needs.
        ``layers``: the settings whose layers ``swapped_weight_bytes`` counts, for a base.
        """
        import transformers.modeling_utils  # noqa: F401  (a hundred megabytes that are no model's)

        before = anonymous_bytes()
        with PeakSampler() as sampler:
            source: Source = find_source(self.variant.source)
            start = time.perf_counter()
            self.model, report = load_model(source, self.variant.dtype, self.variant.settings)
            load_seconds = time.perf_counter() - start
            mappings = file_mappings()
            for parameter in self.model.parameters():
                if any(begin <= parameter.data_ptr() < end for begin, end in mappings):
                    parameter.data = parameter.data.clone()
            ids = torch.tensor([prompt])
            _, cache = self._prefill(ids)
            bytes_a_token = cache_bytes_per_token(cache)
            del cache
            self.decode(prompt, steps)
        book = (self.variant.settings or layers or Settings()).book()
        return {
            "peak_bytes": sampler.peak,
            "before_bytes": before,
            "load_s": load_seconds,
            "dtype": str(next(p.dtype for p in self.model.parameters() if p.is_floating_point())).removeprefix("torch."),
            "parameters": parameter_count(self.model),
            "weight_bytes": weight_bytes(self.model),
            "swapped_weight_bytes": swapped_bytes(self.model, book),
            "ship_bytes": ship_bytes(self.model),
            "cache_bytes_per_token": bytes_a_token,
            "threads": torch.get_num_threads(),
            "eos": list(end_tokens(self.model)),
            "swap": None if report is None else str(report),
        }

    def _prefill(self, ids: Tensor) -> tuple[Tensor, Any]:
        out = self.model(input_ids=ids, use_cache=True, logits_to_keep=1)
        return out.logits[:, -1], out[cache_name(type(self.model))]

    @torch.inference_mode()
    def prompt(self, ids: list[int]) -> dict[str, Any]:
        """Reads a prompt once, up to the logits of its last token."""
        tensor = torch.tensor([ids])
        spent = _Meter(self.energy)
        self._prefill(tensor)
        return {"tokens": len(ids), **spent.stop()}

    @torch.inference_mode()
    def decode(self, ids: list[int], steps: int) -> dict[str, Any]:
        """Writes ``steps`` tokens after a prompt, the likeliest each time, past any end token. The prompt is not timed."""
        logits, cache = self._prefill(torch.tensor([ids]))
        written, past = [int(logits.argmax())], {cache_name(type(self.model)): cache}
        spent = _Meter(self.energy)
        for _ in range(steps):
            out = self.model(input_ids=torch.tensor([written[-1:]]), use_cache=True, **past)
            written.append(int(out.logits[0, -1].argmax()))
        return {"tokens": steps, "ids": written[:steps], **spent.stop()}

    def flops(self, ids: list[int]) -> int:
        return decode_flops(self.model, torch.tensor([ids]))

    @torch.inference_mode()
    def write_logits(self, window: list[int], path: str) -> list[int]:
        """Writes the logits of all but the last position of ``window`` to ``path`` as float32; gives their shape ``[T, V]``."""
        logits = self._logits(window)
        self._map(path, logits.shape).copy_(logits)
        return list(logits.shape)

    @torch.inference_mode()
    def compare(self, window: list[int], path: str, shape: list[int]) -> dict[str, list]:
        """The ``TokenStats`` of this model against the logits that the base wrote, as lists."""
        if Path(path).stat().st_size != shape[0] * shape[1] * 4:
            raise ValueError(f"{path} does not hold logits {shape}")
        base = self._map(path, tuple(shape))
        stats = compare_logits(base, self._logits(window), torch.tensor(window[1:]))
        return {name: getattr(stats, name).tolist() for name in TokenStats.__dataclass_fields__}

    def _logits(self, window: list[int]) -> Tensor:
        return self.model(input_ids=torch.tensor([window]), use_cache=False).logits[0, :-1].float()

    @staticmethod
    def _map(path: str, shape: tuple[int, ...]) -> Tensor:
        return torch.from_file(path, shared=True, size=shape[0] * shape[1], dtype=torch.float32).view(shape)


def stats_from_lists(values: dict[str, list]) -> TokenStats:
    """The inverse of what ``Runner.compare`` does to ``TokenStats`` for the pipe."""
    return TokenStats(
        **{name: torch.tensor(column, dtype=torch.bool if name == "same_top" else torch.float64) for name, column in values.items()}
    )


class _Meter:
    """Wall time, processor time of this process over all its threads, and joules where they are counted."""

    def __init__(self, energy: EnergyCounter) -> None:
        self._energy = energy
        self._joules = energy.read() if energy.available else None
        self._cpu = time.process_time()
        self._start = time.perf_counter()

    def stop(self) -> dict[str, float | None]:
        seconds = time.perf_counter() - self._start
        cpu = time.process_time() - self._cpu
        joules = None if self._joules is None else self._energy.joules_since(self._joules)
        return {"seconds": seconds, "core_seconds": cpu, "joules": joules}
