"""Settings of the tests that run vLLM, in an environment of their own: `make test-serving`."""

import os

# Before vLLM is imported, here or in a server.
os.environ.update(
    HF_HUB_OFFLINE="1",
    HF_HUB_DISABLE_TELEMETRY="1",
    VLLM_NO_USAGE_STATS="1",
    OMP_NUM_THREADS="1",
    VLLM_CPU_OMP_THREADS_BIND="nobind",  # other processes may have the first core
    VLLM_CPU_KVCACHE_SPACE="1",
    VLLM_ENABLE_V1_MULTIPROCESSING="0",  # engines in this process, whose mistakes are exceptions here
    VLLM_USE_V2_MODEL_RUNNER="0",
    VLLM_LOGGING_LEVEL="ERROR",
)
