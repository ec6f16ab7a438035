"""dmat: does better generated data make classifiers more robust?

The library behind the `dmat` command. Importing it loads neither torch nor mlflow; the subpackages do.
"""

__version__ = "0.1.0"

ARTIFACTS = "artifacts"  # folder of everything that stages write, below the project
