"""torch, and one number that is trained: what start and memory cost every program at the least."""

from __future__ import annotations

import time

import marks
from peers import work

marks.watch()
told = work.told()

import torch  # noqa: E402

number = torch.nn.Parameter(torch.ones(1))
optimizer = torch.optim.AdamW([number])
for _ in range(told.steps):
    number.sum().backward()
    optimizer.step()
    optimizer.zero_grad()
time.sleep(2)  # so that its memory is looked at
