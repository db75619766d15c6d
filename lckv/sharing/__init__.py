"""What a sharing pattern means and costs, by arithmetic alone: no torch, no model."""
