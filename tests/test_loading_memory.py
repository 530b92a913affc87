"""from_pretrained with taut.Config: the peak of anonymous memory stays near what the loaded model holds."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

transformers = pytest.importorskip("transformers")

from tiny_models import write_checkpoint

_MEASURE = """
import ctypes, gc, sys, threading, time
import taut, torch
from transformers import AutoModelForCausalLM

def anonymous():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("RssAnon"))

small, large, dtype = sys.argv[1], sys.argv[2], getattr(torch, sys.argv[3])
AutoModelForCausalLM.from_pretrained(small, dtype=dtype, quantization_config=taut.Config())  # imports, thread stacks, arenas
gc.collect()
ctypes.CDLL(None).malloc_trim(0)
base = peak = anonymous()
loading = True

def watch():
    global peak
    while loading:
        peak = max(peak, anonymous())
        time.sleep(0.0005)

thread = threading.Thread(target=watch)
thread.start()
model = AutoModelForCausalLM.from_pretrained(large, dtype=dtype, quantization_config=taut.Config())
loading = False
thread.join()
tensors = {t.data_ptr(): t for t in [*model.parameters(), *model.buffers()]}.values()
print(peak - base, sum(t.numel() * t.element_size() for t in tensors), len(model.taut_report.swapped))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(("stored", "dtype"), [("float32", "float32"), ("bfloat16", "bfloat16"), ("float32", "bfloat16")])
def test_loading_holds_no_float_copy(tmp_path, stored, dtype):
    small = write_checkpoint(tmp_path / "small")
    config = transformers.LlamaConfig(
        vocab_size=1024, hidden_size=1024, intermediate_size=2816, num_hidden_layers=4, num_attention_heads=16, num_key_value_heads=4
    )
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config)
    model.to(getattr(torch, stored)).to_empty(device="cpu")
    for parameter in model.parameters():
        parameter.data.uniform_(-0.05, 0.05)
    model.save_pretrained(tmp_path / "large")
    largest = max(p.numel() for p in model.parameters()) * torch.empty(0, dtype=getattr(torch, dtype)).element_size()
    size = sum(path.stat().st_size for path in (tmp_path / "large").glob("*.safetensors"))
    assert size > 80e6
    done = subprocess.run(
        [sys.executable, "-c", _MEASURE, str(small), str(tmp_path / "large"), dtype],
        capture_output=True, text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    peak, held, swapped = map(int, done.stdout.split())
    assert swapped == 28
    # 4 MB for what grows with nothing: the tables of Python and of the reader
    assert peak <= 1.3 * held + largest + 4e6, f"peak {peak / 1e6:.1f} MB over {held / 1e6:.1f} MB held"
