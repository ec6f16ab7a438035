"""Sending to MLflow from a thread of the tests, so that MLflow is imported once and a test can patch what is used."""

import os
import threading
from pathlib import Path

from dmat.tracking import sender


def start_thread(home: Path) -> int:
    """In place of `sender._start`."""
    threading.Thread(target=sender.follow, args=(home,), daemon=True).start()
    return os.getpid()
