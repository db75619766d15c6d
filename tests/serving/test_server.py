"""The server that `scripts/serve_vllm.sh` starts: completions and chats, many clients at once, and bad ones."""

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.serving.models import CHAT_TEMPLATE, answer, prompts, save, tiny_model

pytest.importorskip("vllm")
pytestmark = pytest.mark.serving

SCRIPT = Path(__file__).parents[2] / "scripts" / "serve_vllm.sh"
NUM_REQUESTS = 30


def start(*arguments: str, **options) -> subprocess.Popen[str]:
    """The script, with the environment that these tests run in."""
    environment = os.environ | {"VLLM_VENV": sys.prefix, "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    return subprocess.Popen([str(SCRIPT), *arguments], env=environment, text=True, **options)


class Server:
    """A model behind a port, and what it is a server of."""

    def __init__(self, folder: Path) -> None:
        self.model = tiny_model(layer_types="0s_1s_2_2")
        save(self.model, folder)
        with socket.socket() as free:
            free.bind(("localhost", 0))
            self.port = free.getsockname()[1]
        arguments = "--dtype float32 --enforce-eager --max-model-len 256 --max-num-seqs 8 --kv-sharing-fast-prefill"
        self.log = (folder / "server.log").open("w", encoding="utf-8")
        self.process = start(
            str(folder), "--port", str(self.port), *arguments.split(), stdout=self.log, stderr=self.log,
            start_new_session=True,
        )  # fmt: skip
        self.name = str(folder)

    def wait(self) -> None:
        """Until it answers."""
        for _ in range(600):
            assert self.process.poll() is None, Path(self.log.name).read_text(encoding="utf-8")[-3000:]
            try:
                urllib.request.urlopen(f"http://localhost:{self.port}/health", timeout=5)
                return
            except OSError:
                time.sleep(0.5)
        raise TimeoutError

    def stop(self) -> None:
        """Ends it and the processes that it has started."""
        os.killpg(self.process.pid, signal.SIGTERM)
        self.process.wait(30)
        self.log.close()

    def ask(self, path: str, **body) -> dict:
        """What it answers to a request with this body."""
        data = json.dumps({"model": self.name, "temperature": 0, "ignore_eos": True, **body}).encode()
        request = urllib.request.Request(
            f"http://localhost:{self.port}{path}", data, {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=120) as response:
            text = response.read().decode()
        if not body.get("stream"):
            return json.loads(text)
        events = [line.removeprefix("data: ") for line in text.splitlines() if line.startswith("data: ")]
        assert events.pop() == "[DONE]"
        return {"events": [json.loads(event) for event in events]}

    def complete(self, prompt: list[int], num_tokens: int = 20) -> list[int]:
        """The tokens that it continues a prompt with."""
        answered = self.ask("/v1/completions", prompt=prompt, max_tokens=num_tokens, return_token_ids=True)
        return answered["choices"][0]["token_ids"]


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[Server]:
    running = Server(tmp_path_factory.mktemp("served"))
    try:
        running.wait()
        yield running
    finally:
        running.stop()


def test_completions_are_those_of_generate(server):
    for prompt in prompts():
        assert server.complete(prompt) == answer(server.model, prompt, 20)[0]


def test_a_chat_is_the_completion_of_its_template(server):
    messages = [{"role": "user", "content": "In the beginning"}]
    text = "[user] In the beginning\n[assistant]"
    assert "[assistant]" in CHAT_TEMPLATE
    chat = server.ask("/v1/chat/completions", messages=messages, max_tokens=12)["choices"][0]["message"]["content"]
    assert chat == server.ask("/v1/completions", prompt=text, max_tokens=12)["choices"][0]["text"]
    events = server.ask("/v1/chat/completions", messages=messages, max_tokens=12, stream=True)["events"]
    assert len(events) > 3
    assert "".join(event["choices"][0]["delta"].get("content") or "" for event in events) == chat


def test_streamed_completions_are_whole(server):
    prompt = prompts()[2]
    events = server.ask("/v1/completions", prompt=prompt, max_tokens=20, stream=True, return_token_ids=True)["events"]
    tokens = [token for event in events for token in event["choices"][0].get("token_ids") or ()]
    assert tokens == answer(server.model, prompt, 20)[0]


def test_many_requests_at_once(server):
    given = [prompt[: 3 + index] + [index] for index, prompt in enumerate(prompts() * 6)]
    assert len(given) == NUM_REQUESTS
    with ThreadPoolExecutor(NUM_REQUESTS) as pool:
        answers = list(pool.map(server.complete, given))
    assert answers == [answer(server.model, prompt, 20)[0] for prompt in given]


def test_a_client_that_disconnects_costs_the_others_nothing(server):
    body = {"model": server.name, "prompt": prompts()[1], "max_tokens": 200, "stream": True, "ignore_eos": True}
    for _ in range(3):
        connection = http.client.HTTPConnection("localhost", server.port, timeout=30)
        connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
        connection.getresponse().readline()
        connection.close()
    assert server.complete(prompts()[0]) == answer(server.model, prompts()[0], 20)[0]


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ({"prompt": [1] * 300, "max_tokens": 20}, "maximum context length"),
        ({"prompt": [1, 2, 3], "max_tokens": 2, "prompt_logprobs": 1}, "incorrect logprobs for prompt tokens"),
    ],
    ids=["longer than the cache", "logprobs of a prompt whose last layers were left out"],
)
def test_what_cannot_be_answered_is_refused_at_once(server, body, reason):
    with pytest.raises(urllib.error.HTTPError) as refused:
        server.ask("/v1/completions", **body)
    assert refused.value.code == 400
    assert reason in refused.value.read().decode()
    assert server.complete(prompts()[0]) == answer(server.model, prompts()[0], 20)[0]


def test_a_mistake_is_one_line(server, tmp_path):
    """Others are in `tests/unit/serving`."""
    for arguments, line in (
        ([server.name, "--port", str(server.port)], f"--port {server.port}: cannot be had (Address already in use)"),
        ([server.name, "--hf-overrides", '{"layer_types": "0_0"}'], "layer_types='0_0': has 2 entries"),
        ([], "name a model first"),
    ):
        process = start(*arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        output, errors = process.communicate(timeout=60)
        assert (process.returncode, output, errors.count("\n")) == (2, "", 1), errors
        assert line in errors
