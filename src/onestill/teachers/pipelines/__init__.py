"""Teachers inside stock pipelines of diffusers, learned by watching the pipeline call its network."""
