"""The argument parser: errors of one line that name the flag that was meant. Imports nothing heavy."""

import argparse
import difflib
import re

from .. import sanitize


class _Formatter(argparse.RawDescriptionHelpFormatter):
    def _get_help_string(self, action):
        silent = action.default in (None, False, argparse.SUPPRESS) or "default" in action.help.lower()
        return action.help if silent else f"{action.help.rstrip('.')}. Default: %(default)s."


class _Parser(argparse.ArgumentParser):
    def __init__(self, **options):
        super().__init__(**options)
        self.refused: dict[str, str] = {}  # another script's flag -> why this one has none

    def parse_known_args(self, args=None, namespace=None):
        self.given = args or []
        return super().parse_known_args(args, namespace)

    def error(self, message):  # argparse would print forty lines of usage first
        message = re.sub(r"argument (--\w+): must\b", r"\1 must", message)
        unknown = re.match(r"unrecognized arguments: (--[\w-]+)", message)
        if message.startswith("the following arguments are required"):  # perhaps one of them was abbreviated
            names = [token.partition("=")[0] for token in self.given if token.startswith("--")]
            unknown = next((re.match("(.*)", name) for name in names if name not in self._option_string_actions), None)
            message += f"; there is no {unknown[1]}" if unknown else ""
        if unknown and unknown[1] in self.refused:
            message = f"{unknown[1]}: {self.refused[unknown[1]]}"
        elif unknown and (near := self._near(unknown[1])):
            message += f" (did you mean {near[0]}?)"
        message = re.sub(r"hf_\w{9,}", "hf_***", sanitize.printable(" ".join(message.split())))
        if re.search("^unrecognized|has no flag", message):  # perhaps a mistyped --hub_token
            message = re.sub(r"(\S*tok\S*?[= ])\S+", r"\1***", message)
        self.exit(2, f"{self.prog}: error: {message}\n")

    def typed(self, tokens: list[str]) -> frozenset[str]:
        """The names of the flags that these tokens set, as opposed to defaults."""
        untouched = object()  # argparse sets no default for an attribute that exists
        args = argparse.Namespace(**{action.dest: untouched for action in self._actions})
        given = self.parse_args(tokens, args)
        return frozenset(name for name, value in vars(given).items() if value is not untouched)

    def _near(self, name: str) -> list[str]:
        """The flag that `name` abbreviates or misspells."""
        flags = [flag for flag in self._option_string_actions if flag.startswith("--")]
        name = name.replace("-", "_").replace("__", "--", 1)
        begun = [flag for flag in flags if flag.startswith(name) and len(name) > 3]
        return begun or difflib.get_close_matches(name, flags, 1)


def make_parser(docstring: str) -> argparse.ArgumentParser:
    """A parser whose description is the script's own docstring, with the `--config` flag already on it."""
    # No abbreviations: a flag added later could change their meaning.
    parser = _Parser(usage="%(prog)s FLAGS", description=docstring, formatter_class=_Formatter, allow_abbrev=False)
    parser.add_argument("--config", metavar="YAML", help="File with defaults for any flag; the command line wins.")
    return parser
