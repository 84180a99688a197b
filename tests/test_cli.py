"""The command line: the demo from end to end, and what `clear-cache` leaves alone."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf

import sparse_conv
from sparse_conv import backends, jit
from sparse_conv.__main__ import main
from sparse_conv._cli import cache, photograph, poster
from sparse_conv._cli.filters import FAMILIES, filter_bank, prune
from sparse_conv._cli.verify import relative_errors
from sparse_conv.problem import Geometry, make_problem
from tests import ours
from tests.reference import conv2d_reference


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """A small JPEG of 40 x 64 pixels."""
    y, x = np.mgrid[:40, :64]
    colours = (x * 4, y * 6, (x + y) * 2)
    path = tmp_path / "picture.jpg"
    encoded = tf.io.encode_jpeg(np.stack(colours, -1).astype(np.uint8))
    path.write_bytes(encoded.numpy())
    return path


def run_demo(image: Path, output: Path, *more: str) -> int:
    return main(["demo", "--image", str(image), "--output", str(output), *more])


def test_demo_compares_times_and_draws(image, tmp_path, capsys):
    output = tmp_path / "poster.png"
    assert run_demo(image, output, "--density", "0.25") == 0
    printed = capsys.readouterr().out
    assert "40 x 64 x 3" in printed
    assert "density      0.250: 5808 of 23232 weights" in printed
    rows = re.findall(
        r"^(\S+conv2d)\b.* \d\.\de-\d\d .* ms .*\d$", printed, re.MULTILINE
    )
    assert rows[0] == "sparse_conv.conv2d"
    assert set(rows[1:]) == {"tf.nn.conv2d"}
    assert str(output.resolve()) in printed
    drawn = tf.io.decode_png(output.read_bytes()).numpy()
    assert drawn.shape == (2298, poster.WIDTH, 3)
    assert len(np.unique(drawn.reshape(-1, 3), axis=0)) > 1000


@pytest.mark.parametrize("fault", [1e-3, np.nan])
def test_demo_prints_no_time_of_a_wrong_result(
    image, tmp_path, capsys, monkeypatch, fault
):
    def wrong(x, kernel, strides, padding, algorithm):
        y = tf.nn.conv2d(x, kernel.to_dense(), strides, padding)
        at = [[0, 7, 9, 5]]
        return tf.tensor_scatter_nd_add(y, at, [fault * tf.reduce_max(tf.abs(y))])

    monkeypatch.setattr(sparse_conv, "conv2d", wrong)
    assert run_demo(image, tmp_path / "poster.png") == 1
    printed = capsys.readouterr()
    assert "sparse_conv.conv2d is wrong" in printed.err
    assert " ms" not in printed.out
    assert not (tmp_path / "poster.png").exists()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("absent.jpg", None, "can't be read: No such file"),
        ("text.jpg", b"not a picture", "must be a JPEG, PNG, GIF or BMP"),
        ("empty.png", b"", "must be a JPEG, PNG, GIF or BMP"),
    ],
)
def test_demo_explains_a_bad_photograph(tmp_path, capsys, name, content, message):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    assert run_demo(path, tmp_path / "poster.png") == 1
    error = capsys.readouterr().err
    assert error.startswith("error: the photograph ")
    assert message in error
    assert str(path) in error


def test_demo_needs_a_place_for_its_poster(image, tmp_path, capsys):
    assert run_demo(image, tmp_path / "absent" / "poster.png") == 1
    assert "error: the poster needs a folder" in capsys.readouterr().err
    assert run_demo(image, tmp_path) == 1
    assert "error: the poster can't be written" in capsys.readouterr().err


@pytest.mark.parametrize("density", ["0", "-1", "1.5", "nan", "much"])
def test_demo_refuses_impossible_densities(image, tmp_path, capsys, density):
    with pytest.raises(SystemExit, match="2"):
        run_demo(image, tmp_path / "poster.png", f"--density={density}")
    assert "the density must be above 0 and at most 1" in capsys.readouterr().err


@pytest.mark.parametrize("shape", [(1, 1, 3), (300, 2, 3), (3, 200, 3)])
def test_poster_of_any_shape(shape):
    picture = np.full(shape, 200, np.uint8)
    maps = np.zeros((*shape[:2], 64), np.float32)
    drawn = poster.compose(picture, filter_bank(), maps)
    assert drawn.shape[1] == poster.WIDTH
    assert drawn.dtype == np.uint8


def test_large_photographs_are_shrunk(tmp_path):
    path = tmp_path / "large.png"
    picture = np.zeros((20, 4096, 3), np.uint8)
    path.write_bytes(tf.io.encode_png(picture).numpy())
    assert photograph.read(path).shape == (5, 1024, 3)


def test_filters_find_contrast_alone():
    bank = filter_bank()
    assert bank.shape == (11, 11, 3, 64)
    assert bank.shape[-1] == 8 * len(FAMILIES)
    np.testing.assert_allclose(bank.sum((0, 1)), 0, atol=1e-6)
    np.testing.assert_allclose((bank**2).sum((0, 1, 2)), 1, rtol=1e-5)


@pytest.mark.parametrize(("density", "kept"), [(1.0, 24), (0.5, 12), (0.001, 1)])
def test_pruning_keeps_the_largest(density, kept):
    kernel = np.random.default_rng(1).normal(size=(2, 3, 1, 4))
    pruned = prune(kernel, density)
    assert np.count_nonzero(pruned) == kept
    gone = kernel[pruned == 0]
    assert np.abs(gone).max(initial=0) <= np.abs(pruned[pruned != 0]).min()
    assert np.all((pruned == 0) | (pruned == kernel))


def test_relative_errors_measure_against_the_definition():
    rng = np.random.default_rng(2)
    x, kernel = rng.normal(size=(7, 9, 3)), rng.normal(size=(4, 5, 3, 2))
    geometry = Geometry((1, 1), "SAME", (1, 1), "NHWC")
    problem = make_problem((1, *x.shape), kernel.shape, geometry)
    exact = conv2d_reference(x[np.newaxis], kernel, problem)[0]
    off = exact.copy()
    off[3, 4, 1] += 0.25 * np.abs(exact).max()
    broken = exact.copy()
    broken[0, 0, 0] = np.nan
    errors = relative_errors([exact, off, broken], x, kernel)
    np.testing.assert_allclose(errors, [0, 0.25, np.nan], atol=1e-14)


def test_clear_cache_removes_ours_alone(tmp_path, capsys, monkeypatch):
    ours = {
        "gather-float32-0a1b.machine-code": b'sparse_conv_marker{"symbols": []}',
        "0a1b_2.cubin": b"\x7fELF\0sparse_conv_marker\0",
    }
    others = {
        "cpu_loops.cpython-312.pyc": b"bytecode",
        "elsewhere.machine-code": b"other",
        "2c3d_2.cubin": b"\x7fELF\0.text.conv2d_gather\0",
        "notes.txt": b"conv2d_gather",
    }
    folder = tmp_path / "cache"
    folder.mkdir()
    for name, content in (ours | others).items():
        (folder / name).write_bytes(content)
    target = tmp_path / "linked.machine-code"
    target.write_bytes(b"sparse_conv_marker")
    (folder / target.name).symlink_to(target)
    monkeypatch.setattr(backends, "caches", lambda: [folder, tmp_path / "absent"])

    assert main(["clear-cache"]) == 0
    assert {path.name for path in folder.iterdir()} == {*others, target.name}
    assert target.exists()
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].startswith(f"{folder}: 2 files, ")
    assert printed[1].startswith(f"{tmp_path / 'absent'}: 0 files, ")


def test_compiled_gpu_functions_will_be_recognised():
    functions = [path.stem for path in jit.KERNELS.glob("*.cu")]
    assert functions
    for function in functions:
        assert cache.MARKER.decode() in jit.source(function), function


def test_compiled_loops_are_recognised():
    with tf.device("/CPU:0"):
        x, kernel = tf.ones((1, 4, 4, 1)), tf.ones((1, 1, 1, 1))
        ours.conv2d(x, kernel, 1, "SAME", backend="cpu")
    found = [file for path in backends.caches() for file in cache.compiled_files(path)]
    assert any(file.name.startswith("gather-float32-") for file in found)
