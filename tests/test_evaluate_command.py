"""The command `evaluate`, run as a user runs it, and the encoder that ships with the package."""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import nn

from command_line import error_of, help_without_torch, run
from drawings import blur, draw, save_folder, save_npz
from self_attention_guidance.cli import evaluate as evaluate_module
from self_attention_guidance.evaluate import (
    FEWEST_FOR_SHARES,
    Estimate,
    Report,
    SampleReport,
    load_encoder,
    load_set,
    measure,
    open_set,
    paired_difference,
    random_halves,
    repeated_values,
    short_names,
    work,
    write_plot,
    write_statistics,
)
from self_attention_guidance.evaluate.encoder import ENCODER_FOLDER, KNOWN_FILE, farther_than_art
from self_attention_guidance.evaluate.features import Emoji
from tiny_pixels import arrays_of, one_thread

INCEPTION = "torch_fidelity.feature_extractor_inceptionv3"
KEYS = ["frechet_distance", "sfid", "kid", "inception_score", "precision", "recall"]
QUICK = ("--bootstrap", 10)
# As few as precision and recall take.
SAMPLES, REFERENCE = FEWEST_FOR_SHARES, 110


@pytest.fixture(autouse=True, scope="module")
def on_one_thread() -> Iterator[None]:
    with one_thread():
        yield


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A reference, samples like it, the same ones blurred, and others in a folder."""
    folder = tmp_path_factory.mktemp("sets")
    save_npz(folder / "reference.npz", draw(REFERENCE, 0))
    save_npz(folder / "sharp.npz", draw(SAMPLES, 1))
    save_npz(folder / "blurred.npz", blur(draw(SAMPLES, 1), 1.5))
    save_folder(folder / "pictures", draw(SAMPLES, 1))
    return folder


def evaluate(*arguments: object, out: Path) -> list[dict[str, Any]]:
    """Runs the command; returns the samples of its JSON."""
    assert run("evaluate", *arguments, "--json", out, "--overwrite") == 0
    return json.loads(out.read_text(encoding="utf-8"))["samples"]


def low(found: dict[str, Any]) -> float:
    """Lower end of an interval; what no half changes has none."""
    return found["value"] if found["low"] is None else found["low"]


def high(found: dict[str, Any]) -> float:
    return found["value"] if found["high"] is None else found["high"]


# Figures


def test_blurred_pictures_score_worse(sets: Path, tmp_path: Path) -> None:
    names = ("sharp.npz", "blurred.npz", "reference.npz")
    paths = [sets / name for name in names]
    sharp, soft = evaluate(*paths, "--bootstrap", 50, out=tmp_path / "a.json")
    assert [sharp["name"], soft["name"]] == ["sharp", "blurred"]
    assert list(sharp["metrics"]) == KEYS
    for key in ("frechet_distance", "sfid", "kid"):
        assert high(sharp["metrics"][key]) < low(soft["metrics"][key]), key
    assert low(sharp["metrics"]["precision"]) > high(soft["metrics"]["precision"])


def test_few_kinds_of_pictures_have_low_recall(sets: Path, tmp_path: Path) -> None:
    kinds = save_npz(tmp_path / "kinds.npz", np.repeat(draw(5, 1), 20, axis=0))
    names = (sets / "sharp.npz", kinds, sets / "reference.npz")
    many, few = evaluate(*names, *QUICK, out=tmp_path / "a.json")
    assert high(few["metrics"]["recall"]) < low(many["metrics"]["recall"])


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
    shuffled = draw(SAMPLES, 1)[np.random.default_rng(0).permutation(SAMPLES)]
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
        assert low(first[key]) <= first[key]["value"] <= high(first[key])
    assert first["kid"]["low"] != other["kid"]["low"]


def test_parts_of_a_loaded_set_are_of_its_own_order(sets: Path, tmp_path: Path) -> None:
    encoder = load_encoder("emoji")
    reference = load_set(open_set(sets / "reference.npz"), encoder, 16)
    halves = random_halves(SAMPLES, 3, 0)
    pictures = draw(SAMPLES, 1)
    for name in ("sharp.npz", "pictures"):
        found = repeated_values(load_set(open_set(sets / name), encoder, 16), reference, halves)
        for number, half in enumerate(halves):
            part = save_npz(tmp_path / "part.npz", pictures[half.numpy()])
            expected = measure(load_set(open_set(part), encoder, 16), reference, 0, 0)
            for key in ("kid", "inception_score"):
                value = float(found[key][number])
                assert value == pytest.approx(expected[key].value, rel=1e-6), (name, key)
    with pytest.raises(ValueError, match="values of 4 and 1 parts can't be paired"):
        paired_difference(found["kid"], found["kid"][:1])
    # Statistics are saved in the order of their features, so they can't be paired.
    write_statistics(tmp_path / "saved.npz", reference)
    saved = load_set(open_set(tmp_path / "saved.npz"), encoder, 16)
    with pytest.raises(ValueError, match=r"saved\.npz': the order of its features is not known"):
        repeated_values(saved, reference, random_halves(REFERENCE, 3, 0))


def test_progress_ends_at_the_whole(sets: Path) -> None:
    encoder, done, encoded = load_encoder("emoji"), [0], [0]
    paths = (sets / "sharp.npz", sets / "reference.npz")
    samples, reference = (
        load_set(open_set(path), encoder, 16, lambda more: encoded.append(encoded[-1] + more))
        for path in paths
    )
    assert encoded[-1] == SAMPLES + REFERENCE
    measure(samples, reference, 5, 0, lambda more: done.append(done[-1] + more))
    assert done[-1] == work(samples, reference)


# Outputs


def test_table_names_all_figures(sets: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("evaluate", sets / "sharp.npz", sets / "reference.npz", *QUICK) == 0
    captured = capsys.readouterr()
    *rows, footnote = captured.out.splitlines()
    assert rows[0].split() == ["sharp"]
    assert rows[1].split() == ["pictures", str(SAMPLES)]
    titles = [row[:20].split("  ")[0].strip() for row in rows[2:]]
    assert titles[0] == "Fréchet distance ↓"
    assert titles[-1] == "recall ↑"
    assert len(titles) == len(KEYS)
    assert all("[" in row for row in rows[2:] if "precision" not in row)
    assert footnote.endswith("95 % intervals from 10 random halves of the samples")


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


# Warnings


def noise(count: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)


def test_pictures_unlike_the_art_are_a_warning(
    sets: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    strange = save_npz(tmp_path / "strange.npz", noise(REFERENCE))
    out, plot = tmp_path / "a.json", tmp_path / "a.png"
    paths = (strange, sets / "sharp.npz", sets / "reference.npz")
    assert run("evaluate", *paths, *QUICK, "--json", out, "--plot", plot) == 0
    message = "strange: most pictures are unlike the art that the features emoji were made for"
    lines = [line for line in capsys.readouterr().err.splitlines() if "unlike" in line]
    assert len(lines) == 1
    assert lines[0].startswith(f"warning: {message}")
    assert lines[0].endswith("--features inception (pip install torch-fidelity)")
    saved = json.loads(out.read_text(encoding="utf-8"))["warnings"]
    assert lines[0].removeprefix("warning: ") in saved


def test_few_pictures_have_no_precision(
    sets: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    few = save_npz(tmp_path / "few.npz", draw(FEWEST_FOR_SHARES - 1, 2))
    for paths in ((few, sets / "reference.npz"), (sets / "sharp.npz", few)):
        (found,) = evaluate(*paths, *QUICK, out=tmp_path / "a.json")
        assert list(found["metrics"]) == KEYS[:4]
        captured = capsys.readouterr()
        assert "precision" not in captured.out
        name = "few" if paths[0] == few else "the reference"
        message = f"warning: {name}: precision and recall are left out, 99 pictures are too few"
        assert message in captured.err
    both = evaluate(few, sets / "sharp.npz", sets / "reference.npz", out=tmp_path / "a.json")
    assert [len(each["metrics"]) for each in both] == [4, 6]
    (row,) = [line for line in capsys.readouterr().out.splitlines() if "precision" in line]
    assert row.split()[2] == "-"


def test_few_pictures_for_a_figure_are_a_warning(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def warnings_of(*counts: int) -> list[str]:
        paths = [save_npz(tmp_path / f"{count}.npz", draw(count, count)) for count in counts]
        assert run("evaluate", *paths, "--bootstrap", 0) == 0
        return [line for line in capsys.readouterr().err.splitlines() if " few for " in line]

    of_all = "Fréchet distance (64 features), sFID (128 features) and Inception Score (23 classes)"
    assert warnings_of(12, 64, 12) == [
        f"warning: 12 and the reference: 12 pictures are few for {of_all}; compare only sets"
        " with the same number of pictures",
        "warning: 64: 64 pictures are few for Fréchet distance (64 features) and sFID (128"
        " features); compare only sets with the same number of pictures",
    ]
    assert warnings_of(129, 130) == []


def test_plots_tell_features_and_warnings(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    metrics = {"kid": Estimate(1.0, 0.5, 1.5)}
    reference: Any = SimpleNamespace(path=Path("reference"), features=None)
    sample = SampleReport("samples", Path("samples"), 100, metrics)
    heights: list[int] = []
    for notes in ((), ("Beware of these figures.",), ("Beware of these figures.",) * 2):
        report = Report(reference, "emoji", 0, 0, [sample], notes)
        write_plot(tmp_path / "a.png", report)
        with Image.open(tmp_path / "a.png") as image:
            heights.append(image.height)
            last_line = np.asarray(image.convert("L"))[-15:]
        assert (last_line < 128).any()
    assert heights[0] < heights[1] < heights[2]


def test_folders_that_are_here_have_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "art" / "new").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "art" / "new")
    assert short_names([Path("."), Path("..")]) == ["new", "art"]
    assert short_names([Path("."), Path("x.npz")]) == ["new", "x"]
    assert short_names([Path("."), Path("../new.npz")]) == [".", "../new.npz"]


@pytest.mark.parametrize("name", ["run_$x^$", "$", "\udcff", "\\frac"])
def test_plots_take_any_name(tmp_path: Path, name: str) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    reference: Any = SimpleNamespace(path=Path(name), features=None)
    sample = SampleReport(name, Path(name), 100, {"kid": Estimate(1.0, 0.5, 1.5)})
    write_plot(tmp_path / "a.png", Report(reference, "emoji", 0, 0, [sample]))
    assert (tmp_path / "a.png").is_file()


def test_what_no_half_changes_has_no_interval(sets: Path, tmp_path: Path) -> None:
    path = sets / "reference.npz"
    (same,) = evaluate(path, path, *QUICK, out=tmp_path / "a.json")
    assert same["metrics"]["precision"] == {"value": 1.0, "low": None, "high": None}
    assert same["metrics"]["kid"]["low"] < same["metrics"]["kid"]["high"]


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
    for name, message in {
        "none": "does not exist: give a folder of pictures or an .npz file",
        "empty": "holds no pictures: none of .apng, .bmp, .gif, .jfif, .jpe, .jpeg, .jpg, .png",
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
    }.items():
        assert message in error_of(capsys, "evaluate", tmp_path / name, sets / "sharp.npz"), name
    message = error_of(capsys, "evaluate", sets / "sharp.npz", tmp_path / "mu.npz")
    assert "holds statistics of 5 features, emoji has 64" in message


def test_the_table_is_shown_even_if_a_file_cannot_be_written(
    sets: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = ["evaluate", sets / "sharp.npz", sets / "blurred.npz", "--bootstrap", 0]
    measured = evaluate_module._measure

    def meanwhile(*arguments: Any) -> Any:
        (tmp_path / "a.json").mkdir()
        return measured(*arguments)

    monkeypatch.setattr(evaluate_module, "_measure", meanwhile)
    assert run(*asked, "--json", tmp_path / "a.json", "--overwrite") == 2
    assert "Fréchet distance" in capsys.readouterr().out
    printed = error_of(
        capsys, "evaluate", sets / "sharp.npz", "--save-statistics", tmp_path / "s.npz",
        "--json", tmp_path / "b.json",
    )  # fmt: skip
    assert "needs samples" in printed


def test_what_opening_shows_is_refused_before_encoding(
    sets: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    large = save_npz(tmp_path / "large.npz", draw(12, 0, size=64))
    np.savez(tmp_path / "mu.npz", mu=np.zeros(64), sigma=np.eye(64))
    np.savez(tmp_path / "shapes.npz", mu=np.zeros(64), sigma=np.eye(4))
    rows = {"features": np.ones((12, 64)), "size": np.array([64, 64])}
    np.savez(tmp_path / "saved.npz", mu=np.zeros(64), sigma=np.eye(64), **rows)
    rows |= {"size": np.array([32, 32]), "encoder": np.array("inception")}
    np.savez(tmp_path / "other.npz", mu=np.zeros(64), sigma=np.eye(64), **rows)
    monkeypatch.setattr(Emoji, "encode", None)
    sharp, save = sets / "sharp.npz", ("--save-statistics", tmp_path / "new.npz")
    for arguments, message in (
        ((sharp, large, sharp), "must be of one size"),
        ((sharp, tmp_path / "saved.npz", sharp), "must be of one size"),
        ((sharp, tmp_path / "saved.npz"), "must be of one size"),
        ((sharp, tmp_path / "mu.npz", sharp), "it can be the reference only"),
        ((sharp, tmp_path / "mu.npz", *save), "mu.npz' holds statistics already, and no features"),
        ((sharp, tmp_path / "shapes.npz"), "sigma is float64 of shape (4, 4); it must be finite"),
        ((sharp, tmp_path / "other.npz"), "holds features of inception, not of emoji"),
    ):
        assert message in error_of(capsys, "evaluate", *arguments), message


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"features": np.full((12, 64), np.nan)}, "features is float64 of shape (12, 64); it must"),
        ({"features": np.zeros(64)}, "it must be finite numbers of shape (any, any)"),
        ({"features": np.zeros((12, 64), complex)}, "features is complex128"),
        ({"features": np.full((12, 64), "a")}, "features is <U1"),
        ({"features": np.full((12, 64), 1e20)}, "must be finite and of sizes below 1e+06"),
        ({"features": np.zeros((12, 9))}, "holds statistics of 9 features, emoji has 64"),
        ({"features": np.zeros((5, 64))}, "holds 5 pictures: at least 10 are needed"),
        ({"probabilities": np.ones((5, 23))}, "it must be finite numbers of shape (12, any)"),
        ({"size": np.array([32, 32, 3])}, "size is int64 of shape (3,); it must be finite"),
        ({"encoder": np.array("clip")}, "holds features of clip, not of emoji"),
        ({"mu": np.full(64, np.inf), "features": None}, "mu is float64 of shape (64,); it must be"),
        ({"mu": np.zeros((1, 64)), "features": None}, "it must be finite numbers of shape (any)"),
        ({"sigma": np.array({}), "features": None}, "cannot be read: Object arrays cannot be"),
        ({"mu": b"abc", "features": None}, "mu is |S3 of shape (); it must be finite numbers"),
        ({"features": b"abc"}, "features is |S3 of shape (); it must be finite numbers"),
        ({"size": None}, "broken.npz': size is missing"),
        ({"mu_s": np.zeros(5), "features": None}, "broken.npz': sigma_s is missing"),
    ],
)
def test_broken_statistics_are_one_line(
    changed: dict[str, Any], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = np.random.default_rng(0).standard_normal((12, 64), dtype=np.float32)
    arrays = {"encoder": np.array("emoji"), "size": np.array([32, 32]), "features": rows}
    arrays |= {"mu": rows.mean(0), "sigma": np.cov(rows.T)} | changed
    given = {name: array for name, array in arrays.items() if array is not None}
    np.savez(
        tmp_path / "broken.npz",
        **{name: array for name, array in given.items() if not isinstance(array, bytes)},
    )
    with zipfile.ZipFile(tmp_path / "broken.npz", "a") as archive:
        for name, content in given.items():
            if isinstance(content, bytes):
                archive.writestr(name, content)
    save_npz(tmp_path / "samples.npz", draw(12, 0))
    error = error_of(capsys, "evaluate", tmp_path / "samples.npz", tmp_path / "broken.npz")
    assert message in error


def test_statistics_may_be_of_any_type_of_number(sets: Path, tmp_path: Path) -> None:
    saved = tmp_path / "saved.npz"
    assert run("evaluate", sets / "reference.npz", "--save-statistics", saved) == 0
    arrays = arrays_of(saved)
    found = []
    for dtype in ("<f4", ">f4", ">f8"):
        kept = {name: arrays[name].astype(dtype) for name in ("features", "mu", "sigma")}
        np.savez(tmp_path / "kept.npz", **arrays | kept)
        paths = (sets / "sharp.npz", tmp_path / "kept.npz")
        found.append(evaluate(*paths, *QUICK, out=tmp_path / "a.json")[0]["metrics"])
    assert found[0] == found[1] == found[2]


def changed_archive(path: Path, change: Callable[[bytearray, int], None]) -> Path:
    content = bytearray(save_npz(path, draw(12, 0)).read_bytes())
    change(content, content.find(b"PK\x01\x02"))
    path.write_bytes(content)
    return path


def test_broken_archives_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def encrypt(content: bytearray, directory: int) -> None:
        content[6] |= 1
        content[directory + 8] |= 1

    def compress(content: bytearray, directory: int) -> None:
        content[8] = content[directory + 10] = 99

    def damage(content: bytearray, directory: int) -> None:
        content[2000] ^= 255

    def damage_the_header(content: bytearray, directory: int) -> None:
        content[content.find(b"NUMPY")] ^= 255

    for change in (encrypt, compress, damage, damage_the_header):
        path = changed_archive(tmp_path / "a.npz", change)
        assert "a.npz'" in error_of(capsys, "evaluate", path, path), change.__name__


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "SAMPLES and REFERENCE must be given"),
        (["b.npz", "--features", "clip"], "--features='clip' must be one of emoji, inception"),
        (["b.npz", "--bootstrap", "-1"], "--bootstrap=-1 must be a whole number, at least 0"),
        (["b.npz", "--bootstrap", "1"], "--bootstrap=1 has no spread: it must be 0, for no"),
        (["b.npz", "--bootstrap", "20000"], "--bootstrap=20000 must be at most 10000"),
        (["b.npz", "--seed", str(2**64)], "--seed=18446744073709551616 is too large"),
        (["b.npz", "--json", "folder.json"], "--json='folder.json' is a folder: name a file"),
        (["b.npz", "--json", "/proc/a.json"], "--json='/proc/a.json' cannot be made: "),
        (["b.npz", "--seed", "-1"], "--seed=-1 must be a whole number, at least 0"),
        (["b.npz", "--batch-size", "0"], "--batch-size=0 must be a whole number, at least 1"),
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
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.json").mkdir()
    for name in ("a.npz", "b.npz"):
        save_npz(tmp_path / name, draw(12, 0))
    assert message in error_of(capsys, "evaluate", "a.npz", *arguments)


def test_statistics_of_other_features_are_refused(
    sets: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    saved = tmp_path / "saved.npz"
    assert run("evaluate", sets / "reference.npz", "--save-statistics", saved) == 0
    capsys.readouterr()
    np.savez(tmp_path / "other.npz", **arrays_of(saved) | {"encoder": np.array("inception")})
    message = error_of(capsys, "evaluate", sets / "sharp.npz", tmp_path / "other.npz")
    assert "holds features of inception, not of emoji" in message


def test_missing_libraries_are_one_line(
    sets: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = (sets / "sharp.npz", sets / "reference.npz")
    for name, arguments, message in (
        (INCEPTION, ("--features", "inception"), "need torch-fidelity: pip install torch-fidelity"),
        (
            "matplotlib",
            ("--plot", sets / "a.png"),
            "--plot needs matplotlib: pip install matplotlib",
        ),
    ):
        monkeypatch.setitem(sys.modules, name, None)
        assert message in error_of(capsys, "evaluate", *paths, *arguments)


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
    assert loaded.features.features.shape == (SAMPLES, 9)
    assert loaded.features.spatial is not None
    assert loaded.features.spatial.shape == (SAMPLES, 7 * 4 * 4)


def test_published_moments_are_taken_with_the_pictures(
    sets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = SimpleNamespace(FeatureExtractorInceptionV3=FakeInception)
    monkeypatch.setitem(sys.modules, INCEPTION, fake)
    encoder = load_encoder("inception")
    moments = {"mu": np.full(9, 1e3), "sigma": np.eye(9)}
    reference = save_npz(tmp_path / "batch.npz", draw(REFERENCE, 0), **moments)
    samples = load_set(open_set(sets / "sharp.npz"), encoder, 16)
    found = measure(samples, load_set(open_set(reference), encoder, 16), 0, 0)
    assert found["frechet_distance"].value > 9 * 800**2
    assert "precision" in found


def test_damaged_published_moments_cost_no_encoding(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = SimpleNamespace(FeatureExtractorInceptionV3=FakeInception)
    monkeypatch.setitem(sys.modules, INCEPTION, fake)
    moments = {"mu": np.full(9, 7.5), "sigma": np.eye(9)}
    path = save_npz(tmp_path / "batch.npz", draw(12, 0), **moments)
    path.write_bytes(path.read_bytes().replace(np.full(9, 7.5).tobytes(), bytes(72)))
    encoded: list[int] = []
    with pytest.raises(ValueError, match=r"batch\.npz' cannot be read: Bad CRC-32"):
        load_set(open_set(path), load_encoder("inception"), 16, encoded.append)
    assert not encoded


def test_failed_downloads_are_one_line(
    sets: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*arguments: object) -> None:
        raise RuntimeError("no\nnetwork")

    fake = SimpleNamespace(FeatureExtractorInceptionV3=fail)
    monkeypatch.setitem(sys.modules, INCEPTION, fake)
    paths = (sets / "sharp.npz", sets / "reference.npz")
    message = error_of(capsys, "evaluate", *paths, "--features", "inception")
    assert (
        "torch-fidelity could not fetch the weights of inception: RuntimeError: no network"
        in message
    )


# What ships


def test_encoder_is_small_and_safe() -> None:
    files = [file for file in ENCODER_FOLDER.iterdir() if file.is_file()]
    assert {file.name for file in files} == {
        "README.md",
        "config.json",
        "known_art.safetensors",
        "model.safetensors",
    }
    assert sum(file.stat().st_size for file in files) <= 2_000_000


def test_known_art_is_that_of_the_references() -> None:
    script = Path(__file__).parents[1] / "benchmarks" / "evaluate" / "known_art.py"
    expected = runpy.run_path(str(script))["known_art"]()
    found = load_file(ENCODER_FOLDER / KNOWN_FILE)
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        torch.testing.assert_close(found[name], values, rtol=1e-4, atol=1e-4)
    for file in sorted((script.parents[1] / "quality" / "references").glob("*.npz")):
        assert farther_than_art(torch.from_numpy(arrays_of(file)["features"])) < 1e-3


def test_help_answers_without_torch() -> None:
    assert "sag evaluate samples.npz" in help_without_torch("evaluate")


def test_builtin_features_need_neither_diffusers_nor_the_extra(sets: Path) -> None:
    code = (
        "import sys; from self_attention_guidance.cli import main;"
        f"main(['evaluate', {str(sets / 'sharp.npz')!r}, {str(sets / 'reference.npz')!r},"
        " '--bootstrap', '0']);"
        "assert not {'diffusers', 'matplotlib', 'torchmetrics'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Fréchet distance" in done.stdout
