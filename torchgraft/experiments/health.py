"""What is installed and found on this machine, and how to get what is missing."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import os
import platform

import torchgraft

PACKAGES = {
    "transformers": "text",
    "tokenizers": "text",
    "gguf": "text",
    "diffusers": "diffusion",
    "kornia": "vision",
    "pillow": "vision",
    "pandas": "tabular",
    "scikit-learn": "run",
    "accelerate": "run",
    "scipy": "run",
    "matplotlib": "run",
    "jinja2": "run",
}


def examine() -> dict[str, dict[str, str]]:
    """Sections of name and finding: this machine, packages, data, models."""
    import torch

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    machine = {
        "torchgraft": torchgraft.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": str(torch.get_num_threads()),
        "gpu": gpu,
        "TORCHGRAFT_DATA": os.environ.get("TORCHGRAFT_DATA", "not set"),
    }
    packages = {}
    for name, extra in PACKAGES.items():
        try:
            packages[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            packages[name] = f"missing: pip install 'torchgraft[{extra}]'"
    found = {"machine": machine, "packages": packages}
    for section, module in (("data", "torchgraft.datasets"), ("models", "torchgraft.zoo")):
        if importlib.util.find_spec(module) is None:
            continue
        available = getattr(importlib.import_module(module), "available", None)
        if available is not None:
            found[section] = {k: str(v) if v is not None else "not on this machine yet" for k, v in available().items()}
    return found
