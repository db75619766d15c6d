"""From pretrained models to models that share keys and values."""
