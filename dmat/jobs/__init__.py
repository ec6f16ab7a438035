"""One module per stage and nothing else: `run(settings, job) -> Result` (`dmat/job.py`).

`dmat/pipeline` runs them. The modules do not import it, nor each other.
"""
