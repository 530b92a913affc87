"""Where taut meets other libraries: one file each, loaded only when that library is.

``import taut`` must stay cheap, and transformers or peft may be imported after it, before it or never. So each file here
is imported at the moment its library's own registry has been.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
from types import ModuleType

# A library's module -> the file here that, once imported, has registered taut with it.
_FILES = {
    "transformers.quantizers.auto": f"{__name__}.transformers", "transformers.modeling_utils": f"{__name__}.attention",
    "peft.tuners.lora.model": f"{__name__}.peft",
}  # fmt: skip


class _AfterImport(importlib.abc.MetaPathFinder):
    """Lets the other finders find a library's module, and imports our file once it has run."""

    def __init__(self, waiting: dict[str, str]) -> None:
        self.waiting = waiting

    def find_spec(self, name: str, path=None, target=None) -> importlib.machinery.ModuleSpec | None:
        ours = self.waiting.pop(name, None)  # WHY pop first: the search below comes through here again
        if ours is None:
            return None
        spec = importlib.util.find_spec(name)
        if spec is None or spec.loader is None:
            return spec
        run = spec.loader.exec_module

        def run_both(module: ModuleType) -> None:
            run(module)
            importlib.import_module(ours)

        spec.loader.exec_module = run_both
        return spec


def install() -> None:
    """Registers taut with every supported library, now where it is imported already, else when it will be."""
    if any(isinstance(finder, _AfterImport) for finder in sys.meta_path):
        return
    waiting = {theirs: ours for theirs, ours in _FILES.items() if theirs not in sys.modules}
    if waiting:
        sys.meta_path.insert(0, _AfterImport(waiting))
    for theirs, ours in _FILES.items():
        if theirs in sys.modules:
            importlib.import_module(ours)
