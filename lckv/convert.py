"""`python -m lckv.convert`: from a pretrained model to one that shares keys and values; see `conf/convert.yaml`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from lckv import train
from lckv.commands import cli
from lckv.config import ConvertConfig, TrainConfig, validate
from lckv.config.model_arguments import plan_from_source
from lckv.config.names import CALIBRATED, TRAINED
from lckv.config.run_names import default_run_name
from lckv.data.sources import check_text_files
from lckv.loading.model_files import check_model, keeps_latents
from lckv.utils.byte_sizes import parse_bytes
from lckv.utils.console import new_console
from lckv.utils.processes import check_launch, is_main_process, num_processes, set_num_threads
from lckv.utils.storage import check_new_folder

if TYPE_CHECKING:
    from lckv.models import LCKVLlamaConfig


def main(cfg: ConvertConfig) -> None:
    """Converts, and trains what was made where the method asks for it."""
    check_launch("lckv.convert")
    validate(cfg)
    assert cfg.source is not None and cfg.out is not None  # checked
    max_shard_size = parse_bytes(cfg.max_shard_size, "max_shard_size")
    given = Path(cfg.out).expanduser()
    out = given.resolve()
    check_new_folder(given)
    asked = cfg.training()
    _check_source(asked)

    # Behind the checks: importing torch and transformers takes seconds.
    from lckv.conversion.pipeline import convert
    from lckv.conversion.settings import adopt_source
    from lckv.conversion.source import Source

    set_num_threads(cfg.trainer.num_threads)
    source = Source.find(cfg.source, revision=cfg.revision)
    console = new_console(to_stderr=True, is_quiet=not is_main_process())
    if cfg.method in TRAINED:
        _train(asked, out, max_shard_size)
    elif is_main_process():
        asked = adopt_source(asked, source.config)
        convert(asked, source, out, console, device=cfg.device, max_shard_size=max_shard_size)
    if is_main_process():
        console.print(f"{given}: {_describe(asked, out, source.config)}")


def _check_source(cfg: TrainConfig) -> None:
    """Finds mistakes in the batch, the source, the pattern and the text before anything slow is imported."""
    assert cfg.init.source is not None
    if cfg.init.method in TRAINED:
        cfg.trainer.cut_batch(num_processes())
    own = check_model(cfg.init.source, revision=cfg.init.revision, key="source", needs_tokenizer=False)
    plan = None if own is None else plan_from_source(cfg, own)
    if own is not None:
        cfg.check_latents(own=bool(keeps_latents(cfg.init.source, key="source")))
    reads_text = cfg.init.method in CALIBRATED and (own is None or plan != own)
    if cfg.init.calibration_tokens if cfg.latent.is_used else reads_text:
        check_model(cfg.init.source, key="source")
        check_text_files(cfg.data)


def _describe(cfg: TrainConfig, out: Path, source: LCKVLlamaConfig) -> str:
    """What was made, in one line."""
    from lckv.models import LCKVLlamaConfig

    config = LCKVLlamaConfig.from_pretrained(out)
    plan = config.sharing_plan
    made = f"{cfg.model.layer_types or cfg.sharing.name} from {cfg.init.source} by {cfg.init.method}"
    if cfg.latent.is_used:
        layout, plain = config.kv_layout, source.kv_layout
        kept, before = (sum(store.size for store in each.stores) for each in (layout, plain))
        return f"{cfg.latent.name} latents from {cfg.init.source}: {kept} numbers of a token for {before}"
    if source.kv_latents is not None:
        return f"{made}; latents as before"
    if all(layer.reads_itself for layer in plan.layers):
        return f"{made}; nothing is shared: give model.layer_types or sharing"
    same = plan == source.sharing_plan
    return f"{made}; shared as before: give model.layer_types, or sharing other than llama" if same else made


def _train(cfg: TrainConfig, out: Path, max_shard_size: int) -> None:
    """Runs `lckv.train` in a folder beside `out`, with the source as the teacher, and takes the trained model over.

    It is trained in `model.dtype`, and written in the source's type. The run folder stays: it has the curves, and if
    the training is interrupted the same command goes on from there.
    """
    from lckv.conversion.target import write_trained
    from lckv.training.run_folder import RunFolder

    path = out.with_name(f"{out.name}-training")
    folder = RunFolder(path, cfg.trainer.save_total_limit, instead=f"give another out=..., or remove {path}")
    run_name = cfg.run_name or default_run_name(cfg)
    train.main(replace(cfg, run_name=run_name, run_dir=str(folder.path)), folder)
    if is_main_process():
        write_trained(folder.model, folder.init, out, max_shard_size=max_shard_size)


if __name__ == "__main__":
    cli.run(main, "convert")
