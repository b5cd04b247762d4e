"""From a name to a network that is adapted, initialised and observed."""
