"""The report as a whole: its files, what stands in them, and where they may be written."""

import json
import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest
from matplotlib import rc_context
from PIL import Image

from lckv.commands.overrides import name_the_first
from lckv.config import ReportConfig, SharingConfig
from lckv.errors import UserError
from lckv.report import main
from lckv.reporting.analysis import analyse
from lckv.reporting.pictures import pictures_of
from lckv.reporting.pictures.base import PALETTE, RC, draw_panel, styles_of
from lckv.reporting.runs import read_runs
from lckv.reporting.tables import main_table, tables_of
from lckv.reporting.writing import check_out, figures_of, render, write_report
from tests import commands
from tests.unit.reporting.sweeps import needle, write_evaluations, write_failure, write_run

PICTURES = {"quality", "loss", "cost", "needle"}


@pytest.fixture(scope="module")
def folder(sweep, tmp_path_factory):
    """The report of the sweep."""
    out = tmp_path_factory.mktemp("reports") / "report"
    write_report(analysed(sweep), out)
    return out


def analysed(folder):
    return analyse(read_runs(folder), folder)


def texts_of(folder, draw=False):
    """The page and the Markdown, without pictures unless these matter: they take their time."""
    report = analysed(folder)
    texts = render(report, pictures_of(report) if draw else [])
    return texts["report.html"], texts["report.md"]


class Page(HTMLParser):
    """What a page loads, and which elements stay open."""

    def __init__(self, text):
        super().__init__()
        self.loads, self.ids, self.open = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.loads += [value for name, value in attributes if name in ("src", "href", "xlink:href", "data", "action")]
        self.ids += [value for name, value in attributes if name == "id"]
        if tag not in ("meta", "link", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_all_files_are_there_and_whole(folder):
    names = {path.name for path in folder.iterdir()}
    assert names == {"report.md", "report.html", "report.json"} | {
        f"{each}.{end}" for each in PICTURES for end in ("png", "svg")
    }
    for name in PICTURES:
        ElementTree.parse(folder / f"{name}.svg")
        with Image.open(folder / f"{name}.png") as image:
            assert image.info["dpi"] == pytest.approx((300, 300), abs=1)
    assert set(json.loads((folder / "report.json").read_text())["files"]) == names


def test_the_page_needs_nothing_else(folder):
    text = (folder / "report.html").read_text()
    page = Page(text)
    assert page.open == []
    assert {value for value in page.loads if not value.startswith("#")} == {"data:,"}
    assert not re.search(r"https?://|@import|url\((?!#)", text)
    targets = {value[1:] for value in page.loads if value.startswith("#")} | set(re.findall(r"url\(#([^)]+)\)", text))
    assert len(page.ids) == len(set(page.ids)) and targets <= set(page.ids)


def test_every_point_has_its_figures_to_hover_on(folder):
    text = (folder / "report.html").read_text()
    groups = re.findall(r'<g id="([^"]*)" class="hits" data-texts="([^"]*)">(.*?)</g>\s*</g>', text, flags=re.DOTALL)
    assert {re.sub(r"\d.*", "", name) for name, _, _ in groups} == PICTURES
    for _, texts, marks in groups:
        assert len(json.loads(texts.replace("&quot;", '"').replace("&#x27;", "'"))) == marks.count("<use")


def test_wide_tables_scroll_and_wrap_on_small_screens(folder):
    text = (folder / "report.html").read_text()
    scrolling = re.findall(r'<div class="scroll" tabindex="0"[^>]*>\s*<table>', text)
    assert len(scrolling) == text.count("<table>") > 1
    style, _, _ = text.partition("</style>")
    assert re.search(r"\.scroll \{[^}]*overflow-x: auto; max-width: 100%;", style)
    small = style.partition("@media (max-width: 90rem) {")[2].partition("@media")[0]
    assert "td { white-space: normal; }" in small and "th button { padding: .4rem .35rem; min-width: 0; }" in small


def test_the_table_can_be_sorted(folder):
    text = (folder / "report.html").read_text()
    assert text.count('aria-sort="none"') == text.count('<button type="button">') > 20
    assert 'data-value="8192"' in text


def test_markdown_names_pictures_that_are_there(folder):
    text = (folder / "report.md").read_text()
    names = re.findall(r"!\[[^]]*\]\(([^)]*)\)", text)
    assert set(names) == {f"{name}.png" for name in PICTURES}
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert "| llama `0_1_2_3_4_5_6_7` | 8,192 | 100% |" in text
    assert "RuntimeError: CUDA out of memory: tried to get 2 GiB |" in text
    assert "| unfinished | step 230 of 400 |" in text
    assert all(row.endswith(" |") for row in rows)


def test_figures_for_other_programs(folder):
    figures = json.loads((folder / "report.json").read_text())
    (only,) = figures["sets"]
    llama, cla, lckv = only["groups"]
    assert (cla["label"], cla["kv_bytes"]["written"], cla["kv_fraction"]) == ("cla", 4096, 0.5)
    assert cla["bits_per_byte"]["n"] == 2 and llama["versus_llama"] is None
    assert lckv["versus_llama"]["test"] == "paired t-test"
    assert only["pareto_front"] == ["lckv", "cla", "llama"]
    assert [trouble["state"] for trouble in figures["troubles"]] == ["failed", "unfinished"]
    assert len(figures["needle"]) == 3


def test_names_cannot_break_out_of_the_page_and_are_no_formulas(tmp_path):
    name = "a<script>alert(1)<" + "|x`*_"
    write_failure(tmp_path / name, error="<img src=x onerror=alert(2)> | 1")
    write_run(tmp_path / "b", "cla", data_fingerprint="</style><b>")
    for number, subset in enumerate((r"$\frac$", "$b$", "né")):
        run = write_run(tmp_path / f"{name}{number}", "cla", settings={"data.subset": subset})
        write_evaluations(run, {"needle": needle(0.5)})
    html, markdown = texts_of(tmp_path, draw=True)
    assert Page(html).open == []
    assert "<script>alert" not in html and "<img src=x" not in html and "</style><b>" not in html
    assert "subset=né" in html and "subset=$b$" in markdown
    row = next(line for line in markdown.splitlines() if "onerror" in line)
    assert len(re.findall(r"(?<!\\)\|", row)) == 5


def test_one_run_gets_a_report_without_comparisons(tmp_path):
    write_run(tmp_path / "a")
    html, markdown = texts_of(tmp_path)
    assert [picture.name for picture in pictures_of(analysed(tmp_path))] == ["loss"]
    assert "No two patterns can be compared" in html and "Pareto" not in html and "Significance" not in markdown


def test_only_failed_runs_get_a_report_that_says_so(tmp_path):
    write_failure(tmp_path / "a", error="boom")
    for text in texts_of(tmp_path):
        assert "No run has finished" in text and "boom" in text and "Results" not in text
    assert figures_of(analysed(tmp_path))["sets"] == []


def test_runs_of_earlier_versions_show_dashes_and_repeated_ones_are_counted(tmp_path):
    write_run(tmp_path / "new", "cla")
    write_run(tmp_path / "new, again", "cla")
    dropped = ("versions", "kv_bytes", "kv_bytes_llama", "train_flops_per_token", "tokens_per_second")
    write_run(tmp_path / "old", "lckv", drop=(*dropped, "num_parameters", "data_fingerprint"))
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "config.yaml").write_text("seed: 1\n")
    (tmp_path / "bare" / "results.json").write_text('{"eval_perplexity": 3.5, "versions": "none"}')
    html, markdown = texts_of(tmp_path)
    assert "4 runs: 3 finished, 1 repeated." in markdown
    assert "not comparable: the version of torch differs" in html
    assert "| lckv `0_6_6_6_6_6_6_7` | C | – | – | – | – | – | 1.4802 |" in markdown
    assert "unknown pattern" in html and "3.5000" in html


def test_another_metric(sweep, tmp_path):
    report = analyse(read_runs(sweep), sweep, "harness:arc_easy.acc")
    assert "harness: arc_easy.acc" in main_table(report).columns
    assert report.cohorts[0].budgets[0].best.label == "llama"
    assert pictures_of(report)[0].caption.startswith("Harness: arc_easy.acc against")


def test_a_pattern_has_one_color_and_each_group_its_marker(tmp_path):
    for rate in (0.001, 0.002):
        for sharing in ("llama", "cla", "lckv"):
            write_run(tmp_path / f"{sharing}{rate}", sharing, settings={"optim.learning_rate": rate})
    styles = styles_of(analysed(tmp_path).rows)
    assert len({style.marker for style in styles.values()}) == 6
    assert len({style.color for style in styles.values()}) == 3
    assert styles["cla learning_rate=0.001"].color == styles["cla learning_rate=0.002"].color == PALETTE[0][0]


def test_a_family_keeps_its_color_at_every_budget(crowd):
    styles = styles_of(analysed(crowd).rows)
    two = [styles[f"pizza_bottom (num_kv_layers={number})"] for number in (4, 3)]
    assert two[0].color == two[1].color and two[0].marker != two[1].marker and two[0].dashes != two[1].dashes
    assert len({style.color for style in styles.values()}) == 6


@pytest.fixture(scope="module")
def crowd(tmp_path_factory):
    """Llama and five families at two budgets, one of them far worse than all others."""
    folder = tmp_path_factory.mktemp("sweeps") / "crowd"
    write_run(folder / "llama")
    for family in ("pizza_bottom", "pizza_top", "sandwich_bottom", "sandwich_top", "lasagna_bottom"):
        for number in (4, 3):
            figures = {"eval_bits_per_byte": 9.0} if (family, number) == ("pizza_top", 3) else {}
            settings = {"sharing": SharingConfig(family, num_kv_layers=number)}
            write_run(folder / f"{family}{number}", family, settings=settings, **figures)
    return folder


def test_a_crowd_stands_side_by_side_and_an_outlier_at_the_edge(crowd):
    report = analysed(crowd)
    picture = pictures_of(report)[0]
    assert len(picture.legend) == len(report.rows) == 11
    assert "Open points lie beyond the frame" in picture.caption
    with rc_context(RC):
        figure, texts = draw_panel(picture.panels[0])
    (axes,) = figure.axes
    assert axes.get_ylim()[1] < 9 and [text.get_text() for text in axes.texts] == ["9.0000"]
    places = [bar.lines[0].get_xydata()[0] for bar in axes.containers]
    assert len({round(x, 3) for x, _ in places}) == 11
    assert all(axes.get_ylim()[0] < y < axes.get_ylim()[1] for _, y in places)
    assert len(texts["hits-quality"]) == 11
    joined = [line for line in axes.lines if len(line.get_xdata()) == 2 and line.get_linestyle() == "-"]
    assert len(joined) == 5


def test_labels_stay_inside_and_apart(sweep):
    picture = pictures_of(analysed(sweep))[0]
    with rc_context(RC):
        figure, _ = draw_panel(picture.panels[0])
        figure.canvas.draw()
        (axes,) = figure.axes
        boxes = [text.get_window_extent() for text in axes.texts]
    assert len(boxes) == 3
    assert not any(one.overlaps(other) for place, one in enumerate(boxes) for other in boxes[:place])
    assert all(axes.bbox.x0 <= box.x0 and box.x1 <= axes.bbox.x1 for box in boxes)


def test_curves_of_runs_that_have_not_ended_are_drawn_too(sweep):
    report = analysed(sweep)
    picture = pictures_of(report)[1]
    assert list(picture.legend) == [*(row.label for row in report.rows), "no result"]
    with rc_context(RC):
        _, texts = draw_panel(picture.panels[0])
    told = [text for hover in texts.values() for text in hover if "(no result)" in text]
    assert told and all(text.startswith("sharing=mix_attention,seed=0 (no result)\n") for text in told)


def test_tables_are_rectangular(sweep):
    for table in tables_of(analysed(sweep)):
        assert {len(row) for row in table.rows} == {len(table.columns)}


def test_only_a_report_is_replaced(tmp_path):
    write_failure(tmp_path / "sweep" / "a")
    report, out = analysed(tmp_path / "sweep"), tmp_path / "out"
    write_report(report, out)
    (out / "report.md").unlink()
    write_report(report, out)
    assert (out / "report.md").exists()
    (out / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="holds notes.txt, which is no part of a report"):
        write_report(report, out)
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to(out)
    reasons = {"file": "is a file", "link": "is a link", "file/sub": "file is a file", "n" * 250: "File name too long"}
    for name, reason in reasons.items():  # what is written first has a longer name
        with pytest.raises(UserError, match=f"^out=.*{reason}"):
            check_out(tmp_path / name)
    with pytest.raises(UserError, match="out=.*sweep: holds a, which"):
        check_out(tmp_path / "sweep")
    with pytest.raises(UserError, match="out=.: is the current folder"):
        check_out(Path())


def test_a_report_that_fails_leaves_the_earlier_one(tmp_path, monkeypatch):
    write_failure(tmp_path / "sweep" / "a")
    report = analysed(tmp_path / "sweep")
    write_report(report, tmp_path / "out")
    monkeypatch.setattr("lckv.reporting.writing.figures_of", lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write_report(report, tmp_path / "out")
    assert (tmp_path / "out" / "report.json").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "sweep"]


def test_a_report_is_no_run_of_the_next_one(tmp_path):
    write_failure(tmp_path / "a")
    for _ in range(2):
        main(ReportConfig(folder=str(tmp_path)))
    assert len(read_runs(tmp_path)) == 1
    with pytest.raises(UserError, match="folder: give the one that holds the runs"):
        main(ReportConfig())


@pytest.mark.parametrize(
    ("given", "named"),
    [
        (["runs/sweep"], ["folder=runs/sweep"]),
        (["metric=loss", "runs/sweep", "out=x"], ["metric=loss", "folder=runs/sweep", "out=x"]),
        (["runs/sweep/sharing=cla,seed=1"], ["folder=runs/sweep/sharing=cla,seed=1"]),
        (["--config-dir", "conf", "a b"], ["--config-dir", "conf", "folder=a b"]),
        (["folder=x"], ["folder=x"]),
        (["--help"], ["--help"]),
        ([], []),
    ],
)
def test_the_first_word_is_the_folder(given, named):
    assert name_the_first(given, "folder") == named


def run(*arguments, cwd):
    command = [sys.executable, "-m", "lckv.report", *map(str, arguments)]
    return commands.run(command, cwd)


def test_the_command(sweep, tmp_path):
    done = run(sweep, f"out={tmp_path / 'a,b=c'}", "metric=perplexity", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "8 runs: 6 finished, 1 failed, 1 unfinished." in done.stdout
    assert (tmp_path / "a,b=c" / "report.html").exists()


def test_mistakes_are_one_line(sweep, tmp_path):
    for arguments, message in [
        (["x" * 300], f"lckv.report: error: {'x' * 300}: File name too long; give another path\n"),
        ([sweep, "metric=bits_per_bite"], "did you mean 'bits_per_byte'?"),
    ]:
        done = run(*arguments, cwd=tmp_path)
        assert (done.returncode, done.stdout) == (2, "")
        assert message in done.stderr and done.stderr.count("\n") == 1


def test_notes_say_with_which_settings_evaluations_were_made(tmp_path):
    usual = {"seed": 0, "cache": {"name": "none"}, "max_documents": None, "data": {"name": "bible"}}
    for seed, settings in enumerate(
        ({}, {"seed": 1}, {"max_documents": 20, "cache": {"name": "quantized", "bits": 4}})
    ):
        run = write_run(tmp_path / "sweep" / f"run{seed}", "cla", seed)
        write_evaluations(run, {"perplexity": {"loss": 3.0, "settings": usual | settings}})
        if seed == 1:
            assert "Settings of" not in texts_of(tmp_path / "sweep")[1]
    note = "Settings of perplexity, where not the default ones or not the same for all: "
    sides = ("cache.name=none in run0, run1", "cache.name=quantized in run2", "max_documents=null in run0, run1")
    told = f"{note}{'; '.join((*sides, 'max_documents=20 in run2'))}."
    assert told in texts_of(tmp_path / "sweep")[1].replace("\\_", "_")
    write_run(tmp_path / "alone" / "run", "cla")
    write_evaluations(tmp_path / "alone" / "run", {"perplexity": {"settings": usual | {"cache": {"name": "sink"}}}})
    assert f"{note}cache.name=sink in run." in texts_of(tmp_path / "alone")[1]
    foreign = usual | {"data": {"name": "files", "files": ["a.txt"]}}
    write_evaluations(tmp_path / "alone" / "run", {"perplexity": {"settings": foreign}})
    assert f"{note}data.name=files in run" in texts_of(tmp_path / "alone")[1]


def test_notes_say_by_which_passes_losses_were_measured(tmp_path):
    write_run(tmp_path / "sweep" / "plain", "cla")
    write_run(tmp_path / "sweep" / "exact", "lckv", eval_forward_passes="converge")
    assert "of training are exact: of as many passes" in texts_of(tmp_path / "sweep")[1]
    write_run(tmp_path / "sweep" / "sharded", "lckv", seed=1, eval_forward_passes=7)
    write_run(tmp_path / "sweep" / "older", "lckv", seed=2)
    assert "of training are exact, but for those of older, sharded, which" in texts_of(tmp_path / "sweep")[1]
