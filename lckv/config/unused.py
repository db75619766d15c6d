"""What is said in vain: settings that do nothing unless something else is set, as one table.

Each row names settings and says of a configuration why they would have no effect in it; what depends on another key
of the same group alone has its row from where it is declared, by `only_with`. A setting counts as given if
it is on the command line, or has another value than its default; where the YAML of this package gives it too, only
the command line counts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from operator import attrgetter
from typing import Any

from lckv.config.cache import cache_options
from lckv.config.conversion import ConvertConfig, SearchConfig
from lckv.config.evaluation import EVALUATIONS, EvaluateConfig, EvaluationConfig
from lckv.config.generation import BenchmarkConfig, ChatConfig, GenerateConfig
from lckv.config.hints import HintsConfig
from lckv.config.keys import Group, keys_of
from lckv.config.model import KEPT_WITH_SOURCE
from lckv.config.names import CALIBRATED, NO_CACHE, TRAINED
from lckv.config.sft import DPO, SFTConfig
from lckv.config.training import TrainConfig
from lckv.errors import UserError

Reason = Callable[[Any, str], str | None]
"""Of a configuration and the full name of a key: why the key has no effect there; None if it has one."""


@dataclass(frozen=True)
class Unused:
    """A row of the table.

    Attributes:
        keys: the settings, with spaces between them; the name of a group stands for all of its keys.
        reason: why they have no effect, if so.
        but: keys of these groups that are not meant.
        is_preset: whether YAML gives them too, so that only the command line counts.
    """

    keys: str
    reason: Reason
    but: str = ""
    is_preset: bool = False

    def covers(self, key: str) -> bool:
        """Whether a key is one of those that are meant."""
        return key not in self.but.split() and any(f"{key}.".startswith(f"{name}.") for name in self.keys.split())


def validate(cfg: Group, given: Sequence[str] = ()) -> None:
    """Checks a whole configuration, whoever made it.

    Args:
        cfg: a root dataclass.
        given: what the command line says of it, in a sweep of this job's.

    Raises:
        UserError: for the first mistake, what is said in vain before all others; the message names the key.
    """
    rows = [row for schema, its_rows in TABLE.items() if isinstance(cfg, schema) for row in its_rows]
    rows += _only_with(type(cfg))
    typed = [(override.lstrip("+~").partition("=")[0].partition("@")[0], override) for override in given]
    # The name in a group is what `group=option` chooses.
    changed = [(key, f"{key.removesuffix('.name')}={_shown(value)}") for key, value in _changed(cfg)]
    for row in rows:
        for key, shown in typed if row.is_preset else typed + changed:
            if row.covers(key) and (reason := row.reason(cfg, key)) is not None:
                raise UserError(f"{shown}: has no effect {reason}")
    cfg.validate()


def _changed(cfg: Group) -> Iterator[tuple[str, Any]]:
    """The full name and the value of every key that is not at its default."""
    schema: Any = type(cfg)
    default = schema()
    for name, declared in keys_of(schema).items():
        value = attrgetter(name)(cfg)
        if not declared.is_group and value != attrgetter(name)(default):
            yield name, value


def _only_with(schema: type) -> Iterator[Unused]:
    """A row for each key that has an effect beside some values of another one of its group."""
    for name, declared in keys_of(schema).items():
        for other, values in declared.traits.get("only_with", {}).items():
            yield Unused(name, partial(_beside, name.rpartition(".")[0], other, values))


def _beside(group: str, other: str, values: Sequence[Any], cfg: Any, key: str) -> str | None:
    name = f"{group}.{other}".lstrip(".")
    if (value := attrgetter(name)(cfg)) in values:
        return None
    return f"with {name}={_shown(value)}, only with {', '.join(map(_shown, values))}; leave it out"


def _shown(value: Any) -> str:
    """A value as one types it."""
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _unless(keys: str, is_used: Callable[[Any], Any], reason: str, **options: Any) -> Unused:
    """A row of settings that have an effect where something holds; else the reason is filled in from `cfg`."""
    return Unused(keys, lambda cfg, key: None if is_used(cfg) else reason.format(cfg=cfg), **options)


def _brings_its_own(cfg: TrainConfig | ConvertConfig, key: str) -> str | None:
    source = cfg.source if isinstance(cfg, ConvertConfig) else cfg.init.source
    if source is None or (key == "model.force_nodiag" and cfg.model.force_nodiag):
        return None
    return f"on the model {source}, which brings its own; leave it out"


_NO_TEXT = f"with method={{cfg.method}}, which looks at no text ({', '.join(sorted(CALIBRATED))} do); leave it out"
_LATENT_FIT = "with latent={cfg.latent.name}, which has a fit of its own; leave it out"


def _fits_by_method(cfg: TrainConfig | ConvertConfig) -> bool:
    """Whether a conversion is done by the method, or at least trained by it."""
    return not cfg.latent.is_used or (cfg.method if isinstance(cfg, ConvertConfig) else cfg.init.method) in TRAINED


_NO_TRAINING = f"with method={{cfg.method}}, which does not train ({', '.join(sorted(TRAINED))} does); leave it out"


def _of_no_cache_here(cfg: EvaluateConfig | ChatConfig | GenerateConfig | BenchmarkConfig, key: str) -> str | None:
    several = cfg.caches if isinstance(cfg, BenchmarkConfig) else []
    names = [each if isinstance(each, str) else each.get("name", "") for each in several if each] or [cfg.cache.name]
    options = [option for name in names for option in cache_options(name)]
    if "." not in key or key.removeprefix("cache.") in ("name", *options):
        return None
    if several:
        return f"on caches of {', '.join(names)}, which take {', '.join(sorted(set(options)))}; leave it out"
    if cfg.cache.name == NO_CACHE:
        return f"with cache={NO_CACHE}; choose a cache, or leave it out"
    return f"with cache={cfg.cache.name}, which takes {', '.join(options)}; leave it out"


def _evaluations(prefix: str, settings_of: Callable[[Any], EvaluationConfig]) -> tuple[Unused, ...]:
    """Settings of evaluations that are not asked for, and the batch size for all where each has its own."""

    def not_asked_for(cfg: Any, key: str) -> str | None:
        name, evals = key.removeprefix(prefix).partition(".")[0], settings_of(cfg).evals
        if name in evals:
            return None
        return f"without {name} in {prefix}evals=[{','.join(evals)}]; leave it out, or add {name}"

    def all_have_their_own(cfg: Any, key: str) -> str | None:
        settings = settings_of(cfg)
        own = [name for name in settings.evals if hasattr(getattr(settings, name, None), "batch_size")]
        keys = " and ".join(f"{prefix}{name}.batch_size" for name in own)
        return f"on {', '.join(own)}; give {keys}" if own and own == settings.evals else None

    return (
        Unused(" ".join(f"{prefix}{name}" for name in EVALUATIONS), not_asked_for),
        Unused(f"{prefix}batch_size", all_have_their_own),
    )


_CACHE = Unused("cache", _of_no_cache_here)
_PAGES = _unless("cache.num_pages", lambda cfg: cfg.cache.has_pages, "without cache.layout=paged; leave it out")
_MODEL = (
    _unless(
        "sharing",
        lambda cfg: cfg.model.layer_types is None,
        "beside model.layer_types={cfg.model.layer_types}; leave one of them out "
        "(model.layer_types=null lets the sharing group decide)",
        is_preset=True,
    ),
    Unused(
        "model tokenizer",
        _brings_its_own,
        but=" ".join(f"model.{name}" for name in KEPT_WITH_SOURCE if name != "force_nodiag"),
        is_preset=True,
    ),
)
_LOOP = (
    _unless(
        "trainer.evaluation_steps",
        lambda cfg: cfg.evaluation.evals,
        "without evaluation.evals, such as evaluation.evals=[perplexity]; leave it out, or give some",
    ),
    Unused("evaluation.perplexity.cache_chunk", lambda cfg, key: "in training; leave it out"),
    *_evaluations("evaluation.", lambda cfg: cfg.evaluation),
)

TABLE: dict[type, tuple[Unused, ...]] = {
    TrainConfig: (
        *_MODEL,
        _unless(
            "tokenizer.vocab_size",
            lambda cfg: cfg.tokenizer.name == "bpe",
            "with tokenizer.name={cfg.tokenizer.name}; leave it out",
            is_preset=True,
        ),
        _unless(
            "teacher",
            lambda cfg: cfg.has_teacher,
            "without teacher.source; give one, or leave it out",
        ),
        _unless("init.method", _fits_by_method, _LATENT_FIT),
        _unless("init", lambda cfg: cfg.init.source is not None, "without init.source; give one, or leave it out"),
        _unless(
            "iso",
            lambda cfg: cfg.init.source is None,
            "on the model {cfg.init.source}, which brings its own sizes; leave it out",
        ),
        *_LOOP,
    ),
    SFTConfig: (
        _unless(
            "lora.alpha lora.dropout lora.target_modules", lambda cfg: cfg.lora.rank, "without lora.rank; give one"
        ),
        _unless(
            "lora.rank",
            lambda cfg: cfg.lora.adapter is None,
            "beside lora.adapter={cfg.lora.adapter}, which brings its own; leave one of them out",
        ),
        _unless(
            "trainer.trainable",
            lambda cfg: not cfg.lora.is_used,
            "beside adapters, which alone are trained; leave it out (lora.target_modules says where they are)",
        ),
        _unless(
            "data.messages_field",
            lambda cfg: cfg.loss != DPO,
            "with loss={cfg.loss}, whose lines have prompt, chosen and rejected; leave it out",
        ),
        Unused("trainer.evaluation_steps", lambda cfg, key: "here; run lckv.evaluate on the tuned model"),
    ),
    ConvertConfig: (
        *_MODEL,
        _unless("method", _fits_by_method, _LATENT_FIT),
        _unless("init data", lambda cfg: cfg.method in CALIBRATED or cfg.latent.is_used, _NO_TEXT, is_preset=True),
        _unless(
            "trainer optim teacher logger evaluation seed run_name "
            "model.dtype model.attention_dropout model.attn_implementation",
            lambda cfg: cfg.method in TRAINED,
            _NO_TRAINING,
            but="trainer.num_threads",
            is_preset=True,
        ),
        _unless(
            "device",
            lambda cfg: cfg.method not in TRAINED,
            "with method={cfg.method}, which calibrates where it trains; leave it out",
        ),
        *_LOOP,
    ),
    SearchConfig: (
        _unless("calibration_tokens ridge", lambda cfg: cfg.method in CALIBRATED or cfg.latent.is_used, _NO_TEXT),
        _unless(
            "method directions split_sources beam shortlist",
            lambda cfg: not cfg.latent.is_used,
            "with latent={cfg.latent.name}, whose groups are a shortest path; leave it out",
        ),
        Unused(
            "latent.ratio latent.dim latent.skip_layers latent.group_size latent.warmup_layers",
            lambda cfg, key: "here, where the budget says how much is kept; leave it out",
        ),
    ),
    EvaluateConfig: (
        *_evaluations("", lambda cfg: cfg),
        _unless(
            "perplexity.cache_chunk",
            lambda cfg: cfg.cache.name != NO_CACHE,
            "with cache=none; choose a cache, or leave it out",
        ),
        _CACHE,
        _PAGES,
    ),
    GenerateConfig: (
        _unless("batching batch_size", lambda cfg: cfg.prompts_file is not None, "without prompts_file; leave it out"),
        _CACHE,
        _PAGES,
    ),
    ChatConfig: (_CACHE, _PAGES),
    BenchmarkConfig: (
        Unused("model.layer_types", lambda cfg, key: "here; give patterns=[...]"),
        _unless(
            "model",
            lambda cfg: cfg.patterns or not cfg.checkpoints,
            "on checkpoints; leave it out, or give patterns=[...]",
            is_preset=True,
        ),
        _unless("cache.name", lambda cfg: not cfg.caches, "beside caches=[...]; leave one of them out"),
        _unless("max_batch_size", lambda cfg: cfg.kv_budget is not None, "with kv_budget=null; leave it out"),
        _unless(
            "overwrite", lambda cfg: cfg.output_dir is not None, "without output_dir; name the folder, or leave it out"
        ),
        _CACHE,
    ),
    HintsConfig: (
        _unless(
            "num_layers",
            lambda cfg: cfg.model is None,
            "beside model={cfg.model}, which has layers of its own; leave one of them out",
        ),
        _unless("revision kv_dtype", lambda cfg: cfg.model is not None, "without model; give one, or leave it out"),
        _unless(
            "context_length",
            lambda cfg: cfg.model is not None or "s" in str(cfg.layer_types),
            "without model, nor windows in layer_types; leave it out",
        ),
        _unless(
            "sliding_window", lambda cfg: "s" in str(cfg.layer_types), "without windows in layer_types; leave it out"
        ),
    ),
}
"""For each root dataclass, and those that derive from it, what may have no effect there."""
