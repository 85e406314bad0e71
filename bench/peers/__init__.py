"""Other people's engines, each built and run by its own tools in its own environment."""
