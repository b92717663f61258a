"""Tables of levels against published and independently computed numbers."""

import numpy as np
import pytest
from scipy import integrate, special

from kernels_pallas.encode.reference import thresholds
from kvjax.stages.codebook import distortion, lloyd_max, normal_float, uniform_step

NORMAL_LEVELS = {  # the positive half
    1: [0.79788456],
    2: [0.45278003, 1.51041761],
    3: [0.24509418, 0.75600528, 1.34390928, 2.15194570],
    4: [0.12839503, 0.38804830, 0.65675912, 0.94234046, 1.25623120, 1.61804639, 2.06901723, 2.73258957],
    5: [
        *(0.0658897, 0.1980518, 0.3313783, 0.4666995, 0.6049336, 0.7471357, 0.8945651, 1.0487833),
        *(1.2118044, 1.3863403, 1.5762281, 1.7872332, 2.0287284, 2.3177394, 2.6911196, 3.2607325),
    ],
}
NORMAL_THRESHOLDS = {  # from 0 up
    2: [0, 0.9815988],
    3: [0, 0.5005497, 1.0499573, 1.7479275],
    4: [0, 0.2582217, 0.5224037, 0.7995498, 1.0992858, 1.4371388, 1.8435318, 2.4008034],
}
NORMAL_DISTORTIONS = {  # with half a unit of the last digit
    1: (0.3633802, 5e-8),
    2: (0.1174818, 5e-8),
    3: (0.0345478, 5e-8),
    4: (0.0095010, 5e-8),
    5: (0.00250467, 5e-9),
    6: (6.4424e-4, 5e-9),
    7: (1.63478e-4, 5e-10),
}
UNIFORM = {  # step, distortion, half a unit of its last digit
    1: (1.59577, 0.36338, 5e-6),
    2: (0.99569, 0.118846, 5e-7),
    3: (0.58602, 0.0374397, 5e-8),
    4: (0.33520, 0.0115429, 5e-8),
    5: (0.18814, 0.0034952, 5e-8),
    6: (0.10406, 0.00104, 5e-6),
    8: (0.03076, 8.77e-5, 5e-8),
}
SPHERE_DISTORTIONS = {  # 1, 2, 3, 4 bits
    32: [0.353357, 0.111600, 0.032261, 0.008774],
    64: [0.358387, 0.114526, 0.033391, 0.009132],
    80: [0.359389, 0.115115, 0.033620, 0.009204],
    96: [0.360056, 0.115508, 0.033773, 0.009253],
    128: [0.360889, 0.116000, 0.033966, 0.009315],
    192: [0.361720, 0.116493, 0.034159, 0.009377],
    256: [0.362136, 0.116740, 0.034256, 0.009408],
    512: [0.362758, 0.117111, 0.034402, 0.009454],
    1024: [0.363069, 0.117296, 0.034475, 0.009478],
    None: [0.363380, 0.117482, 0.034548, 0.009501],
}
SPHERE_LEVELS = {  # the positive half, times sqrt(d)
    64: {
        1: [0.80101],
        2: [0.45212, 1.49997],
        3: [0.24375, 0.75066, 1.32934, 2.11131],
        4: [0.12735, 0.38472, 0.65049, 0.93189, 1.23940, 1.59085, 2.02331, 2.64637],
    },
    128: {
        1: [0.79944],
        2: [0.45245, 1.50519],
        3: [0.24442, 0.75333, 1.33660, 2.13147],
        4: [0.12787, 0.38638, 0.65362, 0.93710, 1.24777, 1.60434, 2.04593, 2.68886],
    },
    256: {
        1: [0.79866],
        2: [0.45262, 1.50780],
        3: [0.24476, 0.75467, 1.34025, 2.14167],
        4: [0.12813, 0.38721, 0.65519, 0.93971, 1.25199, 1.61117, 2.05741, 2.71057],
    },
}
QLORA_NF4 = [
    *(-1.0, -0.6961928, -0.52507305, -0.39491749, -0.28444138, -0.18477343, -0.09105004, 0.0),
    *(0.0795803, 0.1609302, 0.2461123, 0.33791524, 0.44070983, 0.5626170, 0.72295684, 1.0),
]


@pytest.mark.parametrize("bits", NORMAL_LEVELS)
def test_levels_for_the_normal(bits):
    levels = np.asarray(lloyd_max(bits))
    np.testing.assert_array_equal(levels, -levels[::-1])
    assert (np.diff(levels) > 0).all()
    np.testing.assert_allclose(levels[1 << (bits - 1) :], NORMAL_LEVELS[bits], rtol=0, atol=6e-8 if bits == 5 else 6e-9)


@pytest.mark.parametrize("bits", NORMAL_THRESHOLDS)
def test_thresholds_are_the_middles(bits):
    middles = thresholds(lloyd_max(bits))
    assert len(middles) == (1 << bits) - 1
    np.testing.assert_allclose(middles[(1 << (bits - 1)) - 1 :], NORMAL_THRESHOLDS[bits], rtol=0, atol=6e-8)


@pytest.mark.parametrize("bits", NORMAL_DISTORTIONS)
def test_distortion_for_the_normal(bits):
    expected, printed = NORMAL_DISTORTIONS[bits]
    assert distortion(lloyd_max(bits)) == pytest.approx(expected, abs=1.1 * printed)


@pytest.mark.parametrize("bits", UNIFORM)
def test_the_uniform_step_that_is_best_for_the_normal(bits):
    step, expected, printed = UNIFORM[bits]
    assert uniform_step(bits) == pytest.approx(step, abs=6e-6)
    half = 1 << (bits - 1)

    def of_step(step):
        return distortion(tuple(((np.arange(-half, half) + 0.5) * step).tolist()))

    best = of_step(uniform_step(bits))
    assert best == pytest.approx(expected, abs=1.1 * printed)
    assert best <= min(of_step(uniform_step(bits) * factor) for factor in (0.99, 1.01))


@pytest.mark.parametrize("size", SPHERE_DISTORTIONS)
def test_distortion_for_a_coordinate_on_the_sphere(size):
    ours = [distortion(lloyd_max(bits, size), size) for bits in (1, 2, 3, 4)]
    np.testing.assert_allclose(ours, SPHERE_DISTORTIONS[size], rtol=0, atol=5.5e-7)


@pytest.mark.parametrize("size", SPHERE_LEVELS)
def test_levels_for_a_coordinate_on_the_sphere(size):
    for bits, expected in SPHERE_LEVELS[size].items():
        levels = lloyd_max(bits, size)
        np.testing.assert_allclose(levels[1 << (bits - 1) :], expected, rtol=0, atol=5.5e-6)


@pytest.mark.parametrize("size", [3, 8, 20, None])
def test_distortion_is_the_integral_it_stands_for(size):
    """Against quadrature of the density, on levels that are best for nothing."""
    levels = np.asarray([-1.3, -0.2, 0.4, 1.1])
    edges = [-np.inf if size is None else -np.sqrt(size), *thresholds(tuple(levels.tolist()))]
    edges.append(-edges[0])

    def density(x):
        if size is None:
            return np.exp(-(x**2) / 2) / np.sqrt(2 * np.pi)
        constant = special.gamma(size / 2) / special.gamma((size - 1) / 2) / np.sqrt(np.pi * size)
        return constant * (1 - x**2 / size) ** ((size - 3) / 2)

    expected = sum(
        integrate.quad(lambda x, level=level: (x - level) ** 2 * density(x), low, high)[0]
        for level, low, high in zip(levels, edges, edges[1:], strict=False)
    )
    assert distortion(tuple(levels.tolist()), size) == pytest.approx(expected, rel=1e-8)


def test_normal_float_is_qloras():
    np.testing.assert_allclose(normal_float(4), QLORA_NF4, rtol=0, atol=2e-7)


@pytest.mark.parametrize("bits", [2, 3, 5, 8])
def test_normal_float_of_other_widths(bits):
    """Ascending, from -1 to 1, with 0 among them and one level more above it than below."""
    levels = np.asarray(normal_float(bits))
    assert len(levels) == 1 << bits
    assert (np.diff(levels) > 0).all()
    assert (levels[0], levels[-1]) == (-1.0, 1.0)
    assert np.sum(levels > 0) == np.sum(levels < 0) + 1 == 1 << (bits - 1)
    assert 0.0 in levels
