"""optuna-dashboard on the studies, served by this process on 127.0.0.1.

It has no login. The Host header is checked because of DNS rebinding: a page of another site can resolve its own name to
127.0.0.1, and would then read and delete studies through the browser of its visitor. The URL of the storage may hold a
password, so it is not an argument of a command, which all users of this machine can see.
"""

import contextlib
import socketserver
import wsgiref.simple_server
from collections.abc import Callable, Iterable
from typing import Any
from urllib.parse import urlsplit

from dmat.errors import DmatError
from dmat.tuning import storage
from dmat.tuning.plan import Study

ADDRESS = "127.0.0.1"
_OWN_HOSTS = {ADDRESS, "localhost", "::1"}  # with any port: a tunnel may have another
_Application = Callable[[dict[str, Any], Any], Iterable[bytes]]


class _Server(socketserver.ThreadingMixIn, wsgiref.simple_server.WSGIServer):
    daemon_threads = True


class _Quiet(wsgiref.simple_server.WSGIRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
        """The page asks every few seconds; nobody reads that."""


def serve(plan: Study, port: int, started: Callable[[], None]) -> None:
    """Serves until Ctrl-C. started: called once the server listens. Raises DmatError if the port is in use."""
    import optuna_dashboard  # takes seconds

    application = guarded(optuna_dashboard.wsgi(storage.connect(plan.storage)))
    try:
        server = wsgiref.simple_server.make_server(ADDRESS, port, application, _Server, _Quiet)
    except OSError:
        raise DmatError(f"port {port} is taken; expected a free one; name another with --port") from None
    with server, contextlib.suppress(KeyboardInterrupt):
        started()
        server.serve_forever()


def guarded(application: _Application) -> _Application:
    """The application for requests to this machine by its own names; 403 for all others."""

    def answer(environment: dict[str, Any], start: Any) -> Iterable[bytes]:
        urls = [f"//{environment.get('HTTP_HOST', '')}"]
        urls += [environment["HTTP_ORIGIN"]] if "HTTP_ORIGIN" in environment else []
        if all(_host(url) in _OWN_HOSTS for url in urls):
            return application(environment, start)
        start("403 Forbidden", [("Content-Type", "text/plain")])
        return [
            f"the Host or Origin is another than {ADDRESS} and localhost; open http://{ADDRESS} with the port".encode()
        ]

    return answer


def _host(url: str) -> str | None:
    """In lower case, without the port; None if there is none."""
    try:
        return urlsplit(url).hostname
    except ValueError:
        return None
