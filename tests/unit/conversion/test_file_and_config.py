"""Where a checkpoint's tensors and its configuration differ, a conversion means what loading means."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from lckv.errors import UserError
from lckv.loading.models import load_model
from tests.reference import token_ids
from tests.unit.conversion.sources import identity, random_source, run_convert, save_source

EMBEDDINGS, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def change_tensors(folder, change):
    """Rewrites the weights after `change`, which gets the tensors."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def converted(source, out, *arguments):
    """The logits of a source as it loads, and as its conversion does, with what the latter's configuration says."""
    run_convert(source, out, *arguments)
    before, after = (load_model(str(folder), device="cpu")[0] for folder in (source, out))
    config = json.loads((out / "config.json").read_text())
    return before(token_ids(1, 9)).logits, after(token_ids(1, 9)).logits, config, after


@pytest.mark.parametrize("is_tied", [True, False])
@pytest.mark.parametrize("held", ["embeddings", "head", "equal", "different"])
def test_tied_embeddings_are_those_that_loading_ties(tmp_path, is_tied, held):
    source = save_source(tmp_path / "source", random_source(3, tie_word_embeddings=True))
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": is_tied}))

    def change(tensors):
        head = tensors[EMBEDDINGS].clone() + (held == "different")
        if held != "embeddings":
            tensors[HEAD] = head
        if held == "head":
            del tensors[EMBEDDINGS]

    change_tensors(source, change)
    if not is_tied and held in ("embeddings", "head"):
        for call in (lambda: load_model(str(source)), lambda: run_convert(source, tmp_path / "out")):
            with pytest.raises(UserError, match="the weights do not fit config.json: .*(lm_head|embed_tokens).weight"):
                call()
        return
    before, after, config, model = converted(source, tmp_path / "out")
    assert torch.equal(after, before)
    assert config["tie_word_embeddings"] == model.config.tie_word_embeddings == (is_tied and held != "different")
    assert (HEAD in load_file(tmp_path / "out" / "model.safetensors")) == (not config["tie_word_embeddings"])
    model.save_pretrained(tmp_path / "again")
    again, _ = load_model(str(save_source(tmp_path / "again", model)), device="cpu")
    assert torch.equal(again(token_ids(1, 9)).logits, before)


@pytest.mark.parametrize("method", ["average", "aligned"])
def test_biases_that_the_configuration_has_not_are_left_out_and_named(tmp_path, method, caplog):
    source = save_source(tmp_path / "source", random_source(3, attention_bias=True))
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"attention_bias": False}))
    before, after, _, _ = converted(source, tmp_path / "out")
    assert torch.equal(after, before)
    assert {message.partition("source: ")[2] for message in caplog.messages} == {
        "12 weights are not used, such as model.layers.0.self_attn.k_proj.bias"
    }
    run_convert(source, tmp_path / "shared", "model.layer_types=0_0_2", f"method={method}")
    assert not any("bias" in name for name in load_file(tmp_path / "shared" / "model.safetensors"))
    (source / "config.json").write_text(json.dumps(config | {"mlp_bias": True}))
    for call in (lambda: load_model(str(source)), lambda: run_convert(source, tmp_path / "other")):
        with pytest.raises(UserError, match="the weights do not fit config.json: .*mlp.*bias"):
            call()


@pytest.mark.parametrize("kind", [{}, {"use_qk_norm": True}])
def test_keys_and_values_that_nobody_reads_change_nothing(tmp_path, kind, caplog):
    """Some programs write them for every layer."""
    source = save_source(tmp_path / "source", random_source(4, layer_types="0_0_2_2", **kind))
    plain, _ = load_model(str(source), device="cpu")
    expected = plain(token_ids(1, 9)).logits
    every_layer = {
        name: torch.randn_like(tensor)
        for name, tensor in random_source(4, layer_types=identity(4), **kind).state_dict().items()
        if any(part in name for part in ("k_proj", "v_proj", "k_norm"))
    }
    change_tensors(source, lambda tensors: tensors.update(every_layer | tensors))
    before, after, _, _ = converted(source, tmp_path / "out")
    assert torch.equal(before, expected) and torch.equal(after, expected)
    assert len(caplog.messages) == 2 and all("weights are not used" in message for message in caplog.messages)
    run_convert(source, tmp_path / "merged", "model.layer_types=0_0_0_0", "method=average")
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    means = [plain.state_dict()[f"model.layers.{layer}.self_attn.k_proj.weight"] for layer in (0, 2)]
    torch.testing.assert_close(merged["model.layers.0.self_attn.k_proj.weight"], sum(means) / 2)
