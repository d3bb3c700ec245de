"""Flags and YAML files that fill a dataclass, by jsonargparse."""

from __future__ import annotations

from argparse import RawDescriptionHelpFormatter
from dataclasses import fields
from typing import Any, TypeVar, cast

from jsonargparse import ActionConfigFile, ArgumentParser, DefaultHelpFormatter, set_parsing_settings

from lad_kernels.preflight import complain

T = TypeVar("T")
set_parsing_settings(unset_sentinel=True)  # null in a file is checked like any other value


class HelpFormatter(DefaultHelpFormatter, RawDescriptionHelpFormatter):
    """Shows types and defaults of flags, and descriptions unwrapped."""


class FlagParser(ArgumentParser):
    """`hidden_size` and `hidden-size` are one flag, and one key of a file; an error is one line."""

    def error(self, message, ex=None):
        raise SystemExit(complain(self.prog, f"{message}; see {self.prog} --help", 2)) from ex

    def add_argument(self, *names, **options):
        return super().add_argument(*names, *(name.replace("_", "-") for name in names if "_" in name), **options)


def parse_flags(
    kind: type[T],
    arguments: list[str] | None,
    program: str,
    description: str,
    *,
    defaults: dict[str, Any] | None = None,
    special: dict[str, dict[str, Any]] | None = None,
) -> T:
    """Make a dataclass from flags and `--config FILE.yaml`; what comes later on the command line wins.

    Args:
        kind: a dataclass whose fields all have defaults; every field is a flag, and a key of the file.
        arguments: flags and values; None: those of the process.
        program, description: for the help.
        defaults: replace those of `kind`.
        special: options of `add_argument` by field, for fields whose type does not say everything.

    Raises:
        SystemExit: status 2, after a line on stderr, for a file that is missing or no mapping, an unknown flag or
            key, and a value of the wrong type or that `kind` refuses with a ValueError.
    """
    parser = FlagParser(
        program,
        description=description,
        formatter_class=HelpFormatter,
        print_config="--print-config",
        allow_abbrev=False,
    )
    parser.add_argument("--config", action=ActionConfigFile, help="a YAML file with values of flags")
    special = special or {}
    for name, options in special.items():
        parser.add_argument(f"--{name}", **options)
    parser.add_class_arguments(kind, as_group=False, skip=set(special))
    parser.set_defaults(defaults or {})
    given = parser.parse_args(arguments)
    try:
        return kind(**{field.name: given[field.name] for field in fields(cast(Any, kind))})
    except ValueError as error:
        raise SystemExit(complain(program, f"--{error}", 2)) from error
