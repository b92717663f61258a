"""What the command-line programs share: flags and configs, and mistakes as one line with exit code 2.

A program is a module with `main(settings) -> int`. Its flags live in an object of their own, made when it runs, so
importing a program defines nothing and reads nothing.
"""

import dataclasses
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from absl import flags
from ml_collections import ConfigDict, config_flags

from kvjax.errors import UserError, unknown
from kvjax.folder import ROOT, find_file


@dataclasses.dataclass(frozen=True)
class Settings:
    """What a program was asked to do.

    Attributes:
      config: the run's config, locked, overrides applied; empty for a program without one.
      flags: the program's flags by name.
      words: what stood on the command line beside flags.
    """

    config: ConfigDict
    flags: flags.FlagValues
    words: tuple[str, ...]


def run(
    main: Callable[[Settings], int],
    *,
    usage: str,
    define_flags: Callable[[flags.FlagValues], None],
    default_config: str | None = None,
    allows_words: bool = False,
    argv: Sequence[str] | None = None,
) -> int:
    """Parses flags, runs a program and returns its exit code.

    Args:
      main: the program.
      usage: what `--help` prints before the flags.
      define_flags: defines the program's own flags on the object that it is given.
      default_config: path of a config relative to the project's root; None for a program without a config.
      allows_words: whether words beside flags are taken.
      argv: the command line, program name first; None for the process's own.

    Returns:
      0 if all went well, 2 after a mistake in the input, 130 after an interrupt.
    """
    argv = list(sys.argv if argv is None else argv)
    try:
        settings = _parse(argv, usage, define_flags, default_config)
        if settings is None:
            return 0
        if settings.words and not allows_words:
            raise UserError(f"Unexpected argument '{settings.words[0]}': every option is written --name=value.")
        return main(settings)
    except UserError as error:
        return _fail(str(error))
    except BrokenPipeError:  # whoever read the output has gone, e.g. `head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except OSError as error:
        return _fail(f"{error.strerror or error}: {error.filename}" if error.filename else str(error))
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def _fail(message: str) -> int:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    return 2


def _parse(argv: list[str], usage: str, define_flags: Callable, default_config: str | None) -> Settings | None:
    """Reads the command line; prints the help text and returns None where that was asked for."""
    values = flags.FlagValues()
    flags.DEFINE_bool("help", False, "Print this text.", flag_values=values, short_name="h")
    define_flags(values)
    if {"--help", "-h"} & set(argv):
        print(f"{usage.strip()}\n\n{_flags_help(values, default_config)}")
        return None
    if default_config is not None:
        argv = _define_config(values, argv, default_config)
    try:
        words = tuple(values([_with_underscores(values, word) for word in argv])[1:])
    except flags.Error as error:
        raise UserError(f"{error}. Try --help.") from error
    config = ConfigDict() if default_config is None else values["config"].value
    return Settings(config, values, words)


def _with_underscores(values: flags.FlagValues, word: str) -> str:
    """A flag that is spelled with dashes, --bytes-per-token, as it is defined, --bytes_per_token."""
    name, *value = word.removeprefix("--").split("=", 1)
    plain = name.replace("-", "_")
    return "=".join([f"--{plain}", *value]) if word.startswith("--") and plain in values else word


def _flags_help(values: flags.FlagValues, default_config: str | None) -> str:
    """One line a flag."""
    lines = ["Flags:", "  --help: Print this text."]
    if default_config is not None:
        lines.append(f"  --config: File with the run's settings ({default_config}); --config.NAME=VALUE changes one.")
    for name in sorted(values):
        flag = values[name]
        if name not in ("help", "h"):
            spelling = f"[no]{name}" if flag.boolean else name
            default = "" if flag.default in (None, False) else f" (default: {flag.default})"
            lines.append(f"  --{spelling}: {flag.help}{default}")
    return "\n".join(lines)


def _define_config(values: flags.FlagValues, argv: list[str], default: str) -> list[str]:
    """Defines --config; its file is loaded once without overrides, so that a wrong name is found here."""
    given, rest = _take_config_argument(argv)
    path = find_file(given or default, "config")
    known = _load_config(path)
    missing = sorted(set(_load_config(ROOT / default)) - set(known)) if given else []
    if missing:
        raise UserError(f"The config {path} is not for this program: it lacks {', '.join(missing)}; see {default}.")
    for argument in rest:
        if override := re.match(r"--(?:no)?config\.([\w.\[\]]+)", argument):
            _check_field(known, override.group(1))
    try:
        config_flags.DEFINE_config_file("config", str(path), flag_values=values, sys_argv=rest, lock_config=True)
    except (flags.Error, TypeError, ValueError) as error:
        raise UserError(f"A value for the config {path} does not fit: {error}") from error
    return rest


def _load_config(path: Path) -> ConfigDict:
    """What `get_config()` of a file returns."""
    if path.is_dir():
        raise UserError(f"The config {path} is a folder; give a Python file with get_config().")
    scratch = flags.FlagValues()
    try:
        config_flags.DEFINE_config_file("config", str(path), flag_values=scratch, sys_argv=["kvjax"])
        scratch(["kvjax"])
        config = scratch["config"].value
    except Exception as error:  # whatever the file's own code raises
        raise UserError(f"The config {path} does not load: {str(error).strip().splitlines()[-1]}") from error
    if not isinstance(config, ConfigDict):
        raise UserError(f"The config {path}: get_config() must return a ConfigDict, not {type(config).__name__}.")
    return config


def _take_config_argument(argv: list[str]) -> tuple[str | None, list[str]]:
    """Splits `--config=FILE` or `--config FILE` off the command line."""
    given, rest, skip = None, [], False
    for index, argument in enumerate(argv):
        if skip:
            skip = False
        elif argument.startswith("--config="):
            given = argument.removeprefix("--config=")
        elif argument == "--config" and index + 1 < len(argv):
            given, skip = argv[index + 1], True
        else:
            rest.append(argument)
    return given, rest


def _check_field(config: ConfigDict, dotted: str) -> None:
    """Refuses an override of a field that the config does not have."""
    parent, seen = config, []
    for name in dotted.split("."):
        seen.append(name)
        if not isinstance(parent, ConfigDict) or name not in parent:
            names = parent.keys() if isinstance(parent, ConfigDict) else ()
            prefix = "".join(f"{part}." for part in seen[:-1])
            raise unknown("config field", prefix + name, [prefix + known for known in names])
        parent = parent.get_ref(name).get() if name in parent else None
