"""What happens around a training step; one file each."""
