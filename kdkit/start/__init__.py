"""The first files of a user: recipes, studies and plugins from templates; what this machine has."""
