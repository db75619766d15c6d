"""Measuring a trained model: perplexity, tasks, retrieval and speed, each one function in a module of its own.

Nothing is imported here: the training imports parts of this package.
"""
