"""Turns a --config YAML file, which is not trusted, into command-line tokens."""

import argparse
import reprlib
from pathlib import Path

SECRETS = ("hub_token",)  # never written to a file, a tracker, a log or an error text
_NO_VALUES = (list, dict, set, tuple, bytes)  # types that YAML may yield where a flag takes one value
_REPR = reprlib.Repr()  # shortens values, which YAML aliases can nest to gigabytes
_REPR.maxlevel = 2


def tokens(parser: argparse.ArgumentParser, argv: list[str]) -> list[str]:
    """A YAML file as command-line tokens, so that argparse checks types and choices."""
    finder = argparse.ArgumentParser(prog=parser.prog, add_help=False, allow_abbrev=False)
    finder.add_argument("--config")
    path = finder.parse_known_args(argv)[0].config
    if path is None:
        return []
    actions = {action.dest: action for action in parser._actions if action.dest not in ("config", "help")}
    found = []
    for name, value in _read_config(parser, path).items():
        if name not in actions:
            parser.error(f"--config {path}: this script has no flag {_REPR.repr(name)}")
        try:
            found += _tokens(parser, actions[name], value)
        except (ValueError, argparse.ArgumentError) as error:
            parser.error(f"--config {path}: {error}")
    return found


def switch_off(parser: argparse.ArgumentParser, tokens: list[str]) -> list[str]:
    """The tokens without switches that a later `--switch=false` turns off, e.g. those of the file."""
    for action in parser._actions:
        switch = (action.option_strings or [""])[-1]
        if action.nargs == 0 and f"{switch}=false" in tokens:
            tokens = [token for token in tokens if token not in (switch, f"{switch}=false")]
    return tokens


def _read_config(parser, path: str) -> dict:
    import yaml

    try:
        config = yaml.safe_load(Path(path).expanduser().read_text(encoding="utf-8")) or {}
    except OSError as error:
        parser.error(f"--config {path}: {error.strerror}")
    except Exception as error:  # of many types, e.g. for `seed: 2024-13-45`; their text may quote a token from the file
        line = f" in line {error.problem_mark.line + 1}" if getattr(error, "problem_mark", None) else ""
        parser.error(f"--config {path}: not readable as YAML{line}")
    if not isinstance(config, dict):
        parser.error(f"--config {path}: expected lines of the form `flag: value`")
    return config


def _tokens(parser, action, value) -> list[str]:
    """One flag of a config file as command-line tokens; a list becomes the flag's default instead."""
    is_switch, is_list = action.nargs == 0, action.nargs not in (None, "?", 0)
    if value is None:
        return []
    if value is False and "no" in (action.choices or ()):
        value = "no"  # YAML reads an unquoted no as false
    items = value if is_list and isinstance(value, list) else [value]
    if isinstance(value, bool) != is_switch or any(isinstance(item, _NO_VALUES) for item in items):
        wanted = "true or false" if is_switch else "a list of values" if is_list else "one value"
        shown = "***" if action.dest in SECRETS else _REPR.repr(value)
        raise ValueError(f"{action.dest} must be {wanted}, not {shown}")
    if isinstance(action, argparse.BooleanOptionalAction):
        return [action.option_strings[0 if value else -1]]
    if is_switch:
        return [action.option_strings[0]] if value == action.const else []
    values = parser._get_values(action, [str(item) for item in items])  # checks type and choices
    if is_list:  # a default, not tokens: a prompt may begin with a dash
        parser.set_defaults(**{action.dest: values})
        return []
    return [f"{action.option_strings[0]}={value}"]


def public_config(args: argparse.Namespace) -> dict:
    """The arguments as a plain dictionary without secrets, which may be written to files and shown."""
    left_out = {*SECRETS, "config", "typed", "validation_prompts" if hasattr(args, "validation_prompt") else ""}
    return {name: _plain(value) for name, value in sorted(vars(args).items()) if name not in left_out}


def _plain(value):
    """The value as a type that YAML has; flags that a user has added may be of any type."""
    if isinstance(value, list | tuple | set):
        return [_plain(item) for item in value]
    return value if isinstance(value, int | float | None) or type(value) is str else str(value)
