"""What a run leaves on disk and survives: its folder, checkpoints, metrics, and how it is stopped."""
