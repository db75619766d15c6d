"""Entry points: what the user gets to see, with a main function that only looks at its configuration."""

import errno
import importlib.util
import json
import pickle
import subprocess
import sys

import pytest
import yaml
from hydra import compose, initialize_config_dir
from omegaconf.errors import OmegaConfBaseException

from lckv.commands import cli, hydra_store
from lckv.config import PlanConfig, TrainConfig
from lckv.errors import UserError
from lckv.utils.console import arguments_of_this_run


@pytest.fixture
def start(monkeypatch, capsys, tmp_path):
    """Starts an entry point in an empty folder; returns exit code, the configurations that `main` got, and stderr."""
    monkeypatch.chdir(tmp_path)

    def start(*arguments: str, main=None, config_name="train"):
        seen: list[TrainConfig] = []
        monkeypatch.setattr(sys, "argv", [f"lckv.{config_name}", *arguments])
        code = 0
        try:
            cli.run(main or seen.append, config_name)
        except SystemExit as stop:
            code = stop.code
        return code, seen, capsys.readouterr().err

    return start


def test_the_configuration_arrives_as_dataclasses(start, tmp_path):
    code, (cfg,), err = start("model.layer_types=2_2_2", "seed=3")
    assert (code, err) == (0, "")
    assert type(cfg) is TrainConfig
    assert (cfg.model.layer_types, cfg.seed) == ("2_2_2", 3)
    assert list(tmp_path.iterdir()) == []  # Hydra leaves no folder of its own
    _, (cfg,), _ = start("context_length=5", config_name="plan")
    assert type(cfg) is PlanConfig


def test_debug_runs_of_other_settings_have_folders_of_their_own(start):
    def folder(*arguments):
        code, (cfg,), err = start("debug=cpu_smoke", *arguments)
        assert (code, err) == (0, "")
        return cfg.run_dir

    others = [
        ["model.layer_types=0_0_2_2"],
        ["sharing=cla"],
        ["optim.learning_rate=1e-4"],
        ["seed=1"],
        ["debug=default"],
    ]
    folders = [folder(), *(folder(*each) for each in others)]
    assert len(set(folders)) == len(folders)
    assert folder() == folders[0]
    assert folders[1].startswith("runs/debug_cpu_smoke-0_0_2_2-")
    assert folder("run_dir=mine") == "mine"


def test_each_job_of_a_sweep_has_a_folder_of_its_own(start, tmp_path):
    code, jobs, _ = start("-m", "model.layer_types=1_1_1,2_2_2", "seed=0,1")
    assert code == 0
    assert [(job.model.layer_types, job.seed) for job in jobs] == [
        ("1_1_1", 0),
        ("1_1_1", 1),
        ("2_2_2", 0),
        ("2_2_2", 1),
    ]
    assert [job.run_dir for job in jobs][:2] == [
        "runs/sweep/layer_types=1_1_1,seed=0",
        "runs/sweep/layer_types=1_1_1,seed=1",
    ]
    assert len({job.run_dir for job in jobs}) == 4
    code, jobs, _ = start("-m", "run_dir=mine", "run_name=a,b")
    assert [job.run_dir for job in jobs] == ["mine/run_name=a", "mine/run_name=b"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine", "runs"]


def test_two_folders_for_one_sweep_are_refused(start):
    code, jobs, error = start("-m", "run_dir=mine", "hydra.sweep.dir=other", "seed=0")
    assert (code, jobs) == (2, [])
    assert "run_dir=mine: has no effect in a sweep beside hydra.sweep.dir=other" in error
    assert start("-m", "hydra.sweep.dir=other", "seed=0")[1][0].run_dir == "other/seed=0"


def test_flags_may_stand_anywhere(start, tmp_path):
    (tmp_path / "a=b" / "experiment").mkdir(parents=True)
    (tmp_path / "a=b" / "experiment" / "mine.yaml").write_text("# @package _global_\nseed: 7\n")
    code, (cfg,), err = start("model=nano", "--config-dir", "a=b", "experiment=mine")
    assert (code, err, cfg.seed, cfg.model.name) == (0, "", 7, "nano")
    code, jobs, _ = start("model=nano", "-m", "seed=0,1", "model.layer_types=1_1")
    assert [(job.seed, job.model.layer_types) for job in jobs] == [(0, "1_1"), (1, "1_1")]


def test_mistakes_are_one_line(start):  # what it says is in `tests/mistakes.txt`
    for arguments, message in (["model.hiden_size=3"], "did you mean"), (["--config-dir", "nowhere"], "nowhere' not"):
        code, seen, err = start(*arguments)
        (line,) = [line for line in err.splitlines() if "INFO" not in line]
        assert (code, seen) == (2, []) and line.startswith("lckv.train: error: ") and message in line


FIRST_LINE = "# @package _global_\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "model:\n  layer_types: 0_6_6_6_6_6_6_7",
            'mine.yaml, line 3: YAML reads layer_types: 0_6_6_6_6_6_6_7 as 1797559; write layer_types: "0_6_6_6_6_6_',
        ),
        (
            "model:\n  layer_type: '0_1'",
            "unknown key 'model.layer_type'; did you mean 'model.layer_types'? (in experiment/mine.yaml)",
        ),
        (
            "model:\n  hidden_size: big",
            "model.hidden_size='big': allowed is a whole number, 1 or more (in exper",
        ),
        ("model: [", "mine.yaml"),
        (
            "model:\n  rope_parameters: [1]",
            "error: in experiment/mine.yaml: has a list in the place of keys of its own, ",
        ),
        ("seed: 3", "error: in experiment/mine.yaml: needs '# @package _global_' as its first line\n"),
        ("seed: ${nowhere}", "seed: Interpolation key 'nowhere' not found"),
        (
            "hydra:\n  mode: MULTIRUN\n  sweeper:\n    params:\n      model.layer_types: 1_1,2_2_2",
            "model.layer_types=11: must be text",
        ),
    ],
)
def test_mistakes_in_yaml_name_the_file(start, tmp_path, text, message):
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text(f"{'' if text.startswith('seed: 3') else FIRST_LINE}{text}\n")
    code, seen, err = start("--config-dir", str(tmp_path), "experiment=mine")
    assert (code, seen) == (2, [])
    assert message in err
    assert "Traceback" not in err


def test_users_add_options_beside_those_that_have_no_file(start, tmp_path):
    (tmp_path / "sharing").mkdir()
    (tmp_path / "sharing" / "quads.yaml").write_text("name: cla\ngroup_size: 4\n")
    _, jobs, _ = start("--config-dir", str(tmp_path), "-m", "sharing=quads,yoco")
    assert [(job.sharing.name, job.sharing.group_size) for job in jobs] == [("cla", 4), ("yoco", None)]
    code, _, err = start("--config-dir", str(tmp_path), "sharing=quad")
    assert code == 2 and "allowed are cla, " in err and "did you mean 'quads'?" in err


def test_a_quoted_pattern_in_yaml_and_a_later_override_are_fine(start, tmp_path):
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text("# @package _global_\nmodel:\n  layer_types: '0_0'\n")
    assert start("--config-dir", str(tmp_path), "experiment=mine")[1][0].model.layer_types == "0_0"
    assert (
        start("--config-dir", str(tmp_path), "+experiment=mine", "model.layer_types=1_1")[1][0].model.layer_types
        == "1_1"
    )
    code, _, err = start("--config-dir", str(tmp_path), "experiment=mine", "sharing=cla")
    assert code == 2 and "model.layer_types=null lets the sharing group decide" in err
    cfg = start("--config-dir", str(tmp_path), "experiment=mine", "sharing=cla", "model.layer_types=null")[1][0]
    assert (cfg.model.layer_types, cfg.sharing.name) == (None, "cla")


def test_what_main_raises(start):
    def raising(error):
        def main(cfg):
            raise error

        return main

    code, _, err = start(main=raising(UserError("data.files=x: no such\nfile")))
    assert (code, err) == (2, "lckv.train: error: data.files=x: no such file\n")
    for number in errno.ENOSPC, errno.EFBIG:
        code, _, err = start(main=raising(OSError(number, "No room", "runs/x/model.safetensors")))
        assert code == 2 and err.startswith("lckv.train: error: runs/x/model.safetensors: No room")
    assert start(main=raising(KeyboardInterrupt()))[0] == 130
    with pytest.raises(ZeroDivisionError):
        start(main=raising(ZeroDivisionError()))
    for bug in RuntimeError("a bug"), OmegaConfBaseException("a bug"):  # launchers and Hydra raise these, too
        with pytest.raises(type(bug), match="a bug"):
            start(main=raising(bug))
    with pytest.raises(FileNotFoundError):
        start(main=raising(FileNotFoundError(errno.ENOENT, "No such file", "bug")))


def test_what_to_type_next_begins_with_literal_text_too(monkeypatch):
    seen = []
    monkeypatch.setattr("sys.argv", ["convert", "source=a b", "method=distill", "out=c{d}"])
    cli.run(lambda cfg: seen.extend(arguments_of_this_run()), "convert")
    assert sorted(seen) == ["method=distill", "out=c{d}", "source=a b"]


def test_mistakes_and_bugs_in_a_sweep_stop_no_other_job(start):
    done = []

    def main(cfg):
        if cfg.seed == 1:
            raise ZeroDivisionError("seed is\nunlucky")
        if cfg.seed == 2:
            raise UserError("seed=2: unlucky")
        done.append(cfg.seed)

    code, _, err = start("-m", "hydra.sweeper.max_batch_size=1", "seed=0,1,2,3", main=main)
    assert (code, done) == (2, [0, 3])
    assert "lckv.train: error: seed=1: ZeroDivisionError: seed is unlucky\n" in err
    assert 'raise ZeroDivisionError("seed is\\nunlucky")' in err  # the traceback
    assert "lckv.train: error: seed=2: seed=2: unlucky\n" in err


def test_a_failure_from_another_process_leaves_its_reason(monkeypatch):
    monkeypatch.setattr(cli.FailedJob, "received", [])
    failure = cli.FailedJob("seed=1: unlucky")
    sent = pickle.dumps(failure)
    assert cli.FailedJob.received == []  # here, the reason has been reported already
    assert repr(pickle.loads(sent)) == "seed=1: unlucky"
    assert cli.FailedJob.received == ["seed=1: unlucky"]


def test_a_failure_is_no_number():
    """Optuna takes what can be a float for a result."""
    with pytest.raises(TypeError):
        float(cli.FailedJob("x"))  # type: ignore[arg-type]


def test_ctrl_c_stops_the_whole_sweep(start):
    seen = []

    def main(cfg):
        seen.append(cfg.seed)
        raise KeyboardInterrupt

    assert start("-m", "seed=0,1", main=main)[0] == 130
    assert seen == [0]


def test_a_job_that_is_refused_says_why_in_its_folder(start, tmp_path):
    code, seen, err = start("-m", "iso=params,parms", "run_dir=mine")
    assert code == 2 and [cfg.iso for cfg in seen] == ["params"]
    assert "iso=parms: iso='parms': allowed are" in err
    assert [path.name for path in (tmp_path / "mine").iterdir() if path.is_dir()] == ["iso=parms"]
    failure = json.loads((tmp_path / "mine" / "iso=parms" / "failure.json").read_text())
    assert failure["overrides"] == ["iso=parms", "run_dir=mine"] and failure["type"] == "UserError"


def test_a_sweeper_gets_what_main_returns_and_goes_on_after_failures(start, tmp_path):
    tried = []

    def main(cfg):
        tried.append(cfg.optim.learning_rate)
        if len(tried) == 2:
            raise UserError("optim.learning_rate: unlucky")
        return abs(cfg.optim.learning_rate - 1e-3)

    search = ["-m", "hydra/sweeper=optuna_loss", "hydra.sweeper.n_trials=4", "run_dir=search"]
    rates = "optim.learning_rate=tag(log,interval(1e-4,1e-2))"
    code, _, err = start(*search, rates, main=main)
    assert (code, len(set(tried))) == (2, 4)
    assert "optim.learning_rate: unlucky" in err and "Traceback" not in err
    best = yaml.safe_load((tmp_path / "search" / "optimization_results.yaml").read_text())
    nearest = min((rate for rate in tried if rate != tried[1]), key=lambda rate: abs(rate - 1e-3))
    assert best["best_params"] == {"optim.learning_rate": nearest}
    again = list(tried)
    start(*search, rates, main=main)
    assert tried[4] == again[0]  # the same command proposes the same


@pytest.mark.parametrize(
    ("choice", "target"),
    [
        ("launcher=local", "JoblibLauncher"),
        ("launcher=slurm", "SlurmLauncher"),
        ("launcher=slurm_trial", "LocalLauncher"),
        ("sweeper=optuna_loss", "OptunaSweeper"),
    ],
)
def test_ready_launchers_and_sweepers_compose(choice, target):
    hydra_store.register_schema("train")
    with initialize_config_dir(str(hydra_store.config_dir()), version_base="1.3"):
        cfg = compose("train", [f"hydra/{choice}"], return_hydra_config=True)
    assert cfg.hydra[choice.partition("=")[0]]._target_.endswith(f".{target}")


def test_a_launcher_that_is_not_installed_names_the_extra(start):
    if importlib.util.find_spec("ray") is not None:
        pytest.skip("Ray is installed")
    code, seen, err = start("-m", "hydra/launcher=ray_cluster", "seed=0,1")
    assert (code, seen) == (2, [])
    assert err == "lckv.train: error: hydra/launcher=ray: is not installed; pip install 'lckv[ray]'\n"


def test_free_dictionaries_take_new_entries(start):
    for given in ("trainer.hf.fsdp=true", "+trainer.hf.fsdp=true", "trainer.hf={fsdp:true}"):
        (cfg,) = start(given, "model.rope_parameters.rope_theta=5.0")[1]
        assert (cfg.trainer.hf, cfg.model.rope_parameters) == ({"fsdp": True}, {"rope_theta": 5.0})


def test_a_prompt_is_no_sweep_and_a_model_no_group(start, tmp_path):
    text = "Hello, world: {x}=[1,2] ${y}"
    code, (cfg,), err = start(f"prompt={text}", "model=tiny", "cache=static", config_name="generate")
    assert (code, err) == (0, "")
    assert (cfg.prompt, cfg.model, cfg.cache.name) == (text, "tiny", "static")
    code, jobs, _ = start("-m", "model=x", f"prompt={text}", "seed=0,1", config_name="generate")
    assert [(job.prompt, job.seed) for job in jobs] == [(text, 0), (text, 1)]
    assert start("model=x", config_name="generate")[1][0].prompt is None  # nothing is left of the last command line
    assert list(tmp_path.iterdir()) == []


def test_a_reader_that_has_seen_enough_is_no_error(tmp_path):
    program = "from lckv.commands import cli; cli.run(lambda cfg: print('x' * 10**6, flush=True), 'benchmark')"
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.read(1)
        process.stdout.close()
        assert (process.stderr.read(), process.wait()) == (b"", 141)


@pytest.mark.parametrize(  # two suffice: Hydra takes seconds for a help, in which it copies all that it has read
    ("name", "present", "absent"),
    [
        ("train", ["\nmodel: ", "lckv.train model.layer_types=", "experiment: ", "hidden_size: 192"], "\ncache: "),
        ("generate", ["\ncache: dynamic, "], "\nmodel: tiny"),
    ],
)
def test_help_names_examples_and_the_groups_of_the_entry_point(capsys, monkeypatch, name, present, absent):
    monkeypatch.setattr(sys, "argv", [f"lckv.{name}", "--help"])
    with pytest.raises(SystemExit) as stop:
        cli.run(print, name)
    out = capsys.readouterr().out
    assert stop.value.code == 0 and absent not in out
    assert all(words in out for words in present)
