"""Packaging, read from settings.ini by the standard library alone."""

from configparser import ConfigParser
from pathlib import Path
import shlex

from setuptools import find_packages, setup

here = Path(__file__).parent
config = ConfigParser(delimiters=["="])
config.read(here / "settings.ini", encoding="utf-8")
cfg = config["DEFAULT"]
extras = {
    key.removesuffix("_requirements"): shlex.split(cfg[key]) for key in cfg if key.endswith("_requirements")
}
commands = {
    "run": "run",
    "train": "train",
    "cache": "tokenize",
    "tokenize": "tokenize",
    "detokenize": "generate",
    "encode": "encode",
    "decode": "encode",
    "generate": "generate",
    "eval": "measure",
    "compare": "measure",
    "estimate": "estimate",
    "info": "cost",
    "bench": "bench",
    "reconstruct": "explore",
    "demo": "explore",
    "study": "studies",
}  # flextok_<name>: the module of flextok_edu.apps that has <name>_main

setup(
    name=cfg["lib_name"],
    version=cfg["version"],
    description=cfg["description"],
    keywords=cfg["keywords"],
    author=cfg["author"],
    author_email=cfg["author_email"],
    url=cfg["git_url"],
    license="Apache-2.0",
    long_description=(here / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    packages=find_packages(include=["flextok_edu", "flextok_edu.*"]),
    package_data={"flextok_edu": ["expected/*.json", "zoo/*/*", "zoo/*/*/*"]},
    include_package_data=True,
    zip_safe=False,
    python_requires=f">={cfg['min_python']}",
    install_requires=shlex.split(cfg["requirements"]),
    extras_require=extras,
    entry_points={
        "console_scripts": [
            f"flextok_{name}=flextok_edu.apps.{module}:{name}_main" for name, module in commands.items()
        ]
    },
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Developers",
        "Intended Audience :: Education",
        "License :: OSI Approved :: Apache Software License",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ]
    + [f"Programming Language :: Python :: 3.{minor}" for minor in (11, 12, 13)],
)
