"""What every command of this project shares: exit statuses, one-line refusals, typed recipes."""

from __future__ import annotations

import dataclasses
import difflib
import itertools
import os
import re
import socket
import sys
import traceback
import urllib.parse
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import yaml
from jsonargparse import ArgumentParser, Namespace

EXIT_FINISHED = 0
EXIT_FAILED = 1
EXIT_BAD_CONFIG = 2
EXIT_STOPPED = 85  # stopped on request, a checkpoint is saved: a scheduler should requeue


class ConfigError(ValueError):
    """What the user asked for cannot be done: names the value, the rule and the remedy."""


class RunError(RuntimeError):
    """The configuration is fine, the world is not: damaged data, a non-finite loss, a lost rank."""


class ElsewhereError(RuntimeError):
    """Another rank failed and says why; this one only leaves, with the same status."""

    def __init__(self, status: int) -> None:
        super().__init__(f"another rank failed with status {status}")
        self.status = status


def run_command(
    main: Callable[[], int], *, rank: int = 0, leave: Callable[[int], object] = os._exit
) -> NoReturn:
    """Run `main` and end the process with the project's exit status.

    Refusals and failures print one line on stderr; only bugs print a traceback. Every rank finds
    the same fault in a recipe, so only rank 0 speaks of it.

    Args:
        main: the command; returns its exit status.
        rank: of this process.
        leave: how a failed process ends. By default at once, because a collective that other ranks
            still wait in must not keep it alive.
    """
    try:
        status = main()
    except ConfigError as error:
        status = EXIT_BAD_CONFIG
        if rank == 0:
            print(f"error: {one_line(error)}", file=sys.stderr)
    except RunError as error:
        status = EXIT_FAILED
        print(f"error: {one_line(error)}", file=sys.stderr)
    except ElsewhereError as error:
        status = error.status
    except KeyboardInterrupt:
        status = EXIT_FAILED
        if rank == 0:
            print("error: interrupted", file=sys.stderr)
    except SystemExit as request:  # --help and --print_config
        status = request.code if isinstance(request.code, int) else EXIT_FAILED
    except BaseException:
        status = EXIT_FAILED
        print_traceback()
    sys.stdout.flush()
    sys.stderr.flush()
    if status == EXIT_FINISHED:
        sys.exit(status)
    leave(status)
    raise AssertionError("unreachable: `leave` ends the process")


def print_traceback() -> None:
    """The current exception's traceback on stderr, in one piece.

    Line by line, a launcher that ends the ranks at the first sign of trouble may pass on the first
    line alone.
    """
    sys.stderr.write(traceback.format_exc())
    sys.stderr.flush()


def one_line(error: object) -> str:
    """The message with its line breaks folded, so that it stays one line of a log."""
    return re.sub(r"\s*\n\s*", " ", str(error)).strip()


def skip_unreachable_hub(*sources: str | None) -> None:
    """Where a source is no folder and the hub's name does not resolve, use cached files only.

    Call it before transformers is imported: the hub's client would retry for half a minute before
    it says that a misspelt folder is no model.

    Args:
        sources: hub ids or folders that are about to be loaded; None is none.
    """
    wants_hub = any(source and not os.path.isdir(source) for source in sources)
    has_proxy = any(name.lower() in ("https_proxy", "all_proxy") for name in os.environ)
    if not wants_hub or has_proxy or "HF_HUB_OFFLINE" in os.environ:
        return
    host = urllib.parse.urlsplit(os.environ.get("HF_ENDPOINT", "https://huggingface.co")).hostname
    try:
        socket.getaddrinfo(host, 443)
    except OSError:
        os.environ["HF_HUB_OFFLINE"] = "1"


def parse_recipe(
    recipe_type: type,
    argv: Sequence[str] | None,
    *,
    prog: str,
    description: str,
    default_config: str | None = None,
    add_options: Callable[[ArgumentParser], None] = lambda parser: None,
) -> tuple[Any, Namespace]:
    """A recipe from `--config FILE` and dotted overrides, checked against the typed `recipe_type`.

    Args:
        recipe_type: dataclass whose nested dataclasses are the recipe's sections.
        argv: the command line without the program's name; None reads sys.argv.
        prog: how the command is called, for `--help`.
        description: one line for `--help`.
        default_config: the recipe that is read when the command line names none.
        add_options: adds the command's own options, which are not recipe keys.

    Returns:
        The recipe, and the namespace with the command's own options.

    Raises:
        ConfigError: an unknown key, a wrong type, a missing value or a file that cannot be read.
    """
    parser = ArgumentParser(
        prog=prog, description=description, exit_on_error=False, allow_abbrev=False
    )
    parser.add_argument(
        "--config", action="config", help="recipe (YAML); later ones override earlier"
    )
    add_options(parser)
    parser.add_class_arguments(recipe_type, None)
    arguments = list(sys.argv[1:] if argv is None else argv)
    names_recipe = any(a == "--config" or a.startswith("--config=") for a in arguments)
    if default_config is not None and not names_recipe:
        arguments = ["--config", default_config, *arguments]
    for path in _config_paths(arguments):
        _check_readable(path)
    try:
        namespace = parser.parse_args(arguments)
        recipe = parser.instantiate(namespace)
    except (SystemExit, KeyboardInterrupt):
        raise
    except Exception as error:
        raise ConfigError(_explain(parser, one_line(error))) from error
    sections = {
        field.name: getattr(recipe, field.name) for field in dataclasses.fields(recipe_type)
    }
    return recipe_type(**sections), namespace


def _config_paths(arguments: Sequence[str]) -> list[str]:
    named = [a.partition("=")[2] for a in arguments if a.startswith("--config=")]
    return named + [b for a, b in itertools.pairwise(arguments) if a == "--config"]


class _StrictLoader(yaml.SafeLoader):
    """Safe YAML that refuses a key written twice, of which the last would silently win."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """As the base class does, after looking for repeated keys."""
        names = [key.value for key, _ in node.value]
        if twice := sorted({name for name in names if names.count(name) > 1}, key=str):
            raise yaml.constructor.ConstructorError(
                None, None, f"key {twice[0]!r} stands there twice", node.start_mark
            )
        return super().construct_mapping(node, deep)


def _check_readable(path: str) -> None:
    """Name the file where it holds no mapping: the parser's own messages do not."""
    try:
        with open(path, encoding="utf-8") as stream:
            content = yaml.load(stream, Loader=_StrictLoader)
    except OSError as error:
        raise ConfigError(
            f"--config {path} cannot be read ({error.strerror}); name a recipe such as "
            "recipes/demo.yaml"
        ) from error
    except (ValueError, yaml.YAMLError) as error:
        raise ConfigError(f"--config {path} is not YAML ({one_line(error)}); correct it") from error
    if not isinstance(content, dict):
        raise ConfigError(
            f"--config {path} holds no recipe but {type(content).__name__}; see recipes/demo.yaml"
        )


def _explain(parser: ArgumentParser, message: str) -> str:
    """The parser's message with what a reader needs to mend it: the nearest known key."""
    group = re.search(r"Group '([^']+)' does not accept option '([^']+)'", message)
    single = re.search(r"Option '([^']+)' is not accepted", message)
    argument = re.search(r"[Uu]nrecognized arguments: --([^\s=]+)", message)
    if group:
        unknown = f"{group[1]}.{group[2]}"
    elif single:
        unknown = single[1]
    elif argument:
        unknown = argument[1]
    else:
        return re.sub(
            r"Parser key \"([^\"]+)\": Expected a <class '(\w+)'>", r"\1: expected \2", message
        )
    known = [
        action.dest for action in parser._actions if action.dest not in ("help", "print_config")
    ]
    sections = {key.rpartition(".")[0] for key in known}
    known = [key for key in known if key not in sections]
    section = unknown.rpartition(".")[0]
    near = difflib.get_close_matches(unknown, known, n=1, cutoff=0.5)
    siblings = [key for key in known if key.rpartition(".")[0] == section]
    remedy = f"did you mean {near[0]!r}?" if near else f"known keys here: {', '.join(siblings)}"
    return f"unknown key {unknown!r}, refused so that a typo cannot become a default; {remedy}"
