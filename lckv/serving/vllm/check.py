"""`python -m lckv.serving.vllm.check`: says in one line what would keep a server from starting.

vLLM itself says so half a minute later, in the traceback of one of its processes. Where all is well, the folder of the
model is printed, which for a run of `lckv.train` is not the one that was given.
"""

from __future__ import annotations

import argparse
import json
import socket
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from lckv.errors import UserError
from lckv.loading.model_files import check_model, find_files
from lckv.serving.vllm import ARCHITECTURE, PATTERN_KEYS


def main(arguments: Sequence[str] | None = None) -> str:
    """Checks the arguments that a server is about to get, and returns where the model is.

    Of vLLM's own arguments, those are read that can be wrong here.

    Raises:
        UserError: if there is no such model, it cannot be served as the arguments ask for, or the port is in use.
    """
    parser = argparse.ArgumentParser(prog="lckv.serving.vllm.check")
    parser.add_argument("--model", required=True)
    parser.add_argument("--host", default="0.0.0.0")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--hf-overrides", default="{}")
    parser.add_argument("--enforce-eager", action="store_true")
    given, _ = parser.parse_known_args(arguments)
    check_port(given.host, given.port)
    check_model(given.model, key="--model")
    found = find_files(given.model, key="--model")
    try:
        overrides = json.loads(given.hf_overrides)
    except ValueError as error:
        raise UserError(f"--hf-overrides {given.hf_overrides}: is no JSON: {error}") from error
    if found.is_folder:
        check_values(found.stored_values(), overrides, given.enforce_eager)
    return found.path


def check_values(stored: Mapping[str, Any], overrides: Mapping[str, Any], enforce_eager: bool) -> None:
    """Refuses a model, or a pattern for it, that the plugin cannot serve; what vLLM serves itself is vLLM's.

    Args:
        stored: what `config.json` holds.
        overrides: what `--hf-overrides` says.
        enforce_eager: whether the model is not compiled.

    Raises:
        UserError: naming what is wrong.
    """
    values = {**stored, **overrides}
    if values.get("architectures") == [ARCHITECTURE]:
        from lckv.serving.vllm.settings import check_eager, read_served  # takes torch along

        check_eager(read_served(values).config, enforce_eager)
    elif asked := [name for name in PATTERN_KEYS if isinstance(overrides.get(name), str)]:
        raise UserError(
            f"--hf-overrides: {asked[0]}={overrides[asked[0]]!r} has no effect on vLLM's own model; give also "
            f'"architectures": ["{ARCHITECTURE}"]'
        )


def check_port(host: str, port: int) -> None:
    """Refuses a port that is in use.

    Raises:
        UserError: naming it.
    """
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise UserError(f"--port {port}: cannot be had ({error.strerror}); give another one") from error


if __name__ == "__main__":
    try:
        sys.stdout.write(f"{main()}\n")
    except UserError as mistake:
        sys.stderr.write(f"lckv.serving.vllm: error: {' '.join(str(mistake).split())}\n")
        sys.exit(2)
