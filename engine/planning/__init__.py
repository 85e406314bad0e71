"""What a model would need and could do on a device, from its configuration alone."""
