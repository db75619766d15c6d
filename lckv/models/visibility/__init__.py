"""Which keys each query sees, and how the attention backends take that."""
