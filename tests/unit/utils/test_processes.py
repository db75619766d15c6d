"""What processes are told by launchers, and tell the libraries that they load."""

import subprocess
import sys

import pytest
from accelerate.commands.launch import launch_command_parser
from accelerate.utils.launch import prepare_simple_launcher_cmd_env

from lckv.errors import UserError
from lckv.utils.processes import check_launch, share_cores


def told(*arguments: str) -> dict[str, str]:
    """The environment of a process that `accelerate launch` starts where there are not several GPUs."""
    given = ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", *arguments]
    parsed = launch_command_parser().parse_args([*given, "-m", "lckv.train", "seed=1"])
    parsed.use_cpu = parsed.cpu
    return prepare_simple_launcher_cmd_env(parsed)[1]


@pytest.mark.parametrize("arguments", [("--cpu", "--num_processes", "2"), ("--num_processes=2",)])
def test_a_process_that_accelerate_left_alone_says_what_to_use(arguments: tuple[str, ...]) -> None:
    environment = told(*arguments)
    with pytest.raises(UserError, match=r"torchrun --nproc-per-node N -m lckv\.train"):
        check_launch("lckv.train", environment)
    for name in ("WORLD_SIZE", "PMI_SIZE"):  # torchrun's, or MPI's
        check_launch("lckv.train", environment | {name: "2"})


def test_one_process_is_what_was_asked_for() -> None:
    check_launch("lckv.train", told("--cpu", "--num_processes", "1"))
    check_launch("lckv.train", {"MASTER_ADDR": "127.0.0.1"})
    check_launch("lckv.train")


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({}, {"GOMP_SPINCOUNT": "1000"}),
        ({"GOMP_SPINCOUNT": "5"}, {"GOMP_SPINCOUNT": "5"}),
        ({"OMP_WAIT_POLICY": "ACTIVE"}, {"OMP_WAIT_POLICY": "ACTIVE"}),
    ],
)
def test_threads_wait_briefly_unless_the_user_says_how(given: dict[str, str], told: dict[str, str]) -> None:
    share_cores(given)
    assert given == told


def test_an_interrupt_that_a_finalizer_swallows_is_heard() -> None:
    code = """
import signal, time
from lckv.utils.processes import hear_every_interrupt

class Freed:
    def __del__(self):
        signal.raise_signal(signal.SIGINT)

hear_every_interrupt()
try:
    Freed()
    time.sleep(30)
except KeyboardInterrupt:
    print("heard")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=50)
    assert (done.stdout, done.stderr) == ("heard\n", "")
