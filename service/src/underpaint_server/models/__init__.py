"""What a checkpoint is: how one is found, checked, read, and asked."""
