"""What engines that serve models are given: hints which layers may share keys and values."""
