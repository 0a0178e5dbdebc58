import pytest
from matplotlib import image

from rlkv_vllm.errors import RlkvError
from rlkv_vllm.profile.plot import plot_profile
from tests.support.profiles import assert_one_line, make_profile


def test_png_shows_the_split(tmp_path):
    profile = make_profile(layers=28, heads=4)
    pixels = []
    for sparsity in (0.0, 0.5, 1.0):
        path = tmp_path / f"{sparsity}.png"
        plot_profile(profile, sparsity, path)
        pixels.append(image.imread(path))
    height, width, _ = pixels[0].shape
    assert width > 2 * height > 400
    assert (pixels[0] != pixels[1]).any()
    assert (pixels[1] != pixels[2]).any()


@pytest.mark.parametrize(("suffix", "start"), [("svg", b"<?xml"), ("pdf", b"%PDF")])
def test_other_formats(tmp_path, suffix, start):
    plot_profile(make_profile(layers=1, heads=1), 0.5, tmp_path / f"p.{suffix}")
    assert (tmp_path / f"p.{suffix}").read_bytes().startswith(start)


def test_title_is_not_parsed_as_mathematics(tmp_path):
    model = make_profile().model.model_copy(update={"id": "a/$x_{$y"})
    plot_profile(make_profile(model=model), 0.5, tmp_path / "p.png")
    assert (tmp_path / "p.png").exists()


@pytest.mark.parametrize(
    ("name", "sparsity", "part"),
    [("p.gif", 0.5, ".png"), ("p", 0.5, ".png"), ("p.png", 1.5, "--sparsity 1.5")],
)
def test_refuses(tmp_path, name, sparsity, part):
    with pytest.raises(RlkvError) as caught:
        plot_profile(make_profile(), sparsity, tmp_path / name)
    assert_one_line(caught.value, part)
    assert not list(tmp_path.iterdir())
