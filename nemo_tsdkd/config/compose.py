"""From `conf/` and the command line to a TrainConfig: Hydra composes, the dataclasses decide what is allowed."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from pathlib import Path

import yaml
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.errors import HydraException, OverrideParseException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from nemo_tsdkd.config.train_config import TrainConfig
from nemo_tsdkd.config.validation import UserError

_PACKAGE = Path(__file__).parents[1]
# A wheel carries conf/ inside the package (setup.py); a checkout has it beside the package.
CONF = _PACKAGE / "conf" if (_PACKAGE / "conf").is_dir() else _PACKAGE.parent / "conf"
# Lines of Hydra's and OmegaConf's messages that speak of their classes, not of the user's fields.
_NOISE = ("reference_type=", "object_type=", "Config search path", "provider=", "See https", "3. To sweep")


def add_config_arguments(parser: argparse.ArgumentParser) -> None:
    """The options by which a command takes a configuration; `config_from` turns them into it."""
    parser.add_argument("--config-name", required=True, help="a file of conf/ without .yaml, such as demo")
    parser.add_argument("--config-dir", help="folder of your own configurations; they may build on those of conf/")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="such as objective.beta=0.5")


def config_from(args: argparse.Namespace) -> TrainConfig:
    return compose_config(args.config_name, args.overrides, args.config_dir)


def compose_config(name: str, overrides: Sequence[str] = (), config_dir: str | Path | None = None) -> TrainConfig:
    """The configuration `name` of `config_dir` (else of `conf/`) with `key=value` overrides.

    A configuration outside of `conf/` may build on those inside (`defaults: [train]`). Nothing in it can name code:
    only fields of the dataclasses exist.

    Raises:
        UserError: no such configuration, an unknown key, a value of the wrong type, or a field without a value.
    """
    folder = Path(config_dir or CONF).resolve()
    if not folder.is_dir():
        raise UserError(f"config_dir = {str(folder)!r}: no such folder. Give an existing --config-dir.")
    ConfigStore.instance().store(name="schema", node=TrainConfig)
    try:
        with initialize_config_dir(str(folder), version_base="1.3"):
            composed = compose(name, overrides=[*map(_quoted, overrides), f"hydra.searchpath=['file://{CONF}']"])
        # Once more onto the dataclasses: Hydra lets `+key=value` through.
        typed = OmegaConf.merge(OmegaConf.structured(TrainConfig), OmegaConf.to_container(composed, resolve=True))
        if missing := ", ".join(sorted(OmegaConf.missing_keys(typed))):
            raise UserError(f"configuration {name!r} leaves open: {missing}. Give each as key=value.")
        config = OmegaConf.to_object(typed)
    except OverrideParseException as e:
        said = f"Error parsing override {e.override!r}: cannot be read as key=value"
        raise UserError(f"configuration {name!r}: {said}. Put quotes around the value.") from e
    except (UnicodeDecodeError, RecursionError) as e:
        raise UserError(f"configuration {name!r}: is no YAML ({e}). Give a text file of fields.") from e
    except (HydraException, OmegaConfBaseException, yaml.YAMLError) as e:
        cause = e.__cause__ if isinstance(e.__cause__, OmegaConfBaseException) else e
        lines = [line.strip().replace("full_key:", "at") for line in str(cause).splitlines()]
        said = " ".join(line for line in lines if line and not line.startswith(_NOISE))
        raise UserError(f"configuration {name!r}: {said}.") from e
    assert isinstance(config, TrainConfig)
    named = {override.split("=")[0].lstrip("+").removeprefix("objective.") for override in overrides}
    config.objective.validate_preset(named)
    config.objective = config.objective.resolved()  # what is shown and recorded is what the loss computes
    return config


def _quoted(override: str) -> str:
    """A path as users type it: Hydra's grammar would ask for quotes around letters beyond ASCII, blanks and commas."""
    key, _, value = override.partition("=")
    if not key.endswith(("path", "run_dir")) or re.fullmatch(r"[\w./:$}{?~@%+*-]*|(['\"]).*\1", value, re.ASCII):
        return override
    escaped = value.replace("'", "\\'")
    return f"{key}='{escaped}'"
