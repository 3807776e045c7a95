"""Sample models and data, made out of packages so that no model hub is needed."""
