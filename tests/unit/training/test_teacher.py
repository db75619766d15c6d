"""What cannot be a teacher, and what cannot be asked of one."""

from collections.abc import Callable

import pytest

from lckv.config import TeacherConfig, TrainConfig, validate
from lckv.errors import UserError
from lckv.loading.building import check_tokenizers
from lckv.training.distillation import check_teacher_fits
from tests.reference import tiny_model
from tests.tiny import byte_tokenizer


def test_compiled_students_learn_from_logits(make_config: Callable[..., TrainConfig]):
    compiled = {"trainer__torch_compile": True, "trainer__torch_compile_backend": "aot_eager"}
    validate(make_config(teacher__source="x", teacher__attention_weight=0.0, **compiled))


@pytest.mark.parametrize(
    ("settings", "message", "matters_to_logits"),
    [
        ({"vocab_size": 62}, "teacher.source=x: its vocab_size is 62, the trained model's 61", True),
        ({"layer_types": "0_1_2"}, "teacher.source=x: its num_hidden_layers is 3, the trained model's 2", False),
        ({"hidden_size": 16}, "teacher.source=x: its hidden_size is 16, the trained model's 32", False),
        ({"max_position_embeddings": 16}, "data.block_size=32: longer than the teacher's", True),
    ],
)
def test_teachers_that_cannot_be_compared_with(settings: dict, message: str, matters_to_logits: bool):
    student, teacher = tiny_model("0_0"), tiny_model(**{"layer_types": "0_0"} | settings)
    with pytest.raises(UserError, match=message) as raised:
        check_teacher_fits(teacher, student, TeacherConfig(source="x"), block_size=32)
    assert ("teacher.attention_weight=0" in str(raised.value)) == (not matters_to_logits)
    logits_only = TeacherConfig(source="x", attention_weight=0.0)
    if not matters_to_logits:
        check_teacher_fits(teacher, student, logits_only, block_size=32)
    else:
        with pytest.raises(UserError, match=message):
            check_teacher_fits(teacher, student, logits_only, block_size=32)


def test_tokens_must_be_the_same_but_for_special_ones(corpus):
    own = byte_tokenizer()
    check_tokenizers("x", own, byte_tokenizer(additional_special_tokens=["<user>"]))
    with pytest.raises(UserError, match="teacher.source=x: its tokenizer has other tokens, .*tokenizer.name=x"):
        check_tokenizers("x", own, corpus.tokenizer)
