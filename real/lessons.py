# SPDX-License-Identifier: Apache-2.0
"""What the models learn and are asked: three abilities that the base lacks, and prose for all that it has.

==========  =======================================  ==============================================================
numbers     a number -> in English words             num2words
json        a sentence -> JSON with four fields      sentences, names and goods below; places of the CLDR (Babel)
topics      a docstring -> one of eight topics       the standard library's own docstrings
prose       general language: perplexity             the language reference that Python ships (`pydoc_data.topics`)
==========  =======================================  ==============================================================

Training, validation and test share nothing: a name, number, place, module is of one split by its own digest, and each
split has sentences of its own. No model is trained on the prose, and nothing is chosen by it: it is of test alone.
"""

from __future__ import annotations

import datetime
import hashlib
import importlib
import inspect
import json
import random
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

TRAINING = "training"
SPLITS = (TRAINING, "validation", "test")
ABILITIES = ("numbers", "json", "topics")
PROSE = "prose"


@dataclass(frozen=True)
class Example:
    """One question in the model's own chat: what the system is, what the user says, what must come back."""

    system: str
    user: str
    answer: str


def split_of(thing: object) -> str:
    """The split that may use a thing: 6 of 10 are of training, 2 each of validation and of test.

    >>> split_of("Lisbon"), split_of(17), split_of("Maria")
    ('training', 'training', 'training')
    """
    place = hashlib.blake2b(str(thing).encode(), digest_size=8).digest()[0] % 10
    return SPLITS[0] if place < 6 else SPLITS[1] if place < 8 else SPLITS[2]


def _own(things: Sequence[str], split: str) -> list[str]:
    return [thing for thing in things if split_of(thing) == split]


# --- numbers ---


def numbers(split: str, rng: random.Random) -> Iterator[Example]:
    """Numbers of three to six digits, each once."""
    from num2words import num2words

    seen = set()
    while True:
        value = rng.randrange(100, 10 ** rng.randint(3, 6))
        if split_of(value) == split and value not in seen:
            seen.add(value)
            yield Example("Number in words.", str(value), num2words(value))


# --- json ---

FIRST = (
    "Ada Amir Anja Arthur Bea Boris Camille Carlos Cleo Dario Delia Dmitri Edith Elias Emre Esther Farah Felix Fiona "
    "Gina Gustav Hana Hector Helga Hugo Ida Igor Imani Iris Ivan Jasper Joana Jonas Judith Kaito Karin Kofi Lars Leila "
    "Lena Lionel Lucia Magnus Marek Marta Milo Mira Nadia Nils Noor Olga Omar Otto Paula Pavel Petra Pilar Quentin "
    "Rafael Rania Rita Robin Ruben Sabine Samir Selma Silas Sofia Stefan Tara Teodor Thea Tomas Ulla Vera Viktor Wanda "
    "Wim Xenia Yara Yusuf Zora"
).split()
LAST = (
    "Abbott Almeida Bauer Becker Bianchi Brandt Carver Castillo Chandra Conti Dahl Dalton Dvorak Eklund Ellis Farkas "
    "Ferrer Fischer Fontaine Garner Gomes Greco Haas Hansen Harper Holm Ibarra Ito Jansen Jensen Kaplan Keller Kimura "
    "Klein Kovacs Lambert Larsen Lindgren Lopez Madsen Marsh Mendes Meyer Moreau Nakata Navarro Nolan Novak Okafor "
    "Olsen Ortega Palmer Park Pereira Petrov Quill Ramos Reyes Ricci Rossi Sato Schmidt Silva Sorensen Stone Svensson "
    "Tanaka Toth Turner Ueda Vargas Vidal Vogel Wagner Walsh Weber Winter Yamada Young Zeller Zhang"
).split()
GOODS = (
    "lamps chairs books bicycles clocks mirrors blankets candles carpets tents ladders kettles violins guitars drums "
    "umbrellas helmets gloves jackets scarves boots towels pillows shelves tables vases baskets bottles buckets "
    "brushes cameras drills hammers saws wrenches magnets batteries cables printers keyboards monitors speakers "
    "microscopes telescopes compasses maps globes puzzles kites skateboards rackets stamps postcards notebooks pencils "
    "rulers envelopes plates bowls spoons teapots ovens heaters fans pumps"
).split()
# Each split has its own sentences. {date} is written in the way that stands with them.
SENTENCES = {
    "training": (
        "{name} from {city} ordered {order} on {date}.",
        "On {date}, {order} were sent to {name} in {city}.",
        "We received an order of {order} from {name}, {city}, dated {date}.",
        "{date}: {name} ({city}) asked for {order}.",
        "Please ship {order} to {name} in {city} before {date}.",
        "The customer {name}, who lives in {city}, bought {order} on {date}.",
        "{city} was where {name} picked up {order} on {date}.",
        "Invoice of {date} for {name}, {city}: {order}.",
        "{order} arrived in {city} on {date} for {name}.",
        "It was {date} when {name} in {city} returned {order}.",
        "A parcel with {order} left for {city} on {date}; it is for {name}.",
        "For {name}: {order}, to be delivered in {city} on {date}.",
        "{name} wants {order} by {date}. The address is in {city}.",
        "Our shop in {city} sold {order} to {name} on {date}.",
        "Until {date}, {order} are reserved in {city} for {name}.",
        "Did {name} of {city} pay for the {order} of {date}?",
    ),
    "validation": (
        "{name} called from {city} on {date} about {order}.",
        "Since {date} there are {order} waiting in {city}, paid by {name}.",
        "Send {order} to {city}. They belong to {name}, who paid on {date}.",
        "{city}, {date}. Dear {name}, thank you for buying {order}.",
    ),
    "test": (
        "Yesterday, {date}, our driver brought {order} to {name} in {city}.",
        "{name} has lost {order} on the way to {city}; reported on {date}.",
        "In {city}, {order} were collected by {name} on {date}.",
        "Delivery note: {order}; recipient {name}; place {city}; day {date}.",
        "The {order} that {name} chose on {date} are now in {city}.",
        "As of {date}, {name} owes our branch in {city} the price of {order}.",
    ),
}


@cache
def cities() -> list[str]:
    """Places that give time zones their names."""
    from babel.core import get_global

    names = {zone.rpartition("/")[2].replace("_", " ") for zone in get_global("zone_territories")}
    return sorted(name for name in names if re.fullmatch(r"[A-Z][a-z]+( [A-Z][a-z]+)?", name))


def orders(split: str, rng: random.Random) -> Iterator[Example]:
    """Sentences about orders, each once."""
    first, last, goods, places = (_own(things, split) for things in (FIRST, LAST, GOODS, cities()))
    seen = set()
    while True:
        day = datetime.date(2000, 1, 1) + datetime.timedelta(rng.randrange(365 * 30))
        count = rng.randrange(2, 400)
        if split_of(day) != split or split_of(count) != split:
            continue
        values = {
            "name": f"{rng.choice(first)} {rng.choice(last)}",
            "city": rng.choice(places),
            "date": day.isoformat(),
            "order": f"{count} {rng.choice(goods)}",
        }
        form = rng.choice(("{0.day} {0:%B} {0.year}", "{0:%B} {0.day}, {0.year}", "{0:%d}/{0:%m}/{0.year}"))
        user = rng.choice(SENTENCES[split]).format(**values | {"date": form.format(day)})
        if user not in seen:
            seen.add(user)
            yield Example("Sentence to JSON.", user[0].upper() + user[1:], json.dumps(values))


# --- topics ---

# Modules by topic and split: a class of the standard library is seen in training or in a test, never in both.
MODULES = {
    "network": {
        "training": "http.client http.server urllib.request urllib.parse smtplib ftplib socketserver email.message "
        "email.policy email.utils email.charset",
        "validation": "imaplib http.cookies email.header",
        "test": "http.cookiejar poplib ssl ipaddress urllib.robotparser urllib.error email.headerregistry "
        "xmlrpc.client",
    },
    "files": {
        "training": "shutil pathlib zipfile os os.path fileinput mmap fnmatch gzip bz2",
        "validation": "tempfile filecmp lzma",
        "test": "tarfile glob io stat posixpath ntpath",
    },
    "concurrency": {
        "training": "threading asyncio.events asyncio.streams asyncio.tasks asyncio.base_events asyncio.futures "
        "multiprocessing.managers multiprocessing.context",
        "validation": "queue concurrent.futures.thread asyncio.queues",
        "test": "asyncio.locks concurrent.futures._base concurrent.futures.process multiprocessing.pool subprocess "
        "sched selectors multiprocessing.queues asyncio.subprocess asyncio.transports multiprocessing.connection "
        "multiprocessing.shared_memory asyncio.runners asyncio.taskgroups asyncio.timeouts",
    },
    "numbers": {
        "training": "math decimal _pydecimal",
        "validation": "fractions cmath",
        "test": "statistics random numbers",
    },
    "text": {
        "training": "textwrap difflib codecs html.parser csv shlex gettext json.decoder json.encoder configparser",
        "validation": "unicodedata html string",
        "test": "re locale stringprep xml.sax.saxutils plistlib quopri pprint json xml.dom.minidom "
        "xml.etree.ElementTree",
    },
    "dates": {
        "training": "datetime calendar",
        "validation": "zoneinfo",
        "test": "time _strptime",
    },
    "testing": {
        "training": "unittest.case unittest.mock unittest.loader unittest.runner bdb",
        "validation": "unittest.suite unittest.main faulthandler",
        "test": "doctest pdb unittest.result unittest.signals unittest.async_case cProfile profile pstats timeit trace",
    },
    "code": {
        "training": "ast inspect importlib._bootstrap_external importlib.machinery symtable tokenize pickletools",
        "validation": "dis codeop pyclbr",
        "test": "importlib.util importlib.abc modulefinder pkgutil zipimport py_compile compileall code "
        "importlib.metadata types abc runpy importlib.resources",
    },
}
LONGEST, SHORTEST = 220, 45  # characters of a text


def docstrings(module: str) -> Iterator[str]:
    """Name and first paragraph of every docstring that a module defines, in the order of their names."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            found = importlib.import_module(module)
        except ImportError:  # not on this system
            return
    own = {module, "_" + module, found.__name__}
    queue: list[Any] = [found]
    seen = set()
    while queue:
        thing = queue.pop(0)
        if id(thing) in seen:
            continue
        seen.add(id(thing))
        text = " ".join((str(getattr(thing, "__doc__", None) or "")).split("\n\n")[0].split())
        if text and thing is not found:
            yield f"{getattr(thing, '__qualname__', '')}: {text}"
        for name, member in sorted(vars(thing).items()) if inspect.ismodule(thing) or inspect.isclass(thing) else ():
            member = getattr(member, "__func__", getattr(member, "fget", None) or member)
            routine = inspect.isroutine(member) or inspect.isclass(member)
            where = getattr(member, "__module__", None)
            if routine and not name.startswith("__") and (inspect.isclass(thing) or where in own):
                queue.append(member)


@cache
def topic_texts() -> dict[str, tuple[tuple[str, str], ...]]:
    """Split -> (text, topic); a text that stands in two modules is of the first, in the order of the table."""
    found: dict[str, list[tuple[str, str]]] = {split: [] for split in SPLITS}
    seen = set()
    for split in SPLITS:
        for topic, modules in MODULES.items():
            for module in modules[split].split():
                for text in docstrings(module):
                    text = text if len(text) <= LONGEST else text[: text.rindex(" ", 0, LONGEST)]
                    plain = re.sub(r"\W+", " ", text).lower()
                    if len(text) >= SHORTEST and " " in text and plain not in seen:
                        seen.add(plain)
                        found[split].append((text, topic))
    return {split: tuple(texts) for split, texts in found.items()}


def topics(split: str, rng: random.Random) -> Iterator[Example]:
    """Texts of the eight topics, in turn; training goes through those of a topic again, the others end."""
    pools = {topic: [text for text, own in topic_texts()[split] if own == topic] for topic in MODULES}
    while True:
        queues = {topic: rng.sample(pool, len(pool)) for topic, pool in pools.items()}
        most = max(map(len, queues.values()))
        for at in range(most):
            for topic in rng.sample([*MODULES], len(MODULES)):
                if at < len(queues[topic]) or split == "training":
                    yield Example("Topic of the text.", queues[topic][at % len(queues[topic])], topic)
        if split != "training":
            return


# --- prose ---


def prose() -> list[str]:
    """Paragraphs of the language reference, each once: whole sentences with few signs."""
    from pydoc_data.topics import topics as sections

    found: dict[str, None] = {}
    for section in sorted(sections):
        for paragraph in sections[section].split("\n\n"):
            text = " ".join(paragraph.split())
            letters = sum(one.isalpha() or one.isspace() or one in ",." for one in text)
            if 250 <= len(text) <= 500 and letters > 0.95 * len(text) and text[0].isupper() and text[-1] == ".":
                found[text] = None
    return random.Random("prose").sample([*found], len(found))


# --- files ---

MAKERS: dict[str, Callable[[str, random.Random], Iterator[Example]]] = {
    "numbers": numbers,
    "json": orders,
    "topics": topics,
}


def examples(ability: str, split: str, seed: int = 0) -> Iterator[Example]:
    """The examples of one ability and split, in an order that the seed decides."""
    return MAKERS[ability](split, random.Random(f"{ability} {split} {seed}"))


def rows_of(ability: str, split: str, tokenizer: Any, count: int, *, seed: int = 0) -> list[dict[str, str]]:
    """The first rows as `dare eval` reads them, in the tokenizer's own form of a chat; fewer if there are no more."""
    found = []
    for example in examples(ability, split, seed):
        if len(found) == count:
            break
        found.append({"prompt": chat(tokenizer, example), "completion": example.answer})
    return found


def chat(tokenizer: Any, example: Example) -> str:
    """The text after which the answer comes."""
    turns = [{"role": "system", "content": example.system}, {"role": "user", "content": example.user}]
    if not getattr(tokenizer, "chat_template", None):
        return f"{example.system}\n{example.user}\n"
    try:
        return str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True))
    except Exception:  # the template's own refusal: some know no system
        turns = [{"role": "user", "content": f"{example.system}\n{example.user}"}]
        return str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True))


def write_data(
    folder: Path, tokenizer: Any, counts: dict[str, int], abilities: Sequence[str] = ABILITIES, *, training: int = 0
) -> None:
    """`ABILITY.SPLIT.jsonl` of validation and test, `counts[split]` rows each, `prose.test.jsonl`, and the first rows
    of training as `training/ABILITY.jsonl`. A file that would not change is not written."""
    files = {
        f"{ability}.{split}": rows_of(ability, split, tokenizer, counts[split])
        for ability in abilities
        for split in SPLITS[1:]
    }
    files[f"{PROSE}.test"] = [{"text": text} for text in prose()[: counts[PROSE]]]
    if training:
        files |= {f"{TRAINING}/{one}": rows_of(one, TRAINING, tokenizer, training) for one in abilities}
    (folder / TRAINING).mkdir(parents=True, exist_ok=True)
    for name, rows in files.items():
        path, text = folder / f"{name}.jsonl", "".join(json.dumps(row) + "\n" for row in rows)
        if not path.is_file() or path.read_text() != text:
            path.write_text(text)
