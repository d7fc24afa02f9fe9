"""What a run would take: memory, FLOPs, cuts and the schedule of several processes."""
