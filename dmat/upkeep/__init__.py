"""Maintenance of a project: `dmat doctor` checks it, `dmat clean` removes unneeded files; also reproduction of runs."""
