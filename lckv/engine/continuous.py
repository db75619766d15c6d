"""Continuous batching (Yu et al., OSDI 2022): requests join and leave a running batch at any step.

Transformers' own continuous batching is the model for this one. What of it fits is used: the state of a request and
what becomes of it (`RequestState`, `RequestStatus`, `GenerationOutput`), and the logits processors of `generate()`.
Its scheduler, cache and inputs do not fit. They count blocks of transformers' `PagedAttentionCache`, which has keys
and values for every decoder layer, of a kind read from its own meaning of `config.layer_types`; and they put all
tokens of a step into one row, with masks for causal and windowed attention only. Here layers share keys and values,
may read upward, and are iterated.
Its processors for a row of many requests leave out those that look at earlier tokens, such as repetition penalties.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Hashable, Sequence
from itertools import count, takewhile
from typing import Any

import torch
from transformers import GenerationConfig
from transformers.generation.continuous_batching.requests import GenerationOutput, RequestStatus

from lckv.cache.paged import OutOfPagesError, PagedKVCache, extend_hashes
from lckv.engine.requests import BatchStatistics, OnToken, Request, make_request
from lckv.errors import UserError, check_whole_number
from lckv.sharing.iteration import exact_unless
from lckv.utils.logits import NOT_FINITE, are_finite, choose_token
from lckv.utils.padding import pad_left


class ContinuousBatcher:
    """Generates for many requests at once, each as `generate()` would for it alone, if its pages are exact.

    Quantised pages are rounded once one of the requests that share them is long enough, and when that is depends on
    `tokens_per_step`: there, what a request gets may depend on others that begin as it does.

    In every step the running requests get a token each, from one forward call; what is left of the step's budget goes
    to the prompts of requests that join. A request that ends gives its pages back at once. When pages run out, the
    newest request gives up its pages and waits; it goes on later where it was. A request that is too long for the
    whole pool fails, alone.

    Args:
        model: one of ours, in evaluation mode.
        cache: an empty paged cache; by default one whose pools grow.
        generation_config: options of `generate()` for requests that bring none; by default the model's.
        max_rows: most requests that run at once.
        tokens_per_step: most tokens of one step, except that each running request always gets its token.
        forward_passes: for prompts, where layers read upward; by default they are iterated until they converge.
        converge_tolerance: the relative change of KV that ends the iteration; by default one that changes no greedy
            text.
        on_token: called with each request's name and token, unless the request brings a callback.

    Raises:
        UserError: for a cache of another kind, or numbers below 1.
    """

    def __init__(
        self,
        model: Any,
        cache: PagedKVCache | None = None,
        *,
        generation_config: GenerationConfig | None = None,
        max_rows: int = 64,
        tokens_per_step: int = 512,
        forward_passes: int | str | None = None,
        converge_tolerance: float | None = None,
        on_token: OnToken | None = None,
    ) -> None:
        cache = PagedKVCache(model.config) if cache is None else cache
        if not isinstance(cache, PagedKVCache):
            raise UserError(f"continuous batching with a cache {type(cache).__name__}: allowed is cache=paged")
        for option, value in (("max_rows", max_rows), ("tokens_per_step", tokens_per_step)):
            check_whole_number(option, value)
        self.model, self.cache, self.generation_config = model, cache, generation_config
        self.max_rows, self.tokens_per_step, self.on_token = max_rows, tokens_per_step, on_token
        self.iteration = exact_unless(forward_passes, converge_tolerance)
        self.statistics = BatchStatistics()
        self.outputs: dict[str, GenerationOutput] = {}
        self._waiting: deque[Request] = deque()
        self._running: list[Request] = []  # in the order in which they joined
        self._names: set[str] = set()  # of those that wait or run
        self._untold: deque[tuple[Request, int]] = deque()

    def add_request(
        self,
        prompt_ids: Sequence[int],
        request_id: str | None = None,
        *,
        max_new_tokens: int | None = None,
        generation_config: GenerationConfig | None = None,
        seed: int | None = None,
        on_token: OnToken | None = None,
    ) -> str:
        """Lets a request wait for its turn.

        Args:
            prompt_ids: its prompt.
            request_id: its name; by default a number that is not taken.
            max_new_tokens: after how many tokens it ends; by default as `generation_config` says, or 20.
            generation_config: options of `generate()` for this request.
            seed: for sampling that does not depend on the other requests.
            on_token: called with its name and each token.

        Returns:
            Its name.

        Raises:
            UserError: for an empty prompt, tokens that the model does not know, a name that is taken, and options that
                are not those of one greedy or sampled sequence.
        """
        name = self._new_name() if request_id is None else request_id
        if self._is_taken(name):
            raise UserError(f"request {name!r}: there is one of that name")
        request = make_request(
            self.model,
            name,
            [int(token) for token in prompt_ids],
            generation_config or self.generation_config,
            max_new_tokens=max_new_tokens,
            seed=seed,
            on_token=on_token or self.on_token,
        )
        self._names.add(name)
        self._let_wait(request, first=False)
        return name

    def cancel(self, request_id: str) -> None:
        """Ends a request, unless it has ended already; what it has so far is its output.

        Raises:
            UserError: if there never was such a request.
        """
        if request_id in self.outputs:
            return
        for request in [*self._running, *self._waiting]:
            if request.name == request_id:
                self._end(request, "cancelled")
                return
        raise UserError(f"cancel({request_id!r}): there is no such request")

    def has_work(self) -> bool:
        """Whether a request is waiting or running, or has a token that its callback was not told."""
        return bool(self._waiting or self._running or self._untold)

    def run(self) -> dict[str, GenerationOutput]:
        """Makes steps until every request has ended, and returns all outputs by the requests' names."""
        while self.has_work():
            self.step()
        return self.outputs

    @torch.inference_mode()
    def step(self) -> None:
        """Makes a token for each running request, and goes on with the prompts of those that join."""
        start_time = time.perf_counter()
        num_decoded = self._decode()
        self._tell()
        self._prefill(max(1, self.tokens_per_step - num_decoded))
        self._tell()
        self.statistics.num_steps += 1
        self.statistics.seconds += time.perf_counter() - start_time

    def _is_taken(self, name: str) -> bool:
        return name in self.outputs or name in self._names

    def _new_name(self) -> str:
        first = len(self.outputs) + len(self._names)
        return next(name for name in map(str, count(first)) if not self._is_taken(name))

    def _let_wait(self, request: Request, first: bool) -> None:
        request.hashes = extend_hashes([], request.tokens[:-1], self.cache.page_size)
        (self._waiting.appendleft if first else self._waiting.append)(request)

    def _num_pending(self, request: Request) -> int:
        """Tokens that are not in the cache yet."""
        return len(request.tokens) - self.cache.length(request.name)

    def _decode(self) -> int:
        """One forward call for all requests whose prompt is done; returns how many they are."""
        decoding = [request for request in self._running if request.state.status == RequestStatus.DECODING]
        requests = list(self._fit(dict.fromkeys(decoding, 1)))
        if requests:
            self._generate(requests, self._forward(requests, [1] * len(requests)))
        return len(requests)

    def _drop_newest(self, error: str) -> None:
        """The newest request has to wait; if it is alone, waiting would not help."""
        if len(self._running) == 1:
            self._end(self._running[-1], error)
        else:
            self._begin_again(self._running[-1])

    def _begin_again(self, request: Request) -> None:
        """Takes a request's pages away, and lets it wait in front of the others."""
        self._running.remove(request)
        self.cache.remove(request.name)
        request.state.status = RequestStatus.PENDING
        self.statistics.num_preemptions += 1
        self._let_wait(request, first=True)

    def _prefill(self, budget: int) -> None:
        """Goes on with the prompts that have been begun, then begins others."""
        sizes: dict[Request, int] = {}
        for request in self._running:
            if request.state.status == RequestStatus.PREFILLING and budget > 0:
                sizes[request] = min(self._num_pending(request), budget)
                budget -= sizes[request]
        while budget > 0 and self._waiting and len(self._running) < self.max_rows and self._admit():
            request = self._running[-1]
            sizes[request] = min(self._num_pending(request), budget)
            budget -= sizes[request]
        for requests in self._similar(self._fit(sizes)):
            logits = self._forward(requests, [sizes[request] for request in requests])
            self.statistics.num_prompt_tokens += sum(sizes[request] for request in requests)
            done = [row for row, request in enumerate(requests) if not self._num_pending(request)]
            for row in done:
                requests[row].state.status = RequestStatus.DECODING
            if done:
                self._generate([requests[row] for row in done], logits[done])

    def _admit(self) -> bool:
        """Lets the request that waits longest join if there is room for its prompt; says whether one did.

        One that does not fit though it would be alone never will: it fails, and the next has its turn.
        """
        while self._waiting:
            request = self._waiting[0]
            if self._waits_for_pages(request):
                return False
            error = self._begin(request)
            if error is None:
                return True
            if self._running:
                return False
            self._end(request, error)
        return False

    def _begin(self, request: Request) -> str | None:
        """Moves the first of those that wait to those that run, or says for what there is no room."""
        num_reused = self.cache.add(request.name, request.tokens)
        # What is running shall be able to go on for a while, or this request would soon lose its pages again.
        num_new = {other.name: max(self.cache.page_size, self._num_pending(other)) for other in self._running}
        try:
            self.cache.check_room(num_new | {request.name: self._num_pending(request)})
        except OutOfPagesError as error:
            self.cache.remove(request.name)
            return str(error)
        self._waiting.popleft()
        self._running.append(request)
        request.state.status = RequestStatus.PREFILLING
        self.statistics.num_reused_tokens += num_reused
        self.statistics.peak_rows = max(self.statistics.peak_rows, len(self._running))
        return None

    def _waits_for_pages(self, request: Request) -> bool:
        """Whether a prompt that is being run begins alike and will soon have pages that this one can use."""
        for other in self._running:
            pairs = zip(request.hashes, other.hashes, strict=False)
            num_equal = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
            if num_equal * self.cache.page_size > self.cache.length(other.name):
                return True
        return False

    def _fit(self, sizes: dict[Request, int]) -> dict[Request, int]:
        """Takes pages from the newest requests, or makes the piece of the only one smaller, until there is room."""
        while sizes:
            try:
                self.cache.check_room({request.name: size for request, size in sizes.items()})
                break
            except OutOfPagesError as error:
                only = next(iter(sizes))
                if len(self._running) == 1 and sizes[only] > 1:
                    sizes[only] //= 2  # a window drops tokens between pieces
                else:
                    self._drop_newest(str(error))
            for request in [request for request in sizes if request not in self._running]:
                del sizes[request]
        return sizes

    def _similar(self, sizes: dict[Request, int]) -> list[list[Request]]:
        """Requests in groups for one forward call each, so that no more than half of a group's tokens are padding."""
        least = 1.0 if self.model.config.use_sequential else 0.5
        groups: list[list[Request]] = []
        for request in sorted(sizes, key=lambda request: -sizes[request]):
            if groups and sizes[request] >= least * sizes[groups[-1][0]]:
                groups[-1].append(request)
            else:
                groups.append([request])
        return groups

    def _forward(self, requests: list[Request], sizes: list[int]) -> torch.Tensor:
        """Runs each request's next tokens, and returns the logits behind the last, `(batch, vocab_size)`."""
        names: list[Hashable] = [request.name for request in requests]
        starts = [self.cache.length(name) for name in names]
        attention_mask, position_ids = self.cache.select(names, sizes)
        rows = zip(requests, starts, sizes, strict=True)
        input_ids, _ = pad_left([request.tokens[start : start + size] for request, start, size in rows], 0)
        device = self.model.device
        try:
            outputs = self.model(
                input_ids.to(device),
                attention_mask=attention_mask.to(device),
                position_ids=position_ids.to(device),
                past_key_values=self.cache,
                logits_to_keep=1,
                **self.iteration,
            )
        except BaseException:  # Ctrl-C too: whoever goes on afterwards finds these requests waiting
            for request in reversed(requests):
                self._begin_again(request)
            raise
        for request in requests:
            self.cache.record_tokens(request.name, request.tokens)
        used = self.cache.num_used_bytes()
        self.statistics.peak_used_bytes = max(self.statistics.peak_used_bytes, used)
        return outputs.logits[:, -1]

    def _generate(self, requests: list[Request], logits: torch.Tensor) -> None:
        """Gives each request its next token, and ends those that are done."""
        is_sound = are_finite(logits)
        tokens = self._choose(requests, logits.masked_fill(~is_sound[:, None], 0.0))  # those fail, whatever is chosen
        for request, token, is_right in zip(requests, tokens, is_sound.tolist(), strict=True):
            if not is_right:
                self._end(request, f"the model's logits are {NOT_FINITE}")
                continue
            request.tokens.append(token)
            self.statistics.num_generated_tokens += 1
            self._untold.append((request, token))
            if request.state.update_and_check_completion(token, None):
                self._end(request, None)

    def _tell(self) -> None:
        """Calls back for the tokens of this step, and those left of one that a callback ended by raising.

        What a callback may change, by cancelling requests or adding some, is not in use now.
        """
        while self._untold:
            request, token = self._untold.popleft()
            if request.on_token is not None:
                request.on_token(request.name, token)

    def _choose(self, requests: list[Request], logits: torch.Tensor) -> list[int]:
        """The next token of each request, as `generate()` would choose it."""
        if not any(request.processors or request.do_sample for request in requests):
            return list(map(int, logits.argmax(dim=1).tolist()))
        return [
            choose_token(
                row, request.processors, request.tokens, samples=request.do_sample, generator=request.generator
            )
            for request, row in zip(requests, logits.split(1), strict=True)
        ]

    def _end(self, request: Request, error: str | None) -> None:
        """Takes a request out, and its pages with it; once is enough."""
        if request.name in self.outputs:
            return
        if request in self._running:
            self._running.remove(request)
        elif request in self._waiting:
            self._waiting.remove(request)
        if request.name in self.cache:
            self.cache.remove(request.name)
        request.state.error = error
        if error is not None:
            request.state.status = RequestStatus.FAILED
        self.statistics.num_failed += error is not None
        self.statistics.num_finished += error is None
        self._names.remove(request.name)
        self.outputs[request.name] = request.state.to_generation_output()
