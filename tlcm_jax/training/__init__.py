"""The engine: state, jitted step, mesh and sharding, checkpoints, metrics, the loop."""
