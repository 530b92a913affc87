# Sets up this checkout: a virtual environment in .venv, torch, and taut built from the sources. Source it, then call
#   setup_taut STAMP EXTRAS [REQUIREMENT...]
# STAMP names what is set up (one word), EXTRAS are taut's ("transformers"), each REQUIREMENT is installed without its
# dependencies. What is already there is kept: a torch of 2.11 or newer, an editable install, and, if the sources did not
# change since, the whole set-up. Afterwards $TAUT_PYTHON is the interpreter to use, $TAUT_ROOT the checkout, and
# "${TAUT_CONFIG[@]}" what pip needs to build the same again.
#
# From the environment: TAUT_CUDA, ON to have the CUDA kernels built whether there is an nvcc or not (then pip brings one), OFF to
# leave them out; else they are built where there is an nvcc. TAUT_CUDA_ARCHS, the GPUs to build for.

TAUT_ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
TAUT_PYTHON="$TAUT_ROOT/.venv/bin/python"

if [[ -z "${TAUT_CUDA_ARCHS:-}" ]]; then
  # Without a GPU: as few as have every kernel between them.
  if nvidia-smi -L >/dev/null 2>&1; then TAUT_CUDA_ARCHS=native; else TAUT_CUDA_ARCHS="75-real;80-real;89-real;90a-real"; fi
fi
TAUT_CONFIG=(--config-settings "cmake.define.TAUT_CUDA=${TAUT_CUDA:-AUTO}" --config-settings "cmake.define.TAUT_CUDA_ARCHS=$TAUT_CUDA_ARCHS")

setup_say() { printf 'setup: %s\n' "$*" >&2; }

setup_python() {  # the newest python on the path that taut can be built for
  local name
  for name in "${PYTHON:-python3}" python3.13 python3.12 python3.11 python3.10; do
    if command -v "$name" >/dev/null && "$name" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2])' 2>/dev/null; then
      command -v "$name"
      return
    fi
  done
  setup_say "taut needs Python 3.10 or newer; none was found. Set PYTHON to one."
  return 1
}

setup_fingerprint() {  # of everything an install is made from, and of what was asked for
  (cd "$TAUT_ROOT" && find CMakeLists.txt pyproject.toml cmake csrc python -type f ! -name '*.pyc' -print0 | LC_ALL=C sort -z | xargs -0 sha256sum
   echo "$*" "${TAUT_CONFIG[@]}") |
    sha256sum | cut -d' ' -f1
}

setup_is_editable() {
  "$TAUT_PYTHON" - <<'PYTHON'
import json, sys
from importlib import metadata
try:
    origin = json.loads(metadata.distribution("taut").read_text("direct_url.json") or "{}")
except metadata.PackageNotFoundError:
    sys.exit(1)
sys.exit(not origin.get("dir_info", {}).get("editable"))
PYTHON
}

setup_venv() {
  [[ -x "$TAUT_PYTHON" ]] && return
  local python
  python="$(setup_python)" || return
  setup_say "making .venv with $("$python" --version)"
  "$python" -m venv "$TAUT_ROOT/.venv"
}

setup_taut() {
  local stamp="$TAUT_ROOT/.venv/taut-setup-$1" extras="$2" fingerprint
  shift
  fingerprint="$(setup_fingerprint "$@")" || return
  if [[ -x "$TAUT_PYTHON" && -f "$stamp" && "$(<"$stamp")" == "$fingerprint" ]]; then return; fi
  shift
  setup_venv || return
  local pip=("$TAUT_PYTHON" -m pip --disable-pip-version-check install --quiet)
  if ! "$TAUT_PYTHON" -c 'import sys, torch; sys.exit(tuple(map(int, torch.__version__.split(".")[:2])) < (2, 11))' 2>/dev/null; then
    setup_say "installing torch 2.13.0"
    "${pip[@]}" torch==2.13.0 || return
  fi
  if [[ "${TAUT_CUDA:-}" == ON && -z "${CUDACXX:-}" && ! -x /usr/local/cuda/bin/nvcc ]] && ! command -v nvcc >/dev/null; then
    setup_say "installing nvcc"
    "${pip[@]}" 'cuda-toolkit[nvcc,cudart,cccl,nvvm,crt]==13.0.*' || return
  fi
  # A set-up with other kernels built in, whose stamp would be believed, is replaced by this one.
  if [[ "$(cat "$TAUT_ROOT/.venv/taut-config" 2>/dev/null)" != "${TAUT_CONFIG[*]}" ]]; then
    rm -f "$TAUT_ROOT"/.venv/taut-setup-*
    printf '%s\n' "${TAUT_CONFIG[*]}" >"$TAUT_ROOT/.venv/taut-config"
  fi
  setup_say "building taut"
  "${pip[@]}" 'scikit-build-core>=0.10' 'pybind11>=2.13' cmake ninja || return
  if setup_is_editable; then
    "${pip[@]}" --no-build-isolation "${TAUT_CONFIG[@]}" --editable "$TAUT_ROOT[$extras]" || return
  else
    "${pip[@]}" --no-build-isolation "${TAUT_CONFIG[@]}" "$TAUT_ROOT[$extras]" || return
  fi
  if (($#)); then
    setup_say "installing $*"
    "${pip[@]}" --no-deps "$@" || return
  fi
  printf '%s\n' "$fingerprint" >"$stamp"
}
