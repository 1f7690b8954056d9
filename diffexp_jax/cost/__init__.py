"""What a run will take: memory, FLOPs and time to compile, from shapes alone."""
