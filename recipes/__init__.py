"""The recipes of the repository, as a package, so that `kdkit new example` finds them where kdkit is installed."""
