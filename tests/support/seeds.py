"""Where tests seed random numbers."""

from __future__ import annotations

import torch

# torch.manual_seed queues a call, with its traceback, for each kind of device that has not started.
# This takes half a millisecond, and the queue grows.
seed = torch.manual_seed if torch.cuda.is_available() else torch.default_generator.manual_seed
