"""Secrets masked in addresses and in any text, by every name and in every form that libraries write them."""

import sys

import pytest

from dmat.errors import first_line
from dmat.redaction import RedactingStream, address, redacted


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("http://alice:s3cret@127.0.0.1:9", "http://alice:***@127.0.0.1:9"),
        ("postgresql+psycopg://u:p%40ss%2Fw@h:1/d?sslmode=x", "postgresql+psycopg://u:***@h:1/d?sslmode=x"),
        ("postgresql://u:a/b?c#d@h/d", "postgresql://u:***@h/d"),
        ("http://u:a@b@h/d@e", "http://u:***@h/d@e"),
        ("postgresql://user@server:pw@h/d", "postgresql://user@server:***@h/d"),
        ("http://u:it's \"one\"@h", "http://u:***@h"),
        ("redis://:pw@h", "redis://:***@h"),
        ("https://ghp_0123456789abcdefghij@h/x", "https://***@h/x"),
        ("postgresql://h/d?user=u&password=p)w,&sslkey=f", "postgresql://h/d?user=u&password=***&sslkey=f"),
        ("postgresql://h/d?pass%77ord=pw&SSLPassword=x", "postgresql://h/d?pass%77ord=***&SSLPassword=***"),
        ("https://h/?X-Amz-Signature=a&X-Amz-Expires=5&key=k", "https://h/?X-Amz-Signature=***&X-Amz-Expires=5&key=***"),
        ("u:pw@h/d", "u:***@h/d"),
        *((url, url) for url in (
            "", "embedded", "http://h:5000/a?b=c", "postgresql+psycopg://mlflow@postgres:5432/mlflow",
            "sqlite:////home/a:b@c/studies.db",
        )),
    ],
)  # fmt: skip
def test_an_address_keeps_all_but_its_secrets(url, shown):
    assert address(url) == shown
    assert address(shown) == shown  # so stored addresses compare equal


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("get http://a:b1@h1/x, 'https://c:d1@h2' (s://e:f1@h)", "get http://a:***@h1/x, 'https://c:***@h2' (s://e:***@h)"),
        ("http://a:b1@h1,http://c:d1@h2", "http://a:***@h1,http://c:***@h2"),
        ("host=h password=s3 user=u", "host=h password=*** user=u"),
        ("""{'password': 'it\\'s', "api_key": "k", 'u': 'u'}""", """{'password': ***, "api_key": ***, 'u': 'u'}"""),
        ("Authorization: Bearer abc.def", "Authorization: Bearer ***"),
        ("sent Bearer abc.def and secret_key: s3cr", "sent Bearer *** and secret_key: ***"),
        ("at https://h/p?token=abc&n=1 now", "at https://h/p?token=***&n=1 now"),
        *((same, same) for same in ("no password supplied", "key='loss' with value=0.5 at a@b")),
    ],
)  # fmt: skip
def test_a_sentence_keeps_all_but_its_secrets(text, shown):
    assert redacted(text) == shown


@pytest.mark.parametrize(
    ("variable", "value", "forms"),
    [
        ("MLFLOW_TRACKING_URI", "http://u:p%40ss%2fword@h", ["p@ss/word", "p%40ss%2Fword", "p%40ss%2fword"]),
        ("MLFLOW_TRACKING_PASSWORD", "a'\nb c", ["a'\nb c", repr("a'\nb c")[1:-1], "a%27%0Ab%20c", "a%27%0Ab+c"]),
        ("DMAT_STUDIES", "postgresql://h/d?password=pa%2Bss", ["pa+ss", "pa%2Bss"]),
        ("MLFLOW_TRACKING_TOKEN", "abcd1234", ["abcd1234"]),
        ("PGPASSWORD", "postgres", ["postgres"]),
        ("AWS_SECRET_ACCESS_KEY", "ab/cd+ef", ["ab/cd+ef", "ab%2Fcd%2Bef"]),
        ("HTTPS_PROXY", "http://u:proxypw1@h", ["proxypw1"]),
    ],
)  # fmt: skip
def test_secrets_of_the_environment_are_masked_in_any_text(monkeypatch, variable, value, forms):
    monkeypatch.setenv(variable, value)
    for form in forms:
        assert (
            redacted(f"refused ({form}) by postgresql+psycopg://{form}@h")
            == "refused (***) by postgresql+psycopg://***@h"
        )


def test_ordinary_variables_are_not_secrets(monkeypatch):
    for name in ("PWD", "OLDPWD", "TOKENIZERS_PARALLELISM", "SSH_ASKPASS", "PGPASSFILE", "AWS_ACCESS_KEY_ID"):
        monkeypatch.setenv(name, "ordinary")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "abc")  # too short to be looked for in words
    assert redacted("ordinary abc") == "ordinary abc"


def test_the_first_line_is_cut_after_it_is_masked():
    line = first_line(ValueError(f"{290 * 'x'} http://u:{40 * 'p'}@h\nsecond"))
    assert "ppp" not in line
    assert len(line) <= 300
    assert (
        first_line(ValueError("cannot log in with p@ss-word"), "postgresql://u:p%40ss-word@h")
        == "cannot log in with ***"
    )


def test_a_defect_keeps_its_traceback_and_loses_the_password(monkeypatch, capsys):
    from cli import main

    def broken(**_):
        raise RuntimeError("http://alice:s3cret@h is broken") from ValueError("s3cret")

    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://alice:s3cret@h")
    monkeypatch.setattr(main, "app", broken)
    before = sys.stderr
    with pytest.raises(SystemExit) as exit_info:
        main.main()
    error_output = capsys.readouterr().err
    assert exit_info.value.code == 1
    assert sys.stderr is before
    assert "Traceback" in error_output
    assert "RuntimeError: http://alice:***@h is broken" in error_output
    assert "s3cret" not in error_output


def test_a_stream_hides_what_libraries_write():
    class ListStream(list):
        encoding = "utf-8"

        def write(self, text):
            self.append(text)

    stream = ListStream()
    assert RedactingStream(stream).write("http://u:pw@h\n") == len("http://u:pw@h\n")
    assert stream == ["http://u:***@h\n"]
    RedactingStream(stream).writelines(["a\n", "password=pw\n"])
    assert stream[1:] == ["a\n", "password=***\n"]
    assert RedactingStream(stream).encoding == "utf-8"
