"""Make the files of `held_out/` from the training of `emoji-styles`.

    python benchmarks/quality/make_held_out.py DIR

DIR is the folder of the training run. It has `pictures.npz` and the files of the judge. The judge
is kept in half precision.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
from safetensors.torch import save_file

import judging


def main() -> None:
    """Write the pictures that were held out, and the judge."""
    work = Path(sys.argv[1])
    everything = judging.data.load(work / "pictures.npz")
    things, pairs = everything.select(held_out=False).labels, everything.held_out_pairs()
    index = [(picture.label, picture.style) for picture in pairs.pictures]
    np.savez_compressed(judging.PICTURES, index=json.dumps(index), rgba=pairs.pixels.numpy())
    state = judging.judge.load(work, len(things)).half().state_dict()
    save_file(state, judging.JUDGE, metadata={"things": json.dumps(things)})


if __name__ == "__main__":
    main()
