"""What every long run needs (schedules, weight averages, checkpoints, interruption) and the two training runs."""
