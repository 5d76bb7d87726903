"""Wrong command lines are answered in one sentence, most of them before torch is imported."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

# A wrong command line, and what its answer begins with, as a user types options.
AT_ONCE = {
    "generate": "PROMPT is missing",
    "generate a --model ./none": "--model='./none' does not exist: give a folder",
    "generate a --model empty": "--model='empty' has no model_index.json",
    "generate a --model plain.txt": "--model='plain.txt': a single file must be a .safetensors",
    "generate a --model emoji-adm": "--model='emoji-adm' is a pixel-space model",
    "generate a --scheduler eular": "--scheduler='eular' is unknown: the nearest names are",
    "generate a --device tpu": "--device='tpu' is unknown: use auto, cpu, cuda",
    "generate a --device cuda:x": "--device='cuda:x' is unknown: use auto, cpu, cuda",
    "generate a --dtype int8": "--dtype='int8' must be one of auto, float32",
    "generate a --guidance pagg": "--guidance='pagg': 'pagg' is no guidance; did you mean pag?",
    "generate a --guidance sag:sigma=1": "--guidance='sag:sigma=1': 'sigma' is no setting of sag",
    "generate a --guidance sag:scale=abc": "--guidance='sag:scale=abc': scale='abc' must",
    "generate a --guidance pag:stop=2": "--guidance='pag:stop=2': stop=2.0 must be from 0 to 1",
    "generate a --guidance sag+seg --steps 0": "--steps=0 must be",
    "generate a --guidance seg:blur_sigma=0": "--guidance='seg:blur_sigma=0': blur_sigma=0.0 must",
    "generate a --guidance tpg:seed=1.5": "--guidance='tpg:seed=1.5': seed='1.5' must",
    "generate a --guidance sag:branch=x": "--guidance='sag:branch=x': branch='x' must be",
    "generate a --start 0.5 --stop 0.2": "--start=0.5 must be below --stop=0.2",
    "generate a --blur-kernel-size 99999999": "--blur-kernel-size=99999999 must be at most 4095",
    "generate a --guidance blur:blur_kernel_size=4097": "--guidance='blur:blur_kernel_size=4097':",
    "generate a --branch x": "--branch='x' must be 'uncond' or 'cond'",
    "compare a --columns guidance=none,pag:every=0": "--columns='guidance=none,pag:every=0': "
    "guidance='pag:every=0': every=0 must be",
    "generate a --guidance pag --threshold 1": "--threshold=1.0: 'threshold' is no setting of pag",
    "generate a --guidance sag:0.5": "--guidance='sag:0.5': '0.5' must be NAME=VALUE, such as",
    "generate a --guidance sag:scale=1;every=2": "--guidance='sag:scale=1;every=2': its settings",
    "generate a --guidance none --start 0.5": "--start must not be given with --guidance none",
    "generate a --steps 0": "--steps=0 must be a whole number, at least 1",
    f"generate a --steps {10**10}": f"--steps={10**10} must be at most 100000",
    f"generate a --seed {2**64}": f"--seed={2**64} is too large: seeds must be below 2**64",
    f"generate a --num-images {10**15}": f"--num-images={10**15} must be at most 10000000",
    "generate a --size 60x64": "--size: width=60 must be a multiple of 8",
    "generate a --size 64": "--size='64' must be WIDTHxHEIGHT",
    "generate a --size 100000x100000": "--size: width=100000 must be at most 2048 (--max-size)",
    "generate a --seed -1": "--seed=-1 must be a whole number, at least 0",
    "generate a --num-images 0": "--num-images=0 must be a whole number, at least 1",
    "generate a --batch-size 0": "--batch-size=0 must be a whole number, at least 1",
    "generate a --sag-scale nan": "--sag-scale=nan must be a finite number",
    "generate a --blur-sigma -1": "--blur-sigma=-1 must be at least 0",
    "generate a --stop 2": "--stop=2 must be from 0 to 1",
    "generate a -q --stop=2.5": "--stop=2.5 must be from 0 to 1",
    "generate a --stop 0.5 --stop nan": "--stop=nan must be from 0 to 1",
    "generate a --every 0": "--every=0 must be at least 1",
    "generate a --sag-scale abc": "--sag-scale='abc' must be a number",
    "generate a --sag-scale=": "--sag-scale='' must be a number",
    "generate a --steps 1.5": "--steps='1.5' must be a whole number",
    "generate a -q --steps=x --fast": "--steps='x' must be a whole number",
    "generate a --steps": "Option '--steps' requires an argument",
    "generate a --config stop.toml": "--stop=2 must be from 0 to 1",
    "sample --num-samples many": "--num-samples='many' must be a whole number",
    "sample": "Missing option '--num-samples'",
    "evaluate a b --bootstrap q": "--bootstrap='q' must be a whole number",
    "nope": "No such command 'nope'",
    "generate a --out plain.txt": "--out='plain.txt' is or lies below a file",
    "generate --prompts none.txt": "--prompts='none.txt' cannot be read: No such file",
    "generate --prompts empty.txt": "--prompts='empty.txt' holds no prompt",
    "generate --like none.png": "--like='none.png' does not exist",
    "compare a --out taken.png": "--out: 'taken.png' exists: choose another place, or overwrite",
    "compare a --out a.jpg": "--out='a.jpg' must end in .png",
    "compare a --sag-scales 0;1": "--sag-scales='0;1' must be numbers separated by commas",
    f"compare a --rows seed={2**64}": f"--rows='seed={2**64}': seed={2**64} is too large",
    "batch": "give either PROMPTS or --num-samples",
    "batch none.jsonl": "prompts='none.jsonl' must be a file: there is none",
    "batch --num-samples 1 --steps 2000": "--steps=2000 must be at most 1000",
    "batch --num-samples 1 --model ./none": "--model='./none' does not exist",
    "batch --num-samples 100000000000000000000": "--num-samples=100000000000000000000 must be at",
    "batch --num-samples 2 --num-images 2": "--num-images: with --num-samples, each sample is one",
    "batch --num-samples 2 --together 100000": "--together=100000 must be at most 4096",
    "batch --num-samples 2 --workers 0": "--workers=0 must be a whole number",
    "batch --num-samples 2 --guidance sag:sigma=1": "--guidance='sag:sigma=1': 'sigma' is no",
    **{
        f"batch --num-samples 2 --model emoji-adm {option}": f"{option.split()[0]}: emoji-adm takes"
        for option in (
            *("--negative-prompt x", "--guidance-scale 7.5", "--size 64x64", "--branch cond"),
            *("--image plain.png", "--offload model", "--compile"),
        )
    },
    "sample --num-samples 1 --device tpu": "--device='tpu' is unknown",
    "sample --num-samples 0": "--num-samples=0 must be a whole number",
    "sample --num-samples 1 --model emoji": "--model='emoji' is a Stable Diffusion model",
    "sample --num-samples 1 --out a.zip": "--out='a.zip' must end in .npz",
    "sample --num-samples 1 --eta 0.5 --scheduler euler": "--eta=0.5 has no effect with Euler",
    f"sample --num-samples {10**20}": f"--num-samples={10**20} must be at most 10000000",
    f"sample --num-samples 9 --seed {2**64 - 8}": f"--seed={2**64 - 8} with num_samples=9: seeds",
    # What needs no model is wrong whether or not the hub can be reached.
    **{
        f"{line} no/one {option}": answer
        for line, option, answer in (
            ("generate a --model", "--steps 0", "--steps=0 must be"),
            ("generate a --model", "--out plain.txt", "--out='plain.txt' is or lies below a file"),
            ("generate a --model", "--out taken.png", "--out: 'taken.png' exists"),
            ("generate a --model", "--out a.jpg", "--out='a.jpg' must end in .png"),
            ("sample --num-samples 1 --model", "--classes heart,", "--classes='heart,' must be"),
            ("sample --num-samples 1 --model", "--classes 1 --steps 0", "--steps=0 must be"),
            ("sample --num-samples 1 --model", "--classes 1 --out a.zip", "--out='a.zip' must end"),
            ("sample --num-samples 1 --model", "--classifier none", "--classifier='none' must be"),
            ("sample --num-samples 1 --model", "--blur-guidance --layer x", "--layer='x' must not"),
            ("batch --num-samples 1 --model", "--steps 2000", "--steps=2000 must be at most 1000"),
            ("batch --num-samples 1 --model", "--batch-size 0", "--batch-size=0 must be"),
            ("batch --num-samples 1 --model", "--shard-size 0", "--shard-size=0 must be"),
            ("demo --model", "--max-steps 0", "--max-steps=0 must be"),
            ("demo --model", "--port 0", "--port=0 must be between 1 and 65535"),
            ("tune", "--budget 5x", "--budget='5x' must be a time"),
            ("tune", "--steps 0", "--steps=0 must be"),
            ("tune", "--reference none", "--reference='none' does not exist"),
            ("tune", "", "--out must be given: 'no/one' is no folder of yours"),
            ("tune", "--out taken.json", "--out: 'taken.json' exists"),
            ("tune", "--out a.json --choose 7", "--choose=7 must be at most 6"),
            ("tune", "--out a.json --work plain.txt", "--work='plain.txt' is or lies below"),
        )
    },
    "generate a --model ./inpaint": "--model='./inpaint' is for inpainting: its U-Net takes 9",
    "info none.png": "FILE='none.png' does not exist",
    "layers ./none": "model='./none' does not exist",
    "demo --model ./none": "--model='./none' does not exist",
    "demo --device gpu": "--device='gpu' is unknown",
    "demo --max-steps 0": "--max-steps=0 must be a whole number",
    "convert adm plain.txt out": "'plain.txt' is not the name of a published file of adm: give --",
    "convert adm plain.txt out --preset x": "--preset='x' must be one of 64x64_diffusion",
    "convert adm none.pt out": "checkpoint='none.pt' must be a file",
    "evaluate none.npz none": "'none.npz' does not exist",
    "evaluate plain.png plain.png --features clip": "--features='clip' must be one of emoji, inc",
    "evaluate plain.png plain.png --bootstrap 1": "--bootstrap=1 has no spread: it must be 0",
    "evaluate plain.png plain.png --json none/a.json": "--json='none/a.json': there is no folder",
    "tune": "Missing argument 'MODEL'",
    "tune ./none": "model='./none' does not exist: give a folder",
    "tune emoji": "--out must be given: 'emoji' is no folder of yours",
    "tune emoji --out a.txt": "--out='a.txt' must end in .json",
    "tune emoji --out taken.json": "--out: 'taken.json' exists: choose another place",
    "tune emoji --budget 3d": "--budget='3d' must be a time like 90s, 30m or 2h",
    "tune emoji --budget 20": "--budget=20 pictures are too few to try 2 settings: at least",
    "tune emoji --methods sag,pagg": "--methods='sag,pagg': 'pagg' is no guidance; did you mean",
    "tune emoji --methods sag,sag": "--methods='sag,sag': sag was given twice",
    "tune emoji --count 20": "--count=20 must be a multiple of twice the batch size (16)",
    "tune emoji --count -2": "--count=-2 must be a whole number, at least 1",
    "tune emoji --out a.json --batch-size 4096": "--batch-size=4096 must be at most 2048",
    f"tune emoji --count {16 * 10**20}": "--count=1600000000000000000000 must be at most 100000",
    f"tune emoji --seed {2**64 - 9}": "--seed=18446744073709551607",
    "tune emoji --out a.json --work plain.txt": "--work='plain.txt' is or lies below a file",
    "tune emoji --steps 0": "--steps=0 must be a whole number, at least 1",
    "tune emoji --out a.json --choose -1": "--choose=-1 must be a whole number, at least 0",
    "tune emoji --out a.json --choose 7": "--choose=7 must be at most 6",
    "tune emoji --out a.json --choose 1": "--choose=1 is a row of a report: there is none in",
    "tune emoji --features clip": "--features='clip' must be one of emoji, inception",
    "tune emoji --reference none": "--reference='none' does not exist: give a folder",
    "tune emoji --prompts none.txt": "--prompts='none.txt' cannot be read",
    "tune emoji-adm --prompts plain.txt": "--prompts must not be given: emoji-adm takes no prompts",
    "tune emoji --out a.json --device tpu": "--device='tpu' is unknown",
    "tune emoji --dtype int8": "--dtype='int8' must be one of auto, float32",
}

_CODE = """
import os, sys
from self_attention_guidance.cli import main
os.chdir(sys.argv[1])
for line in sys.stdin.read().splitlines():
    assert main(line.split()) == 2, line
    heavy = {"torch", "diffusers", "transformers"} & set(sys.modules)
    assert not heavy, (line, heavy)
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "empty").mkdir()
    (tmp_path / "inpaint/unet").mkdir(parents=True)
    (tmp_path / "inpaint/unet/config.json").write_text('{"in_channels": 9}')
    index = {part: ["diffusers", part] for part in ("unet", "vae")}
    index["unet"] = ["diffusers", "UNet2DConditionModel"]
    (tmp_path / "inpaint/model_index.json").write_text(json.dumps(index))
    (tmp_path / "plain.txt").write_text("mine")
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "taken.png").write_bytes(b"mine")
    (tmp_path / "stop.toml").write_text("stop = 2")
    Image.new("RGB", (64, 64)).save(tmp_path / "plain.png")
    (tmp_path / "taken.json").write_bytes(b"{}")
    return tmp_path


def test_they_are_answered_without_torch(folder: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", _CODE, str(folder)],
        input="\n".join(AT_ONCE),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    answers = done.stderr.splitlines()
    assert len(answers) == len(AT_ONCE)
    for (line, begin), answer in zip(AT_ONCE.items(), answers, strict=True):
        assert answer.startswith(f"error: {begin}"), line
    assert (folder / "taken.png").read_bytes() == b"mine"
