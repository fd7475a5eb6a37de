"""Build script; everything it would say is in pyproject.toml."""

from setuptools import setup

setup()
