"""onestill: one-step generators from pre-trained diffusion models, without a training image."""
