"""The recipes, as a package: `kdkit new example` finds them where kdkit is installed."""
