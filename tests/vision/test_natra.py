import copy
import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from torchgraft import datasets
from torchgraft.vision.natra import (
    Directions,
    FeatureDistance,
    GeneratorAdapter,
    InversionResult,
    NaTraAugment,
    discover_directions,
    edit,
    encoder_loss,
    invert,
    latent_mix,
    natra_loss,
    pixel_pgd,
    psnr,
    shift_codes,
)


def seeded(make, seed=0):
    torch.manual_seed(seed)
    return make().eval()


def linear_generator(d=4, pixels=64):
    return seeded(lambda: nn.Sequential(nn.Linear(d, pixels), nn.Unflatten(1, (1, 8, pixels // 8)))).double()


class Styled(nn.Module):
    """A miniature of StyleGAN: a constant, and a code for each of two layers; batch norm and dropout to trip over."""

    def __init__(self, d=6, c=5):
        super().__init__()
        self.start = nn.Parameter(torch.randn(1, c, 4, 4))
        self.styles = nn.ModuleList(nn.Linear(d, c) for _ in range(2))
        self.convs = nn.ModuleList(nn.Conv2d(c, c, 3, padding=1) for _ in range(2))
        self.cut = nn.Identity()
        self.norm, self.drop, self.out = nn.BatchNorm2d(c), nn.Dropout(0.5), nn.Conv2d(c, 3, 1)

    def forward(self, w):
        h = self.start.expand(len(w), -1, -1, -1)
        for i, (style, conv) in enumerate(zip(self.styles, self.convs, strict=True)):
            h = conv(F.interpolate(h, scale_factor=2.0) if i else h) * (1 + style(w[:, i]))[..., None, None]
            h = torch.tanh(h) if i else self.cut(torch.tanh(h))
        return torch.tanh(self.out(self.drop(self.norm(h))))


@pytest.fixture
def styled():
    mapping = seeded(lambda: nn.Sequential(nn.Linear(6, 6), nn.Tanh()), 1)
    return GeneratorAdapter(seeded(Styled), (2, 6), mapping=mapping, split_layer="cut", mean_samples=500)


@pytest.fixture
def classifier():
    return seeded(
        lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3))
    )


def store_of(adapter, n=6, **how):
    images = adapter.decode(adapter.sample_codes(n, 7)).detach()
    return invert(adapter, images, **({"steps": 3, "shift": None, "min_psnr": -100.0} | how))


# the generator


def test_three_families_decode_split_and_mix(styled):
    class Dcgan(nn.Sequential):
        def __init__(self):
            super().__init__(
                nn.ConvTranspose2d(8, 6, 4), nn.BatchNorm2d(6), nn.ReLU(), nn.ConvTranspose2d(6, 3, 4, 2, 1), nn.Tanh()
            )

    class Autoencoder(nn.Module):
        """Its ``decode`` returns an object with ``.sample``, as diffusers' autoencoders do."""

        def __init__(self):
            super().__init__()
            self.decoder = Dcgan()

        def decode(self, z):
            return SimpleNamespace(sample=self.decoder(z.reshape(len(z), 8, 1, 1)))

    dcgan = GeneratorAdapter(seeded(Dcgan), (8, 1, 1), split_layer="2")
    kl = GeneratorAdapter(seeded(Autoencoder).decode, (2, 2, 2), split_layer="decoder.2")
    halves = seeded(
        lambda: nn.Sequential(nn.Linear(4, 24), nn.Linear(24, 3 * 64), nn.Unflatten(1, (3, 8, 8)), nn.Tanh())
    )
    pair = (lambda z: halves[0](z), lambda features, z: halves[1:](features))
    vae = GeneratorAdapter(halves, (4,), split_layer=pair)
    for adapter, layers in ((dcgan, 1), (kl, 1), (vae, 1), (styled, 2)):
        assert adapter.layers == layers
        assert adapter.image_shape == (3, 8, 8)
        codes = adapter.sample_codes(5)
        assert codes.shape == (5, layers, adapter.features)
        images = adapter.decode(codes)
        assert torch.equal(adapter.g2(adapter.g1(codes), codes), images)
        # one code of weight one is plain decoding, to the last bit
        ones = torch.ones(5, 1, adapter.g1(codes).shape[1])
        assert torch.equal(adapter.decode_mixed(codes[:, None], ones), images)
        for method in ("pca", "sefa", "random", "feature_pca"):
            found = discover_directions(adapter, method, 2, samples=50)
            assert torch.allclose(found.vectors.flatten(1).norm(dim=1), torch.ones(2), atol=1e-5)
            for n in (1, 2):
                store = store_of(adapter, n_codes=n)
                assert edit(adapter, store, found, torch.ones(6, 2)).shape == (6, 3, 8, 8)


def test_diffusers_autoencoder_is_wrapped_as_it_is():
    diffusers = pytest.importorskip("diffusers")
    vae = diffusers.AutoencoderKL(block_out_channels=(32,), latent_channels=2, norm_num_groups=8).eval()
    adapter = GeneratorAdapter(vae.decode, (2, 8, 8), split_layer="decoder.mid_block", image_range=(-99, 99))
    store = store_of(adapter, 2, encoder=lambda x: vae.encode(x).latent_dist.mean)
    assert torch.equal(store.recon, vae.decode(store.codes.view(2, 2, 8, 8)).sample)


def test_mixing_is_the_formula_of_the_multi_code_prior(styled):
    codes = styled.sample_codes(6).view(3, 2, 2, 6)
    alphas = torch.randn(3, 2, 5)
    image = styled.decode_mixed(codes, alphas)
    for b in range(3):
        total = 0
        for n in range(2):
            features = styled.g1(codes[b, n][None])
            total = total + torch.stack([alphas[b, n, c] * features[0, c] for c in range(5)])[None]
        assert torch.allclose(styled.g2(total, codes[b, :1]), image[b : b + 1], atol=1e-6)


def test_codes_are_mapped_and_their_statistics_are_those_of_samples(styled):
    codes = styled.sample_codes(500, seed=1)
    assert torch.equal(codes[:, 0], codes[:, 1]), "the mapping gives one code for all layers"
    assert torch.allclose(styled.mean_code(), codes.mean(0), atol=1e-6)
    assert styled.code_distances().shape == (500,)
    assert torch.equal(styled.sample_codes(3, 5), styled.sample_codes(3, 5))
    drawn = GeneratorAdapter(linear_generator(), (4,), lambda n, g: 3 + 0 * torch.randn(n, 4, generator=g))
    assert torch.allclose(drawn.mean_code(), torch.full((1, 4), 3.0, dtype=torch.float64))


def test_generator_stays_as_it_is(styled, classifier):
    before = copy.deepcopy(styled.synthesis.state_dict())
    natra = NaTraAugment(styled, discover_directions(styled, "pca", 3, samples=50), store_of(styled), "pgd", steps=2)
    natra.train()
    y = torch.tensor([0, 1, 2, 0, 1, 2])
    natra_loss(classifier, natra(torch.arange(6), y, classifier), y, natra(torch.arange(6), y, classifier)).backward()
    assert not any(part.training for part in styled.synthesis.modules())
    assert all(p.grad is None for p in styled.parameters())
    assert all(torch.equal(before[k], v) for k, v in styled.synthesis.state_dict().items())
    assert all(p.requires_grad for p in styled.synthesis.parameters())


def test_wrong_generators_are_refused(without_shape_checks):
    decoder = nn.Sequential(nn.Linear(4, 64), nn.Unflatten(1, (1, 8, 8)))
    with pytest.raises(ValueError, match=r"train mode.*eval"):
        GeneratorAdapter(decoder, (4,))
    adapter = GeneratorAdapter(decoder.eval(), (4,))
    decoder.train()
    for call in (lambda: adapter.decode(torch.zeros(1, 1, 4)), lambda: adapter.sample_codes(2)):
        with pytest.raises(ValueError, match="train mode"):
            call()
    decoder.eval()
    with pytest.raises(ValueError, match="needs a split"):
        adapter.g1(torch.zeros(1, 1, 4))
    with pytest.raises(ValueError, match="'9' is not in the generator; it has 0, 1"):
        GeneratorAdapter(decoder, (4,), split_layer="9")
    with pytest.raises(ValueError, match="differs from synthesis"):
        GeneratorAdapter(decoder, (4,), split_layer=(decoder[0], lambda f, z: decoder[1](f + 1)))
    with pytest.raises(TypeError, match=r"images \(B, C, H, W\)"):
        GeneratorAdapter(decoder[0], (4,))
    with pytest.raises(TypeError, match="synthesis must be"):
        GeneratorAdapter("stylegan", (4,))
    with pytest.raises(ValueError, match="latent_shape"):
        GeneratorAdapter(decoder, (0,))
    with pytest.raises(ValueError, match="image_range"):
        GeneratorAdapter(decoder, (4,), image_range=(1, 0))


# inversion


def test_inversion_of_a_linear_generator_is_least_squares():
    generator = linear_generator()
    adapter = GeneratorAdapter(generator, (4,), image_range=(-9, 9), mean_samples=200)
    images = torch.randn(3, 1, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    found = invert(adapter, images, steps=300, lr=0.1, shift=None, weights=(1, 0, 0), min_psnr=-100.0)
    A, b = generator[0].weight.detach(), generator[0].bias.detach()
    closed = torch.linalg.lstsq(A, (images.flatten(1) - b).T).solution.T
    assert torch.allclose(found.codes[:, 0, 0], closed, atol=1e-4)
    # with a penalty it is ridge regression towards the mean code
    found = invert(adapter, images, steps=300, lr=0.1, shift=None, weights=(1, 0, 0.5), min_psnr=-100.0)
    mean = adapter.mean_code()[0]
    left = A.T @ A / 64 + 0.5 / 4 * torch.eye(4, dtype=torch.float64)
    right = (images.flatten(1) - b) @ A / 64 + 0.5 / 4 * mean
    assert torch.allclose(found.codes[:, 0, 0], torch.linalg.solve(left, right.T).T, atol=1e-4)


def test_inversion_finds_what_the_generator_drew():
    adapter = GeneratorAdapter(linear_generator().float(), (4,), image_range=(-9, 9), mean_samples=200)
    truth = adapter.sample_codes(4, 9)
    found = invert(adapter, adapter.decode(truth).detach(), steps=300, shift=None)
    assert found.psnr.min() > 35
    assert torch.allclose(found.codes[:, 0], truth, atol=0.05)
    assert bool(found.kept.all())


def test_one_image_does_not_depend_on_its_neighbours(styled):
    images = styled.decode(styled.sample_codes(5, 3)).detach()
    how = {"steps": 10, "shift": "image", "min_psnr": -100.0}
    whole, alone = invert(styled, images, **how), invert(styled, images[2:3], **how)
    small = invert(styled, images, batch_size=2, **how)
    assert torch.allclose(whole.codes[2:3], alone.codes, atol=1e-4)
    assert torch.allclose(whole.codes, small.codes, atol=1e-4)


def test_more_codes_reconstruct_better_and_start_from_the_single_code(styled):
    torch.manual_seed(0)
    images = (torch.rand(4, 3, 8, 8) * 2 - 1) * 0.5
    start = [invert(styled, images, steps=0, n_codes=n, shift=None, min_psnr=-100.0) for n in (1, 3)]
    assert torch.allclose(start[0].recon, start[1].recon, atol=1e-6)
    one, many = (invert(styled, images, steps=60, n_codes=n, shift=None, min_psnr=-100.0).psnr.mean() for n in (1, 4))
    assert many > one + 0.3
    assert invert(styled, images, steps=2, n_codes=3, min_psnr=-100.0).alphas.shape == (4, 3, 5)


def test_encoders_of_every_shape_and_their_loss(styled):
    images = styled.decode(styled.sample_codes(5, 3)).detach()
    codes = torch.randn(5, 2, 6)
    how = {"steps": 0, "shift": None, "min_psnr": -100.0}
    assert torch.equal(invert(styled, images, lambda x: codes, **how).codes[:, 0], codes)
    assert torch.equal(invert(styled, images, lambda x: codes.flatten(1), **how).codes[:, 0], codes)
    one = invert(styled, images, lambda x: codes[:, 0], **how).codes[:, 0]
    assert torch.equal(one, codes[:, :1].expand(-1, 2, -1))
    with pytest.raises(ValueError, match="encoder must return codes of shape"):
        invert(styled, images, lambda x: codes[:3], **how)
    with pytest.raises(ValueError, match="encoder is in train mode"):
        invert(styled, images, nn.Flatten(), **how)

    adapter = GeneratorAdapter(linear_generator().float(), (4,), image_range=(-9, 9), mean_samples=100)
    encoder = seeded(lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 4)))
    optimizer = torch.optim.Adam(encoder.parameters(), 0.02)
    for step in range(60):
        loss = encoder_loss(adapter, encoder, adapter.sample_codes(32, step))
        first = loss.item() if step == 0 else first
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < first / 20
    truth = adapter.sample_codes(4, 1000)
    exact = encoder_loss(adapter, lambda x: truth, truth)
    assert exact.item() == 0
    real = adapter.decode(truth).detach() + 1
    one = encoder_loss(
        adapter, lambda x: truth, truth, real, perceptual=lambda a, b: torch.ones(len(a)), weights=(5, 0)
    )
    assert one.item() == pytest.approx(6, rel=1e-5)


def test_shift_brings_codes_to_where_samples_lie(styled):
    mean, limit = styled.mean_code(), styled.code_distances().quantile(0.95)
    codes = mean + torch.randn(8, 1, 2, 6) * torch.linspace(0.01, 3, 8).view(8, 1, 1, 1)

    def far(c):
        return (c - mean).flatten(2).norm(dim=2)

    moved, psi = shift_codes(styled, codes, "quantile")
    assert psi.unique().numel() == 1
    assert far(moved).quantile(0.95).item() == pytest.approx(limit.item(), rel=1e-4)
    moved, psi = shift_codes(styled, codes, "image")
    assert bool((far(moved) <= limit * 1.0001).all())
    near = far(codes).amax(1) <= limit
    assert torch.equal(psi == 1, near)
    assert near.any()
    assert torch.allclose(shift_codes(styled, codes, 0.5)[0], (codes + mean) / 2)
    assert shift_codes(styled, codes, None)[0] is codes
    inside = mean + 0.01 * torch.randn(8, 1, 2, 6)
    assert torch.allclose(shift_codes(styled, inside)[0], inside)
    for wrong in (0, 1.5, True, "mean"):
        with pytest.raises(ValueError, match="shift must be"):
            shift_codes(styled, codes, wrong)


@pytest.mark.parametrize(
    ("images", "error", "match"),
    [
        (torch.zeros(3, 8, 8), ValueError, r"shape \(B, 3, 8, 8\), got \(3, 8, 8\)"),
        (torch.zeros(2, 1, 8, 8), ValueError, r"got \(2, 1, 8, 8\)"),
        (torch.zeros(2, 3, 8, 9), ValueError, r"got \(2, 3, 8, 9\)"),
        (torch.zeros(0, 3, 8, 8), ValueError, "empty"),
        (torch.zeros(2, 3, 8, 8, dtype=torch.uint8), TypeError, "uint8"),
        (torch.full((2, 3, 8, 8), 255.0), ValueError, r"range -1..1, got 255..255"),
        (torch.full((2, 3, 8, 8), math.nan), ValueError, "NaN"),
    ],
)
def test_images_that_are_not_the_generators_are_refused(without_shape_checks, styled, images, error, match):
    with pytest.raises(error, match=match):
        invert(styled, images)
    directions = discover_directions(styled, "pca", 2, samples=50)
    if images.is_floating_point():
        with pytest.raises(error, match=match):
            NaTraAugment(styled, directions, mode="random", encoder=lambda x: torch.zeros(len(x), 2, 6))(images)


def test_settings_of_inversion_are_checked(styled):
    x = styled.decode(styled.sample_codes(2)).detach()
    for wrong in ({"n_codes": 0}, {"steps": -1}, {"batch_size": 0}, {"lr": 0.0}, {"weights": (1, 1, -1)}):
        with pytest.raises(ValueError, match="must be"):
            invert(styled, x, **wrong)
    plain = GeneratorAdapter(styled.synthesis, (2, 6))
    with pytest.raises(ValueError, match="split_layer="):
        invert(plain, x, n_codes=2)
    with pytest.warns(UserWarning, match="scale the images"):
        invert(styled, x.abs(), steps=0, min_psnr=-100.0)
    with pytest.raises(FloatingPointError, match="lower lr"):
        invert(styled, x, lambda i: torch.full((2, 2, 6), math.nan), steps=1)


def test_bad_reconstructions_are_marked_and_never_edited(styled):
    images = styled.decode(styled.sample_codes(4, 3)).detach()
    images[1] = torch.sign(torch.randn(3, 8, 8))
    with pytest.warns(UserWarning, match=r"1 of 4 images .* will not be edited"):
        store = invert(styled, images, steps=80, shift=None, min_psnr=9.0)
    assert store.kept.tolist() == [True, False, True, True]
    natra = NaTraAugment(styled, discover_directions(styled, "pca", 2, samples=50), store, "random")
    found = natra.attack(torch.arange(4))
    assert torch.equal(found.images[1], images[1])
    assert found.amounts[1].tolist() == [0, 0]
    assert not torch.allclose(found.images[0], store.recon[0])


def test_store_is_saved_indexed_and_read(styled, tmp_path):
    for n in (1, 2):
        store = store_of(styled, n_codes=n)
        store.save(tmp_path / "codes.safetensors")
        again = InversionResult.load(tmp_path / "codes.safetensors")
        assert torch.allclose(again.codes, store.codes, atol=2e-3)
        assert torch.equal(again.kept, store.kept)
        assert (again.alphas is None) == (n == 1)
        assert len(again[torch.tensor([0, 2])]) == 2
    from safetensors.torch import save_file

    save_file({"codes": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="lacks images"):
        InversionResult.load(tmp_path / "other.safetensors")


def test_psnr_and_feature_distance():
    a = torch.zeros(2, 1, 4, 4)
    assert psnr(a, a + 0.1, 1.0).tolist() == pytest.approx([20, 20], rel=1e-5)
    first, second = seeded(lambda: nn.Conv2d(1, 3, 3)), seeded(lambda: nn.Conv2d(3, 2, 1), 1)
    distance = FeatureDistance(first, second).eval()
    a, b = torch.randn(2, 1, 5, 5), torch.randn(2, 1, 5, 5)
    expected = torch.zeros(2)
    for f in (first, nn.Sequential(first, second)):
        u, v = f(a), f(b)
        u, v = u / u.norm(dim=1, keepdim=True), v / v.norm(dim=1, keepdim=True)
        expected = expected + (u - v).square().sum(1).mean((1, 2))
    assert torch.allclose(distance(a, b), expected, atol=1e-5)
    with pytest.raises(ValueError, match="train mode"):
        distance.train()(a, b)
    with pytest.raises(ValueError, match="empty"):
        FeatureDistance()


def test_perceptual_distance_takes_part(styled):
    images = styled.decode(styled.sample_codes(3, 3)).detach()
    distance = FeatureDistance(seeded(lambda: nn.Conv2d(3, 4, 3), 5)).eval()
    how = {"steps": 40, "shift": None, "min_psnr": -100.0}
    without, with_it = invert(styled, images, **how), invert(styled, images, perceptual=distance, **how)
    assert distance(with_it.recon, images).mean() < distance(without.recon, images).mean()


# directions


def test_pca_recovers_the_axes_of_a_gaussian():
    torch.manual_seed(0)
    axes = torch.linalg.qr(torch.randn(4, 4)).Q.T
    sigma = torch.tensor([5.0, 3.0, 2.0, 1.0])
    adapter = GeneratorAdapter(
        linear_generator().float(), (4,), lambda n, g: torch.randn(n, 4, generator=g) * sigma @ axes
    )
    found = discover_directions(adapter, "pca", 4)
    cosine = (found.vectors[:, 0] * axes).sum(1).abs()
    assert bool((cosine > 0.99).all())
    assert torch.allclose(found.scales, sigma, rtol=0.05)
    feature = GeneratorAdapter(adapter.synthesis, (4,), adapter.sample_latent, split_layer="0")
    found = discover_directions(feature, "feature_pca", 4, samples=10_000)
    # features are linear in the code here, with this covariance
    A = adapter.synthesis[0].weight.detach() @ axes.T * sigma
    values, vectors = torch.linalg.eigh(A @ A.T)
    assert found.space == "feature"
    assert bool(((found.vectors * vectors.T.flip(0)[:4]).sum(1).abs() > 0.99).all())
    assert torch.allclose(found.scales, values.flip(0)[:4].sqrt(), rtol=0.05)


def test_sefa_is_the_top_right_singular_vectors(styled):
    generator = linear_generator()
    found = discover_directions(GeneratorAdapter(generator, (4,)), "sefa", 3, samples=100)
    _, vectors = torch.linalg.eigh(generator[0].weight.T @ generator[0].weight)
    assert torch.allclose((found.vectors[:, 0] * vectors.flip(1).T[:3]).sum(1).abs(), torch.ones(3).double())

    stacked = torch.cat([style.weight for style in styled.synthesis.styles])
    top = torch.linalg.svd(stacked.double()).Vh[0].float()
    found = discover_directions(styled, "sefa", 1, samples=100)
    for layer in range(2):
        assert (found.vectors[0, layer] @ top).abs().item() == pytest.approx(0.5**0.5, rel=1e-5)
    named = discover_directions(styled, "sefa", 1, samples=100, weights=["styles.1.weight"], layers=[1])
    own = torch.linalg.svd(styled.synthesis.styles[1].weight).Vh[0]
    assert (named.vectors[0, 1] @ own).abs().item() == pytest.approx(1, rel=1e-5)
    assert not named.vectors[0, 0].any()
    transposed = seeded(lambda: nn.Sequential(nn.ConvTranspose2d(5, 3, 4)))
    found = discover_directions(GeneratorAdapter(transposed, (5, 1, 1)), "sefa", 1, samples=50)
    weight = transposed[0].weight.flatten(1).T
    gains = (weight @ found.vectors[0, 0]).norm()
    assert gains.item() == pytest.approx(torch.linalg.matrix_norm(weight, 2).item(), rel=1e-5)


def test_directions_stay_in_their_layers(styled):
    found = discover_directions(styled, "pca", 2, layers=[1], samples=100)
    assert not found.vectors[:, 0].any()
    store = store_of(styled)
    same = styled.g1(store.codes[:, 0])
    moved = styled.g1(store.codes[:, 0] + found.offset(torch.ones(6, 2)))
    assert torch.equal(same, moved), "features before the edited layers must not change"


def test_wrong_directions_are_refused(without_shape_checks, styled):
    for wrong, match in (
        ({"method": "ica"}, "method must be"),
        ({"k": 0}, "k must lie"),
        ({"k": 99}, "k must lie in 1..12"),
        ({"layers": [2]}, "layers must be"),
        ({"layers": []}, "layers must be"),
        ({"method": "feature_pca", "layers": [0]}, "layers must be"),
        ({"method": "sefa", "weights": ["none"]}, "not parameters"),
    ):
        with pytest.raises(ValueError, match=match):
            discover_directions(styled, **({"samples": 50, "k": 2} | wrong))
    odd = seeded(lambda: nn.Sequential(nn.Unflatten(1, (1, 2, 2))))
    with pytest.raises(ValueError, match="weights="):
        discover_directions(GeneratorAdapter(odd, (4,)), "sefa", 1, samples=50)
    found, store = discover_directions(styled, "pca", 2, samples=50), store_of(styled)
    with pytest.raises(ValueError, match=r"\(B, 2\)"):
        edit(styled, store, found, torch.zeros(6, 3))
    with pytest.raises(ValueError, match="amounts are for 5"):
        edit(styled, store, found, torch.zeros(5, 2))


@pytest.fixture
def signed():
    """Axis 0 is the class (the sign of the first pixel), axis 1 is not; an oracle reads the class off."""
    generator = nn.Sequential(nn.Linear(2, 4, bias=False), nn.Unflatten(1, (1, 2, 2))).eval()
    generator[0].weight.data = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
    adapter = GeneratorAdapter(generator, (2,), image_range=(-99, 99), mean_samples=500)
    codes = torch.randn(200, 2, generator=torch.Generator().manual_seed(0))
    codes[:, 0] = codes[:, 0].sign() * (1 + codes[:, 0].abs())
    images = adapter.decode(codes[:, None]).detach()
    store = invert(adapter, images, lambda x: codes, steps=0, shift=None)
    axes = Directions(torch.eye(2)[:, None], torch.ones(2), torch.full((2,), 3.0))

    def oracle(x):
        return torch.stack([x[:, 0, 0, 0], -x[:, 0, 0, 0]], 1)

    return adapter, store, axes, oracle


def test_filter_drops_or_shrinks_what_changes_the_class(signed):
    adapter, store, axes, oracle = signed
    kept = axes.filter(adapter, oracle, store[:100], tau=0.95, radius=3.0, min_radius=0.25)
    # |code| >= 1, so that class changes set in beyond radius 1 and the other axis is free
    assert len(kept) == 2
    assert 1 <= kept.radii[0] < 3
    assert kept.radii[1] == 3
    assert bool((kept.keep_rates >= 0.95).all())
    fresh = store[100:]
    for k in range(2):
        amounts = torch.zeros(100, 2)
        amounts[:, k] = (2 * torch.rand(100, generator=torch.Generator().manual_seed(1)) - 1) * kept.radii[k]
        same = oracle(edit(adapter, fresh, kept, amounts)).argmax(1) == oracle(fresh.recon).argmax(1)
        assert same.float().mean() >= 0.93, "95 % on images of the filter, hardly less on others"
    only = axes.filter(adapter, oracle, store, min_radius=2.9)
    assert torch.equal(only.vectors, axes.vectors[1:])
    labels = oracle(store.images).argmax(1)
    assert len(axes.filter(adapter, oracle, store, labels)) == 2


def test_filter_refuses_with_a_table(signed):
    adapter, store, axes, oracle = signed
    fickle = Directions(axes.vectors[:1] * 1, torch.tensor([100.0]), torch.tensor([3.0]))
    with pytest.raises(ValueError, match=r"no direction keeps the label of 0\.95.*\n.*scale  radius  keep rate\n.*100"):
        fickle.filter(adapter, oracle, store)
    with pytest.raises(ValueError, match="no image has a vote"):
        axes.filter(adapter, oracle, store, 1 - oracle(store.recon).argmax(1))
    with pytest.raises(ValueError, match="3 labels do not belong to 200"):
        axes.filter(adapter, oracle, store, torch.zeros(3, dtype=torch.long))
    for wrong in ({"tau": 0.0}, {"points": 3}, {"min_radius": 4.0}):
        with pytest.raises(ValueError, match="even number of points"):
            axes.filter(adapter, oracle, store, **wrong)
    with pytest.raises(TypeError, match="must return logits"):
        axes.filter(adapter, lambda x: x.flatten(1).mean(1), store)


# training


@pytest.mark.parametrize("n_codes", [1, 2])
@pytest.mark.parametrize("method", ["pca", "feature_pca"])
def test_edits_are_in_the_box_and_harder_than_random(styled, classifier, n_codes, method):
    store, y = store_of(styled, n_codes=n_codes), torch.tensor([0, 1, 2, 0, 1, 2])
    directions = discover_directions(styled, method, 3, samples=50)
    zero = edit(styled, store, directions, torch.zeros(6, 3))
    assert torch.allclose(zero, store.recon, atol=1e-6)
    control = NaTraAugment(styled, directions, store, "reconstruction")(torch.arange(6))
    assert torch.equal(control, zero)
    for mode in ("random", "search", "pgd"):
        natra = NaTraAugment(styled, directions, store, mode, candidates=5, radius=0.5, steps=4)
        torch.manual_seed(0)
        found = natra.attack(torch.arange(6), y, classifier)
        assert bool((found.amounts.abs() <= 1.5 + 1e-6).all())
        assert torch.allclose(found.images, edit(styled, store, directions, found.amounts), atol=1e-5)
        assert not found.images.requires_grad
        if mode != "random":
            assert torch.allclose(F.cross_entropy(classifier(found.images), y, reduction="none"), found.loss, atol=1e-5)
            assert bool((found.loss >= found.start).all())
            assert bool((found.loss > found.start).any())
        else:
            torch.manual_seed(0)
            first = NaTraAugment(styled, directions, store, "search", 1, 0.5).attack(torch.arange(6), y, classifier)
            assert torch.equal(first.images, found.images), "search with one candidate is a random edit"


def test_search_keeps_the_worst_of_its_candidates(styled, classifier):
    store, y = store_of(styled), torch.tensor([0, 1, 2, 0, 1, 2])
    directions = discover_directions(styled, "pca", 3, samples=50)
    torch.manual_seed(4)
    found = NaTraAugment(styled, directions, store, "search", 4).attack(torch.arange(6), y, classifier)
    torch.manual_seed(4)
    drawn = [(2 * torch.rand(6, 3) - 1) * directions.radii for _ in range(4)]
    losses = torch.stack(
        [F.cross_entropy(classifier(edit(styled, store, directions, a)), y, reduction="none") for a in drawn]
    )
    assert torch.allclose(found.loss, losses.amax(0), atol=1e-6)


def test_pgd_steps_are_the_sign_steps_of_the_loss(styled, classifier):
    store, y = store_of(styled)[:2], torch.tensor([0, 1])
    directions = discover_directions(styled, "pca", 2, samples=50)
    torch.manual_seed(0)
    found = NaTraAugment(styled, directions, store, "pgd", steps=1).attack(torch.arange(2), y, classifier)
    torch.manual_seed(0)
    a = ((2 * torch.rand(2, 2) - 1) * directions.radii).requires_grad_(True)
    before = F.cross_entropy(classifier(edit(styled, store, directions, a)), y, reduction="none")
    slope = torch.autograd.grad(before.sum(), a)[0]
    b = (a + 2.5 * directions.radii * slope.sign()).detach().clamp(-directions.radii, directions.radii)
    after = F.cross_entropy(classifier(edit(styled, store, directions, b)), y, reduction="none")
    assert torch.allclose(found.loss, torch.maximum(before, after), atol=1e-6)


def test_modes_and_statistics_of_the_classifier_come_back(styled, classifier):
    store, y = store_of(styled), torch.tensor([0, 1, 2, 0, 1, 2])
    classifier.train()
    classifier[2].eval()
    before = copy.deepcopy(classifier.state_dict())
    directions = discover_directions(styled, "pca", 2, samples=50)
    for mode in ("search", "pgd"):
        natra = NaTraAugment(styled, directions, store, mode, candidates=2, steps=1)
        natra(torch.arange(6), y, classifier)
        with pytest.raises(IndexError):
            natra(torch.arange(6), y + 5, classifier)
    pixel_pgd(classifier, store.recon.clamp(-1, 1), y, steps=2)
    assert [part.training for part in classifier] == [True, True, False, True, True]
    assert all(torch.equal(before[k], v) for k, v in classifier.state_dict().items())
    assert all(p.grad is None for p in classifier.parameters())


def test_weight_zero_is_ordinary_training_to_the_last_bit(classifier):
    x, y = torch.randn(4, 3, 8, 8), torch.tensor([0, 1, 2, 0])
    other = copy.deepcopy(classifier).train()
    classifier.train()
    natra_loss(classifier, x, y, torch.randn(4, 3, 8, 8), 0.0).backward()
    F.cross_entropy(other(x), y).backward()
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(classifier.parameters(), other.parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(classifier.buffers(), other.buffers(), strict=True))


def test_loss_is_the_formula():
    a, b = torch.randn(2, 5, 3, dtype=torch.float64)
    y = torch.tensor([0, 1, 2, 0, 1])
    p, q = a.softmax(1), b.softmax(1)
    naive = -sum(p[i, y[i]].log() + 0.7 * q[i, y[i]].log() for i in range(5)) / 5
    naive = naive + 0.3 * sum(p[i, c] * (p[i, c] / q[i, c]).log() for i in range(5) for c in range(3)) / 5
    assert torch.allclose(natra_loss(lambda z: z, a, y, b, 0.7, 0.3), naive)
    whole = natra_loss(lambda z: SimpleNamespace(logits=z), a, y, b, 0.7, 0.3)
    assert torch.allclose(whole, naive)
    assert torch.autograd.gradcheck(lambda u, v: natra_loss(lambda z: z, u, y, v, 0.7, 0.3), (
        a.clone().requires_grad_(True), b.clone().requires_grad_(True)
    ))  # fmt: skip


def test_transformers_classifier_is_trained_through_a_prepared_input(styled):
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=8, patch_size=4
    )
    vit = transformers.ViTForImageClassification(config)
    store, y = store_of(styled), torch.tensor([0, 1, 0, 1, 0, 1])
    seen = []

    def prepare(x):
        seen.append(x)
        return x / 2

    directions = discover_directions(styled, "pca", 2, samples=50)
    natra = NaTraAugment(styled, directions, store, "pgd", steps=1, prepare=prepare)
    loss = natra_loss(vit, prepare(store.images), y, prepare(natra(torch.arange(6), y, vit)))
    loss.backward()
    assert len(seen) == 4
    assert all(p.grad is not None for p in vit.classifier.parameters())


def test_images_are_inverted_in_one_pass_by_an_encoder(styled):
    images = styled.decode(styled.sample_codes(3, 7)).detach()
    directions = discover_directions(styled, "pca", 2, samples=50)
    truth = styled.sample_codes(3, 7)
    natra = NaTraAugment(styled, directions, mode="reconstruction", encoder=lambda x: truth)
    shifted, _ = shift_codes(styled, truth[:, None], "image")
    assert torch.equal(natra(images), styled.decode(shifted[:, 0]))


def test_pool_edits_every_image_once(styled, classifier):
    store, y = store_of(styled), torch.tensor([0, 1, 2, 0, 1, 2])
    directions = discover_directions(styled, "pca", 2, samples=50)
    pool = NaTraAugment(styled, directions, store, "reconstruction").pool(y, classifier, batch_size=4)
    assert torch.allclose(pool, store.recon, atol=1e-5)


def test_wrong_calls_of_the_augmentation_are_refused(without_shape_checks, styled, classifier):
    store, y = store_of(styled), torch.tensor([0, 1, 2, 0, 1, 2])
    directions = discover_directions(styled, "pca", 2, samples=50)
    for wrong, match in (
        ({"mode": "fgsm"}, "mode must be"),
        ({"candidates": 0}, "at least 1"),
        ({"radius": 0.0}, "radius positive"),
    ):
        with pytest.raises(ValueError, match=match):
            NaTraAugment(styled, directions, store, **wrong)
    with pytest.raises(ValueError, match="directions are empty"):
        NaTraAugment(styled, directions._chosen(torch.zeros(0, dtype=torch.long)), store)
    natra, i = NaTraAugment(styled, directions, store), torch.arange(6)
    with pytest.raises(ValueError, match="labels and model"):
        natra(i)
    with pytest.raises(ValueError, match=r"0\.\.5"):
        natra(i + 1, y, classifier)
    with pytest.raises(TypeError, match="int64"):
        natra(i.int(), y, classifier)
    with pytest.raises(ValueError, match="2 labels"):
        natra(i, y[:2], classifier)
    with pytest.raises(ValueError, match="need encoder="):
        natra(store.images, y, classifier)
    with pytest.raises(ValueError, match="need a store"):
        NaTraAugment(styled, directions)(i, y, classifier)
    with pytest.raises(ValueError, match="a pool is made of"):
        NaTraAugment(styled, directions).pool(y, classifier)
    for bad in (lambda x: None, lambda x: x.mean((1, 2, 3)), lambda x: torch.zeros(2, 3)):
        with pytest.raises(TypeError, match="must return logits"):
            natra(i, y, bad)
    with pytest.raises(FloatingPointError, match="NaN"):
        natra(i, y, lambda x: torch.full((len(x), 3), math.nan))
    with pytest.raises(ValueError, match="an edited image for each"):
        natra_loss(classifier, store.images, y, store.images[:1])
    with pytest.raises(ValueError, match="equally many and not none"):
        natra_loss(classifier, store.images[:0], y[:0], None)
    with pytest.raises(ValueError, match="the same shape"):
        psnr(store.images, store.images[:1])
    with pytest.raises(ValueError, match="not be negative"):
        natra_loss(classifier, store.images, y, None, -1.0)
    with pytest.raises(ValueError, match="x_nat is needed"):
        natra_loss(classifier, store.images, y, None)


# baselines


def test_pixel_attack_stays_in_its_ball_and_hurts(without_shape_checks, classifier):
    torch.manual_seed(0)
    x, y = torch.rand(6, 3, 8, 8) * 2 - 1, torch.tensor([0, 1, 2, 0, 1, 2])
    found = pixel_pgd(classifier, x, y, epsilon=0.05)
    assert (found - x).abs().max() <= 0.1 + 1e-6
    assert found.abs().max() <= 1
    assert F.cross_entropy(classifier(found), y) > F.cross_entropy(classifier(x), y)
    with pytest.raises(TypeError, match="uint8"):
        pixel_pgd(classifier, x.byte(), y)
    with pytest.raises(ValueError, match=r"-1\.\.1"):
        pixel_pgd(classifier, x * 255, y)


def test_mixing_takes_some_layers_from_another_image(styled, classifier):
    store, y = store_of(styled, 3), torch.tensor([0, 1, 2])
    rows = torch.arange(3)
    found = latent_mix(styled, store, rows, [1], mode="random")
    own, other = store.codes[:, 0, 0], store.codes[:, 0, 1]
    every = torch.stack([styled.decode(torch.stack([own, other[[p] * 3]], 1)) for p in range(3)])
    assert bool((found - every).flatten(2).abs().amax(2).amin(0).lt(1e-5).all())
    worst = latent_mix(styled, store, rows, [1], y, classifier, candidates=40)
    losses = torch.stack([F.cross_entropy(classifier(x), y, reduction="none") for x in every])
    assert torch.allclose(F.cross_entropy(classifier(worst), y, reduction="none"), losses.amax(0), atol=1e-5)
    for layers in ([], [0, 1], [2]):
        with pytest.raises(ValueError, match="some and not all"):
            latent_mix(styled, store, rows, layers, mode="random")
    with pytest.raises(ValueError, match="needs labels and model"):
        latent_mix(styled, store, rows, [1])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_dtype_of_the_generator_goes_through(dtype):
    styled = GeneratorAdapter(seeded(Styled).to(dtype), (2, 6), split_layer="cut", mean_samples=50)
    store = store_of(styled, 3, n_codes=2, shift="quantile")
    directions = discover_directions(styled, "pca", 2, samples=50)
    for tensor in (
        store.codes,
        store.recon,
        directions.vectors,
        edit(styled, store, directions, directions.radii.expand(3, 2)),
    ):
        assert tensor.dtype == dtype


needs_faces = pytest.mark.skipif(
    datasets.available()["yale-faces"] is None, reason="TORCHGRAFT_DATA does not point at a folder with the faces"
)


@needs_faces
def test_faces_are_read_without_copies():
    faces = datasets.load("yale-faces")
    assert faces.x.shape[1:] == (1, 243, 320)
    assert "dupe" not in faces.condition
    named = set(zip((faces.person + 1).tolist(), faces.condition, strict=True))
    assert len(named) == len(faces.x)
    assert (4, "sad") not in named, "its publisher put the normal picture there"
    assert {(p, "normal") for p in range(1, 16)} <= named
    flat = faces.x.flatten(1)
    assert len(flat.unique(dim=0)) == len(flat)
    # light from the left leaves the right side of the picture dark, and the other way round
    left, right = (faces.x[[c == f"{s}light" for c in faces.condition]].float() for s in ("left", "right"))
    sides = [(x[..., :160].mean() - x[..., 160:].mean()).item() for x in (left, right)]
    assert sides[0] > 10 > -10 > sides[1]


def test_state_of_the_adapter_is_the_generators_alone(styled, tmp_path):
    names = {f"synthesis.{k}" for k in styled.synthesis.state_dict()} | {
        f"mapping.{k}" for k in styled.mapping.state_dict()
    }
    styled.code_distances()
    assert set(styled.state_dict()) == names
    bound = GeneratorAdapter(styled.synthesis.forward, (2, 6), mean_samples=50)
    assert set(bound.state_dict()) == {f"synthesis_owner.{k}" for k in styled.synthesis.state_dict()}
    assert bound.double().sample_codes(2).dtype == torch.float64
