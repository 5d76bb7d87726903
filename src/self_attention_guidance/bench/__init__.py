"""What guidance costs: time, network rows and memory, against none and diffusers' own class.

Example:
    ```python
    from self_attention_guidance.bench import Report, bench, format_table, plan

    print(format_table(Report(7, bench(plan(["emoji"], device="cpu"), pairs=7))))
    ```
"""

from .measuring import Result, VariantResult, bench, measure, work
from .memory import Memory
from .networks import NETWORKS, Network, exact_guidance, fast_guidance, load
from .plan import CFG, DTYPES, MODES, Configuration, plan
from .plot import check_plotting, write_plot
from .report import Report, as_json, format_table
from .timing import Spread, order, ratios, spread, time_rounds
from .variants import VARIANTS, Subject, Unsuitable, difference_to_diffusers

__all__ = [
    "plan",
    "bench",
    "work",
    "measure",
    "Configuration",
    "Result",
    "VariantResult",
    "Memory",
    "NETWORKS",
    "Network",
    "load",
    "exact_guidance",
    "fast_guidance",
    "MODES",
    "DTYPES",
    "CFG",
    "VARIANTS",
    "Subject",
    "Unsuitable",
    "difference_to_diffusers",
    "Spread",
    "order",
    "ratios",
    "spread",
    "time_rounds",
    "Report",
    "as_json",
    "format_table",
    "check_plotting",
    "write_plot",
]
