"""`python -m lckv.report`: the table and the pictures of a sweep; see `conf/report.yaml`."""

from __future__ import annotations

import sys
from pathlib import Path

from lckv.commands import cli
from lckv.commands.overrides import name_the_first
from lckv.config import ReportConfig, validate
from lckv.utils.console import new_console


def main(cfg: ReportConfig) -> None:
    """Reads the runs, writes the report and prints its main figures."""
    validate(cfg)
    assert cfg.folder is not None  # checked

    # Behind the check: importing matplotlib and scipy takes a second.
    from lckv.reporting.analysis import analyse
    from lckv.reporting.runs import read_runs
    from lckv.reporting.writing import print_report, write_report

    folder = Path(cfg.folder).expanduser()
    out = folder / "report" if cfg.out is None else Path(cfg.out).expanduser()
    report = analyse(read_runs(folder), folder, cfg.metric)
    files = write_report(report, out)
    print_report(report, files, new_console())


if __name__ == "__main__":
    sys.argv[1:] = name_the_first(sys.argv[1:], "folder")
    cli.run(main, "report")
