"""Masks passwords, tokens and keys in what is shown or stored: addresses, sentences, output of other libraries.

`address` masks a URL. Its result depends on the URL alone, so it can be stored and compared. `redacted` masks any text.
It also masks the secrets of environment variables wherever they appear.
"""

import functools
import json
import os
import re
from collections.abc import Iterable, Iterator
from typing import IO, Any
from urllib.parse import quote, quote_plus, unquote, unquote_plus

MASK = "***"
_MIN_SECRET_LENGTH = 4  # characters of a secret that is masked outside a URL; shorter ones are parts of ordinary words
_MIN_TOKEN_LENGTH = 20  # characters; a user name of a URL of at least this length counts as a token
_SECRET_NAMES = (
    r"pass(?:word|wd|phrase)|pwd|secret|token|credentials?|signature"
    r"|(?:api|access|account|private|secret|auth|master)[_-]?key"
)
_PARAMETER = re.compile(rf"(?:{_SECRET_NAMES}|(?:^|[_.-])(?:key|pass|sig|auth))$", re.IGNORECASE)  # of a URL
_VARIABLE = re.compile(rf"^(?!(?:OLD)?PWD$).*(?:{_SECRET_NAMES}|_PASS)$", re.IGNORECASE)  # PWD is the working directory
# `end`: characters that end a URL in a sentence. A password may contain / ? # (SQLAlchemy) or @ (urllib).
_PASSWORD = r"(?P<user>[^:/?#{end}]*):(?P<password>[^@{end}]{{0,1000}}@(?:[^/?#{end}]*@)?)"
_LOGIN = rf"(?<!/)//(?:{_PASSWORD}|(?P<token>[^:/?#@{{end}}]+)@)"
_QUERY = r"(?P<before>[?&;])(?P<name>[^=?&;\s]{{1,100}})=(?P<value>[^&{end}]*)"
_LOGIN_OF_URL, _QUERY_OF_URL = (re.compile(pattern.format(end=r"\n")) for pattern in (_LOGIN, _QUERY))
_LOGIN_IN_TEXT, _QUERY_IN_TEXT = (re.compile(pattern.format(end=r"\s'\"")) for pattern in (_LOGIN, _QUERY))
_ASSIGNED = re.compile(  # password=..., password: ..., 'password': '...'
    rf"""((?:{_SECRET_NAMES})(?:\s*=\s*|['"]?\s*:\s*))("(?:[^"\\]|\\.)*"|'(?:[^'\\]|\\.)*'|[^\s&'"]+)""", re.IGNORECASE
)
_HEADER = re.compile(r"((?:authorization['\"]?\s*[:=]\s*['\"]?\w+|bearer)\s+)[^\s'\"]+", re.IGNORECASE)


def address(url: str) -> str:
    """A URL with its password, token and secret parameters masked; host, user and database stay."""
    if "//" not in url:  # not a URL, but perhaps meant as one
        return re.sub(r"^([^:/\s]*):.*@", rf"\1:{MASK}@", url)
    return _QUERY_OF_URL.sub(_without_value, _LOGIN_OF_URL.sub(_without_login, url))


def redacted(text: str, *urls: str) -> str:
    """The text with secrets masked: in URLs, in assignments such as password=..., and those of environment variables.

    urls: addresses that the text may be about. Their secrets are also masked where they appear outside the URL.
    """
    for url in urls:
        text = text.replace(url, address(url))
    text = _secrets_pattern(tuple(os.environ.items()), urls).sub(MASK, text)
    text = _QUERY_IN_TEXT.sub(_without_value, _LOGIN_IN_TEXT.sub(_without_login, text))
    return _ASSIGNED.sub(rf"\1{MASK}", _HEADER.sub(rf"\1{MASK}", text))


class RedactingStream:
    """A text stream that masks secrets in everything written to it: warnings, logs and tracebacks of any library."""

    def __init__(self, stream: IO[str]):
        self._stream = stream

    def write(self, text: str) -> int:
        """Writes text with secrets masked; returns the length of the text before masking."""
        self._stream.write(redacted(text))
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        """Writes lines with secrets masked."""
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _without_login(match: re.Match[str]) -> str:
    """The login part of a URL with password and token masked."""
    name = match["token"] or match["user"]
    shown = MASK if len(name) >= _MIN_TOKEN_LENGTH else name
    return f"//{shown}@" if match["token"] else f"//{shown}:{MASK}@"


def _without_value(match: re.Match[str]) -> str:
    """A query parameter of a URL, with its value masked if the name is that of a secret."""
    is_secret = _PARAMETER.search(unquote_plus(match["name"]))
    return f"{match['before']}{match['name']}={MASK}" if is_secret else match[0]


@functools.lru_cache(maxsize=8)
def _secrets_pattern(environment: tuple[tuple[str, str], ...], urls: tuple[str, ...]) -> re.Pattern[str]:
    """A pattern of every form of every secret, the longest first.

    A form of letters only or digits only is not matched inside longer words.
    """
    secrets = {value for name, value in environment if _VARIABLE.search(name)}
    secrets |= {
        url_secret
        for url in (*urls, *(value for _, value in environment if "//" in value))
        for url_secret in _secrets_in_url(url)
    }
    forms = sorted({form for secret in secrets for form in _forms(secret)}, key=len, reverse=True)
    templates = (r"(?<!\w){}(?!\w)" if form.isalpha() or form.isdigit() else "{}" for form in forms)
    alternatives = "|".join(template.format(re.escape(form)) for template, form in zip(templates, forms, strict=True))
    return re.compile(alternatives or r"(?!)", re.IGNORECASE)  # the digits of %2f are written in either case


def _secrets_in_url(url: str) -> Iterator[str]:
    """Passwords, tokens and values of secret parameters of a URL."""
    for login in _LOGIN_OF_URL.finditer(url):
        if login["password"]:
            yield login["password"].removesuffix("@")
        if len(name := login["token"] or login["user"]) >= _MIN_TOKEN_LENGTH:
            yield name
    for parameter in _QUERY_OF_URL.finditer(url):
        if _PARAMETER.search(unquote_plus(parameter["name"])):
            yield parameter["value"]


def _forms(secret: str) -> Iterator[str]:
    """Forms of a secret in text: as it is, decoded, encoded, and as Python and JSON write strings."""
    for plain in {secret, unquote(secret), unquote_plus(secret)}:
        for form in (plain, quote(plain, safe=""), quote_plus(plain), repr(plain)[1:-1], json.dumps(plain)[1:-1]):
            if len(form) >= _MIN_SECRET_LENGTH:
                yield form
