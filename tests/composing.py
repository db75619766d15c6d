"""Configurations as `lckv.commands.cli.compose` makes them, several times as fast.

Hydra takes a tenth of a second to compose a configuration from its groups, so that is done once for each choice of
groups; single values are then set by the function with which Hydra sets them.
"""

import pickle
from collections.abc import Sequence
from functools import cache
from typing import Any

import hydra
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf, flag_override

from lckv.commands import cli, config_errors, hydra_store, overrides
from lckv.errors import UserError


def compose(arguments: Sequence[str] = (), command: str = "train") -> Any:
    """The configuration that `python -m lckv.COMMAND` gets from these arguments, without flags of Hydra's.

    Raises:
        UserError: if the arguments are wrong.
    """
    schema = hydra_store.SCHEMAS[command]
    try:
        return _prepared(command, schema, arguments)
    except UserError:
        raise
    except config_errors.CONFIG_ERRORS as error:
        raise UserError(config_errors.describe(error, schema)) from error


def _prepared(command: str, schema: type, arguments: Sequence[str]) -> Any:
    others, literals = overrides.take_literals(arguments, cli.literal_keys(schema))
    quoted = overrides.quote_overrides(others, cli.open_keys(schema))
    parsed = OverridesParser.create().parse_overrides(quoted)
    groups = [each.input_line for each in parsed if each.key_or_group in hydra_store.groups()]
    values = [each for each in parsed if each.input_line not in groups]
    composed = pickle.loads(_composed(command, tuple(map(str, groups))))
    for key, text in literals.items():
        OmegaConf.update(composed, key, overrides.escape(text))
    ConfigLoaderImpl._apply_overrides_to_config(values, composed)
    hydra_cfg = composed.hydra
    with flag_override(composed, ["struct", "readonly"], False):
        del composed["hydra"]
    with flag_override(hydra_cfg, ["struct", "readonly"], False):
        hydra_cfg.overrides.task = quoted
    return cli.prepare(composed, hydra_cfg)


@cache
def _composed(command: str, groups: tuple[str, ...]) -> bytes:
    """Pickled, from which a copy is made in a seventh of the time that `deepcopy` takes."""
    hydra_store.register_schema(command)
    hydra_store.register_literals({})
    with hydra.initialize_config_dir(str(hydra_store.config_dir()), version_base="1.3"):
        return pickle.dumps(hydra.compose(command, list(groups), return_hydra_config=True))
