"""What a run leaves on disk, how that is read, and how the run survives being stopped."""
