"""One face for the generators of others: codes in, images out, cut in two where features are mixed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

Synthesis = nn.Module | Callable[..., Any]
Split = str | tuple[Callable[..., Tensor], Callable[..., Tensor]] | None


class _Stop(Exception):
    """Leaves a forward pass at the layer of the split."""


def _owner(function: Any) -> nn.Module | None:
    """The module itself, or the one whose bound method it is."""
    found = function if isinstance(function, nn.Module) else getattr(function, "__self__", None)
    return found if isinstance(found, nn.Module) else None


def check_eval(module: nn.Module, what: str) -> None:
    """Refuse a module in train mode, where batch norm would learn and dropout would make edits irreproducible."""
    for name, part in module.named_modules():
        if part.training:
            raise ValueError(f"the {what} is in train mode ({name or type(part).__name__}); call .eval() on it first")


class GeneratorAdapter(nn.Module):
    """Wraps a trained generator: StyleGAN ports, decoders of VAEs (diffusers' AutoencoderKL too), DCGANs.

    The generator is read and never changed: it must be in eval mode, stays there when the adapter is put in train mode,
    and nothing here writes a gradient to its weights.

    Args:
        synthesis: from latents (B, *latent_shape) to images (B, C, H, W), or to an object with ``.sample`` as diffusers
            returns it; a module, or a bound method of one such as ``vae.decode``.
        latent_shape: of one latent. Two numbers are read as (L, d), a code for each of L layers; any other number of
            them as one code of their product.
        sample_latent: ``(n, generator) -> z`` with a ``torch.Generator`` on the CPU; a standard normal unless given.
            For a plain VAE draw from encoded data: its prior has no axes that PCA could find.
        mapping: from z to codes (B, d), the same for all layers, or (B, L, d).
        split_layer: where feature maps of several codes are mixed (LCE): the name of a module inside ``synthesis``,
            whose output is taken and replaced by hooks, or a pair of functions ``g1(latents)`` and
            ``g2(features, latents)``. About a third of the depth is a good place. With a name, ``g2`` runs the layers
            before the split once more, since later layers of any generator may need what stands beside the features.
        image_range: smallest and largest value of an image of the generator.
        mean_samples: codes of which the mean is taken.

    Attributes:
        image_shape: (C, H, W), found by decoding once.

    Raises:
        TypeError: for something that cannot be called or does not return images.
        ValueError: for a generator in train mode, a latent shape that it does not take, an unknown split layer, or a
            split whose halves together are not the whole.

    Example:
        >>> decoder = nn.Sequential(nn.Linear(4, 64), nn.Unflatten(1, (1, 8, 8)), nn.Tanh()).eval()
        >>> adapter = GeneratorAdapter(decoder, (4,), split_layer="1")
        >>> adapter.decode(adapter.sample_codes(3)).shape
        torch.Size([3, 1, 8, 8])
    """

    _mean: Tensor | None
    _distances: Tensor | None

    def __init__(
        self,
        synthesis: Synthesis,
        latent_shape: tuple[int, ...],
        sample_latent: Callable[[int, torch.Generator], Tensor] | None = None,
        mapping: Synthesis | None = None,
        split_layer: Split = None,
        image_range: tuple[float, float] = (-1.0, 1.0),
        mean_samples: int = 10_000,
    ) -> None:
        super().__init__()
        for name, function in (("synthesis", synthesis), ("mapping", mapping), ("sample_latent", sample_latent)):
            if function is not None and not callable(function):
                raise TypeError(f"{name} must be a module or a function, got {type(function).__name__}")
        latent_shape = tuple(latent_shape)
        if not latent_shape or any(not isinstance(v, int) or v < 1 for v in latent_shape):
            raise ValueError(f"latent_shape must be positive whole numbers, got {latent_shape}")
        if not image_range[0] < image_range[1]:
            raise ValueError(f"image_range must be (smallest, largest), got {image_range}")
        self.synthesis, self.mapping, self.sample_latent = synthesis, mapping, sample_latent
        for name, function in (("synthesis", synthesis), ("mapping", mapping)):
            if not isinstance(function, nn.Module) and (owner := _owner(function)) is not None:
                # nn.Module finds modules, not the owner of a bound method; so it moves to devices with the adapter
                self.add_module(f"{name}_owner", owner)
        self.register_buffer("_mean", None, persistent=False)
        self.register_buffer("_distances", None, persistent=False)
        self.latent_shape, self.split_layer, self.image_range = latent_shape, split_layer, image_range
        self.layers, self.features = latent_shape if len(latent_shape) == 2 else (1, torch.Size(latent_shape).numel())
        self.mean_samples = mean_samples
        self.image_shape: tuple[int, ...] = ()
        with torch.no_grad():
            probe = self.sample_codes(1)
            self.image_shape = tuple(self.decode(probe).shape[1:])
            if split_layer is not None:
                self._check_split(probe)

    def train(self, mode: bool = True) -> GeneratorAdapter:
        """Set the mode of the adapter; the generator stays in eval mode."""
        self.training = mode
        return self

    @property
    def owners(self) -> list[nn.Module]:
        """The modules that are wrapped."""
        return [module for module in map(_owner, (self.synthesis, self.mapping)) if module is not None]

    def _check_split(self, probe: Tensor) -> None:
        if isinstance(self.split_layer, str):
            owner = _owner(self.synthesis)
            names = [name for name, _ in owner.named_modules() if name] if owner is not None else []
            if self.split_layer not in names:
                raise ValueError(f"split_layer {self.split_layer!r} is not in the generator; it has {', '.join(names)}")
        features = self.g1(probe)
        if features.ndim < 2 or len(features) != len(probe):
            raise ValueError(f"the split must give features (B, channels, ...), got {tuple(features.shape)}")
        whole, halves = self.decode(probe), self.g2(features, probe)
        if whole.shape != halves.shape or not torch.allclose(whole, halves, rtol=1e-2, atol=1e-2):
            raise ValueError("g2(g1(codes), codes) differs from synthesis(codes); split_layer must cut it in two")

    def _place(self) -> tuple[torch.device, torch.dtype]:
        for owner in self.owners:
            for tensor in owner.parameters():
                return tensor.device, tensor.dtype
        return torch.device("cpu"), torch.get_default_dtype()

    def _latents(self, codes: Tensor) -> Tensor:
        wanted = (self.layers, self.features)
        if codes.ndim != 3 or tuple(codes.shape[1:]) != wanted:
            raise ValueError(f"codes must have shape (B, {wanted[0]}, {wanted[1]}), got {tuple(codes.shape)}")
        for owner in self.owners:
            check_eval(owner, "generator")
        return codes.reshape(-1, *self.latent_shape)

    def decode(self, codes: Float[Tensor, "B L d"]) -> Float[Tensor, "B C H W"]:
        """Images of codes; gradients reach the codes.

        Raises:
            ValueError: for codes of another shape and a generator in train mode.
            TypeError: when no images come back.
        """
        images = self.synthesis(self._latents(codes))
        images = getattr(images, "sample", images) if not isinstance(images, Tensor) else images
        if not isinstance(images, Tensor) or images.ndim != 4 or len(images) != len(codes):
            got = tuple(images.shape) if isinstance(images, Tensor) else type(images).__name__
            raise TypeError(f"synthesis must return images (B, C, H, W) for latents {self.latent_shape}, got {got}")
        return images

    def _hooked(self, codes: Tensor, hook: Callable[..., Any]) -> Tensor | None:
        owner = _owner(self.synthesis)
        assert owner is not None
        assert isinstance(self.split_layer, str)
        handle = owner.get_submodule(self.split_layer).register_forward_hook(hook)
        try:
            return self.decode(codes)
        except _Stop:
            return None
        finally:
            handle.remove()

    def _need_split(self) -> None:
        if self.split_layer is None:
            raise ValueError("mixing codes or features needs a split; give the adapter split_layer=")

    def g1(self, codes: Float[Tensor, "B L d"]) -> Float[Tensor, "B c ..."]:
        """Feature maps at the split.

        Raises:
            ValueError: without a split, or when the layer was not reached.
        """
        self._need_split()
        if isinstance(self.split_layer, tuple):
            return self.split_layer[0](self._latents(codes))
        taken: list[Tensor] = []

        def stop(module: nn.Module, args: Any, output: Any) -> None:
            taken.append(output)
            raise _Stop

        self._hooked(codes, stop)
        if not taken or not isinstance(taken[0], Tensor):
            raise ValueError(f"split_layer {self.split_layer!r} gave no tensor; choose a layer on the image's way")
        return taken[0]

    def g2(self, features: Float[Tensor, "B c ..."], codes: Float[Tensor, "B L d"]) -> Float[Tensor, "B C H W"]:
        """Images of feature maps at the split; layers behind it get ``codes``."""
        self._need_split()
        if isinstance(self.split_layer, tuple):
            return self.split_layer[1](features, self._latents(codes))
        images = self._hooked(codes, lambda module, args, output: features)
        assert images is not None
        return images

    def mixed_features(
        self, codes: Float[Tensor, "B n L d"], alphas: Float[Tensor, "B n c"] | None
    ) -> Float[Tensor, "B c ..."]:
        """Feature maps of the codes of an image, weighted by channel and summed (LCE, "extended feature maps")."""
        maps = self.g1(codes.flatten(0, 1)).unflatten(0, codes.shape[:2])
        if alphas is None:
            return maps[:, 0]
        return (alphas.reshape(*alphas.shape, *[1] * (maps.ndim - 3)) * maps).sum(1)

    def decode_mixed(
        self, codes: Float[Tensor, "B n L d"], alphas: Float[Tensor, "B n c"] | None = None
    ) -> Float[Tensor, "B C H W"]:
        """Images of several codes each, ``G2(sum_n alpha_n * G1(w_n))``; layers behind the split get the first code.

        The formula is the one of the multi-code GAN prior; which code the later layers get is ours (reconstructed).
        One code without weights is ``decode``.
        """
        if alphas is None:
            if codes.shape[1] != 1:
                raise ValueError(f"{codes.shape[1]} codes an image need alphas of shape (B, n, channels)")
            return self.decode(codes[:, 0])
        return self.g2(self.mixed_features(codes, alphas), codes[:, 0])

    def _draws(self, n: int, seed: int) -> Iterator[Tensor]:
        device, dtype = self._place()
        generator = torch.Generator().manual_seed(seed)
        for start in range(0, n, 1000):
            count = min(1000, n - start)
            if self.sample_latent is not None:
                z = self.sample_latent(count, generator)
            elif self.mapping is not None:
                z = torch.randn(count, self.features, generator=generator)
            else:
                z = torch.randn(count, *self.latent_shape, generator=generator)
            z = z.to(device, dtype)
            if self.mapping is not None:
                z = self.mapping(z)
                z = z[:, None].expand(-1, self.layers, -1) if z.ndim == 2 else z
            yield z.reshape(count, self.layers, self.features)

    @torch.no_grad()
    def sample_codes(self, n: int, seed: int = 0) -> Float[Tensor, "n L d"]:
        """Codes as the generator was trained to read them, drawn and mapped.

        Raises:
            ValueError: for a generator in train mode.
        """
        for owner in self.owners:
            check_eval(owner, "generator")
        return torch.cat(list(self._draws(n, seed)))

    @torch.no_grad()
    def mean_code(self) -> Float[Tensor, "L d"]:
        """Mean of ``mean_samples`` codes, computed once."""
        if self._mean is None:
            total = sum(part.double().sum(0) for part in self._draws(self.mean_samples, 1))
            assert isinstance(total, Tensor)
            self._mean = (total / self.mean_samples).to(self._place()[1])
        return self._mean

    @torch.no_grad()
    def code_distances(self) -> Float[Tensor, " m"]:
        """Distances of ``mean_samples`` codes from their mean, computed once."""
        if self._distances is None:
            mean, parts = self.mean_code(), self._draws(self.mean_samples, 2)
            self._distances = torch.cat([(part - mean).float().flatten(1).norm(dim=1) for part in parts])
        return self._distances

    def check_images(self, images: Tensor, name: str = "images") -> None:
        """Refuse what this generator could not have drawn.

        Raises:
            TypeError: for whole numbers.
            ValueError: for another shape, NaN, or values outside ``image_range``.
        """
        low, high = self.image_range
        if not isinstance(images, Tensor) or not images.is_floating_point():
            got = images.dtype if isinstance(images, Tensor) else type(images).__name__
            raise TypeError(f"{name} must be a tensor of floats in {low:g}..{high:g}, got {got}; scale it first")
        if images.ndim != 4 or tuple(images.shape[1:]) != self.image_shape:
            wanted = ", ".join(map(str, self.image_shape))
            raise ValueError(f"{name} must have the generator's shape (B, {wanted}), got {tuple(images.shape)}")
        if not len(images):
            raise ValueError(f"{name} is empty; give at least one image")
        if not bool(images.isfinite().all()):
            raise ValueError(f"{name} contain NaN or infinite pixels")
        slack = 1e-3 * (high - low)
        if float(images.min()) < low - slack or float(images.max()) > high + slack:
            raise ValueError(
                f"{name} must lie in the generator's range {low:g}..{high:g}, got {float(images.min()):g}.."
                f"{float(images.max()):g}"
            )
