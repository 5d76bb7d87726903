"""The command `evaluate`, run as a user runs it, and the encoder that ships with the package."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from command_line import error_of, help_without_torch, run
from drawings import blur, draw, save_folder, save_npz
from self_attention_guidance.evaluate import load_encoder, load_set, measure, open_set, work
from self_attention_guidance.evaluate.encoder import ENCODER_FOLDER
from tiny_pixels import arrays_of, one_thread

INCEPTION = "torch_fidelity.feature_extractor_inceptionv3"
KEYS = ["frechet_distance", "sfid", "kid", "inception_score", "precision", "recall"]
QUICK = ("--bootstrap", 10)


@pytest.fixture(autouse=True, scope="module")
def on_one_thread() -> Iterator[None]:
    with one_thread():
        yield


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A reference, samples like it, the same ones blurred, and others in a folder."""
    folder = tmp_path_factory.mktemp("sets")
    save_npz(folder / "reference.npz", draw(70, 0))
    save_npz(folder / "sharp.npz", draw(50, 1))
    save_npz(folder / "blurred.npz", blur(draw(50, 1), 1.5))
    save_folder(folder / "pictures", draw(50, 1))
    return folder


def evaluate(*arguments: object, out: Path) -> list[dict[str, Any]]:
    """Runs the command; returns the samples of its JSON."""
    assert run("evaluate", *arguments, "--json", out, "--overwrite") == 0
    return json.loads(out.read_text(encoding="utf-8"))["samples"]


# Figures


def test_blurred_pictures_score_worse(sets: Path, tmp_path: Path) -> None:
    names = ("sharp.npz", "blurred.npz", "reference.npz")
    paths = [sets / name for name in names]
    sharp, soft = evaluate(*paths, "--bootstrap", 50, out=tmp_path / "a.json")
    assert [sharp["name"], soft["name"]] == ["sharp", "blurred"]
    assert list(sharp["metrics"]) == KEYS
    for key in ("frechet_distance", "sfid", "kid"):
        assert sharp["metrics"][key]["high"] < soft["metrics"][key]["low"], key
    assert sharp["metrics"]["precision"]["low"] > soft["metrics"]["precision"]["high"]


def test_few_kinds_of_pictures_have_low_recall(sets: Path, tmp_path: Path) -> None:
    kinds = save_npz(tmp_path / "kinds.npz", np.repeat(draw(5, 1), 10, axis=0))
    names = (sets / "sharp.npz", kinds, sets / "reference.npz")
    many, few = evaluate(*names, *QUICK, out=tmp_path / "a.json")
    assert few["metrics"]["recall"]["high"] < many["metrics"]["recall"]["low"]


def test_a_set_against_itself_is_perfect(sets: Path, tmp_path: Path) -> None:
    path = sets / "reference.npz"
    (same,) = evaluate(path, path, "--bootstrap", 0, out=tmp_path / "a.json")
    metrics = same["metrics"]
    assert metrics["frechet_distance"]["value"] == pytest.approx(0, abs=1e-6)
    assert metrics["sfid"]["value"] == pytest.approx(0, abs=1e-6)
    assert [metrics[key]["value"] for key in ("precision", "recall")] == [1, 1]
    assert metrics["kid"]["value"] < 0  # unbiased for other draws of the same pictures
    assert metrics["kid"]["low"] is None


def test_batches_order_and_kind_of_file_do_not_matter(sets: Path, tmp_path: Path) -> None:
    reference = sets / "reference.npz"
    shuffled = draw(50, 1)[np.random.default_rng(0).permutation(50)]
    save_npz(tmp_path / "shuffled.npz", shuffled)
    runs = [
        (sets / "sharp.npz", reference, "--batch-size", 64),
        (sets / "sharp.npz", reference, "--batch-size", 1),
        (sets / "pictures", reference, "--batch-size", 37),
        (tmp_path / "shuffled.npz", reference, "--batch-size", 9),
    ]
    found = [evaluate(*each, *QUICK, out=tmp_path / "a.json")[0]["metrics"] for each in runs]
    assert found[0] == found[1] == found[2] == found[3]


def test_seeds_move_the_intervals_only(sets: Path, tmp_path: Path) -> None:
    def figures(seed: int) -> dict[str, Any]:
        paths = sets / "sharp.npz", sets / "reference.npz"
        return evaluate(*paths, *QUICK, "--seed", seed, out=tmp_path / "a.json")[0]["metrics"]

    first, again, other = figures(3), figures(3), figures(4)
    assert first == again
    for key in KEYS:
        assert first[key]["value"] == other[key]["value"]
        assert first[key]["low"] <= first[key]["value"] <= first[key]["high"]
    assert first["kid"]["low"] != other["kid"]["low"]


def test_progress_ends_at_the_whole(sets: Path) -> None:
    encoder, done, encoded = load_encoder("emoji"), [0], [0]
    paths = (sets / "sharp.npz", sets / "reference.npz")
    samples, reference = (
        load_set(open_set(path), encoder, 16, lambda more: encoded.append(encoded[-1] + more))
        for path in paths
    )
    assert encoded[-1] == 50 + 70
    measure(samples, reference, 5, 0, lambda more: done.append(done[-1] + more))
    assert done[-1] == work(samples, reference, 5)


# Outputs


def test_table_names_all_figures(sets: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("evaluate", sets / "sharp.npz", sets / "reference.npz", *QUICK) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    *rows, footnote = captured.out.splitlines()
    assert rows[0].split() == ["sharp"]
    assert rows[1].split() == ["pictures", "50"]
    titles = [row[:20].split("  ")[0].strip() for row in rows[2:]]
    assert titles[0] == "Fréchet distance ↓"
    assert titles[-1] == "recall ↑"
    assert len(titles) == len(KEYS)
    assert all("[" in row for row in rows[2:])
    assert footnote.endswith("95 % intervals from 10 halves of the samples")


def test_plot_is_a_picture_of_all_sets(sets: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    heights = []
    for count in (1, 2):
        out = tmp_path / f"{count}.png"
        names = ["sharp.npz", "blurred.npz"][:count]
        paths = [sets / name for name in (*names, "reference.npz")]
        assert run("evaluate", *paths, *QUICK, "--plot", out) == 0
        with Image.open(out) as image:
            image.load()
            heights.append(image.height)
            assert len(np.unique(np.asarray(image))) > 10
    assert heights[0] < heights[1]


def test_saved_statistics_give_the_same(sets: Path, tmp_path: Path) -> None:
    reference, saved = sets / "reference.npz", tmp_path / "saved.npz"
    assert run("evaluate", reference, "--save-statistics", saved) == 0
    pair = [
        evaluate(sets / "sharp.npz", path, *QUICK, out=tmp_path / "a.json")[0]["metrics"]
        for path in (reference, saved)
    ]
    assert pair[0] == pair[1]
    reverse = [
        evaluate(path, sets / "sharp.npz", *QUICK, out=tmp_path / "a.json")[0]["metrics"]
        for path in (reference, saved)
    ]
    assert reverse[0] == reverse[1]


def test_moments_of_other_tools_give_frechet_distances(sets: Path, tmp_path: Path) -> None:
    saved, foreign = tmp_path / "saved.npz", tmp_path / "foreign.npz"
    assert run("evaluate", sets / "reference.npz", "--save-statistics", saved) == 0
    arrays = arrays_of(saved)
    np.savez(foreign, mu=arrays["mu"], sigma=arrays["sigma"])
    (own,) = evaluate(sets / "sharp.npz", saved, *QUICK, out=tmp_path / "a.json")
    (found,) = evaluate(sets / "sharp.npz", foreign, *QUICK, out=tmp_path / "a.json")
    assert list(found["metrics"]) == ["frechet_distance", "inception_score"]
    assert found["metrics"]["frechet_distance"] == own["metrics"]["frechet_distance"]


# Errors


def test_wrong_inputs_are_one_line(
    sets: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    mixed = save_folder(tmp_path / "mixed", draw(12, 0))
    Image.new("RGB", (40, 32)).save(mixed / "z.png")
    broken = save_folder(tmp_path / "broken", draw(12, 0))
    (broken / "00007.png").write_bytes(b"no picture")
    whole = (sets / "sharp.npz").read_bytes()
    (tmp_path / "text.npz").write_text("no archive")
    (tmp_path / "half.npz").write_bytes(whole[: len(whole) // 2])
    np.savez(tmp_path / "key.npz", pictures=draw(12, 0))
    np.savez(tmp_path / "floats.npz", arr_0=draw(12, 0) / 255)
    np.savez(tmp_path / "flat.npz", arr_0=draw(12, 0)[0])
    save_npz(tmp_path / "few.npz", draw(9, 0))
    save_npz(tmp_path / "large.npz", draw(12, 0, size=64))
    np.savez(tmp_path / "mu.npz", mu=np.zeros(5), sigma=np.eye(5))
    np.savez(tmp_path / "shapes.npz", mu=np.zeros(5), sigma=np.eye(4))
    for name, told in {
        "none": "does not exist: give a folder of pictures or an .npz file",
        "empty": "holds no pictures: none of .bmp, .jpeg, .jpg, .png, .webp",
        "mixed": "z.png' is 40x32, 00000.png is 32x32: all pictures must have one size",
        "broken": "00007.png' cannot be read as a picture",
        "text.npz": "cannot be read as an .npz file",
        "half.npz": "cannot be read as an .npz file",
        "key.npz": "holds pictures: it must hold arr_0 (pictures), or mu and sigma",
        "floats.npz": "arr_0 is float64 of shape (12, 32, 32, 3), it must be uint8",
        "flat.npz": "arr_0 is uint8 of shape (32, 32, 3), it must be uint8 of shape",
        "few.npz": "holds 9 pictures: at least 10 are needed",
        "large.npz": "hold pictures of 64x64 and 32x32 pixels: they must be of one size",
        "mu.npz": "holds moments and no features: it can be the reference only",
        "shapes.npz": "mu has shape (5,) and sigma (4, 4); they must be",
    }.items():
        assert told in error_of(capsys, "evaluate", tmp_path / name, sets / "sharp.npz"), name
    told = error_of(capsys, "evaluate", sets / "sharp.npz", tmp_path / "mu.npz")
    assert "holds statistics of 5 features, emoji has 64" in told


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ([], "SAMPLES and REFERENCE must be given"),
        (["b.npz", "--features", "clip"], "features='clip' must be one of emoji, inception"),
        (["b.npz", "--bootstrap", "-1"], "bootstrap=-1 must be a whole number, at least 0"),
        (["b.npz", "--seed", "-1"], "seed=-1 must be a whole number, at least 0"),
        (["b.npz", "--batch-size", "0"], "batch_size=0 must be a whole number, at least 1"),
        (["b.npz", "--json", "a.txt"], "json='a.txt' must end in .json"),
        (["b.npz", "--plot", "a.pdf"], "plot='a.pdf' must end in .png"),
        (["b.npz", "--plot", "none/a.png"], "there is no folder 'none'"),
        (["b.npz", "--save-statistics", "a.npz"], "exists: replace it with --overwrite"),
    ],
)
def test_wrong_options_are_one_line(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    arguments: list[str],
    told: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a.npz", "b.npz"):
        save_npz(tmp_path / name, draw(12, 0))
    assert told in error_of(capsys, "evaluate", "a.npz", *arguments)


def test_statistics_of_other_features_are_refused(
    sets: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    saved = tmp_path / "saved.npz"
    assert run("evaluate", sets / "reference.npz", "--save-statistics", saved) == 0
    capsys.readouterr()
    np.savez(tmp_path / "other.npz", **arrays_of(saved) | {"encoder": np.array("inception")})
    told = error_of(capsys, "evaluate", sets / "sharp.npz", tmp_path / "other.npz")
    assert "holds features of inception, not of emoji" in told


def test_missing_libraries_are_one_line(
    sets: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = (sets / "sharp.npz", sets / "reference.npz")
    for name, arguments, told in (
        (INCEPTION, ("--features", "inception"), "needs torch-fidelity: pip install"),
        ("matplotlib", ("--plot", sets / "a.png"), "plot needs matplotlib: pip install"),
    ):
        monkeypatch.setitem(sys.modules, name, None)
        assert told in error_of(capsys, "evaluate", *paths, *arguments)


# Inception


class FakeInception(nn.Module):
    """In the place of torch-fidelity's network: two layers and its interface."""

    def __init__(self, name: str, features_list: list[str]) -> None:
        super().__init__()
        assert features_list == ["2048", "logits_unbiased"]
        self.Mixed_6d = nn.Module()
        self.Mixed_6d.branch1x1 = nn.Conv2d(3, 9, 8, 8)

    def forward(self, pictures: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        assert pictures.dtype == torch.uint8
        features = self.Mixed_6d.branch1x1(pictures.float()).mean((2, 3))
        return features, features[:, :4]


def test_inception_comes_from_torch_fidelity(
    sets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = SimpleNamespace(FeatureExtractorInceptionV3=FakeInception)
    monkeypatch.setitem(sys.modules, INCEPTION, fake)
    arguments = (*QUICK, "--features", "inception")
    paths = (sets / "sharp.npz", sets / "reference.npz")
    (found,) = evaluate(*paths, *arguments, out=tmp_path / "a.json")
    assert list(found["metrics"]) == KEYS
    loaded = load_set(open_set(paths[0]), load_encoder("inception"), 16)
    assert loaded.features is not None
    assert loaded.features.features.shape == (50, 9)
    assert loaded.features.spatial is not None
    assert loaded.features.spatial.shape == (50, 7 * 4 * 4)


def test_published_moments_are_taken_with_the_pictures(
    sets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = SimpleNamespace(FeatureExtractorInceptionV3=FakeInception)
    monkeypatch.setitem(sys.modules, INCEPTION, fake)
    encoder = load_encoder("inception")
    moments = {"mu": np.full(9, 1e3), "sigma": np.eye(9)}
    reference = save_npz(tmp_path / "batch.npz", draw(20, 0), **moments)
    samples = load_set(open_set(sets / "sharp.npz"), encoder, 16)
    found = measure(samples, load_set(open_set(reference), encoder, 16), 0, 0)
    assert found["frechet_distance"].value > 9 * 800**2
    assert "precision" in found


def test_failed_downloads_are_one_line(
    sets: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*arguments: object) -> None:
        raise RuntimeError("no\nnetwork")

    fake = SimpleNamespace(FeatureExtractorInceptionV3=fail)
    monkeypatch.setitem(sys.modules, INCEPTION, fake)
    paths = (sets / "sharp.npz", sets / "reference.npz")
    told = error_of(capsys, "evaluate", *paths, "--features", "inception")
    assert "torch-fidelity could not fetch the network's weights: RuntimeError: no network" in told


# What ships


def test_encoder_is_small_and_safe() -> None:
    files = [file for file in ENCODER_FOLDER.iterdir() if file.is_file()]
    assert {file.name for file in files} == {"README.md", "config.json", "model.safetensors"}
    assert sum(file.stat().st_size for file in files) <= 2_000_000


def test_transparent_pictures_are_on_white(tmp_path: Path) -> None:
    clear = Image.new("RGBA", (32, 32), (0, 0, 0, 0))
    for folder, image in (("clear", clear), ("white", Image.new("L", (32, 32), 255))):
        (tmp_path / folder).mkdir()
        for index in range(10):
            image.save(tmp_path / folder / f"{index}.PNG")
    pictures = [next(open_set(tmp_path / name).batches(3)) for name in ("clear", "white")]
    assert (pictures[0] == 255).all()
    assert (pictures[0] == pictures[1]).all()


def test_help_answers_without_torch() -> None:
    assert "sag evaluate samples.npz" in help_without_torch("evaluate")


def test_builtin_features_need_neither_diffusers_nor_the_extra(sets: Path) -> None:
    code = (
        "import sys; from self_attention_guidance.cli import main;"
        f"main(['evaluate', {str(sets / 'sharp.npz')!r}, {str(sets / 'reference.npz')!r},"
        " '--bootstrap', '0']);"
        "assert not {'diffusers', 'matplotlib', 'torchmetrics'} & set(sys.modules)"
    )
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert told.returncode == 0, told.stderr
    assert "Fréchet distance" in told.stdout
