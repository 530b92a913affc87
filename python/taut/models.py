"""Loading language models by local directory, hub id or GGUF file, with errors that fit on one line."""

from __future__ import annotations

import os
import re
import shutil
import sys
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .fuse import check_mode
from .head import make_head_rule
from .integrations.compressed_tensors import is_sparse, written_dense
from .swap import RuleBook, SwapReport, swap

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


@dataclass(frozen=True)
class Settings:
    """How a model is swapped: the arguments of ``taut.swap``. Raises ``ValueError`` where they do not fit."""

    weights: str = "int4"
    group_size: int | None = None
    zeros: bool = False
    activations: str = "auto"
    skip: tuple[str, ...] = ()
    rules: Mapping[str, Mapping | None] | None = None
    lm_head: str | None = None
    fuse: bool | str = "auto"
    sparsity: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "skip", tuple(self.skip))  # a list when it comes out of JSON
        check_mode(self.fuse, strict=False)
        make_head_rule(self.lm_head)
        self.book()

    def book(self) -> RuleBook:
        return RuleBook(self.weights, self.group_size, self.zeros, self.activations, self.skip, self.rules, sparsity=self.sparsity)

    def swap_arguments(self) -> dict[str, Any]:
        return {**asdict(self), "skip": list(self.skip)}

    def __str__(self) -> str:
        return f"{self.book().default.format}, {self.activations} activations"


@dataclass(frozen=True)
class Source:
    """Where a model comes from. ``kind`` is "directory", "gguf" or "hub"; ``name`` is what the user wrote."""

    kind: str
    name: str

    @property
    def arguments(self) -> tuple[str, dict[str, str]]:
        """What ``from_pretrained`` takes."""
        if self.kind == "gguf":
            path = Path(self.name)
            return str(path.parent), {"gguf_file": path.name}
        return self.name, {}


def find_source(name: str | os.PathLike) -> Source:
    """Says what ``name`` is: a directory that holds config.json, a GGUF file (or a directory with exactly one), or a hub id.

    Raises ``FileNotFoundError`` for a path that is not there, ``ValueError`` for one that holds no model.
    """
    name = os.fspath(name)
    path = Path(name).expanduser()
    if path.is_file():
        with path.open("rb") as file:
            if file.read(4) != b"GGUF":
                raise ValueError(f"{name} is a file, but not a GGUF file; accepted: a model directory, a GGUF file, a hub id")
        return Source("gguf", str(path.absolute()))
    if path.is_dir():
        if (path / "config.json").is_file():
            return Source("directory", str(path))
        files = sorted(path.glob("*.gguf"))
        if len(files) == 1:
            return find_source(files[0])
        what = f"{len(files)} GGUF files (name one)" if files else "neither a config.json nor a GGUF file"
        raise ValueError(f"{name} is a directory with {what}")
    if _HUB_ID.fullmatch(name) and not name.endswith(".gguf"):
        return Source("hub", name)
    raise FileNotFoundError(f"{name}: no such file or directory, and no hub id (owner/name)")


def local_source(source: Source) -> Source:
    """``source`` as files on this machine: a hub id is downloaded to the hub's cache first (weights, configuration, tokenizer).

    Raises ``OSError`` with one line where it cannot be had.
    """
    if source.kind != "hub":
        return source
    require_transformers()
    from huggingface_hub import snapshot_download

    patterns = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
    try:
        return Source("directory", _one_line_errors(source, lambda: snapshot_download(source.name, allow_patterns=patterns)))
    except ValueError as error:  # the hub's errors are of many types; to the caller it is a file that could not be read
        raise OSError(str(error)) from error


def load_tokenizer(source: Source) -> Any:
    """The tokenizer of ``source``. Raises ``OSError`` or ``ValueError`` with one line if there is none."""
    transformers = require_transformers()
    where, arguments = source.arguments
    return _one_line_errors(source, lambda: transformers.AutoTokenizer.from_pretrained(where, **arguments))


def load_model(
    source: Source, dtype: str = "auto", settings: Settings | None = None, progress: Callable[[int, int, str], None] | None = None
) -> tuple[nn.Module, SwapReport | None]:
    """A causal language model in evaluation mode, on the CPU, and what was swapped in it (None where nothing was asked).

    ``dtype``: "auto" (that of the checkpoint), "float32", "bfloat16", "float16". With ``settings``, a checkpoint streams in:
    each weight is packed as it is read, and no float copy of the model is held; with rules, and from GGUF, floats are read first.
    Sparse float checkpoints of compressed-tensors are read as dense ones: ``sparsity="2:4"`` then keeps exactly their nonzeros.
    ``progress(done, total, name)`` is called where layers are swapped after loading.
    Raises ``OSError`` or ``ValueError`` with a one-line message if the model cannot be read or swapped.
    """
    if dtype != "auto" and dtype not in DTYPES:
        raise ValueError(f"unknown dtype {dtype!r}; accepted: auto, {', '.join(DTYPES)}")
    transformers = require_transformers()
    if source.kind != "gguf" and is_quantized(source) == "compressed-tensors":
        local = local_source(source)
        if is_sparse(Path(local.name)):
            with written_dense(Path(local.name)) as folder:
                return load_model(Source("directory", str(folder)), dtype, settings, progress)
    where, arguments = source.arguments
    report = None
    quantized = is_quantized(source)
    if settings is not None and quantized:
        raise ValueError(f"{source.name} is already quantized ({quantized}); give the float model to quantize it another way")
    # WHY not with rules: they may name a tied output head, which gets low bits of its own only once the model is there
    streams = settings is not None and source.kind != "gguf" and not settings.rules
    if streams:
        from .integrations.transformers import Config

        arguments = {**arguments, "quantization_config": Config(**settings.swap_arguments())}
    # WHY float32 for GGUF: its numbers are float16 at best, and "auto" would not say which dtype they become
    chosen = DTYPES.get(dtype, torch.float32 if source.kind == "gguf" else "auto")
    load = transformers.AutoModelForCausalLM.from_pretrained
    model, found = _one_line_errors(source, lambda: load(where, dtype=chosen, output_loading_info=True, **arguments))
    if missing := sorted(found["missing_keys"]):  # transformers only warns, and leaves them random
        names = ", ".join(missing[:3]) + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
        raise ValueError(f"cannot read {source.name}: it lacks {len(missing)} weight{'s' * (len(missing) > 1)}: {names}")
    if source.kind == "gguf":
        _forget_gguf(model)
    if settings is not None and not streams:
        report = swap(model, progress=progress, **settings.swap_arguments())
    elif settings is not None:
        report = getattr(getattr(model, "hf_quantizer", None), "report", None)
    return model.eval(), report


def is_quantized(source: Source) -> str | None:
    """The quantization method a checkpoint names in its config.json, or None. A GGUF file counts as none: it is read as floats."""
    if source.kind == "gguf":
        return None
    transformers = require_transformers()
    config = _one_line_errors(source, lambda: transformers.AutoConfig.from_pretrained(source.name))
    quantization = getattr(config, "quantization_config", None)
    if quantization is None:
        return None
    method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization.quant_method
    return str(getattr(method, "value", method))


def _forget_gguf(model: nn.Module) -> None:
    """Takes off the marks transformers leaves on a model read from GGUF: its weights are plain floats, and may be saved."""
    model.hf_quantizer = None
    for config in (model.config, getattr(model.config, "get_text_config", lambda: None)()):
        if config is not None and hasattr(config, "quantization_config"):
            del config.quantization_config
    for mark in ("is_quantized", "quantization_method"):
        if mark in model.__dict__:
            delattr(model, mark)


def require_transformers() -> Any:
    """The transformers package, with taut's quantizer registered. Raises ``ValueError`` if it is not installed."""
    try:
        import transformers
    except ImportError:
        raise ValueError("this needs transformers: pip install 'taut[transformers]'") from None
    from .integrations import transformers as _  # noqa: F401  (registers taut's quantizer, for checkpoints that taut wrote)

    if not sys.stderr.isatty():  # a bar drawn into a file is noise
        transformers.logging.disable_progress_bar()
    return transformers


def _one_line_errors(source: Source, load: Callable[[], Any]) -> Any:
    """Runs a loader of transformers, whose errors run over many lines and come in many types."""
    try:
        return load()
    except (KeyboardInterrupt, MemoryError):
        raise
    except OSError as error:
        raise OSError(f"cannot read {source.name}: {first_line(error)}") from error
    except Exception as error:
        raise ValueError(f"cannot read {source.name}: {first_line(error)}") from error


def first_line(error: BaseException | str, limit: int = 300) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = lines[0] if lines else type(error).__name__
    return text if len(text) <= limit else text[: limit - 1] + "…"


def write_directory(target: str | os.PathLike, fill: Callable[[Path], None], force: bool = False) -> None:
    """Has ``fill`` write a new directory beside ``target``, then puts it in place of ``target`` by renaming.

    Until the new one is complete the old one stays whole, and it comes back if the exchange fails.
    Raises ``ValueError`` for a target that holds files unless ``force``, ``OSError`` where it cannot be written.
    """
    target = Path(target).absolute()
    check_target(target, force)
    target.parent.mkdir(parents=True, exist_ok=True)
    token = uuid.uuid4().hex[:8]
    new, old = (target.with_name(f".{target.name}.{word}-{token}") for word in ("new", "old"))
    new.mkdir()
    try:
        fill(new)
        if target.exists():
            target.rename(old)
        try:
            new.rename(target)
        except OSError:
            if old.exists():
                old.rename(target)
            raise
    finally:
        shutil.rmtree(new, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)


def check_target(target: Path, force: bool) -> None:
    """Raises if ``target`` may not be written: before long work, and again when it is done."""
    if target.is_file():
        raise ValueError(f"{target} is a file; accepted: a new or an empty directory")
    if target.is_dir() and any(target.iterdir()) and not force:
        raise ValueError(f"{target} is not empty; give --force to replace it")
    parent = next(folder for folder in (target, *target.parents) if folder.exists())
    if not os.access(parent, os.W_OK):
        raise PermissionError(f"{parent} cannot be written")


def prompt_tokens(tokenizer: Any, prompt: str, chat: bool | None = None) -> torch.Tensor:
    """Token ids ``[1, T]`` of ``prompt``; ``chat``: through the tokenizer's chat template (None: if it has one).

    Raises ``ValueError`` for an empty prompt, or where ``chat`` asks for a template that is not there.
    """
    has_template = bool(getattr(tokenizer, "chat_template", None))
    if chat and not has_template:
        raise ValueError("this tokenizer has no chat template; use --no-chat")
    if has_template if chat is None else chat:
        text = tokenizer.apply_chat_template([{"role": "user", "content": prompt}], add_generation_prompt=True, tokenize=False)
        ids = tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
    else:
        ids = tokenizer(prompt, return_tensors="pt").input_ids
    if ids.numel() == 0:
        raise ValueError("the prompt is empty")
    return ids.long()


def text_windows(tokenizer: Any, text: str, length: int, count: int) -> torch.Tensor:
    """``count`` windows of ``length`` tokens, evenly spaced over ``text``: ``int64 [count, length]``.

    Raises ``ValueError`` if the text is too short for one window; gives fewer windows where it is too short for all.
    """
    ids = torch.tensor(tokenizer(text, add_special_tokens=False).input_ids, dtype=torch.int64)
    if ids.numel() < length:
        raise ValueError(f"the text has {ids.numel()} tokens; one window takes {length}")
    count = min(count, ids.numel() // length)
    starts = torch.linspace(0, ids.numel() - length, count).long().tolist()
    return torch.stack([ids[start : start + length] for start in starts])


def end_tokens(model: nn.Module) -> Sequence[int]:
    """The ids that end a text, of the generation configuration or else the configuration."""
    for config in (getattr(model, "generation_config", None), model.config):
        end = getattr(config, "eos_token_id", None)
        if end is not None:
            return [end] if isinstance(end, int) else list(end)
    return []


def save(model: nn.Module, tokenizer: Any, target: str | os.PathLike, force: bool = False) -> None:
    """Writes a swapped model and its tokenizer to a new directory, in one piece: see ``write_directory``."""
    from .integrations.transformers import save as save_swapped

    write_directory(target, lambda folder: save_swapped(model, folder, tokenizer), force)
