"""What generation costs: measured side by side for several patterns, checkpoints and caches."""
