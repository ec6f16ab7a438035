"""Masks passwords, tokens and keys in what is shown or stored: addresses, sentences, what other libraries say.

`address` is for a URL and depends on it alone, so its result can be remembered and compared. `redacted` is for any
text; it also masks the secrets that the environment holds, wherever they stand.
"""

import functools
import json
import os
import re
from collections.abc import Iterable, Iterator
from typing import IO, Any
from urllib.parse import quote, quote_plus, unquote, unquote_plus

MASK = "***"
_SHORTEST = 4  # characters of a secret that is masked outside a URL: shorter ones are parts of ordinary words
_TOKEN = 20  # characters from which on the user name of a URL is taken for a token
_WORDS = (
    r"pass(?:word|wd|phrase)|pwd|secret|token|credentials?|signature"
    r"|(?:api|access|account|private|secret|auth|master)[_-]?key"
)
_PARAMETER = re.compile(rf"(?:{_WORDS}|(?:^|[_.-])(?:key|pass|sig|auth))$", re.IGNORECASE)  # of a URL
_VARIABLE = re.compile(rf"^(?!(?:OLD)?PWD$).*(?:{_WORDS}|_PASS)$", re.IGNORECASE)  # PWD is the working directory
# `end` are characters that end a URL in a sentence. A password may hold / ? # (SQLAlchemy) or @ (urllib).
_PASSWORD = r"(?P<user>[^:/?#{end}]*):(?P<password>[^@{end}]{{0,1000}}@(?:[^/?#{end}]*@)?)"
_LOGIN = rf"(?<!/)//(?:{_PASSWORD}|(?P<token>[^:/?#@{{end}}]+)@)"
_QUERY = r"(?P<before>[?&;])(?P<name>[^=?&;\s]{{1,100}})=(?P<value>[^&{end}]*)"
_LOGIN_OF_URL, _QUERY_OF_URL = (re.compile(one.format(end=r"\n")) for one in (_LOGIN, _QUERY))
_LOGIN_IN_TEXT, _QUERY_IN_TEXT = (re.compile(one.format(end=r"\s'\"")) for one in (_LOGIN, _QUERY))
_ASSIGNED = re.compile(  # password=..., password: ..., 'password': '...'
    rf"""((?:{_WORDS})(?:\s*=\s*|['"]?\s*:\s*))("(?:[^"\\]|\\.)*"|'(?:[^'\\]|\\.)*'|[^\s&'"]+)""", re.IGNORECASE
)
_HEADER = re.compile(r"((?:authorization['\"]?\s*[:=]\s*['\"]?\w+|bearer)\s+)[^\s'\"]+", re.IGNORECASE)


def address(url: str) -> str:
    """A URL with its password, token and secret parameters masked; host, user and database stay."""
    if "//" not in url:  # no URL, but perhaps meant as one
        return re.sub(r"^([^:/\s]*):.*@", rf"\1:{MASK}@", url)
    return _QUERY_OF_URL.sub(_without_value, _LOGIN_OF_URL.sub(_without_login, url))


def redacted(text: str, *urls: str) -> str:
    """The text with secrets masked: in URLs, in assignments such as password=..., and the values of the environment.

    urls: addresses that the text may be about. Their secrets are masked also where they stand without the URL.
    """
    for url in urls:
        text = text.replace(url, address(url))
    text = _secrets(tuple(os.environ.items()), urls).sub(MASK, text)
    text = _QUERY_IN_TEXT.sub(_without_value, _LOGIN_IN_TEXT.sub(_without_login, text))
    return _ASSIGNED.sub(rf"\1{MASK}", _HEADER.sub(rf"\1{MASK}", text))


class RedactingStream:
    """A text stream that masks secrets in what is written to it: warnings, logs and tracebacks of any library."""

    def __init__(self, stream: IO[str]):
        self._stream = stream

    def write(self, text: str) -> int:
        self._stream.write(redacted(text))
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _without_login(found: re.Match[str]) -> str:
    name = found["token"] or found["user"]
    shown = MASK if len(name) >= _TOKEN else name
    return f"//{shown}@" if found["token"] else f"//{shown}:{MASK}@"


def _without_value(found: re.Match[str]) -> str:
    secret = _PARAMETER.search(unquote_plus(found["name"]))
    return f"{found['before']}{found['name']}={MASK}" if secret else found[0]


@functools.lru_cache(maxsize=8)
def _secrets(environment: tuple[tuple[str, str], ...], urls: tuple[str, ...]) -> re.Pattern[str]:
    """Every form of every secret, the longest first. One that is a plain word is not looked for inside longer words."""
    secrets = {value for name, value in environment if _VARIABLE.search(name)}
    secrets |= {one for url in (*urls, *(value for _, value in environment if "//" in value)) for one in _of_url(url)}
    forms = sorted({form for secret in secrets for form in _forms(secret)}, key=len, reverse=True)
    alone = (r"(?<!\w){}(?!\w)" if form.isalpha() or form.isdigit() else "{}" for form in forms)
    either = "|".join(how.format(re.escape(form)) for how, form in zip(alone, forms, strict=True))
    return re.compile(either or r"(?!)", re.IGNORECASE)  # the digits of %2f are written in either case


def _of_url(url: str) -> Iterator[str]:
    for login in _LOGIN_OF_URL.finditer(url):
        if login["password"]:
            yield login["password"].removesuffix("@")
        if len(name := login["token"] or login["user"]) >= _TOKEN:
            yield name
    for parameter in _QUERY_OF_URL.finditer(url):
        if _PARAMETER.search(unquote_plus(parameter["name"])):
            yield parameter["value"]


def _forms(secret: str) -> Iterator[str]:
    """As it is, decoded, encoded, and as a string that Python or JSON shows."""
    for plain in {secret, unquote(secret), unquote_plus(secret)}:
        for form in (plain, quote(plain, safe=""), quote_plus(plain), repr(plain)[1:-1], json.dumps(plain)[1:-1]):
            if len(form) >= _SHORTEST:
                yield form
