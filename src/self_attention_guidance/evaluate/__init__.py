"""Quality of a set of samples: distances to a reference, precision and recall, with intervals.

Example:
    ```python
    from pathlib import Path
    from self_attention_guidance.evaluate import load_encoder, load_set, measure, open_set

    encoder = load_encoder("emoji")
    samples, reference = (
        load_set(open_set(Path(path)), encoder, batch_size=64) for path in ("samples.npz", "art")
    )
    measure(samples, reference, repetitions=200, seed=0)["frechet_distance"].value
    ```
"""

from .advice import FEWEST_FOR_SHARES, advice
from .features import ENCODERS, FeatureSet, check_encoder, extract, load_encoder
from .loading import (
    LoadedSet,
    SavedStatistics,
    check_savable,
    load_set,
    open_set,
    write_statistics,
)
from .measuring import METRICS, check_fit, check_sizes, measure, repeated_values, work
from .plot import check_plotting, write_plot
from .report import Report, SampleReport, as_json, format_table, short_names
from .resampling import Estimate, estimate, paired_difference, random_halves
from .sources import PictureSource

__all__ = [
    "load_encoder",
    "open_set",
    "load_set",
    "check_sizes",
    "check_savable",
    "check_fit",
    "measure",
    "work",
    "repeated_values",
    "random_halves",
    "estimate",
    "paired_difference",
    "Estimate",
    "METRICS",
    "ENCODERS",
    "check_encoder",
    "FeatureSet",
    "LoadedSet",
    "PictureSource",
    "SavedStatistics",
    "extract",
    "write_statistics",
    "FEWEST_FOR_SHARES",
    "advice",
    "Report",
    "SampleReport",
    "as_json",
    "format_table",
    "short_names",
    "check_plotting",
    "write_plot",
]
