"""Secrets masked in addresses and in any text, by every name and in every form that libraries write them."""

import subprocess
import sys
from urllib.parse import quote

import pytest

from cli.main import main
from dmat import files
from dmat.errors import first_line
from dmat.redaction import RedactingStream, address, redacted
from dmat.tracking import sender
from tests import senders
from tests.projects import Project


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


PLANTED = {  # where -> a secret that is nowhere else
    "address of MLflow": "planted-Tr4cking",
    "MLFLOW_TRACKING_PASSWORD": "planted-M1flow",
    "AWS_SECRET_ACCESS_KEY": "planted/S3+key",
    "address of studies": "planted-Stud1es",
    "remote of DVC": "planted-R3mote",
}


@pytest.fixture
def project_with_secrets(tmp_path, tiny_params, monkeypatch):
    """A project in git with changes, which is the present folder, and secrets in its settings and environment."""
    for name in ("AWS_SECRET_ACCESS_KEY", "MLFLOW_TRACKING_PASSWORD"):
        monkeypatch.setenv(name, PLANTED[name])
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setenv("DMAT_STUDIES", f"postgresql+psycopg://bob:{PLANTED['address of studies']}@127.0.0.1:1/studies")
    monkeypatch.setenv("DMAT_TRACKING", "on")
    monkeypatch.setattr(sender, "_start", senders.start_thread)
    Project(tmp_path, tiny_params)
    remote = f"[core]\n    remote = team\n['remote \"team\"']\n    url = https://carol:{PLANTED['remote of DVC']}@h/x\n"
    files.write_text(tmp_path / ".dvc/config.local", remote)
    files.write_text(tmp_path / ".dvc/.gitignore", "/config.local\n")
    identity = ["-c", "user.name=n", "-c", "user.email=e"]
    for arguments in (["init", "-q"], ["add", "-A"], [*identity, "commit", "-qm", "first"]):
        subprocess.run(["git", *arguments], cwd=tmp_path, check=True)
    with (tmp_path / "params.yaml").open("a") as file:
        file.write("# changed since the commit\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_secrets_are_in_no_file_output_or_argument_of_a_process(project_with_secrets, monkeypatch, capfd):
    """A tracked stage with the store of the project, then commands with a server that does not answer."""
    arguments = []

    class Popen(subprocess.Popen):
        def __init__(self, args, *rest, **options):
            arguments.append(args)
            super().__init__(args, *rest, **options)

    monkeypatch.setattr(subprocess, "Popen", Popen)
    code = _dmat(monkeypatch, "prepare-data")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://alice:{PLANTED['address of MLflow']}@127.0.0.1:9")
    _dmat(monkeypatch, "doctor")
    _dmat(monkeypatch, "runs", "sync")
    arguments.append(sender.popen_options(project_with_secrets)["args"])
    shown = "".join(capfd.readouterr())
    assert code == 0, shown
    assert "alice:***@127.0.0.1:9" in shown
    places = {"output": shown.encode(), "arguments": str(arguments).encode()}
    for path in (path for path in project_with_secrets.rglob("*") if path.is_file() and path.name != "config.local"):
        places[str(path.relative_to(project_with_secrets))] = path.read_bytes()
    for part in ("mlruns/mlflow.db", "tracking.json", "git.patch", "provenance/prepare_data", "finished.json"):
        assert [place for place in places if part in place], f"{part} would not be searched"
    forms = {name: (secret.encode(), quote(secret, safe="").encode()) for name, secret in PLANTED.items()}
    leaks = [
        (name, place)
        for place, text in places.items()
        for name, written in forms.items()
        if any(form in text for form in written)
    ]
    assert leaks == []
    assert len(arguments) > 3


def _dmat(monkeypatch, *arguments):
    """Exit code of `dmat <arguments>` in this process."""
    monkeypatch.setattr("sys.argv", ["dmat", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    return ended.value.code
