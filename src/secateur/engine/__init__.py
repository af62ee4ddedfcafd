"""The training loop, checkpoints and progress: used by every method, knowing none."""
