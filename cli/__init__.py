"""The `dmat` command: parse, call one job, print, exit code. Loads no torch until a job runs."""
