"""`python -m lckv.convert`: from a pretrained model to one that shares keys and values; see `conf/convert.yaml`."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path

from lckv import cli, train
from lckv.byte_sizes import parse_bytes
from lckv.config import ConvertConfig, InitConfig, TrainConfig
from lckv.console import new_console
from lckv.errors import UserError, check_choice
from lckv.storage import check_new_folder
from lckv.training.launch import check_launch


def main(cfg: ConvertConfig) -> None:
    """Converts, and trains what was made where the method asks for it."""
    check_launch("lckv.convert")
    for key in ("source", "out"):
        if getattr(cfg, key) is None:
            raise UserError(f"{key}: give one: python -m lckv.convert source=MODEL model.layer_types=... out=FOLDER")
    for key in ("source", "revision", "method"):
        if (value := getattr(cfg.init, key)) != getattr(InitConfig, key):
            raise UserError(f"init.{key}={value}: has no effect here; give {key}={value}")
    max_shard_size = parse_bytes(cfg.max_shard_size, "max_shard_size")
    assert cfg.source is not None and cfg.out is not None
    given = Path(cfg.out).expanduser()
    out = given.resolve()

    # Behind the checks: importing torch and transformers takes seconds.
    from lckv.conversion import METHODS, TRAINED, Source, adopt_source, convert
    from lckv.processes import is_main_process, set_num_threads

    check_new_folder(given)
    check_choice("method", cfg.method, METHODS)
    if cfg.method in TRAINED and cfg.device != ConvertConfig.device:
        reason = f"has no effect with method={cfg.method}, which calibrates where it trains"
        raise UserError(f"device={cfg.device}: {reason}; leave it out")
    set_num_threads(cfg.trainer.num_threads)
    source = Source.find(cfg.source, revision=cfg.revision)
    cfg.init = replace(cfg.init, source=cfg.source, revision=cfg.revision, method=cfg.method)
    console = new_console(to_stderr=True, is_quiet=not is_main_process())
    if cfg.method in TRAINED:
        _train(cfg, out, max_shard_size)
    elif is_main_process():
        cfg = adopt_source(cfg, source.config)
        convert(cfg, source, out, console, device=cfg.device, max_shard_size=max_shard_size)
    if is_main_process():
        console.print(f"{given}: {_describe(cfg, out)}")


def _describe(cfg: ConvertConfig, out: Path) -> str:
    """What was made, in one line."""
    from lckv.models import LCKVLlamaConfig

    plan = LCKVLlamaConfig.from_pretrained(out).sharing_plan
    made = f"{cfg.model.layer_types or cfg.sharing.name} from {cfg.source} by {cfg.method}"
    is_shared = len(plan.kv_owners) < plan.num_hidden_layers
    return made if is_shared else f"{made}; nothing is shared: give model.layer_types or sharing"


def _train(cfg: ConvertConfig, out: Path, max_shard_size: int) -> None:
    """Runs `lckv.train` in a folder beside `out`, with the source as the teacher, and takes the trained model over.

    It is trained in `model.dtype`, and written in the source's type. The run folder stays: it has the curves, and if
    the training is interrupted the same command goes on from there.
    """
    from lckv.conversion import write_trained
    from lckv.processes import is_main_process
    from lckv.training.run_folder import RunFolder

    path = out.with_name(f"{out.name}-training")
    folder = RunFolder(path, cfg.trainer.save_total_limit, instead=f"give another out=..., or remove {path}")
    values = {item.name: getattr(cfg, item.name) for item in fields(TrainConfig)} | {"run_dir": str(folder.path)}
    train.main(TrainConfig(**values), folder)
    if is_main_process():
        write_trained(folder.model, folder.init, out, max_shard_size=max_shard_size)


if __name__ == "__main__":
    cli.run(main, "convert")
