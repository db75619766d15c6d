"""What a serving engine does with models that share KV, small enough to read: the reference, and no engine itself.

Pages, prefixes that requests share, and requests that join and leave a running batch at any step are here so that an
engine which is taught these models can be held against something plain: same tokens, same pages, same failures. Its
features are frozen. What makes serving fast (kernels, schedulers, many devices) belongs in an engine.
"""
