"""`scripts/study_conversion.py`: what is measured together was measured alike."""

import json
from argparse import Namespace
from pathlib import Path

import pytest

from scripts.study_conversion import SETTINGS_OF_STAGE, Study, held_out


def arguments(out: Path, stage: str = "convert", **settings) -> Namespace:
    return Namespace(stage=stage, out=str(out), **(dict.fromkeys(SETTINGS_OF_STAGE["uptrain"], 1) | settings))


def test_results_of_other_settings_are_not_mixed(tmp_path, capsys):
    Study(arguments(tmp_path, ridge=0.01)).note("conversion", "a / fit", perplexity=2.0)
    with pytest.raises(SystemExit) as end:
        Study(arguments(tmp_path, ridge=0.5, source="other"))
    assert end.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert error.endswith("other settings: source=other (there: 1), ridge=0.5 (there: 0.01)\n")
    trained = Study(arguments(tmp_path, "uptrain", ridge=0.01, steps=40))  # conversions took no steps
    assert not trained.missing("conversion", "a / fit")
    with pytest.raises(SystemExit):
        Study(arguments(tmp_path, "uptrain", ridge=0.01, steps=20))
    Study(arguments(tmp_path, "show", ridge=None))


@pytest.mark.parametrize(("documents", "lines"), [(5, 5), (6, 6), (20, 9)])
def test_no_more_documents_than_asked_for_are_held_out(tmp_path, documents, lines):
    text = tmp_path / "text.jsonl"
    text.write_text("".join(json.dumps({"text": str(index)}) + "\n" for index in range(9)))
    file = held_out(arguments(tmp_path, heldout_text=str(text), heldout_documents=documents, heldout_characters=4))
    assert len(file.read_text().splitlines()) == lines
