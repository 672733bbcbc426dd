"""What a training step is made of: batches, losses, optimizer, checkpoints."""
