"""What a training will cost on this machine, and what slows it: measured on the training loop itself, before a long run."""
