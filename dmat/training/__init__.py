"""What every long run needs (schedules, weight averaging, checkpoints, interruption) and the two training runs."""

HISTORY = "history.json"  # history of a training run, beside its weights
SNAPSHOTS = "snapshots.json"  # what the judged snapshots of a denoiser measured
