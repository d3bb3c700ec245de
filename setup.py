"""Installation: wide ranges here, exact pins in constraints.txt."""

import re
from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent
version = re.search(r'__version__ = "(.+)"', (here / "lad_kernels" / "__init__.py").read_text()).group(1)
cli = ["rich>=13", "packaging>=24", "jsonargparse>=4.51,<5", "docstring-parser>=0.17"]
train = ["transformers>=5.0", "accelerate>=1.10", "gguf>=0.10", "reasoning-gym>=0.1.24", "matplotlib>=3.8", *cli]
oracles = ["liger-kernel>=0.8", "cut-cross-entropy>=25.1"]
docs = ["sphinx>=9", "furo>=2025.12.19", "myst-parser>=5"]
lint = ["ruff>=0.15", "mypy>=1.18"]
trl = ["trl>=1.14,<1.17,!=1.15.0", "datasets>=4.7", "peft>=0.18", *train]
test = [
    "pytest>=8",
    "pytest-xdist>=3.6",
    "pytest-timeout>=2.3",
    "hypothesis>=6.100",
    "tensorboardX>=2.6",
    *docs,
    *lint,
    *oracles,
    *trl,
]
gpu = [*train, "flash-attn>=2.8; platform_system == 'Linux'", "liger-kernel>=0.8"]  # faster layers for the trainer
bench = [
    "pytest>=8",
    "pytest-timeout>=2.3",
    "pytest-benchmark>=5",
    "matplotlib>=3.8",
    *oracles,
    *trl,
    "nvidia-cutlass-dsl>=4.6; platform_system == 'Linux'",  # Liger's Hopper kernels
]

setup(
    name="lad_kernels",
    version=version,
    description="Fused losses for reinforcement learning of language models, without storing logits",
    long_description=(here / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="MIT",
    classifiers=[
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
    packages=find_packages(include=["lad_kernels", "lad_kernels.*"]),
    package_data={"lad_kernels": ["py.typed"]},
    python_requires=">=3.11",
    install_requires=["torch>=2.11", "numpy>=1.26", "triton>=3.6,<3.10; platform_system == 'Linux'"],
    entry_points={
        "console_scripts": ["lad-kernels = lad_kernels.cli:main"],
        "verl.plugins": ["lad = lad_kernels.frameworks.verl"],
    },
    extras_require={
        "cli": cli,
        "docs": docs,
        "train": train,
        "trl": trl,
        "gpu": gpu,
        "bench": bench,
        "test": test,
    },
)
