"""The state of a project and what it can do without: `dmat doctor` looks, `dmat clean` removes."""
