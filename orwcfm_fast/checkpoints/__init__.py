"""Files: checkpoints, what may be read, what is kept, who may write."""
