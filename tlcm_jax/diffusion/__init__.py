"""The mathematics of noise: pure functions over arrays and a denoiser callable."""
