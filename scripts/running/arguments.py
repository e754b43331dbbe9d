"""The command line: options that no config knows, which MONAI would add to the config without a word."""

from __future__ import annotations

import inspect
import json
import logging
import sys
from collections.abc import Iterable
from difflib import get_close_matches
from typing import Any

from monai.bundle import ConfigParser, ConfigWorkflow, run
from monai.bundle.config_item import ComponentLocator, ConfigComponent
from monai.bundle.reference_resolver import ReferenceResolver
from monai.bundle.utils import DEFAULT_EXP_MGMT_SETTINGS

from scripts.running.errors import BundleError
from scripts.running.knobs import located

logger = logging.getLogger(__name__)


def options() -> dict[str, Any]:
    """{key: value} of the options of `python -m monai.bundle run`; none where another program runs the config."""
    program, *words = sys.argv
    if not program.replace("\\", "/").endswith("monai/bundle/__main__.py") or words[:1] != ["run"]:
        return {}
    import fire  # here, since MONAI Deploy does not install it

    given: dict[str, Any] = {}
    fire.Fire(lambda *verb, **found: given.update(found), command=words[1:])  # reads them as it did for MONAI
    return ConfigParser.load_config_files(given.get("args_file", {})) | given


def nearest(word: str, known: Iterable[str], least: float = 0.4) -> str:
    """The end of a sentence with the known word that may be meant; nothing where none is as near as `least`, 0 to 1."""
    near = get_close_matches(word, list(known), 1, least)
    return f"; {near[0]} is the nearest" if near else ""


def check_arguments() -> None:
    """Warn of an option that no config has a key for, since it changes nothing.

    Raises:
        BundleError: of an option such as `--network_def#unet#chanels`, which the network there does not take.
    """
    given = options()
    if not given.get("config_file"):
        return
    config = ConfigParser(ConfigParser.load_config_files(given["config_file"]))
    known = set(config.get()) | {ConfigParser.meta_key}
    tracking = given.get("tracking")
    if tracking:
        settings = DEFAULT_EXP_MGMT_SETTINGS.get(tracking) or ConfigParser.load_config_files(tracking)
        known |= set(settings["configs"])
    ours = {name for f in (run, ConfigWorkflow.__init__) for name in inspect.signature(f).parameters}
    used = json.dumps(given, default=str)
    for option in given.keys() - ours:
        path, name = ReferenceResolver.split_id(option, last=True)
        if path:
            check_argument(config, given, path, name)
        elif name not in known and f"@{name}" not in used:
            logger.warning(f"--{name}: no config has this key, so that it changes nothing{nearest(name, known)}")


def check_argument(config: ConfigParser, given: dict[str, Any], path: str, name: str) -> None:
    """The part of a config at a path has, or takes, an argument of this name; see `check_arguments`."""
    part = config.get(path)
    option = f"--{path}::{name}".replace("::", "#")
    if not isinstance(part, dict) or name in part or name in ConfigComponent.non_arg_keys:
        return
    if "_target_" not in part:  # it may be for names that the user gives
        near = nearest(name, part, 0.8)
        if near:
            logger.warning(f"{option}: no config has this key{near}")
        return
    target = part["_target_"]
    if target[0] == "@":  # the class is a knob, which may be what the weights say
        changed = ConfigParser(config.get() | {key: value for key, value in given.items() if key in config})
        target = changed.get_parsed_content(target[1:])
    found = located(ConfigComponent({"_target_": target}, locator=ComponentLocator()).resolve_module_name())
    try:
        parameters = inspect.signature(found).parameters
    except (TypeError, ValueError):  # of an expression, or of a function written in C
        return
    if name not in parameters and all(p.kind is not p.VAR_KEYWORD for p in parameters.values()):
        raise BundleError(f"{option}: {target} takes no argument {name!r}{nearest(name, parameters)}")
