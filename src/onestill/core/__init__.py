"""What everything stands on: tensors, files, errors, devices, settings."""
