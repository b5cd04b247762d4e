"""The packages of the distribution: a folder of the repository each, and all folders in it."""

from setuptools import find_namespace_packages, setup

FOLDERS = {"kdkit": "kdkit", "kdkit_plugins": "plugins", "kdkit_recipes": "recipes"}

setup(
    package_dir=FOLDERS,
    packages=[
        f"{package}.{inside}".rstrip(".")
        for package, folder in FOLDERS.items()
        for inside in ("", *find_namespace_packages(folder, exclude=["*__pycache__*"]))
    ],
)
