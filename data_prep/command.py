"""What every command of this project shares: exit statuses, one-line refusals, typed recipes."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import itertools
import math
import os
import re
import socket
import sys
import traceback
import typing
import urllib.parse
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import yaml
from jsonargparse import ArgumentParser, Namespace

EXIT_FINISHED = 0
EXIT_FAILED = 1
EXIT_BAD_CONFIG = 2
EXIT_STOPPED = 85  # stopped on request, a checkpoint is saved: a scheduler should requeue
LIKE = 0.7  # share of letters in common from which an unknown key is taken for a misspelt one
SHORTEST_SECRET = 8  # characters of a variable's value; a shorter one may be any word
MAX_VALUES = 100_000  # in a recipe, beyond which its aliases are taken for a mistake


class ConfigError(ValueError):
    """What the user asked for cannot be done: names the value, the rule and the remedy."""


class RunError(RuntimeError):
    """The configuration is fine, the world is not: damaged data, a non-finite loss, a lost rank."""


class ElsewhereError(RuntimeError):
    """Another rank failed and says why; this one only leaves, with the same status."""

    def __init__(self, status: int) -> None:
        super().__init__(f"another rank failed with status {status}")
        self.status = status


class OptionParser(argparse.ArgumentParser):
    """The options of a command that reads no recipe; what is wrong with them is a ConfigError."""

    def error(self, message: str) -> NoReturn:
        """Refuse in one line, in place of the usage and an exit."""
        raise ConfigError(f"{message}; `{self.prog} --help` lists what there is")


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
            print(f"error: {masked(one_line(error))}", file=sys.stderr)
    except RunError as error:
        status = EXIT_FAILED
        print(f"error: {masked(one_line(error))}", file=sys.stderr)
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
    sys.stderr.write(masked(traceback.format_exc()))
    sys.stderr.flush()


def one_line(error: object) -> str:
    """The message with its line breaks folded, so that it stays one line of a log."""
    return re.sub(r"\s*\n\s*", " ", str(error)).strip()


def masked(text: str) -> str:
    """The text without the secrets that this project meets: for logs, and files that are shared.

    These are passwords in URLs, queries of web addresses (in which signatures and tokens stand),
    and the values of environment variables whose names say that they are secret.
    """
    text = re.sub(r"(https?://)[^\s/@'\"]+@", r"\1***@", text)
    text = re.sub(r"(\w://)[^\s/@'\":]*:[^\s/@'\"]+@", r"\1***@", text)
    text = re.sub(r"(https?://[^\s?'\"<>]+\?)[^\s'\"<>]+", r"\1***", text)
    for name, value in os.environ.items():
        if re.search("TOKEN|SECRET|PASSWORD|ACCESS_KEY", name) and len(value) >= SHORTEST_SECRET:
            text = text.replace(value, "***")
    return text


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


_TEXT, _MERGE = "tag:yaml.org,2002:str", "tag:yaml.org,2002:merge"


class _StrictLoader(yaml.SafeLoader):
    """Safe YAML that refuses what has another meaning, or none, once it is written out.

    Of a key written twice the last one would silently win; of aliases a few lines can stand for
    more values than memory holds, or for a value within itself.
    """

    def get_single_node(self) -> yaml.Node | None:
        """As the base class does, after looking at what aliases stand for."""
        node: yaml.Node | None = super().get_single_node()
        if node is not None and _num_values(node, {}) > MAX_VALUES:
            raise yaml.constructor.ConstructorError(
                None, None, f"its aliases stand for more than {MAX_VALUES:,} values, or go round"
            )
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """As the base class does, after looking for repeated keys."""
        names = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        for key, _ in node.value:
            if key.tag not in (_TEXT, _MERGE) or key.value == "":
                raise yaml.constructor.ConstructorError(
                    None, None, f"key {key.value!r} is no text; write it in quotes", key.start_mark
                )
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise yaml.constructor.ConstructorError(
                None, None, f"key {twice[0]!r} stands there twice", node.start_mark
            )
        return super().construct_mapping(node, deep)


def _num_values(node: yaml.Node, known: dict[int, float]) -> float:
    """How many values a node stands for with its aliases written out; infinite in a circle."""
    if id(node) not in known:
        known[id(node)] = math.inf  # where it is met again before it is counted
        parts: list[yaml.Node] = []
        if isinstance(node, yaml.SequenceNode):
            parts = node.value
        elif isinstance(node, yaml.MappingNode):
            parts = [part for pair in node.value for part in pair]
        known[id(node)] = 1 + sum(_num_values(part, known) for part in parts)
    return known[id(node)]


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
    except RecursionError as error:
        raise ConfigError(
            f"--config {path} is not YAML that can be read (it nests too deeply); correct it"
        ) from error
    if not isinstance(content, dict):
        raise ConfigError(
            f"--config {path} holds no recipe but {type(content).__name__}; see recipes/demo.yaml"
        )


def _explain(parser: ArgumentParser, message: str) -> str:
    """The parser's message with what a reader needs to mend it: the nearest known key."""
    message = re.sub(r"Problem with given class_path '[^']+': ", "", message)
    within = re.match(r'Parser key "([^"]+)": Option', message)
    group = re.search(r"Group '([^']+)' does not accept option '([^']+)'", message)
    single = re.search(r"Option '([^']+)' is not accepted", message)
    argument = re.search(r"[Uu]nrecognized arguments: --([^\s=]+)", message)
    if group:
        unknown = f"{group[1]}.{group[2]}"
    elif single:
        unknown = f"{within[1]}.{single[1]}" if within else single[1]
    elif argument:
        unknown = argument[1]
    else:
        typed = r"Parser key \"([^\"]+)\": Expected a <class '(\w+)'>"
        if (mistyped := re.search(typed, message)) is None:
            return message
        examples = {"list": "a list, as [a, b]", "dict": "a mapping, as {a: 1}"}
        remedy = examples.get(mistyped[2], "such a value, as `--help` lists it")
        return re.sub(typed, r"\1: expected \2", message) + f"; write {remedy}"
    known = [
        action.dest for action in parser._actions if action.dest not in ("help", "print_config")
    ]
    sections = {key.rpartition(".")[0] for key in known} - {""}
    section = unknown.rpartition(".")[0]
    keys = [key for key in known if key not in sections]
    if within:  # a list of dataclasses, whose keys are no actions of the parser
        types = {action.dest: getattr(action, "_typehint", None) for action in parser._actions}
        (item,) = typing.get_args(types[within[1]])
        keys = [f"{within[1]}.{field.name}" for field in dataclasses.fields(item)]
    near = _nearest(unknown, keys if section else [*keys, *sections])
    siblings = [key for key in keys if key.rpartition(".")[0] == section] or keys
    remedy = f"did you mean {near!r}?" if near else f"known keys here: {', '.join(siblings)}"
    return f"unknown key {unknown!r}, refused so that a typo cannot become a default; {remedy}"


def _nearest(unknown: str, known: Sequence[str]) -> str | None:
    """The key that was probably meant: alike as a whole, or of a like name in another section."""

    def likeness(key: str) -> float:
        asked = unknown.lower().replace("-", "_")
        names = (asked.rpartition(".")[2], key.rpartition(".")[2])
        whole = difflib.SequenceMatcher(None, asked, key).ratio()
        return max(whole, difflib.SequenceMatcher(None, *names).ratio() - 0.05)

    best = max(sorted(known), key=likeness)
    return best if likeness(best) >= LIKE else None
