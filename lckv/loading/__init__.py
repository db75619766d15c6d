"""Finds, reads and builds models by what the user calls them."""
