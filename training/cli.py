"""The command line: YAML files and dotted options onto the configuration, one line for every error."""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from jsonargparse import ArgumentParser, Namespace

from training import commands
from training.config import Config
from training.errors import InputError

PROGRAM = "python -m training"
CONFIGS = Path(__file__).parent / "configs"
COMMANDS: dict[str, Callable[[Config], Any]] = {
    "fit": commands.fit,
    "evaluate": commands.evaluate,
    "predict": commands.predict,
    "demo": commands.demo,
}


class Parser(ArgumentParser):
    """jsonargparse's parser; its errors take one line, without the usage text."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        print(f"{PROGRAM}: error: {' '.join(message.split())}", file=sys.stderr)
        sys.exit(2)


def make_parser() -> Parser:
    """The parser of all subcommands; each takes the whole configuration."""
    parser = Parser(prog=PROGRAM, description="Train, evaluate and draw the forecasters of fastsam.")
    subcommands = parser.add_subcommands(dest="command", required=True)
    for name, command in COMMANDS.items():
        defaults = [str(CONFIGS / "demo.yaml")] if name == "demo" else []
        subparser = Parser(description=command.__doc__, default_config_files=defaults)
        subparser.add_argument("--config", action="config", help="YAML file of settings; options after it override it")
        subparser.add_class_arguments(Config)
        subcommands.add_subcommand(name, subparser, help=command.__doc__)
    return parser


def read_config(parser: Parser, arguments: Sequence[str] | None) -> tuple[str, Config]:
    """The subcommand and its configuration.

    Raises:
        InputError: if the settings contradict each other.
    """
    parsed: Namespace = parser.parse_args(arguments)
    sections = parser.instantiate(parsed)[parsed.command]
    config = Config(**{name: sections[name] for name in Config.__dataclass_fields__})
    return parsed.command, config.plain()


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a subcommand. Returns the exit status: 0, or 2 after one line that says what was wrong with the input."""
    try:
        command, config = read_config(make_parser(), arguments)
        COMMANDS[command](config)
    except InputError as error:
        print(f"{PROGRAM}: error: {error}", file=sys.stderr)
        return 2
    return 0
