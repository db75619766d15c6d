"""What the entry points share: Hydra, command lines, mistakes in one line, and run folders around the work."""
