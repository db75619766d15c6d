"""Keys and values of one owner."""

import torch

KeyValue = tuple[torch.Tensor, torch.Tensor]
