"""What every long run needs (schedules, weight averages, checkpoints, interruption) and the two training runs."""

HISTORY = "history.json"  # of a training, beside the weights that it made
