"""The README as PyPI shows it: links and pictures refer to the repository, at the tag of the version."""

import re
import tomllib
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent
version = re.search(r'^__version__ = "(.+)"', (ROOT / "sdllava/version.py").read_text(encoding="utf-8"), re.M)[1]
project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
address = project["urls"]["Repository"]
readme = (ROOT / "README.md").read_text(encoding="utf-8")
readme = re.sub(r"(!\[[^]]*\])\((?![a-z]+:|#)", rf"\1({address}/raw/v{version}/", readme)
readme = re.sub(r"\]\((?![a-z]+:|#)", f"]({address}/blob/v{version}/", readme)
setup(long_description=readme, long_description_content_type="text/markdown")
