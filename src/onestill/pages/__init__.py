"""Pages that open in a browser: a template, the plots and pictures in it, and nothing from elsewhere."""
