"""Where examples come from: local files, the hub, or generated."""
