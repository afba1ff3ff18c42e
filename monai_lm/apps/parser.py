"""How a command line is read, and what is said of a wrong one: which option, what was expected, what came."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from itertools import takewhile
from pathlib import Path
from types import NoneType
from typing import Any, Literal, NoReturn, get_args, get_origin

import yaml
from jsonargparse import ArgumentParser, Namespace

__all__ = ["Parser", "as_typed"]


class Parser(ArgumentParser):
    """A parser whose command lines need no brackets and no ``true``, and whose errors are a line for people.

    ``--output-dir out`` is ``--output_dir out``, ``--scales=4,2,1`` is ``--scales [4,2,1]``, and a switch that stands
    alone, as ``--overwrite``, is ``--overwrite true``. What is wrong ends with exit code 2 and a sentence that names
    the option as it is typed, or the key and its file (``--config``); options that do not exist, with the nearest ones.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.allow_abbrev = False  # --label would be --label_something as long as there is but one
        self._words: list[str] = []
        self._file: str | None = None  # of options, while it is read

    def parse_args(self, args: Sequence[str] | None = None, *more: Any, **kwargs: Any) -> Namespace:  # type: ignore
        """Read a command line, see :class:`jsonargparse.ArgumentParser`."""
        self._words = [part for word in (sys.argv[1:] if args is None else args) for part in self._parts(word)]
        return super().parse_args(self._written(), *more, **kwargs)

    def parse_path(self, cfg_path: Any, *more: Any, **kwargs: Any) -> Namespace:
        """Read a file of options, see :class:`jsonargparse.ArgumentParser`."""
        self._file = str(cfg_path)
        try:
            return super().parse_path(cfg_path, *more, **kwargs)
        finally:
            self._file = None

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:  # noqa: ARG002 (jsonargparse's)
        """End with what is wrong."""
        self.exit(2, f"{self.prog.removeprefix('python -m ').split()[0]}: {self._said(message)}\n")

    def _parts(self, word: str) -> list[str]:
        """An option and its value as words of their own, the option with underscores."""
        name, equals, value = word.partition("=")
        option = name if name in self._option_string_actions else f"--{name[2:].replace('-', '_')}"
        if not name.startswith("--") or self._kind(option) is None:
            return [word]
        if value.startswith("-"):  # it would be an option
            return [f"{option}={value}"]
        return [option, value] if equals else [option]

    def _written(self) -> list[str]:
        """The words as jsonargparse takes them."""
        out = []
        for before, word, after in zip(["", *self._words], self._words, [*self._words[1:], "--"], strict=False):
            out.append(f"[{word}]" if _wants_brackets(self._kind(before), word) else word)
            if self._kind(word) is bool and after.startswith("-"):
                out.append("true")
        return out

    def _kind(self, option: str) -> Any:
        """The type of an option's values; ``None`` for what is none of the options of a command."""
        return getattr(self._option_string_actions.get(option), "_typehint", None)

    def _commands(self) -> dict[str, Parser]:
        """The parsers of the commands, by their names."""
        return {} if self._subparsers is None else dict(self._subparsers._group_actions[0].choices or {})

    def _of(self, keys: Sequence[str] = ()) -> Parser:
        """Whose options these are: those of the command that was called, else of one that has them."""
        commands = self._commands()
        for word in [*self._words, *(key.partition(".")[0] for key in keys)]:
            if word in commands:
                return commands[word]
        options = [f"--{key.rpartition('.')[2]}" for key in keys]
        return next((p for p in commands.values() if any(p._kind(option) is not None for option in options)), self)

    def _said(self, message: str) -> str:
        """What is said in place of a message of jsonargparse's or argparse's."""
        if found := re.match(r"unrecognized arguments: (\S+)", message):
            return self._unknown(found[1]) if found[1].startswith("-") else self._astray(found[1])
        if found := re.search(r"invalid choice: '?([^' ]*)'? \(choose", message):
            return self._no_command(found[1])
        if message.startswith('expected "subcommand"'):
            return f"a command must come first, one of {_joined(self._commands(), 'or')}; see {self.prog} --help"
        if found := re.match(r"argument (\S+): expected", message):
            after = [after for word, after in self._pairs() if word == found[1] and after[:1] in ("", "-")]
            return f"{found[1]} must be followed by a value, got {after[0] if after and after[0] else 'none'}"
        if found := re.match(r"the following arguments are required: (.*)", message):
            owner = self._of(keys := found[1].split(", "))
            missing = _joined([f"--{key.rpartition('.')[2]}" for key in keys], "and")
            return f"{missing} must be given; see {owner._name()} --help"
        if found := re.search(r"[Oo]ption '([^']+)'", message):
            return self._unknown(found[1])
        if (found := re.match(r'Parser key "([^"]+)"', message)) and found[1] != "config":
            return self._wrong(found[1])
        return self._no_file(message)

    def _unknown(self, option: str) -> str:
        """Of an option that does not exist."""
        owner, typed = self._of([option]), option.startswith("-")
        key = option.partition("=")[0]
        known = [name for name in owner._option_string_actions if name.startswith("--")]
        nearest = _nearest(key.lstrip("-").replace("-", "_").rpartition(".")[2], [name[2:] for name in known])
        place = "" if typed else f" in {' or '.join(self._sources())}"
        hint = _joined([f"--{name}" if typed else name for name in nearest], "or") if nearest else None
        end = f", did you mean {hint}?" if hint else f"; see {owner._name()} --help"
        return f"{key}{place} is no option of {owner._name()}{end}"

    def _astray(self, word: str) -> str:
        """Of a word that belongs to no option."""
        before = self._words[: self._words.index(word)]
        options = [other for other in before if other.startswith("--")]
        if not options:
            return f"{word!r} must come after an option, as --name {word}; see {self._name()} --help"
        values = [*takewhile(lambda other: not other.startswith("--"), self._words[before.index(options[-1]) + 1 :])]
        listed = f"{options[-1]} {','.join(value.strip(',') for value in values)}"
        how = listed if _lists(self._kind(options[-1])) else "quoted if need be"
        return f"{options[-1]} must be one word, {how}, got {' '.join(values)}"

    def _no_command(self, word: str) -> str:
        """Of a word where the command should be."""
        if early := [w for w in self._words[: self._words.index(word)] if w.startswith("-") and w != "--config"]:
            return f"{early[0]} must come after a command, as {self.prog} refine {early[0]}; see {self.prog} --help"
        commands = self._commands()
        nearest = get_close_matches(word, [*commands, *self._option_string_actions], 1)
        hint = f", did you mean {nearest[0]}?" if nearest else f"; there are {_joined(commands, 'and')}"
        return f"{word!r} is no command of {self.prog}{hint}"

    def _wrong(self, key: str) -> str:
        """Of a value that is none of an option's."""
        option = f"--{key.rpartition('.')[2]}"
        owner = self if self._kind(option) is not None else self._of([key])
        typed = [value for word, value in owner._pairs() if word == option]
        if self._file is None and typed:
            return f"{option} must be {_expected(owner._kind(option))}, got {typed[-1]!r}"
        for source in self._sources():
            for name in (key, f"{owner._name().split()[-1]}.{key}"):
                if (value := _stored(source, name)) is not None:
                    return f"{name} in {source} must be {_expected(owner._kind(option))}, got {value!r}"
        return f"{option} must be {_expected(owner._kind(option))}"

    def _no_file(self, message: str) -> str:
        """Of a file of options that cannot be read; any other message, in a line."""
        noise = r'Parser key "\w+":|in "<unicode string>",|Problems parsing config:|Unexpected config:'
        text = " ".join(re.sub(noise, "", message).split())
        if not (sources := self._sources()):
            return text
        reason = f": {text}" if Path(sources[-1]).is_file() else ", which is no file"
        return f"--config must be a YAML file of names and values of options, got {sources[-1]}{reason}"

    def _sources(self) -> list[str]:
        """The file of options that is read, or those that the words name."""
        named = [after for word, after in [*self._pairs(), *self._of()._pairs()] if word == "--config"]
        return list(dict.fromkeys(named)) if self._file is None else [self._file]

    def _pairs(self) -> list[tuple[str, str]]:
        """The words, each with the one after it, and options with what they have after an equals sign."""
        out = []
        for word, after in zip(self._words, [*self._words[1:], ""], strict=False):
            name, equals, value = word.partition("=")
            out.append((name, value) if equals and self._kind(name) is not None else (word, after))
        return out

    def _name(self) -> str:
        """Program and command."""
        return self.prog.replace(" [options]", "")


def as_typed(message: str, options: Iterable[str]) -> str:
    """A message about arguments of functions as one about options: ``step must be …`` as ``--step must be …``.

    Only names with an underscore are looked for everywhere; the others are words, too.

    Args:
        message: names arguments, of the house's form: ``NAME must …``, ``… together with NAME``.
        options: names of the options that there are.
    """
    names = {name: name for name in options}
    for name in ("mask", "lesion"):
        if f"fixed_{name}" in names:
            names.setdefault(name, f"fixed_{name}")
    if not names:
        return message
    one = "|".join(sorted(map(re.escape, names), key=len, reverse=True))
    listed = rf"(?:{one})(?:(?:, | and | or )(?:{one}))*"

    def dashed(found: re.Match[str]) -> str:
        return re.sub(rf"\b(?:{one})\b", lambda name: f"--{names[name[0]]}", found[0])

    places = (
        rf"\A{listed}(?= (?:must|needs|cannot|has) )", rf"(?<=: ){listed}(?= (?:needs|cannot) )",
        rf"(?<=together with ){listed}\b", rf"(?<= needs ){listed}\b",
    )  # fmt: skip
    message = re.sub("|".join(places), dashed, message)
    long = "|".join(sorted((name for name in names if "_" in name), key=len, reverse=True))
    return re.sub(rf"(?<![\w./\\'\"=-])(?:{long})(?![\w/\\'\"=(-]|\.\w)", dashed, message) if long else message


def _stored(source: str, key: str) -> Any:
    """The value of a key in a file of options, or in a text of them; ``None`` where it is not there."""
    value = yaml.safe_load(Path(source).read_text() if Path(source).is_file() else source)
    for name in key.split("."):
        value = value.get(name) if isinstance(value, dict) else None
    return value


def _expected(kind: Any) -> str:
    """What the values of a type are called."""
    lists, single = _lists(kind), [m for m in _members(kind) if m not in (NoneType, str, *_lists(kind))]
    phrases = [_one(member) for member in single]
    for element in (get_args(one)[0] for one in lists):
        if element in single:
            phrases[single.index(element)] += ", or several of them separated by commas"
        else:
            plural = "texts" if element is str else _one(element).replace("a ", "", 1).replace("number", "numbers")
            phrases.insert(0, f"{plural}, separated by commas")
    return ", or ".join(phrases) or "text"


def _one(kind: Any) -> str:
    """What a value of a type is called that is neither a union nor a list."""
    if get_origin(kind) is Literal:
        return _joined(map(str, get_args(kind)), "or")
    if kind is bool:
        return "true or false"
    number = "a whole number" if issubclass(kind, int) else "a number"
    bounds = dict(re.findall(r"v([<>]=?)(\S+)", getattr(kind, "_expression", "")))
    if len(bounds) == 2:
        return f"{number} from {bounds['>=']} to {bounds['<=']}"
    signs = {">": "greater than", ">=": "of at least"}
    return " ".join([number, *(f"{signs[sign]} {float(bound):g}" for sign, bound in bounds.items())])


def _members(kind: Any) -> tuple[Any, ...]:
    """The types of a union, or the type."""
    return get_args(kind) if get_args(kind) and get_origin(kind) not in (list, tuple, Literal) else (kind,)


def _lists(kind: Any) -> list[Any]:
    """The lists among the types of an option."""
    return [member for member in _members(kind) if get_origin(member) in (list, tuple)]


def _wants_brackets(kind: Any, word: str) -> bool:
    """Whether a value is a list that is written without brackets."""
    if not _lists(kind) or word[:1] in ("[", "-") or word == "null":
        return False
    single = [member for member in _members(kind) if member not in (NoneType, *_lists(kind))]
    numbers = [member for member in single if isinstance(member, type) and issubclass(member, int | float)]
    return "," in word or not single or bool(not numbers and re.fullmatch(r"[\d.]+", word))


def _nearest(name: str, known: Sequence[str]) -> list[str]:
    """The names that one may have meant, the likeliest first."""
    if surely := get_close_matches(name, known, 1, 0.85):
        return surely
    parts = [other for other in known if other.startswith(name) or name in other.split("_")]
    return list(dict.fromkeys([*get_close_matches(name, known, 3, 0.65), *parts]))[:3]


def _joined(words: Iterable[str], last: str) -> str:
    """Words as a phrase: ``a, b or c``."""
    *most, end = words
    return f"{', '.join(most)} {last} {end}" if most else end
