"""`python -m lckv.export`: writes a model down for other programs; see `conf/export.yaml`."""

from __future__ import annotations

from lckv.commands import cli
from lckv.config import ExportConfig, validate
from lckv.exporting import FORMATS
from lckv.loading.model_files import check_model
from lckv.utils.console import new_console


def main(cfg: ExportConfig) -> None:
    """Checks all that can be checked at once, then writes the model in the format asked for."""
    validate(cfg)
    assert cfg.format is not None and cfg.model is not None  # checked
    export = FORMATS[cfg.format](cfg)
    export.check(check_model(cfg.model, revision=cfg.revision))
    new_console(to_stderr=True).print(f"{cfg.out}: {export.write()}")


if __name__ == "__main__":
    cli.run(main, "export")
