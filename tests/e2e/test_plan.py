"""`python -m lckv.plan` as a user runs it."""

import json
import subprocess
import sys

from lckv.sharing.costs import ModelSizes, count_parameters
from lckv.sharing.patterns import parse_layer_types

PATTERN = "2_2_2_5_5_5_8_8_8"


def test_a_pattern_is_shown_drawn_and_counted(run_module, tmp_path):
    done = run_module("lckv.plan", f"model.layer_types={PATTERN}", "draw=sharing.svg")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"{PATTERN}\n")
    assert done.stdout.count(": a cycle") == 3
    assert "KV bytes resident per token" in done.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["sharing.svg"]


def test_a_sweep_prints_one_json_object_per_pattern(run_module, tmp_path):
    done = run_module("lckv.plan", "-m", "model.layer_types=1_1_1,2_2_2,0s_1_0", "json=true")
    assert done.returncode == 0, done.stderr
    decoder, text, found = json.JSONDecoder(), done.stdout.strip(), []
    while text:
        value, end = decoder.raw_decode(text)
        found.append(value)
        text = text[end:].lstrip()
    assert [value["layer_types"] for value in found] == ["1_1_1", "2_2_2", "0s_1_0"]
    for value in found:
        plan = parse_layer_types(value["layer_types"])
        assert value["costs"]["num_parameters"] == count_parameters(plan, ModelSizes(**value["sizes"]))
    assert list(tmp_path.iterdir()) == []


def test_patterns_stay_text_under_accelerate(run_module):
    launch = ["launch", "--cpu", "--num_processes", "1", "--num_machines", "1", "--mixed_precision", "no"]
    done = run_module(
        "accelerate.commands.accelerate_cli",
        *[*launch, "--dynamo_backend", "no", "-m", "lckv.plan", f"model.layer_types={PATTERN}", "json=true"],
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["layer_types"] == PATTERN


def test_a_mistake_is_one_line_and_exit_code_2(run_module):
    done = run_module("lckv.plan", "model.layer_types=0_1_9")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        "lckv.plan: error: model.layer_types='0_1_9': entry 2 is '9', but there is no layer 9; allowed are 0 to 2\n"
    )


def test_no_torch_is_loaded(tmp_path):
    code = """
import runpy, sys
sys.argv = ["lckv.plan", "sharing=lckv"]
runpy.run_module("lckv.plan", run_name="__main__")
assert not {"torch", "transformers", "matplotlib"} & set(sys.modules), "slow to start"
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=50)
    assert done.returncode == 0, done.stderr
