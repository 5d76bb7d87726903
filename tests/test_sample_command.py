"""The commands `sample` and `convert`, run as a user runs them."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from diffusers import (
    DDPMScheduler,
    FlowMatchEulerDiscreteScheduler,
    UNet2DModel,
)
from safetensors.torch import load_file, save_file

import self_attention_guidance.models.builtin as builtin
from command_line import error_of, run
from self_attention_guidance import (
    ADMPipeline,
    BlurGuidance,
    NoisyClassifier,
    PerturbedAttentionGuidance,
    SelfAttentionGuidance,
    builtin_model,
)
from self_attention_guidance.batch import Storage
from self_attention_guidance.generate import (
    class_names,
    find_model,
    load_pixel_model,
    parse_classes,
    read_record,
)
from tiny import seeded
from tiny import tiny_unet as tiny_conditional_unet
from tiny_pixels import (
    arrays_of,
    interrupt,
    one_thread,
    pictures_of,
    save_tiny_pixels,
    tiny_pipeline,
    tiny_unet,
)

ORIGINALS = Path(__file__).parent / "data" / "originals"


@pytest.fixture(autouse=True, scope="module")
def on_one_thread() -> Iterator[None]:
    with one_thread():
        yield


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tiny_pixels(tmp_path_factory.mktemp("samples") / "tiny")


# sample


def test_a_network_alone_is_sampled(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny_unet().save_pretrained(tmp_path / "unet")
    ADMPipeline(tiny_unet(), DDPMScheduler()).save_pretrained(tmp_path / "pipeline")
    drawn = []
    for name, scale in (("unet", 1), ("pipeline", 1), ("unet", 0)):
        out = tmp_path / f"{name}{scale}.npz"
        asked = ("sample", "--model", tmp_path / name, "--num-samples", 2, "--steps", 4)
        assert run(*asked, "--sag-scale", scale, "--out", out) == 0
        drawn.append(pictures_of(out))
    assert (drawn[0] == drawn[1]).all()
    assert (drawn[0] != drawn[2]).any()
    weights = tmp_path / "unet" / "diffusion_pytorch_model.safetensors"
    kept = {name: tensor for name, tensor in load_file(weights).items() if "mid_block" not in name}
    save_file(kept, weights)
    broken = (
        "sample",
        "--model",
        tmp_path / "unet",
        "--num-samples",
        1,
        "--out",
        tmp_path / "b.npz",
    )
    capsys.readouterr()
    assert "of its unet do not hold 'mid_block" in error_of(capsys, *broken)
    weights.unlink()
    assert "it has no weights in .safetensors files" in error_of(capsys, *broken)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"in_channels": 6}, "is for more than sampling, such as super-resolution: its network"),
        ({"in_channels": 4, "out_channels": 4}, "draws 4 channels: a picture has 3 channels"),
        ({"in_channels": 2, "out_channels": 4}, "draws 2 channels: a picture has 3 channels"),
    ],
)
@pytest.mark.parametrize("is_bare", [False, True])
def test_networks_that_draw_no_pictures_are_refused(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    changes: dict[str, int],
    message: str,
    is_bare: bool,
) -> None:
    saved: Any = tiny_unet(**changes)
    (saved if is_bare else ADMPipeline(saved, DDPMScheduler())).save_pretrained(tmp_path)
    for command in ("sample", "batch"):
        asked = (command, "--model", tmp_path, "--num-samples", 1)
        assert message in error_of(capsys, *asked, "--out", tmp_path / "a.npz")


def test_parts_that_do_not_fit_are_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ("sample", "--model", tmp_path, "--num-samples", 1, "--sag-scale", 0, "--quiet")
    asked += ("--out", tmp_path / "a.npz")
    ADMPipeline(tiny_unet(), FlowMatchEulerDiscreteScheduler()).save_pretrained(tmp_path)
    assert "trained by flow matching, unlike its UNet2DModel" in error_of(capsys, *asked)
    unet = tiny_unet()
    unet.register_to_config(sample_size=None)
    ADMPipeline(unet, DDPMScheduler()).save_pretrained(tmp_path)
    assert "the model can't draw: do its parts fit each other? " in error_of(capsys, *asked)


def test_other_networks_alone_are_refused_by_what_they_lack(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_conditional_unet().save_pretrained(tmp_path / "unet")
    message = error_of(capsys, "generate", "a", "--model", tmp_path / "unet")
    assert "is a network alone (UNet2DConditionModel), without what reads prompts" in message
    sample = ("sample", "--model", tmp_path / "unet", "--num-samples", 1)
    assert "it must be one of" in error_of(capsys, *sample)
    index = {"_class_name": "ConsistencyModelPipeline", "unet": [], "scheduler": []}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    sample = ("sample", "--model", tmp_path, "--num-samples", 1)
    assert "is of the class ConsistencyModelPipeline: it must" in error_of(capsys, *sample)
    message = error_of(capsys, "generate", "a", "--model", tmp_path)
    assert "is of the class ConsistencyModelPipeline, which takes no prompts" in message


def test_a_network_without_attention_is_pointed_to_blur_guidance(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    blocks = {"down_block_types": ["DownBlock2D"] * 2, "up_block_types": ["UpBlock2D"] * 2}
    shape = {"sample_size": 16, "block_out_channels": (8, 16), "norm_num_groups": 4}
    UNet2DModel(**blocks, **shape, add_attention=False).save_pretrained(tmp_path / "unet")
    asked = ("sample", "--model", tmp_path / "unet", "--num-samples", 1, "--steps", 2)
    asked += ("--out", tmp_path / "a.npz")
    message = error_of(capsys, *asked)
    assert "this UNet2DModel has no self-attention; BlurGuidance ('blur') needs none" in message
    assert run(*asked, "--guidance", "blur") == 0


def test_command_prints_paths_and_rate(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, model: str
) -> None:
    out = tmp_path / "a.npz"
    arguments = ["sample", "--model", model, "--out", out, "--classes", "4,0,6"]
    assert run(*arguments, "--num-samples", "7", "--batch-size", "4") == 0
    captured = capsys.readouterr()
    *paths, rate = captured.out.splitlines()
    assert paths == [str(out), str(tmp_path / "a.png")]
    assert rate.startswith("7 pictures in ")
    assert rate.endswith(" a second")
    assert captured.err == (
        "note: drawn by tiny: 16x16, 2 steps, DDIM, sag:scale=1.5, classes 4 0 6, seeds 0 to 6\n"
    )
    assert arrays_of(out)["arr_1"].tolist() == [4, 0, 6, 4, 0, 6, 4]
    assert "a.npz' exists" in error_of(capsys, *arguments, "--num-samples", "7")


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("classes.json", ["tench, Tinca tinca", "heart", "food-fruit", "d", "e", "f", "g"]),
        ("classes.json", {"0": "tench, Tinca tinca", "1": "heart", "2": "food-fruit"}),
        ("model_index.json", {"0": "tench, Tinca tinca", "1": "heart", "2": "food-fruit"}),
    ],
)
def test_classes_have_names(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], file: str, content: object
) -> None:
    model = Path(save_tiny_pixels(tmp_path / "model"))
    index = json.loads((model / "model_index.json").read_text())
    written = content if file == "classes.json" else {**index, "id2label": content}
    (model / file).write_text(json.dumps(written))
    asked = ["sample", "--model", model, "--num-samples", 5, "--steps", 1, "--out"]
    named = "food-fruit,Tinca Tinca,1, heart,tench"
    assert run(*asked, tmp_path / "a.npz", "--classes", named) == 0
    assert run(*asked, tmp_path / "b.npz", "--classes", "2,0,1,1,0") == 0
    assert arrays_of(tmp_path / "a.npz")["arr_1"].tolist() == [2, 0, 1, 1, 0]
    assert (pictures_of(tmp_path / "a.npz") == pictures_of(tmp_path / "b.npz")).all()
    capsys.readouterr()
    assert run("info", tmp_path / "a.npz") == 0
    shown = capsys.readouterr().out
    assert 'Classes: "2, 0, 1, 1, 0"' in shown
    assert 'Class names: "food-fruit, tench, heart, heart, tench"' in shown
    for wrong, message in (
        ("hart", "--classes='hart' is no class of this model: the nearest are heart"),
        ("1,fruit", "--classes='fruit' is no class of this model: the nearest are food-fruit"),
        ("zzz", "--classes='zzz' is no class of this model, which has tench, tinca tinca, heart"),
        ("7", "classes=7 must be from 0 to 6"),
        ("heart,", "--classes='heart,' must be numbers or names between single commas"),
        (",,1", "--classes=',,1' must be numbers or names between single commas"),
    ):
        assert message in error_of(capsys, *asked, tmp_path / "c.npz", "--classes", wrong)
    (model / "classes.json").write_text("[1, 2]")
    message = error_of(capsys, *asked, tmp_path / "c.npz", "--classes", "heart")
    assert "the classes must be names, by numbers" in message


def test_classes_of_the_builtin_model_have_names() -> None:
    names = class_names(builtin.builtin_folder("emoji-adm"))
    assert (names["face-smiling"], names["drink"], len(names)) == (0, 22, 23)
    assert parse_classes("Drink,3,heart", names) == (22, 3, 8)


def test_options_reach_the_samples(tmp_path: Path, model: str) -> None:
    arguments = ["sample", "--model", model, "--num-samples", "2", "--classes", "1", "--out"]
    options: dict[str, list[object]] = {
        "plain": [],
        "scale": ["--sag-scale", 3],
        "blur": ["--blur-guidance"],
        "sigma": ["--blur-sigma", 5],
        "kernel": ["--blur-kernel-size", 3],
        "threshold": ["--threshold", 0],
        "layer": ["--layer", "up_blocks.0.attentions.0"],
        "start": ["--start", 0.5],
        "stop": ["--stop", 0.5],
        "steps": ["--steps", 3],
        "seed": ["--seed", 9],
        "class": ["--classes", 2],
        "ddpm": ["--scheduler", "ddpm"],
        "eta": ["--eta", 0.5],
        "dtype": ["--dtype", "bfloat16"],
    }
    for name, given in options.items():
        assert run(*arguments, tmp_path / f"{name}.npz", *given) == 0, name
    different = {pictures_of(path).tobytes() for path in tmp_path.glob("*.npz")}
    assert len(different) == len(options)


def test_the_note_has_all_settings(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, model: str
) -> None:
    arguments = ("sample", "--num-samples", 1, "--steps", 3, "--out")
    settings = ("--eta", 0.5, "--classes", 4, "--scheduler", "ddim", "--dtype", "bfloat16")
    assert run(*arguments, tmp_path / "a.npz", "--model", model, *settings, "--sag-scale", 0) == 0
    assert capsys.readouterr().err == (
        "note: drawn by tiny: 16x16, 3 steps, DDIM, no guidance, eta 0.5, class 4, bfloat16,"
        " seed 0\n"
    )
    # Defaults of SAG, but not those of this model: without them, the text means other pictures.
    asked = ("--guidance", "sag:scale=2,blur_sigma=1,blur_kernel_size=9")
    assert run(*arguments, tmp_path / "b.npz", *asked) == 0
    assert "sag:scale=2,blur_sigma=1,blur_kernel_size=9, seed 0" in capsys.readouterr().err
    assert run(*arguments, tmp_path / "c.npz", *asked, "--quiet") == 0
    assert capsys.readouterr().err == ""


@pytest.fixture(params=["nothing", "tpg", "sag"])
def recommending(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A model that recommends nothing, or a method with settings of its own."""
    folder = tmp_path / "model"
    ADMPipeline(tiny_unet(), DDPMScheduler()).save_pretrained(folder)
    chosen = {"method": request.param, "scale": 3.0, "start": 0.25, "every": 2}
    if request.param != "nothing":
        content = {"guidance": chosen, "fast": {**chosen, "every": 3}}
        (folder / "sag_settings.json").write_text(json.dumps(content))
    return str(folder)


def test_defaults_of_a_method_depend_on_the_pipeline_alone(
    tmp_path: Path, recommending: str
) -> None:
    loaded = load_pixel_model(recommending, "cpu")
    wide = {"blur_sigma": 9.0, "blur_kernel_size": 31}
    for made, usual in (
        (SelfAttentionGuidance, SelfAttentionGuidance(0.5, **wide)),
        (BlurGuidance, BlurGuidance(0.5, **wide)),
        (PerturbedAttentionGuidance, PerturbedAttentionGuidance()),
    ):
        if made.method == loaded.recommended.guidance.get("method"):
            continue
        assert loaded.guidance(method=made.method) == usual
        fast = loaded.guidance(True, method=made.method)
        assert fast == made.fast(usual.scale * 4 / 3, **(wide if made.method != "pag" else {}))
    assert loaded.guidance() == loaded.pipeline.guidance
    sample = ("sample", "--model", recommending, "--num-samples", 1, "--steps", 2, "--out")
    drawn: list[Any] = []
    for number, options in enumerate((["--blur-guidance"], ["--guidance", "blur"])):
        assert run(*sample, tmp_path / f"{number}.npz", *options, "--stop", 0.9) == 0
        drawn.append(read_record(tmp_path / f"{number}.npz")["guidance"])
    assert drawn == [BlurGuidance(0.5, stop=0.9, **wide).to_dict()] * 2


def test_the_fast_preset_begins_from_the_pipelines_own_defaults(tmp_path: Path) -> None:
    ADMPipeline(tiny_unet(), DDPMScheduler()).save_pretrained(tmp_path)
    fast = load_pixel_model(str(tmp_path), "cpu").guidance(fast=True)
    assert fast == SelfAttentionGuidance.fast(2 / 3, blur_sigma=9.0, blur_kernel_size=31)


def test_other_settings_are_one_line(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, model: str
) -> None:
    out = tmp_path / "a.npz"
    arguments = ["sample", "--model", model, "--num-samples", 5, "--out", out]
    loaded = load_pixel_model(model, "cpu")
    loaded.pipeline.set_progress_bar_config(disable=True)
    interrupt(loaded.pipeline, out, 2, loaded.settings())
    message = error_of(capsys, *arguments, "--seed", 4)
    assert "holds an unfinished run with seed=0, not 4" in message
    assert "--overwrite" in message
    assert run(*arguments) == 0
    assert "5 pictures, 2 of them drawn before, 3 now in " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--num-samples", "0"], "--num-samples=0 must be a whole number, at least 1"),
        (["--num-samples", "x"], "--num-samples"),
        (["--classes", "1;2"], "classes='1;2' must be whole numbers separated by commas"),
        (["--classes", "-1"], "classes=-1 must be a whole number, at least 0"),
        (["--classes", "7"], "classes=7 must be from 0 to 6"),
        (["--out", "a.txt"], "out='a.txt' must end in .npz"),
        (["--steps", "0"], "--steps=0 must be a whole number, at least 1"),
        (["--scheduler", "eular"], "scheduler='eular' is unknown: the nearest"),
        (["--scheduler", "edm euler"], "needs EDM preconditioning"),
        (["--eta", "-1"], "eta=-1.0 must be at least 0"),
        (["--eta", "1", "--model", "emoji-adm"], "--eta=1.0 has no effect with DDPMScheduler"),
        (["--scheduler", "pndm", "--steps", "3"], "--steps=3 must be at least 4 with PNDM"),
        (["--sag-scale", "nan"], "--sag-scale=nan must be a finite number"),
        (["--classifier-scale", "2"], "--classifier-scale=2.0 must be 0: there is no classifier"),
        (["--classifier", "none"], "classifier='none' must be a folder that `sag convert"),
        (["--blur-kernel-size", "2"], "--blur-kernel-size=2 must be odd"),
        (["--blur-guidance", "--layer", "x"], "layer='x' must not be given with --blur-guidance"),
        (["--layer", "no.such.layer"], "no.such.layer"),
        (["--seed", "-1"], "seed=-1 must be a whole number, at least 0"),
        (["--batch-size", "0"], "--batch-size=0 must be a whole number, at least 1"),
        (["--device", "cuda:63"], "device='cuda:63' is not available here"),
        (["--device", "meta"], "device='meta' is not available here"),
        (["--device", "hpu"], "device='hpu' is not available here"),
        (["--dtype", "int8"], "dtype='int8' must be one of auto, float32"),
        (["--model", "./none"], "model='./none' does not exist: give a folder"),
        (["--model", "emoji"], "is a Stable Diffusion model: draw from it with `sag generate`"),
        (["--model", __file__], "is a file: give a folder; `sag convert` makes one"),
        (["--model", "nobody/none"], "could not be loaded from the Hugging Face"),
    ],
)
def test_user_errors_are_one_line(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    model: str,
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    if "--num-samples" not in arguments:
        arguments = [*arguments, "--num-samples", "2"]
    if "--model" not in arguments:
        arguments = [*arguments, "--model", model]
    assert message in error_of(capsys, "sample", *arguments)
    assert not list(tmp_path.iterdir())


def test_it_needs_neither_pyarrow_nor_ray(tmp_path: Path, model: str) -> None:
    code = (
        "import sys; sys.modules.update(pyarrow=None, ray=None);"
        "from self_attention_guidance.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    arguments = ["sample", "--model", model, "--num-samples", "1", "--out", tmp_path / "a.npz"]
    arguments += ["--quiet"]
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert len(pictures_of(tmp_path / "a.npz")) == 1


def test_two_runs_of_one_file_are_refused(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, model: str
) -> None:
    out = tmp_path / "a.npz"
    with Storage(f"{out}.parts").locked():
        for _ in range(2):
            message = error_of(capsys, "sample", "--model", model, "--num-samples", 1, "--out", out)
            assert "is in use by another run" in message


def test_number_of_samples_must_be_given(capsys: pytest.CaptureFixture[str]) -> None:
    assert "--num-samples" in error_of(capsys, "sample")


def test_classes_of_models_without_are_refused(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    tiny_pipeline().save_pretrained(tmp_path / "tiny")
    arguments = ["sample", "--model", tmp_path / "tiny", "--num-samples", 1, "--classes", 1]
    message = error_of(capsys, *arguments, "--out", tmp_path / "a.npz")
    assert "classes=[1] must not be given: the model has no classes" in message


def test_foreign_folders_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["sample", "--num-samples", 1, "--out", tmp_path / "a.npz", "--model", tmp_path]
    assert "has no model_index.json" in error_of(capsys, *arguments)
    index = tmp_path / "model_index.json"
    for content, message in {
        "{": "model_index.json cannot be read",
        "[]": "must hold a JSON object",
        '{"_class_name": "KandinskyPipeline", "movq": []}': "must be one of ADMPipeline",
        '{"_class_name": "DDPMPipeline", "unet": ["diffusers", "UNet2DModel"]}': "cannot be loaded",
    }.items():
        index.write_text(content)
        assert message in error_of(capsys, *arguments)


# Models


def test_builtin_pixel_model(
    tmp_path: Path,
    model: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "emoji-adm").symlink_to(model, target_is_directory=True)
    monkeypatch.setattr(builtin, "_HERE", tmp_path)
    pipe = builtin_model("emoji-adm")
    assert type(pipe) is ADMPipeline
    assert pipe.guidance == SelfAttentionGuidance(1.5)
    with pytest.raises(ValueError, match="takes no prompts: draw from it with `sag sample`"):
        find_model("emoji-adm")
    message = error_of(capsys, "generate", "a", "--model", "emoji-adm", "--out", tmp_path / "out")
    assert "`sag sample`" in message
    assert run("sample", "--num-samples", "1", "--out", tmp_path / "a.npz") == 0


def test_classifier_comes_from_its_folder(tmp_path: Path, model: str) -> None:
    with seeded(0):
        for size in (16, 8):
            NoisyClassifier(
                num_classes=5,
                sample_size=size,
                block_out_channels=(32, 64),
                layers_per_block=1,
                attention_head_dim=32,
                down_block_types=("DownBlock2D", "AttnDownBlock2D"),
                downsample_type="conv",
                timestep_channels=32,
            ).save_pretrained(tmp_path / str(size))
    arguments = ["sample", "--model", model, "--num-samples", 9, "--sag-scale", 0, "--classifier"]
    for scale in (0, 5):
        out = tmp_path / f"{scale}.npz"
        given = [*arguments, tmp_path / "16", "--classifier-scale", scale, "--out", out]
        assert run(*given) == 0
    assert arrays_of(tmp_path / "0.npz")["arr_1"].max() > 4
    assert arrays_of(tmp_path / "5.npz")["arr_1"].max() == 4  # known to both
    assert (pictures_of(tmp_path / "0.npz") != pictures_of(tmp_path / "5.npz")).any()
    with pytest.raises(ValueError, match="is for pictures of 8 pixels, the model draws 16"):
        load_pixel_model(model, "cpu", classifier=tmp_path / "8")


# convert


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["gan", "a.pt", "new"], "kind='gan' must be one of adm, iddpm, dit, classifier"),
        (["adm", "none.pt", "new"], "checkpoint='none.pt' must be a file"),
        (["adm", "a.pt", "a.pt"], "out='a.pt' is a file: name a folder"),
        (["adm", "a.pt", "full"], "out: 'full' exists and is not empty"),
        (["adm", "a.pt", "new", "--config", "a.json", "--preset", "x"], "must not both be given"),
        (["adm", "a.pt", "new", "--config", "none.json"], "config='none.json' cannot be read as"),
        (["adm", "a.pt", "new", "--config", "a.pt"], "config='a.pt' cannot be read as JSON"),
        (["adm", "a.pt", "new", "--config", "list.json"], "must hold a JSON object"),
        (["adm", "a.pt", "new", "--preset", "x"], "preset='x' must be one of "),
        (["adm", "a.pt"], "OUT"),
    ],
)
def test_wrong_conversions_are_one_line(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a.pt").write_bytes(b"nothing")
    Path("a.json").write_text("{}")
    Path("list.json").write_text("[]")
    Path("full").mkdir()
    Path("full", "mine").write_text("mine")
    assert message in error_of(capsys, "convert", *arguments)
    assert not Path("new").exists()


@pytest.mark.parametrize("kind", ["adm", "iddpm"])
def test_converted_checkpoints_draw(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, kind: str
) -> None:
    original, out = ORIGINALS / kind, tmp_path / "converted"
    arguments = ["convert", kind, original / "model.pt", out]
    assert "'model.pt' is not the name of a published file of" in error_of(capsys, *arguments)
    assert run(*arguments, "--config", original / "config.json") == 0
    assert capsys.readouterr().out == f"{out}\n"
    drawn = ["sample", "--model", out, "--num-samples", 1, "--steps", 2, "--sag-scale", 0]
    for scheduler in ("ddpm", "ddim"):
        given = [*drawn, "--scheduler", scheduler, "--out", tmp_path / f"{scheduler}.npz"]
        assert run(*given) == 0
    pictures = [pictures_of(tmp_path / f"{name}.npz") for name in ("ddpm", "ddim")]
    assert (pictures[0] != pictures[1]).any()
