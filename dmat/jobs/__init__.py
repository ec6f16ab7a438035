"""One file for each stage and nothing else: `run(settings, job) -> Result` (`dmat/job.py`).

What runs them is in `dmat/pipeline`; they know nothing of it, nor of each other.
"""
