"""A package, for a dependency installs one of the same name."""
