"""Tuning by TRL's trainer: the loss is that of each conversation alone, and a run is like any other."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from lckv.config import ConversationsConfig, LoggerConfig, LoraConfig, OptimConfig, SFTConfig, TrainerConfig
from lckv.data.chat_templates import read_chat_template, set_chat_template
from lckv.data.chat_tokens import build_conversation_data, build_encoder
from lckv.errors import UserError
from lckv.sharing.patterns import parse_layer_types
from lckv.training.adapters import check_adapter_pattern, read_adapter
from lckv.training.run_folder import RunFolder
from tests.reference import tiny_model
from tests.tiny import merging_tokenizer

pytest.importorskip("trl", reason="needs the extra 'sft'")
pytest.importorskip("peft", reason="needs the extra 'sft'")

from lckv.training.sft import SFTSession, build_sft_arguments  # noqa: E402

MakeSession = Callable[..., SFTSession]
LENGTHS = [1, 5, 2, 9, 3, 3, 7, 1, 4, 7, 2, 2]
PATTERNS: dict[str, dict[str, Any]] = {
    "llama": {"layer_types": "0_1_2_3"},
    "windows": {"layer_types": "0s_1s_1_1"},
    "upward": {"layer_types": "0_2_2_3"},
    "upward-windows": {"layer_types": "0s_3_3s_3"},
    "upward-groups": {"layer_types": "0_2_2_3", "forward_passes": 1, "cyclic_groups": 4},
    "latents": {"layer_types": "0_2_2_3", "kv_latents": [{"latent": 12}, None, {"latent": 12}, {"latent": 12}]},
    "scaled": {"layer_types": "0_0_2_2", "logits_scaling": 4.0, "final_logit_softcapping": 2.0},
}


def build_model(pattern: str):
    return tiny_model(vocab_size=302, bos_token_id=0, eos_token_id=1, pad_token_id=1, **PATTERNS[pattern])


@pytest.fixture
def tokenizer():
    tokenizer = merging_tokenizer()
    set_chat_template(tokenizer, read_chat_template("chatml"), "test")
    return tokenizer


@pytest.fixture
def conversations(tmp_path: Path) -> Path:
    file = tmp_path / "c.jsonl"
    rows = (
        [{"role": "user", "content": f"{n}?"}, {"role": "assistant", "content": "the sea was near " * length}]
        for n, length in enumerate(LENGTHS)
    )
    file.write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    return file


@pytest.fixture
def make_session(tmp_path: Path, conversations: Path, tokenizer) -> MakeSession:
    def make(name: str = "run", pattern: str = "upward", **settings: Any) -> SFTSession:
        trainer = {"max_steps": 4, "global_batch_size": 4, "eval_steps": None, "save_steps": 2, "logging_steps": 1}
        trainer |= {"sample_steps": None, "sample_tokens": 4, "sample_prompt": "the sea?"}
        trainer |= {key: settings.pop(key) for key in list(settings) if key in TrainerConfig.__dataclass_fields__}
        cfg = SFTConfig(
            data=ConversationsConfig(files=str(conversations), validation_fraction=0.2),
            trainer=TrainerConfig(**trainer),
            optim=OptimConfig(learning_rate=1e-2),
            run_dir=str(tmp_path / name),
            run_name=name,
            **settings,
        )
        model = build_model(pattern)
        multiple_of = model.config.cyclic_groups
        data = build_conversation_data(cfg, tokenizer, max_length=128, multiple_of=multiple_of)
        folder = RunFolder(str(cfg.run_dir), cfg.trainer.save_total_limit)
        folder.claim({"seed": cfg.seed})
        return SFTSession(cfg, build_sft_arguments(cfg), model, tokenizer, data, folder, Console(quiet=True))

    return make


def whole_loss(session: SFTSession, collate=None) -> float:
    """What the trainer makes of all training rows together."""
    rows = list(session.data.train)
    batch = (collate or session.trainer.data_collator)(rows)
    count = (batch["labels"][:, 1:] != -100).sum()
    session.trainer.model.train()
    return session.trainer.compute_loss(session.trainer.model, dict(batch), num_items_in_batch=count).item()


def learnt_losses(session: SFTSession, conversations: Path) -> dict[str, tuple[float, int]]:
    """Each conversation alone, without padding and by the model's plain logits: summed loss, tokens learnt."""
    encoder, found = build_encoder(session.tokenizer, session.cfg, 128, 1), {}
    for line in conversations.read_text().splitlines():
        ids, labels = (torch.tensor(each) for each in encoder.encode(json.loads(line)["messages"]))
        with torch.no_grad():
            logits = session.model.train()(ids[None], use_cache=False).logits[0, :-1]
        picked = labels[1:] != -100
        loss = F.cross_entropy(logits[picked], ids[1:][picked], reduction="sum").item()
        found[json.dumps(ids.tolist())] = (loss, int(picked.sum()))
    return found


@pytest.mark.parametrize("pattern", PATTERNS)
def test_packed_or_padded_the_loss_is_that_of_each_conversation_alone(make_session, conversations, pattern):
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    losses = {}
    for packing in (True, False):
        session = make_session(f"packing_{packing}", pattern, packing=packing)
        losses[packing] = whole_loss(session)
        # TRL's own way, all rows laid end to end as one, reaches the same masks.
        flat = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)
        assert whole_loss(session, flat) == pytest.approx(losses[packing], abs=1e-5)
    filled_up = session.data.train["input_ids"]
    alone = learnt_losses(session, conversations)
    trained = [
        each for key, each in alone.items() if any(row[: len(json.loads(key))] == json.loads(key) for row in filled_up)
    ]
    assert len(trained) == session.data.counts["train"].num_conversations
    expected = sum(loss for loss, _ in trained) / sum(count for _, count in trained)
    assert losses[True] == pytest.approx(expected, abs=1e-4)
    assert losses[False] == pytest.approx(expected, abs=1e-4)


def curve(session: SFTSession) -> list[dict[str, float]]:
    kept = ("step", "loss", "grad_norm", "eval_loss", "kv_residual", "mean_token_accuracy", "entropy")
    return [{name: line[name] for name in kept if name in line} for line in session.folder.read_metrics()]


def test_a_run_is_like_any_other(make_session, tokenizer):
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    session = make_session(sample_steps=2)
    results = session.run()
    lines = session.folder.read_metrics()
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 4]
    assert all("kv_residual" in line and "entropy" in line for line in lines if "loss" in line)
    assert not any("num_tokens" in line for line in lines)  # TRL's, which begins anew where a run goes on
    assert lines[3]["loss"] < lines[0]["loss"]
    assert results["eval_loss"] == lines[-1]["eval_loss"] and results["unigram_loss"] > 0
    assert results["num_trained_parameters"] == results["num_parameters"]
    assert len([line for line in lines if "sample" in line]) == 2
    assert not list(session.folder.path.rglob("README.md"))
    model = AutoModelForCausalLM.from_pretrained(session.folder.model)
    assert model.config.use_cache
    # Generation stops at the end of an answer as well as at that of a text.
    assert model.generation_config.eos_token_id == [1, tokenizer.convert_tokens_to_ids("<|im_end|>")]
    assert (session.folder.model / "chat_template.jinja").read_text() == session.tokenizer.chat_template


@pytest.mark.timeout(60)
def test_trackers_get_what_the_metrics_file_gets(make_session):
    pytest.importorskip("tensorboard")
    pytest.importorskip("wandb")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    session = make_session(max_steps=2, logger=LoggerConfig(names=["tensorboard", "wandb"]))
    session.run()
    events = EventAccumulator(str(session.folder.tensorboard))
    events.Reload()
    lines = [line for line in session.folder.read_metrics() if "loss" in line]
    for name in "loss", "mean_token_accuracy":
        assert [event.value for event in events.Scalars(f"train/{name}")] == pytest.approx(
            [line[name] for line in lines]
        )
    assert len(events.Scalars("eval/loss")) == 1
    assert list(session.folder.path.glob("wandb/offline-run-*"))


def test_neither_accumulation_nor_recomputing_changes_the_curve(make_session):
    curves = []
    for number, settings in enumerate(({}, {"micro_batch_size": 1}, {"gradient_checkpointing": True})):
        session = make_session(str(number), lora=LoraConfig(rank=2), max_steps=2, **settings)
        session.run()
        kept = ("loss", "grad_norm", "eval_loss")
        curves.append([{name: line[name] for name in kept if name in line} for line in curve(session)])
    for other in curves[1:]:
        for mine, theirs in zip(curves[0], other, strict=True):
            assert theirs == pytest.approx(mine, rel=1e-4)


def test_gone_on_with_it_is_the_undisturbed_run_bit_for_bit(make_session, interrupt):
    lora = LoraConfig(rank=2, dropout=0.1)
    whole = make_session("whole", lora=lora)
    whole.run()
    interrupt(make_session("broken", lora=lora), 3)
    resumed = make_session("broken", lora=lora)
    assert resumed.first_step == 2
    resumed.run()
    assert curve(resumed) == curve(whole)
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name]), name


def attention_outputs(session: SFTSession, inputs: torch.Tensor) -> list[torch.Tensor]:
    seen: dict[int, torch.Tensor] = {}
    layers = session.model.model.layers
    hooks = [
        layer.self_attn.register_forward_hook(lambda module, args, output, at=at: seen.__setitem__(at, output[0]))
        for at, layer in enumerate(layers)
    ]
    with torch.no_grad():
        session.model.eval()(inputs, use_cache=False, forward_passes=9)
    for hook in hooks:
        hook.remove()
    return [seen[at] for at in range(len(layers))]


@pytest.mark.parametrize(("pattern", "owner", "readers"), [("scaled", 0, {0, 1}), ("upward", 2, {1, 2})])
def test_an_adapter_of_an_owners_keys_changes_what_all_readers_see(make_session, pattern, owner, readers):
    session = make_session(pattern=pattern, lora=LoraConfig(rank=2, target_modules=["k_proj", "v_proj"]))
    layers = session.model.model.layers
    plan = session.model.config.sharing_plan
    adapted = {at for at, layer in enumerate(layers) if hasattr(getattr(layer.self_attn, "k_proj", None), "lora_A")}
    assert adapted == set(plan.kv_owners)
    assert readers == {at for at, layer in enumerate(plan.layers) if layer.value_source == owner}
    inputs = torch.arange(3, 33)[None]
    before = attention_outputs(session, inputs)
    with torch.no_grad():
        torch.nn.init.normal_(layers[owner].self_attn.v_proj.lora_B["default"].weight)
    changed = {
        at
        for at, (old, new) in enumerate(zip(before, attention_outputs(session, inputs), strict=True))
        if not torch.allclose(old, new)
    }
    assert readers <= changed  # and what lies above them
    assert changed.isdisjoint(range(min(readers)))
    session.trainer.model.train()
    batch = session.trainer.data_collator(list(session.data.train))
    session.trainer.compute_loss(session.trainer.model, batch).backward()
    assert all(layers[at].self_attn.v_proj.lora_B["default"].weight.grad.abs().sum() > 0 for at in adapted)


def test_adapters_are_saved_and_merged_and_gone_on_from(make_session):
    from peft import PeftModel

    session = make_session("first", lora=LoraConfig(rank=2))
    adapter = str(session.folder.path / "adapter")
    results = session.run()
    assert 0 < results["num_trained_parameters"] < results["num_parameters"]
    inputs, base = torch.arange(3, 33)[None], build_model("upward")
    with torch.no_grad():
        merged = AutoModelForCausalLM.from_pretrained(session.folder.model).eval()(inputs).logits
        plain = base(inputs).logits
        adapted = PeftModel.from_pretrained(base, adapter).eval()(inputs).logits
    assert torch.allclose(adapted, merged, atol=1e-4)
    assert not torch.allclose(plain, merged, atol=1e-3)
    further = make_session("further", lora=LoraConfig(adapter=adapter))
    batch = further.trainer.data_collator(list(further.data.train))
    tuned = session.model.train()(**batch, use_cache=False).loss.item()
    assert whole_loss(further) == pytest.approx(tuned, abs=1e-4)


def test_while_one_token_is_decoded_no_adapter_of_latents_is_passed_by(make_session):
    """Latents are read there without the projections being called: these have no adapters."""
    session = make_session(pattern="latents", lora=LoraConfig(rank=2))
    names = {name.rpartition(".")[0] for name, _ in session.model.named_modules() if name.endswith("lora_A")}
    assert any(name.endswith("kv_a_proj") for name in names)
    assert not [name for name in names if name.endswith("_b_proj")]
    with pytest.raises(UserError, match="lora.target_modules: 'v_b_proj' can have no adapter .*did you mean"):
        make_session("other", pattern="latents", lora=LoraConfig(rank=2, target_modules=["v_b_proj"]))


def test_an_adapter_of_another_model_is_refused(make_session, tmp_path):
    make_session("first", "llama", lora=LoraConfig(rank=2), max_steps=1).run()
    folder = str(tmp_path / "first" / "adapter")
    with pytest.raises(UserError, match=r"^given: adapts the keys of layer 1, which reads those of layer 2"):
        check_adapter_pattern(read_adapter(folder), parse_layer_types("0_2_2_3"), "given")
    with pytest.raises(UserError, match=r"^given: adapts .* of layer 2, which is not there in the model \(0_1\)"):
        check_adapter_pattern(read_adapter(folder), parse_layer_types("0_1"), "given")
    with pytest.raises(UserError, match=r"adapter: is of another model: there is no .*layers.1.self_attn.k_proj"):
        make_session("upward", "upward", lora=LoraConfig(adapter=folder))
