"""Mistakes in the settings of evaluations."""

import pytest

from lckv import cli
from lckv.errors import UserError
from lckv.evaluation.checks import check_evaluation, check_lengths, check_training_evaluation

MISTAKES = {
    "evals=[perplexit]": "evals='perplexit': allowed are perplexity, .*; did you mean 'perplexity'?",
    "evals=[recall,recall]": "evals: 'recall' is there twice",
    "batch_size=0": "batch_size=0: allowed is a whole number, 1 or more",
    "perplexity.stride=0": "perplexity.stride=0: allowed is a whole number",
    "perplexity.max_documents=-1": "perplexity.max_documents=-1: allowed",
    "speed.rounds=3 speed.rounds=0": "speed.rounds=0: has no effect without speed in evals=.perplexity.",
    "evals=[speed] speed.rounds=0": "speed.rounds=0: allowed is a whole number",
    "evals=[needle] perplexity.stride=3": "perplexity.stride=3: has no effect without perplexity in evals=.needle.",
    "perplexity.context_length=8 perplexity.stride=9": "perplexity.stride=9: allowed is perplexity.context_length=8",
}


@pytest.mark.parametrize(("arguments", "message"), MISTAKES.items())
def test_mistakes_are_named(arguments: str, message: str):
    cfg = cli.compose(["model=x", *arguments.split()], "evaluate")
    with pytest.raises(UserError, match=f"^{message}"):
        check_evaluation(cfg)


TRAINING_MISTAKES = {
    "trainer.evaluation_steps=5": "trainer.evaluation_steps=5: has no effect without evaluation.evals",
    "evaluation.evals=[needl]": "evaluation.evals='needl': allowed are .*; did you mean 'needle'?",
    "evaluation.perplexity.stride=4": "evaluation.perplexity.stride=4: has no effect without perplexity",
    "evaluation.evals=[perplexity] evaluation.perplexity.cache_chunk=4": "evaluation.perplexity.cache_chunk=4: has no",
}


@pytest.mark.parametrize(("arguments", "message"), TRAINING_MISTAKES.items())
def test_mistakes_of_trainings_are_named(arguments: str, message: str):
    with pytest.raises(UserError, match=f"^{message}"):
        check_training_evaluation(cli.compose(arguments.split()))


def test_lengths_that_do_not_fit_a_model_are_named():
    arguments = ["evaluation.evals=[perplexity,speed]", "evaluation.perplexity.stride=1000"]
    config = cli.compose([*arguments, "evaluation.speed.prompt_length=1500"]).evaluation
    check_lengths(config, 2048, None, "evaluation.")
    with pytest.raises(UserError, match="^evaluation.perplexity.stride=1000: allowed is .*context_length=512 or less"):
        check_lengths(config, 512, None, "evaluation.")
    with pytest.raises(
        UserError, match="^evaluation.speed.prompt_length=1500 and evaluation.speed.new_tokens=32: make"
    ):
        check_lengths(config, 1024, None, "evaluation.")
