"""`python -m lckv.search`: which layers of a pretrained model should share KV; see `conf/search.yaml`."""

from __future__ import annotations

from pathlib import Path

from lckv.commands import cli
from lckv.config import SearchConfig, validate
from lckv.data.sources import check_text_files
from lckv.errors import UserError
from lckv.loading.model_files import check_model
from lckv.utils.console import new_console
from lckv.utils.storage import check_new_folder


def main(cfg: SearchConfig) -> None:
    """Searches, prints the frontier and writes it."""
    validate(cfg)
    assert cfg.source is not None  # checked

    out = None if cfg.out is None else Path(cfg.out).expanduser()
    if out is not None:
        check_new_folder(out)
    check_model(cfg.source, revision=cfg.revision, key="source")
    check_text_files(cfg.data)

    # Behind the checks: importing torch and transformers takes seconds.
    from lckv.conversion.search_report import write_report
    from lckv.conversion.search_session import SearchOfLatents, SharingSearch
    from lckv.conversion.source import Source
    from lckv.utils.processes import set_num_threads

    set_num_threads(cfg.num_threads)
    console = new_console(to_stderr=True)
    source = Source.find(cfg.source, revision=cfg.revision)
    if source.config.kv_latents is not None:
        raise UserError(
            f"source={cfg.source}: keeps latents, of which none can be shared; allowed are keys and values"
        )
    search = SearchOfLatents if cfg.latent.is_used else SharingSearch
    report = search(cfg, source, console).run()
    folder = write_report(report, out)
    output = new_console()
    output.print(report.table())
    for point in report.frontier:  # too long for a column
        output.print(f"{point.name}: {point.layer_types}")
    console.print(report.summary(folder))
    if report.is_interrupted:
        raise KeyboardInterrupt


if __name__ == "__main__":
    cli.run(main, "search")
