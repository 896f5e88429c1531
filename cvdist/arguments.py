"""Command lines and YAML files to the dataclasses of config.py, by jsonargparse; what is wrong with them in one line."""

from __future__ import annotations

import dataclasses
import difflib
import re
from typing import Any, TypeVar, get_type_hints

from jsonargparse import ArgumentError, ArgumentParser, set_parsing_settings

from cvdist.config import AugmentConfig, from_dict
from cvdist.errors import ConfigError

T = TypeVar("T")


def parse(kind: type[T], argv: list[str], *, prog: str, positional: tuple[str, ...] = ()) -> T:
    """Parses a command line, and the YAML file that --config names, into a dataclass of config.py.

    Args:
        kind: The dataclass.
        argv: Arguments without the program's name.
        prog: The program's name in its help.
        positional: Fields that are given by position instead of by option.

    Raises:
        ConfigError: An argument is unknown (the nearest known one is named), missing, or of the wrong type.
        SystemExit: --help or --print_config was asked for.
    """
    set_parsing_settings(import_path_denylist=["*"])  # it would import what a `class_path` in YAML names
    description = (kind.__doc__ or "").split("\n")[0]
    parser = ArgumentParser(prog=prog, exit_on_error=False, allow_abbrev=False, description=description)
    parser.add_argument("--config", action="config", help="YAML file of settings; options after it win.")
    for name in positional:
        parser.add_argument(name, type=str)
    parser.add_class_arguments(kind, None, skip=set(positional))
    try:
        settings = parser.parse_args(complete_switches(kind, argv)).as_dict()
    except (ArgumentError, ImportError) as error:
        raise ConfigError(explain(str(error), parser)) from None
    require_groups(kind, settings)
    return from_dict(kind, {name: settings[name] for name in get_type_hints(kind)}, "the command line")


def complete_switches(kind: type, argv: list[str]) -> list[str]:
    """Lets a bare switch such as --resume mean --resume true; what follows it is another option, or a URL."""
    switches = {f"--{name}" for name, hint in get_type_hints(kind).items() if hint is bool}
    switches |= {f"--augment.{name}" for name, hint in get_type_hints(AugmentConfig).items() if hint is bool}
    following = [*argv[1:], "--"][: len(argv)]
    return [
        f"{arg}=true" if arg in switches and (after.startswith("-") or "://" in after) else arg
        for arg, after in zip(argv, following, strict=True)
    ]


def require_groups(kind: type, settings: dict[str, Any]) -> None:
    """Raises ConfigError for a single value where a group of settings belongs, as `optim: 3` in YAML."""
    for name, hint in get_type_hints(kind).items():
        if dataclasses.is_dataclass(hint) and not isinstance(settings[name], dict):
            members = [field.name for field in dataclasses.fields(hint)]
            raise ConfigError(
                f"{name}: {settings[name]!r} is no group of settings; expected settings such as {name}.{members[0]};"
                f" use one or more of {', '.join(members)}"
            )


TYPE_WORDS = {
    "<class 'int'>": "a whole number",
    "<class 'float'>": "a number",
    "<class 'bool'>": "true or false",
    "<class 'str'>": "text",
    "<class 'NoneType'>": "null",
}


def explain(message: str, parser: ArgumentParser) -> str:
    """Turns a message of the parser into one line: what was found, what was expected, how to fix it."""
    line = " ".join(message.split())
    if code := re.search(r"Importing '([^']*)' is not allowed", line):
        return f"class_path: {code.group(1)!r} names code; expected settings, because nothing that is read is run; remove it"
    unknown = re.search(r"[Uu]nrecognized arguments: --?([\w.]+)|Option '([\w.]+)' is not accepted", line)
    nested = re.search(r"Group '([\w.]+)' does not accept option '([\w.]+)'", line)
    if unknown or nested:
        known = [option[2:] for option in parser._option_string_actions if option.startswith("--")]
        found = ".".join(nested.groups()) if nested else next(group for group in unknown.groups() if group)  # type: ignore[union-attr]
        close = difflib.get_close_matches(found, known, n=1, cutoff=0.5)
        return f"{found}: no such setting; {f'did you mean {close[0]}?' if close else 'run with --help for the list'}"
    if stray := re.search(r"[Uu]nrecognized arguments: (.*)", line):
        return f"{stray.group(1)}: not expected here; expected --NAME VALUE pairs; run with --help for the list"
    if bare := re.search(r"argument --([\w.]+): expected one argument", line):
        return f"{bare.group(1)}: has no value; expected one; add --{bare.group(1)} VALUE"
    if missing := re.search(r"arguments are required: (.*)", line):
        names = [name.strip(" -") for name in missing.group(1).split(",")]
        by_position = {action.dest for action in parser._actions if not action.option_strings}
        fix = " ".join(name.upper() if name in by_position else f"--{name} VALUE" for name in names)
        return f"not given: {', '.join(names)}; expected a value for each; add {fix}"
    if wrong := re.search(r'[Pp]arser key "([\w.]+)": (.*)', line):
        kinds = re.findall(r"Expected a (<class '\w+'>|typing\.Literal\[[^]]*\])", wrong.group(2))
        value = re.search(r"(?:Got|Given) value: ?(.*)", wrong.group(2))
        if not kinds or not value:
            return f"{wrong.group(1)}: {wrong.group(2)}; expected what --help lists; correct the value"
        words = [TYPE_WORDS.get(kind) or "one of " + kind[15:-1].replace("'", "") for kind in kinds]
        return f"{wrong.group(1)}: {value.group(1)!r} does not fit; expected {' or '.join(words)}; correct the value"
    return f"{line}; expected --NAME VALUE pairs, or a YAML file of NAME: VALUE lines; run with --help for the list"
