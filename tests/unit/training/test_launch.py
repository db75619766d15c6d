import pytest

from lckv.errors import UserError
from lckv.training import launch

ALONE = {"ACCELERATE_USE_CPU": "True", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        (ALONE, True),
        ({}, False),
        ({"ACCELERATE_USE_CPU": "True"}, False),
        ({**ALONE, "ACCELERATE_USE_CPU": "False"}, False),
        ({**ALONE, "WORLD_SIZE": "2"}, False),
        ({**ALONE, "PMI_SIZE": "2"}, False),
    ],
)
def test_only_a_process_that_accelerate_left_alone_starts_others(environment: dict[str, str], expected: bool):
    assert launch.is_alone_by_mistake(environment) is expected


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        ("accelerate launch --cpu --num_processes 2 -m lckv.train", 2),
        ("accelerate launch --num-processes=12 --cpu -m lckv.train", 12),
        ("accelerate launch --num_processes 2 --num_processes 3", 3),
        ("accelerate launch --config_file x.yaml -m lckv.train", None),
        ("accelerate launch --max_num_processes 5", None),
        ("bash", None),
    ],
)
def test_number_is_read_from_the_launchers_command_line(command: str, expected: int | None):
    assert launch.num_processes_asked_for(command.split()) == expected


def test_nothing_happens_outside_accelerate(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(launch.os, "execv", lambda *args: pytest.fail("started something"))
    launch.launch_missing_processes("lckv.train")


def test_number_that_cannot_be_found_is_asked_for(monkeypatch: pytest.MonkeyPatch):
    for name, value in ALONE.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(launch, "num_processes_asked_for", lambda command: None)
    with pytest.raises(UserError, match="--num_processes N"):
        launch.launch_missing_processes("lckv.train")
