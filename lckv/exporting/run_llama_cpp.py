"""Runs llama.cpp on a file, in a process of its own, which it ends where it does not like the file.

A request is one JSON object on the standard input, `{"path", "num_tokens", "num_threads", "float32_cache", "text",
"completions"}`; `completions` are requests of llama.cpp's server. The answer, on the standard output, is
`{"tokens", "completions"}`; `tokens` are the text's. What llama.cpp reports goes to the standard error.
"""

from __future__ import annotations

import http.client
import json
import sys
from typing import Any
from urllib.parse import urlsplit


def main() -> None:
    """Answers the request."""
    request = json.load(sys.stdin)
    server = _start(request)
    answer = {
        "tokens": _tokenize(server.listening_address, request["text"]),
        "completions": [server.handle_completions(completion) for completion in request["completions"]],
    }
    json.dump(answer, sys.stdout)


def _start(request: dict[str, Any]) -> Any:
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = request["path"]
    params.n_ctx = request["num_tokens"]
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = request["num_threads"]
    params.n_gpu_layers = 0
    params.warmup = params.fit_params = False
    params.verbosity = 4  # with which it says how large its caches are
    if request["float32_cache"]:
        params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    return xllamacpp.Server(params)


def _tokenize(address: str, text: str) -> list[int]:
    connection = http.client.HTTPConnection(urlsplit(address).netloc)
    body = json.dumps({"content": text, "add_special": True, "parse_special": True})
    connection.request("POST", "/tokenize", body, {"Content-Type": "application/json"})
    tokens: list[int] = json.load(connection.getresponse())["tokens"]
    connection.close()
    return tokens


if __name__ == "__main__":
    main()
