"""A name in, a model and images out: where they come from, how they are read, and into which parts images are dealt."""
