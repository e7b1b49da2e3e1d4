"""Stage 1 on two dimensions, where the teacher's own trajectories can be followed exactly."""
