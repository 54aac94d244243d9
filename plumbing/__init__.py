"""What a reader may skip: files, options, resuming, processes, statistics."""
